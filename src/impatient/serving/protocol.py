"""The Open Inference Protocol v2: requests in, replies out, as bytes.

JSON and binary tensors.

Whatever comes from outside is checked here. What is wrong with it is a `BadRequest`, never another
error, and nothing is read beyond what a limit allows.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from impatient.errors import BadRequest

# Names of the protocol, and how numbers lie in binary tensors: little-endian, row by row.
DATATYPES: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype("?"),
    "UINT8": np.dtype("<u1"),
    "UINT16": np.dtype("<u2"),
    "UINT32": np.dtype("<u4"),
    "UINT64": np.dtype("<u8"),
    "INT8": np.dtype("<i1"),
    "INT16": np.dtype("<i2"),
    "INT32": np.dtype("<i4"),
    "INT64": np.dtype("<i8"),
    "FP16": np.dtype("<f2"),
    "FP32": np.dtype("<f4"),
    "FP64": np.dtype("<f8"),
}
# Bytes of JSON that are read at once: a millisecond in which nothing else goes on.
INLINE_JSON = 2**16
HEADER_LENGTH = "inference-header-content-length"
Parameters = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class InputSpec:
    """What a model takes.

    Attributes:
        name: name of its one input.
        datatypes: names of the number types it takes; the first is advertised.
        shape: shape of one sample, without the batch dimension.
        most_rows: most samples in one request.
    """

    name: str
    datatypes: tuple[str, ...]
    shape: tuple[int, ...]
    most_rows: int = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class InferRequest:
    """An inference request, checked.

    Attributes:
        id: the caller's own name for it; empty without.
        array: the input, samples first.
        parameters: parameters of the request.
        binary: whether outputs go back as binary tensors.
    """

    id: str
    array: np.ndarray
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
    tensors = header.get("inputs")
    if not isinstance(tensors, list) or len(tensors) != 1 or not isinstance(tensors[0], dict):
        raise BadRequest(f"expected inputs with one tensor, of the name {spec.name!r}.")
    parameters = _mapping(header.get("parameters", {}), "parameters")
    name = header.get("id", "")
    if not isinstance(name, str) or len(name) > 256:
        raise BadRequest("id: expected a text of at most 256 characters.")
    binary = b"" if json_length is None else body[json_length:]
    return InferRequest(
        id=name,
        array=read_tensor(tensors[0], binary, spec),
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
    whole = isinstance(shape, list) and all(type(size) is int and size > 0 for size in shape)
    if not whole or not isinstance(datatype, str) or datatype not in DATATYPES:
        raise BadRequest(
            f"an input has datatype {str(datatype)[:40]!r} and shape {str(shape)[:100]}; expected "
            f"{' or '.join(DATATYPES)}, and a list of positive whole numbers."
        )
    data = _from_json(tensor.pop("data", None), DATATYPES[datatype], tuple(shape)).tobytes()
    parameters = _mapping(tensor.get("parameters", {}), "parameters of an input")
    tensor["parameters"] = {**parameters, "binary_data_size": len(data)}
    return data


def _object(text: bytes) -> dict[str, Any]:
    def no_such_number(word: str) -> float:
        raise BadRequest(f"the JSON holds {word}; expected finite numbers.")

    try:
        value = json.loads(text, parse_constant=no_such_number)
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


def _wants_binary(header: Mapping[str, Any], parameters: Parameters) -> bool:
    wanted = parameters.get("binary_data_output", False) is True
    outputs = header.get("outputs", [])
    if not isinstance(outputs, list) or not all(isinstance(one, dict) for one in outputs):
        raise BadRequest('outputs: expected a list of objects, such as [{"name": "output"}].')
    for one in outputs:
        if one.get("name") != "output":
            raise BadRequest(f"no output {one.get('name')!r}; expected 'output'.")
        wanted = _mapping(one.get("parameters", {}), "parameters of an output").get(
            "binary_data", wanted
        )
    return wanted is True


def read_tensor(tensor: Mapping[str, Any], binary: bytes, spec: InputSpec) -> np.ndarray:
    """Read an input tensor.

    Args:
        tensor: its name, datatype, shape and data, or `parameters.binary_data_size`.
        binary: its numbers, where they are binary.
        spec: what the model takes.
    Raises:
        BadRequest: if it is not that.
    """
    if tensor.get("name") != spec.name:
        raise BadRequest(f"no input {tensor.get('name')!r}; expected {spec.name!r}.")
    datatype = tensor.get("datatype")
    if datatype not in spec.datatypes:
        raise BadRequest(
            f"input {spec.name!r} has datatype {str(datatype)[:40]!r}; expected "
            f"{' or '.join(spec.datatypes)}."
        )
    shape = _checked_shape(tensor.get("shape"), spec)
    size = _mapping(tensor.get("parameters", {}), "parameters of an input").get("binary_data_size")
    dtype = DATATYPES[datatype]
    if size is None:
        array = _from_json(tensor.get("data"), dtype, shape)
    else:
        expected = math.prod(shape) * dtype.itemsize
        if not size == len(binary) == expected:
            raise BadRequest(
                f"{len(binary)} bytes of binary data, announced as {size!r}; expected {expected} "
                f"for shape {list(shape)} of {datatype}."
            )
        array = np.frombuffer(binary, dtype).reshape(shape)
    if not np.isfinite(array).all():
        raise BadRequest(f"input {spec.name!r} holds NaN or infinite values; expected finite ones.")
    return array


def _checked_shape(shape: Any, spec: InputSpec) -> tuple[int, ...]:
    whole = isinstance(shape, list) and all(type(size) is int for size in shape)
    if not whole or tuple(shape[1:]) != spec.shape or not 1 <= shape[0] <= spec.most_rows:
        raise BadRequest(
            f"input {spec.name!r} has shape {str(shape)[:100]}; expected [N, "
            f"{', '.join(map(str, spec.shape))}] with N from 1 to {spec.most_rows}."
        )
    return tuple(shape)


def _from_json(data: Any, dtype: np.dtype[Any], shape: tuple[int, ...]) -> np.ndarray:
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
    model: str, id: str, output: np.ndarray, parameters: Parameters, *, binary: bool
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
    head = json.dumps(
        {
            "model_name": model,
            "model_version": "1",
            **({"id": id} if id else {}),
            "parameters": dict(parameters),
            "outputs": [tensor],
        }
    ).encode()
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
            {"name": spec.name, "datatype": spec.datatypes[0], "shape": [-1, *spec.shape]},
        ],
        "outputs": [{"name": "output", "datatype": "FP32", "shape": [-1, len(classes)]}],
        "parameters": {"class_names": list(classes)},
    }
