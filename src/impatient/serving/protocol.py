"""The Open Inference Protocol v2: requests in, replies out, as bytes.

JSON and binary tensors.

Whatever comes from outside is checked here. What is wrong with it is a `BadRequest`, never another
error, and nothing is read beyond what a limit allows.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from impatient.errors import BadRequest
from impatient.serving.tensors import ANY, DATATYPES, Inputs, InputSpec, TensorSpec, all_finite

try:
    import orjson
except ImportError:
    # It is only faster.
    orjson = None  # type: ignore[assignment, unused-ignore]

# Bytes of JSON that are read at once: a millisecond in which nothing else goes on.
INLINE_JSON = 2**16
# dimensions of a tensor
MOST_DIMENSIONS = 32
HEADER_LENGTH = "inference-header-content-length"
Parameters = Mapping[str, Any]


class InferRequest(NamedTuple):
    """An inference request, checked.

    Attributes:
        id: the caller's own name for it; empty without.
        inputs: the arrays by name, samples first.
        parameters: parameters of the request.
        binary: whether outputs go back as binary tensors.
    """

    id: str
    inputs: Inputs
    parameters: Parameters
    binary: bool


def read_request(body: bytes, json_length: int | None, spec: InputSpec) -> InferRequest:
    """Read an inference request.

    Args:
        body: the whole body.
        json_length: bytes of JSON at its beginning; None if all of it is JSON.
        spec: what the model takes.
    Raises:
        BadRequest: if it breaks the protocol, or is not what the model takes.
    """
    if json_length is not None and not 0 <= json_length <= len(body):
        raise BadRequest(
            f"{HEADER_LENGTH} is {json_length} for a body of {len(body)} bytes; expected the "
            "length of the JSON at its beginning."
        )
    header = _object(body if json_length is None else body[:json_length])
    parameters = _mapping(header.get("parameters", {}), "parameters")
    name = header.get("id", "")
    if not isinstance(name, str) or len(name) > 256:
        raise BadRequest("id: expected a text of at most 256 characters.")
    binary = b"" if json_length is None else body[json_length:]
    return InferRequest(
        id=name,
        inputs=read_tensors(header.get("inputs"), binary, spec),
        parameters=parameters,
        binary=_wants_binary(header, parameters),
    )


def binary_request(body: bytes) -> tuple[bytes, int]:
    """Turn a request of JSON into one with binary tensors, whose JSON is small.

    Returns:
        The new body, and the length of the JSON at its beginning.

    Raises:
        BadRequest: if it is no JSON, or its tensors hold no numbers.
    """
    header = _object(body)
    tensors = header.get("inputs")
    parts = [_in_binary(tensor) for tensor in tensors] if isinstance(tensors, list) else []
    head = json.dumps(header).encode()
    if len(head) > INLINE_JSON:
        raise BadRequest(f"more than {INLINE_JSON} bytes of JSON beside the data of inputs.")
    return head + b"".join(parts), len(head)


def _in_binary(tensor: Any) -> bytes:
    """Take the numbers out of a tensor, and write in it how many bytes they are."""
    tensor = _mapping(tensor, "an input")
    datatype, shape = tensor.get("datatype"), tensor.get("shape")
    # Bounded before they are multiplied: the product of millions of numbers takes minutes.
    whole = isinstance(shape, list) and len(shape) <= MOST_DIMENSIONS
    whole = whole and all(type(size) is int and 0 < size < 2**63 for size in shape)
    if not whole or not isinstance(datatype, str) or datatype not in DATATYPES:
        raise BadRequest(
            f"an input has datatype {str(datatype)[:40]!r} and shape {ascii(shape)[:100]}; "
            f"expected {' or '.join(DATATYPES)}, and a list of at most {MOST_DIMENSIONS} positive "
            "whole numbers."
        )
    data = _from_json(tensor.pop("data", None), DATATYPES[datatype], tuple(shape)).tobytes()
    parameters = _mapping(tensor.get("parameters", {}), "parameters of an input")
    tensor["parameters"] = {**parameters, "binary_data_size": len(data)}
    return data


def _no_such_number(word: str) -> float:
    raise BadRequest(f"the JSON holds {word}; expected finite numbers.")


# Made once: with an option, json.loads makes another for each request.
_DECODER = json.JSONDecoder(parse_constant=_no_such_number)


def _read_json(text: bytes) -> Any:
    if orjson is not None:
        try:
            return orjson.loads(text)
        except orjson.JSONDecodeError:
            # Other encodings are read below, and what is wrong has its error there.
            pass
    # as json.loads does it: with any mark at the beginning that says how it is encoded
    return _DECODER.decode(text.decode(json.detect_encoding(text), "surrogatepass"))


def _write_json(value: Any) -> bytes:
    if orjson is not None:
        try:
            text: bytes = orjson.dumps(value)
            return text
        except orjson.JSONEncodeError:
            # such as an id with half a surrogate pair
            pass
    return json.dumps(value).encode()


def _object(text: bytes) -> dict[str, Any]:
    try:
        value = _read_json(text)
    except (UnicodeDecodeError, RecursionError) as error:
        raise BadRequest(f"the body is not JSON: {type(error).__name__}.") from error
    except ValueError as error:
        if isinstance(error, BadRequest):
            raise
        raise BadRequest(f"the body is not JSON: {error}.") from error
    return dict(_mapping(value, "the body"))


def _mapping(value: Any, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise BadRequest(f"{what} is a {type(value).__name__}; expected a JSON object.")
    return value


def check_output(name: object) -> None:
    """Check that an output that is asked for is there.

    Raises:
        BadRequest: if it is not.
    """
    if name != "output":
        raise BadRequest(f"no output {str(name)[:100]!r}; expected 'output'.")


def _wants_binary(header: Mapping[str, Any], parameters: Parameters) -> bool:
    wanted = parameters.get("binary_data_output", False) is True
    outputs = header.get("outputs", [])
    if not isinstance(outputs, list) or not all(isinstance(one, dict) for one in outputs):
        raise BadRequest('outputs: expected a list of objects, such as [{"name": "output"}].')
    for one in outputs:
        check_output(one.get("name"))
        wanted = _mapping(one.get("parameters", {}), "parameters of an output").get(
            "binary_data", wanted
        )
    return wanted is True


def read_tensors(tensors: Any, binary: bytes, spec: InputSpec) -> Inputs:
    """Read the input tensors of a request.

    Args:
        tensors: for each its name, datatype, shape and data, or `parameters.binary_data_size`.
        binary: the numbers of those that are binary, one after the other.
        spec: what the model takes.
    Raises:
        BadRequest: if they are not that.
    """
    given = [_mapping(one, "an input") for one in tensors] if isinstance(tensors, list) else []
    names = [one.get("name") for one in given]
    wanted = {one.name: one for one in spec.tensors}
    if len(names) != len(wanted) or any(name not in names for name in wanted):
        raise BadRequest(
            f"inputs are {str(names)[:200]}; expected one tensor of each name: {', '.join(wanted)}."
        )
    found = {}
    rest = memoryview(binary)
    for tensor in given:
        array, taken = _read_tensor(tensor, rest, wanted[tensor["name"]], spec)
        found[tensor["name"]] = array
        rest = rest[taken:]
    if rest:
        raise BadRequest(
            f"{len(rest)} bytes of binary data belong to no input; expected what binary_data_size "
            "announces."
        )
    _check_alike(found, spec)
    return found


def _read_tensor(
    tensor: Mapping[str, Any], binary: memoryview, wanted: TensorSpec, spec: InputSpec
) -> tuple[np.ndarray, int]:
    """Read a tensor, and tell how many bytes of the binary data it took."""
    what = f"input {wanted.name!r}"
    datatype = tensor.get("datatype")
    if datatype not in wanted.datatypes:
        raise BadRequest(
            f"{what} has datatype {str(datatype)[:40]!r}; expected {' or '.join(wanted.datatypes)}."
        )
    shape = _checked_shape(tensor.get("shape"), wanted, spec)
    size = _mapping(tensor.get("parameters", {}), "parameters of an input").get("binary_data_size")
    dtype = DATATYPES[datatype]
    if size is None:
        array = _from_json(tensor.get("data"), dtype, shape)
    else:
        expected = math.prod(shape) * dtype.itemsize
        if size != expected or len(binary) < expected:
            raise BadRequest(
                f"{len(binary)} bytes of binary data, announced as {str(size)[:40]}; expected "
                f"{expected} for shape {list(shape)} of {datatype}."
            )
        array = np.frombuffer(binary[:expected], dtype).reshape(shape)
    if dtype.kind == "f" and not all_finite(array):
        raise BadRequest(f"{what} holds NaN or infinite values; expected finite ones.")
    if wanted.below is not None and not 0 <= array.min() <= array.max() < wanted.below:
        raise BadRequest(
            f"{what} holds numbers from {array.min()} to {array.max()}; expected from 0 to "
            f"{wanted.below - 1}."
        )
    return array, 0 if size is None else expected


def _checked_shape(shape: Any, wanted: TensorSpec, spec: InputSpec) -> tuple[int, ...]:
    whole = isinstance(shape, list) and all(type(size) is int for size in shape)
    if not whole or not _fits(shape, wanted, spec):
        sizes = ["N", *("T" if size == ANY else str(size) for size in wanted.shape)]
        lengths = f" and T from 1 to {spec.longest}" if wanted.differs else ""
        raise BadRequest(
            f"input {wanted.name!r} has shape {str(shape)[:100]}; expected [{', '.join(sizes)}] "
            f"with N from 1 to {spec.most_rows}{lengths}."
        )
    return tuple(shape)


def _fits(shape: Sequence[int], wanted: TensorSpec, spec: InputSpec) -> bool:
    if len(shape) != 1 + len(wanted.shape) or not 1 <= shape[0] <= spec.most_rows:
        return False
    return all(
        1 <= size <= spec.longest if expected == ANY else size == expected
        for size, expected in zip(shape[1:], wanted.shape, strict=True)
    )


def _check_alike(found: Inputs, spec: InputSpec) -> None:
    """Check that the arrays have as many samples, and places where lengths differ, as each other.

    Raises:
        BadRequest: if they do not.
    """
    if len(found) == 1:
        return
    lengths = {found[one.name].shape[1] for one in spec.tensors if one.differs}
    if len({len(array) for array in found.values()}) > 1 or len(lengths) > 1:
        shapes = ", ".join(f"{name} {list(array.shape)}" for name, array in found.items())
        raise BadRequest(f"inputs have the shapes {shapes}; expected the same N, and the same T.")


def _from_json(data: Any, dtype: np.dtype[Any], shape: tuple[int, ...]) -> np.ndarray:
    if dtype.kind == "f" and isinstance(data, list) and len(data) == math.prod(shape):
        try:
            packed = struct.pack(f"<{len(data)}{dtype.char}", *data)
            return np.frombuffer(packed, dtype).reshape(shape)
        except (struct.error, OverflowError):
            # What is wrong has its error below.
            pass
    try:
        values = np.asarray(data)
        fits = values.dtype.kind in "biuf" and values.size == math.prod(shape)
        if not fits or (dtype.kind in "iu" and values.dtype.kind == "f"):
            raise ValueError
        if dtype.kind in "iu":
            ends = np.iinfo(dtype)
            if values.min() < ends.min or values.max() > ends.max:
                raise ValueError
        with np.errstate(over="ignore"):
            return values.astype(dtype).reshape(shape)
    except (ValueError, TypeError, OverflowError):
        raise BadRequest(
            f"data: expected {math.prod(shape)} numbers that fit {dtype.name}, flat or nested in "
            f"shape {list(shape)}."
        ) from None


def write_reply(
    model: str, id: str, output: np.ndarray, parameters: dict[str, Any], *, binary: bool
) -> tuple[bytes, dict[str, str]]:
    """Write the reply to an inference request.

    Returns:
        Body and headers.
    """
    output = np.ascontiguousarray(output, dtype="<f4")
    tensor: dict[str, Any] = {
        "name": "output",
        "datatype": "FP32",
        "shape": list(output.shape),
    }
    if binary:
        tensor["parameters"] = {"binary_data_size": output.nbytes}
    else:
        tensor["data"] = output.ravel().tolist()
    told: dict[str, Any] = {"model_name": model, "model_version": "1"}
    if id:
        told["id"] = id
    head = _write_json({**told, "parameters": parameters, "outputs": [tensor]})
    if not binary:
        return head, {"content-type": "application/json"}
    return head + output.tobytes(), {
        "content-type": "application/octet-stream",
        HEADER_LENGTH: str(len(head)),
    }


def milliseconds(value: Any, what: str) -> float:
    """Read a positive number of milliseconds as seconds.

    Raises:
        BadRequest: if it is none.
    """
    return _positive(value, what, "milliseconds") / 1e3


def budget_s(parameters: Parameters, headers: Mapping[str, str]) -> float | None:
    """Find the time that a request allows for its answer, in seconds.

    The least of all it says.

    `parameters.timeout` is in microseconds, as Triton has it; `parameters.deadline_ms` and the
    header `x-envoy-expected-rq-timeout-ms` are in milliseconds, `x-request-timeout-seconds` in
    seconds.

    Raises:
        BadRequest: if one of them is not a positive number.
    """
    found = []
    # Triton's clients say 0 where they mean nothing.
    if parameters.get("timeout", 0) != 0:
        found.append(_positive(parameters["timeout"], "parameters.timeout", "microseconds") / 1e6)
    if "deadline_ms" in parameters:
        found.append(milliseconds(parameters["deadline_ms"], "parameters.deadline_ms"))
    for name, per_second in (
        ("x-request-timeout-seconds", 1.0),
        ("x-envoy-expected-rq-timeout-ms", 1e3),
    ):
        if name in headers:
            found.append(_positive(headers[name], name, "time, as a number") / per_second)
    return min(found, default=None)


def priority_of(parameters: Parameters) -> int:
    """Read a request's priority: 0 (usual) to 10, each counting once more.

    Raises:
        BadRequest: if it is none of these.
    """
    value = parameters.get("priority", 0)
    if type(value) is not int or not 0 <= value <= 10:
        raise BadRequest(
            f"parameters.priority is {str(value)[:40]}; expected a whole number from 0 to 10."
        )
    return value


def flag_of(parameters: Parameters, name: str) -> bool:
    """Read a parameter that is true or false.

    Without it, false.
    """
    value = parameters.get(name, False)
    if type(value) is not bool:
        raise BadRequest(f"parameters.{name} is {str(value)[:40]}; expected true or false.")
    return value


def _positive(value: Any, what: str, unit: str) -> float:
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not 0.0 < number < math.inf:
        raise BadRequest(f"{what} is {str(value)[:40]}; expected a positive number of {unit}.")
    return number


def metadata(model: str, spec: InputSpec, classes: Sequence[str]) -> dict[str, Any]:
    """Describe a model as the protocol does."""
    return {
        "name": model,
        "versions": ["1"],
        "platform": "impatient",
        "inputs": [
            {"name": one.name, "datatype": one.datatypes[0], "shape": [-1, *one.shape]}
            for one in spec.tensors
        ],
        "outputs": [{"name": "output", "datatype": "FP32", "shape": [-1, len(classes)]}],
        "parameters": {"class_names": list(classes)},
    }
