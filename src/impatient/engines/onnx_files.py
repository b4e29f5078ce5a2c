"""One ONNX file per part of a network, in full precision or with weights and features of 8 bits."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from impatient.engines.partition import Parts, any_batch
from impatient.errors import ExportFailed
from impatient.portable import SESSIONS

# bytes: what protobuf can hold, less some room for the graph
LARGEST_FILE = 2**31 - 2**24
# norms and soft maxima keep their 32 bits: they are cheap, and 8 bits spoil them
STATIC_KINDS = [
    "Conv",
    "Gemm",
    "MatMul",
    "Add",
    "Relu",
    "Clip",
    "Concat",
    "MaxPool",
    "AveragePool",
    "GlobalAveragePool",
]
PRECISIONS = ("fp32", "int8-dynamic", "int8-static")


def write_parts(parts: Parts, folder: Path, engine: str, *, whole: bool) -> None:
    """Write stage0.onnx, head0.onnx, ..., or session.onnx, and, if asked for, whole.onnx.

    Raises:
        ExportFailed: if a part cannot be written as ONNX, or the packages for it are missing.
    """
    for package in ("onnx", "onnxscript"):
        if importlib.util.find_spec(package) is None:
            raise ExportFailed(
                f"writing ONNX needs {package}, which is not installed: pip install "
                "'impatient[onnx]'."
            )
    for name, part, takes, gives in _named_parts(parts, engine):
        if whole or name != "whole":
            _write(part, parts, takes, gives, folder / f"{name}.onnx")


def _named_parts(
    parts: Parts, engine: str
) -> Iterator[tuple[str, nn.Module, tuple[str, ...], tuple[str, ...]]]:
    """Every file's name and module, and the names of what it takes and gives."""
    wiring = parts.wiring
    if engine in SESSIONS:
        outputs = tuple(f"output{index}" for index in range(len(parts.stages)))
        yield (
            "session",
            _AllExits(parts, late=engine == "onnxruntime-session"),
            wiring.inputs,
            outputs,
        )
    else:
        for index, (stage, takes, gives) in enumerate(
            zip(parts.stages, wiring.takes, wiring.gives, strict=True)
        ):
            yield f"stage{index}", stage, takes, gives
        for index, (head, features) in enumerate(zip(parts.heads, wiring.features, strict=True)):
            if head is not None:
                yield f"head{index}", head, (features,), ("output",)
    yield "whole", parts.whole, wiring.inputs, ("output",)


class _AllExits(nn.Module):
    """All stages and heads in one, with outputs that can be read while it computes (see
    standalone/streamed.py).

    Each is made by a gather, which copies values that are final. Its first column stands twice, or
    engines would take the gather for nothing and leave it out.

    Args:
        late: write the gathers at the end of the file, the deepest exit's first. ONNX Runtime
            (1.31) computes depth first, from the last node that nobody takes from, so that every
            output then comes as soon as it can; OpenVINO (2026.4) computes in the order of the
            file.
    """

    def __init__(self, parts: Parts, *, late: bool) -> None:
        super().__init__()
        self._wiring = parts.wiring
        self._late = late
        self._stages = nn.ModuleList(parts.stages)
        self._heads = nn.ModuleList(filter(None, parts.heads))
        self.register_buffer("_columns", torch.tensor([*range(parts.num_classes), 0]))

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        values = dict(zip(self._wiring.inputs, inputs, strict=True))
        outputs = []
        heads = [*self._heads, nn.Identity()]
        for index, (stage, head) in enumerate(zip(self._stages, heads, strict=True)):
            given = stage(*(values[name] for name in self._wiring.takes[index]))
            values.update(zip(self._wiring.gives[index], given, strict=True))
            output = head(values[self._wiring.features[index]])
            outputs.append(output if self._late else self._readable(output))
        if self._late:
            outputs = [self._readable(output) for output in reversed(outputs)][::-1]
        return tuple(outputs)

    def _readable(self, output: Tensor) -> Tensor:
        return output.index_select(1, self.get_buffer("_columns"))


def _write(
    part: nn.Module, parts: Parts, takes: Sequence[str], gives: Sequence[str], file: Path
) -> None:
    """Write one part with a batch of any size."""
    shapes = any_batch([parts.wiring.batch_dims[name] for name in takes])
    # torch takes one tensor given twice for one input
    arguments = tuple(parts.examples[name].clone() for name in takes)
    size = sum(tensor.nbytes for tensor in (*part.parameters(), *part.buffers()))
    try:
        with torch.no_grad(), warnings.catch_warnings():
            # torch's own, of its own older names
            warnings.simplefilter("ignore")
            exported = torch.export.export(
                part, arguments, dynamic_shapes=(shapes,) if isinstance(part, _AllExits) else shapes
            )
            program: Any = torch.onnx.export(exported, arguments, dynamo=True, verbose=False)
            _name_values(program.model.graph, takes, gives)
            program.save(str(file), external_data=size > LARGEST_FILE)
    except Exception as error:
        # the exporter raises whatever its passes meet
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ExportFailed(
            f'{file.stem} of this network cannot be written as ONNX: {reason} engine="eager" and '
            f'"compile" need no such file.'
        ) from error


def _name_values(graph: Any, takes: Sequence[str], gives: Sequence[str]) -> None:
    """Name what a graph takes and gives; the names of all other values are made to be no wiring's."""
    for number, node in enumerate(graph.all_nodes()):
        for place, value in enumerate(node.outputs):
            value.name = f"/{number}/{place}"
    for value in list(graph.initializers.values()):
        value.name = f"/weights/{value.name}"
    for value, name in zip((*graph.inputs, *graph.outputs), (*takes, *gives), strict=True):
        value.name = name


def quantise(
    parts: Parts,
    folder: Path,
    engine: str,
    precision: str,
    calibration: Sequence[tuple[Tensor, ...]],
) -> None:
    """Replace every file in a folder that `write_parts` has written by one that computes with 8
    bits.

    Args:
        precision: "int8-dynamic" finds the range of every part's features as it runs; "int8-static"
            fixes the ranges now.
        calibration: for "int8-static", inputs to find the ranges with, in batches: tuples as in
            `wiring.inputs`.
    """
    seen = _values_seen(parts, calibration) if precision == "int8-static" else []
    for name, _, takes, _ in _named_parts(parts, engine):
        file = folder / f"{name}.onnx"
        # whole.onnx may have been left out
        if file.is_file():
            _quantise(
                file, engine, precision, [{name: values[name] for name in takes} for values in seen]
            )


def _values_seen(parts: Parts, batches: Sequence[tuple[Tensor, ...]]) -> list[dict[str, Any]]:
    """Per batch, all the values that go between parts, as arrays."""
    seen = []
    for inputs in batches:
        values = dict(zip(parts.wiring.inputs, inputs, strict=True))
        with torch.inference_mode():
            for stage, takes, gives in zip(
                parts.stages, parts.wiring.takes, parts.wiring.gives, strict=True
            ):
                values.update(zip(gives, stage(*(values[name] for name in takes)), strict=True))
        seen.append({name: value.numpy() for name, value in values.items()})
    return seen


def _quantise(
    file: Path, engine: str, precision: str, samples: Sequence[Mapping[str, Any]]
) -> None:
    import onnx
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_dynamic, quantize_static
    from onnxruntime.quantization.quant_utils import add_pre_process_metadata

    model = onnx.load(file)
    # shapes of values in between would no longer be true of transposed weights
    del model.graph.value_info[:]
    # or the quantiser warns: torch's exporter has already folded what folds
    add_pre_process_metadata(model)
    large = file.with_name(f"{file.name}.data").is_file()
    if precision == "int8-dynamic":
        quantize_dynamic(
            model,
            file,
            weight_type=QuantType.QInt8,
            per_channel=True,
            use_external_data_format=large,
        )
        return
    # OpenVINO (2026.4) cannot compile zeros that are not 0 where channels are filled up with zeros
    symmetric = engine.startswith("openvino")
    quantize_static(
        model,
        file,
        _Samples(iter(samples)),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        op_types_to_quantize=STATIC_KINDS,
        activation_type=QuantType.QInt8 if symmetric else QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        use_external_data_format=large,
        # processors without VNNI add products of 8 times 8 bits in 16, and overflow
        reduce_range=True,
        # logits on a grid of 256 values tie, and features are rounded once at the next part
        extra_options={
            "OpTypesToExcludeOutputQuantization": ["Gemm", "MatMul"],
            "ActivationSymmetric": symmetric,
        },
    )


class _Samples:
    """What ONNX Runtime's calibration reads samples from."""

    def __init__(self, samples: Iterator[Mapping[str, Any]]) -> None:
        self._samples = samples

    def get_next(self) -> Mapping[str, Any] | None:
        return next(self._samples, None)
