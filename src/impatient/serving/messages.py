"""The messages of the Open Inference Protocol over gRPC, made from a table.

They live in a pool of their own: another package in the process, such as Triton's client, may have
the same messages in protobuf's common pool, which allows a name only once.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError, Message

from impatient.errors import BadRequest

PACKAGE = "inference"
SERVICE = f"{PACKAGE}.GRPCInferenceService"

# per message its fields, by name: number and type; "*" is for many, "map" for a map from texts
_TABLE: Mapping[str, Mapping[str, tuple[int, str]]] = {
    "ServerLiveRequest": {},
    "ServerLiveResponse": {"live": (1, "bool")},
    "ServerReadyRequest": {},
    "ServerReadyResponse": {"ready": (1, "bool")},
    "ModelReadyRequest": {"name": (1, "string"), "version": (2, "string")},
    "ModelReadyResponse": {"ready": (1, "bool")},
    "ServerMetadataRequest": {},
    "ServerMetadataResponse": {
        "name": (1, "string"),
        "version": (2, "string"),
        "extensions": (3, "string*"),
    },
    "ModelMetadataRequest": {"name": (1, "string"), "version": (2, "string")},
    "TensorMetadata": {"name": (1, "string"), "datatype": (2, "string"), "shape": (3, "int64*")},
    "ModelMetadataResponse": {
        "name": (1, "string"),
        "versions": (2, "string*"),
        "platform": (3, "string"),
        "inputs": (4, "TensorMetadata*"),
        "outputs": (5, "TensorMetadata*"),
    },
    "InferParameter": {
        "bool_param": (1, "bool"),
        "int64_param": (2, "int64"),
        "string_param": (3, "string"),
        "double_param": (4, "double"),
        "uint64_param": (5, "uint64"),
    },
    "InferTensorContents": {
        "bool_contents": (1, "bool*"),
        "int_contents": (2, "int32*"),
        "int64_contents": (3, "int64*"),
        "uint_contents": (4, "uint32*"),
        "uint64_contents": (5, "uint64*"),
        "fp32_contents": (6, "float*"),
        "fp64_contents": (7, "double*"),
        "bytes_contents": (8, "bytes*"),
    },
    "Tensor": {
        "name": (1, "string"),
        "datatype": (2, "string"),
        "shape": (3, "int64*"),
        "parameters": (4, "map InferParameter"),
        "contents": (5, "InferTensorContents"),
    },
    "RequestedOutput": {"name": (1, "string"), "parameters": (2, "map InferParameter")},
    "ModelInferRequest": {
        "model_name": (1, "string"),
        "model_version": (2, "string"),
        "id": (3, "string"),
        "parameters": (4, "map InferParameter"),
        "inputs": (5, "Tensor*"),
        "outputs": (6, "RequestedOutput*"),
        "raw_input_contents": (7, "bytes*"),
    },
    "ModelInferResponse": {
        "model_name": (1, "string"),
        "model_version": (2, "string"),
        "id": (3, "string"),
        "parameters": (4, "map InferParameter"),
        "outputs": (5, "Tensor*"),
        "raw_output_contents": (6, "bytes*"),
    },
    "ModelStreamInferResponse": {
        "error_message": (1, "string"),
        "infer_response": (2, "ModelInferResponse"),
    },
}
# messages of which one field at most is set
_ONE_OF = {"InferParameter": "parameter_choice"}
_FIELD = descriptor_pb2.FieldDescriptorProto


def _described(name: str, fields: Mapping[str, tuple[int, str]]) -> descriptor_pb2.DescriptorProto:
    """Describe one message of the table for protobuf."""
    message = descriptor_pb2.DescriptorProto(name=name)
    if name in _ONE_OF:
        message.oneof_decl.add(name=_ONE_OF[name])
    for field_name, (number, kind) in fields.items():
        field = message.field.add(name=field_name, number=number)
        many = kind.endswith("*") or kind.startswith("map ")
        field.label = _FIELD.LABEL_REPEATED if many else _FIELD.LABEL_OPTIONAL
        if kind.startswith("map "):
            entry = _map_entry(message, field_name, kind.removeprefix("map "))
            _set_type(field, f"{name}.{entry}")
        else:
            _set_type(field, kind.removesuffix("*"))
        if name in _ONE_OF:
            field.oneof_index = 0
    return message


def _map_entry(message: descriptor_pb2.DescriptorProto, field: str, values: str) -> str:
    """Add the pair of key and value of which protobuf makes a map."""
    name = f"{field.title()}Entry"
    entry = message.nested_type.add(name=name)
    entry.options.map_entry = True
    for number, (half, kind) in enumerate((("key", "string"), ("value", values)), start=1):
        pair = entry.field.add(name=half, number=number, label=_FIELD.LABEL_OPTIONAL)
        _set_type(pair, kind)
    return name


def _set_type(field: descriptor_pb2.FieldDescriptorProto, kind: str) -> None:
    if kind[0].isupper():
        field.type = _FIELD.TYPE_MESSAGE
        field.type_name = f".{PACKAGE}.{kind}"
    else:
        field.type = _FIELD.Type.Value(f"TYPE_{kind.upper()}")


def _classes() -> dict[str, type[Message]]:
    """Make a class per message, in a pool of their own."""
    file = descriptor_pb2.FileDescriptorProto(
        name="open_inference.proto", package=PACKAGE, syntax="proto3"
    )
    file.message_type.extend(_described(name, fields) for name, fields in _TABLE.items())
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return {
        name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{PACKAGE}.{name}"))
        for name in _TABLE
    }


_CLASSES = _classes()


def message(kind: str, /, **fields: Any) -> Any:
    r"""Make a message of a kind, with these fields.

    Example:
        >>> message("ServerLiveResponse", live=True).SerializeToString()
        b'\x08\x01'
    """
    return _CLASSES[kind](**fields)


def read(kind: str, data: bytes) -> Any:
    """Read a message from its bytes.

    Raises:
        BadRequest: if they are no such message.
    """
    try:
        return _CLASSES[kind].FromString(data)
    except DecodeError as error:
        raise BadRequest(f"the bytes are no {PACKAGE}.{kind}: {error}.") from error


def parameter(value: object) -> Any:
    """Make a parameter of a truth, a whole number, a number or a text."""
    kind = {bool: "bool", int: "int64", float: "double"}.get(type(value), "string")
    return message("InferParameter", **{f"{kind}_param": str(value) if kind == "string" else value})


def value_of(parameter: Any) -> Any:
    """Return what a parameter holds.

    None if nothing.
    """
    chosen = parameter.WhichOneof("parameter_choice")
    return None if chosen is None else getattr(parameter, chosen)
