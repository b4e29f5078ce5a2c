"""Write a network's parts as ONNX files, in 32 or 8 bits."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from impatient.engines.network import EngineSettings
from impatient.engines.partition import Parts, any_batch, values_of
from impatient.errors import ExportFailed
from impatient.portable import SESSIONS

# Bytes: the limit of protobuf, less some room for the graph.
LARGEST_FILE = 2**31 - 2**24
# Weights in 7 bits: processors without VNNI add products of two 8-bit numbers in 16 bits, which
# overflows.
REDUCED = True
# Norms and softmax stay in 32 bits: they take little time, and 8 bits make them inaccurate.
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
    """Yield name, module and names of inputs and outputs for every file."""
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
    """All stages and heads as one module, with outputs that are readable early.

    portable/streamed.py reads the outputs while the module computes. Each output is written by a
    gather, which copies final values.
    The gather repeats the first column, because engines would otherwise remove it as an operation
    without effect.

    Args:
        parts: parts of the network.
        late: write the gathers at the end of the file, the deepest exit's first. ONNX Runtime
            (1.31) computes depth first, beginning at the last node whose output no node takes, so
            that every output then comes as early as possible. OpenVINO (2026.4) computes in the
            order of the file.
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
    """Write one part with a dynamic batch size."""
    shapes = any_batch([parts.wiring.batch_dims[name] for name in takes])
    # Cloned, because torch would merge two inputs that are the same tensor.
    arguments = tuple(parts.examples[name].clone() for name in takes)
    size = sum(tensor.nbytes for tensor in (*part.parameters(), *part.buffers()))
    try:
        with torch.no_grad(), warnings.catch_warnings():
            # torch warns about its own use of deprecated names.
            warnings.simplefilter("ignore")
            exported = torch.export.export(
                part, arguments, dynamic_shapes=(shapes,) if isinstance(part, _AllExits) else shapes
            )
            program: Any = torch.onnx.export(exported, arguments, dynamo=True, verbose=False)
            _name_values(program.model.graph, takes, gives)
            program.save(str(file), external_data=size > LARGEST_FILE)
    except Exception as error:
        # The exporter's passes raise errors of many types.
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ExportFailed(
            f"{file.stem} of this network cannot be written as ONNX: {reason} "
            'engine="eager" and "compile" need no ONNX files.'
        ) from error


def _name_values(graph: Any, takes: Sequence[str], gives: Sequence[str]) -> None:
    """Name the inputs and outputs of a graph.

    All other values get names that cannot occur in a wiring.
    """
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
    settings: EngineSettings,
    calibration: Sequence[tuple[Tensor, ...]],
) -> None:
    """Replace the files that `write_parts` has written by 8-bit versions.

    Args:
        parts: parts of the network.
        folder: folder of the files.
        settings: engine that the files were written for, and precision. "int8-dynamic" determines
            the ranges of the features while running, "int8-static" determines them now.
        calibration: batches of inputs from which "int8-static" determines the ranges, as tuples in
            the order of `wiring.inputs`.
    """
    seen = _values_seen(parts, calibration) if settings.precision == "int8-static" else []
    for name, _, takes, _ in _named_parts(parts, settings.engine):
        file = folder / f"{name}.onnx"
        # whole.onnx is optional.
        if file.is_file():
            samples = [{name: values[name] for name in takes} for values in seen]
            _quantise(file, settings, samples)


def _values_seen(parts: Parts, batches: Sequence[tuple[Tensor, ...]]) -> list[dict[str, Any]]:
    """Return all values that pass between parts, as arrays, for each batch."""
    seen = []
    for inputs in batches:
        with torch.inference_mode():
            values = values_of(parts.stages, parts.wiring, inputs)
        seen.append({name: value.numpy() for name, value in values.items()})
    return seen


def _quantise(file: Path, settings: EngineSettings, samples: Sequence[Mapping[str, Any]]) -> None:
    import onnx
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_dynamic, quantize_static
    from onnxruntime.quantization.quant_utils import add_pre_process_metadata

    model = onnx.load(file)
    # The stored shapes of inner values would be wrong for transposed weights.
    del model.graph.value_info[:]
    # Avoids a warning of the quantiser. Torch's exporter has already folded constants.
    add_pre_process_metadata(model)
    large = file.with_name(f"{file.name}.data").is_file()
    if settings.precision == "int8-dynamic":
        quantize_dynamic(
            model,
            file,
            weight_type=QuantType.QInt8,
            per_channel=True,
            reduce_range=REDUCED,
            use_external_data_format=large,
        )
        return
    # OpenVINO (2026.4) cannot compile a zero point other than 0 where channels are zero-padded.
    symmetric = settings.engine.startswith("openvino")
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
        reduce_range=REDUCED,
        # Logits on a grid of 256 values would tie. Features are rounded at the next part anyway.
        extra_options={
            "OpTypesToExcludeOutputQuantization": ["Gemm", "MatMul"],
            "ActivationSymmetric": symmetric,
        },
    )


class _Samples:
    """Source of samples for ONNX Runtime's calibration."""

    def __init__(self, samples: Iterator[Mapping[str, Any]]) -> None:
        self._samples = samples

    def get_next(self) -> Mapping[str, Any] | None:
        return next(self._samples, None)
