"""Write a network's parts as ONNX files, in 32 or 8 bits."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import inspect
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from impatient.engines.network import EngineSettings
from impatient.engines.partition import FreeDims, Parts, any_size, values_of
from impatient.errors import ExportFailed
from impatient.portable import SESSIONS
from impatient.progress import tracked
from impatient.tasks.task import Judge, Score

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
WEIGHTED = ("Conv", "Gemm", "MatMul")


# The part that compares outputs with those of the exit before.
COMPARE = "compare"


@dataclass(frozen=True, slots=True, kw_only=True)
class Scoring:
    """The score that a policy looks at, to be computed by the files.

    Attributes:
        of: how sure outputs look; or
        distance: how far outputs are from those of the exit before, which is the score negated.
    """

    of: Score | None = None
    distance: Judge | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class OnnxFile:
    """One ONNX file to write.

    Attributes:
        name: name of the file, without its ending.
        part: what it computes.
        takes: an example of each input by name.
        dims: dimensions of each input that may have any size, in order.
        gives: names of its outputs.
        scored: whether a score is part of it.
    """

    name: str
    part: nn.Module
    takes: Mapping[str, Tensor]
    dims: Sequence[FreeDims]
    gives: Sequence[str]
    scored: bool = False


def write_parts(
    parts: Parts,
    folder: Path,
    engine: str,
    *,
    whole: bool,
    scoring: Scoring | None = None,
    progress: bool = False,
) -> None:
    """Write stage0.onnx, head0.onnx, ..., or session.onnx, and, if asked for, whole.onnx.

    With a scoring, heads give a second output, the score [B], or compare.onnx computes it from the
    outputs of two exits. A session gives it in the columns of its outputs.

    Raises:
        ExportFailed: if a part cannot be written as ONNX, or the packages for it are missing.
    """
    for package in ("onnx", "onnxscript"):
        if importlib.util.find_spec(package) is None:
            raise ExportFailed(
                f"writing ONNX needs {package}, which is not installed: pip install {package}."
            )
    files = [
        file
        for file in _files(parts, engine, scoring or Scoring())
        if whole or file.name != "whole"
    ]
    shown = tracked(files, "writing ONNX", total=len(files), unit="files", wanted=progress)
    with _one_registry():
        for file in shown:
            write_file(file, folder)


@contextlib.contextmanager
def _one_registry() -> Iterator[None]:
    """Let torch read its table of ONNX functions once instead of once per file.

    It parses the source of some 500 functions each time, more than half of the time of an export.
    """
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    read = staticmethod(functools.cache(ONNXRegistry.from_torchlib))
    with mock.patch.object(ONNXRegistry, "from_torchlib", read):
        yield


def _files(parts: Parts, engine: str, scoring: Scoring) -> Iterator[OnnxFile]:
    """Yield what every file computes."""
    wiring = parts.wiring

    def file(
        name: str,
        part: nn.Module,
        takes: Sequence[str],
        gives: Sequence[str],
        *,
        scored: bool = False,
    ) -> OnnxFile:
        return OnnxFile(
            name=name,
            part=part,
            takes={name: parts.examples[name] for name in takes},
            dims=[parts.free_dims(name) for name in takes],
            gives=gives,
            scored=scored,
        )

    if engine in SESSIONS:
        outputs = tuple(f"output{index}" for index in range(len(parts.stages)))
        late = engine == "onnxruntime-session"
        session = _AllExits(parts, scoring, late=late)
        scored = scoring != Scoring()
        yield file("session", session, wiring.inputs, outputs, scored=scored)
    else:
        for index, stage in enumerate(parts.stages):
            yield file(f"stage{index}", stage, wiring.takes[index], wiring.gives[index])
        for index, (head, features) in enumerate(zip(parts.heads, wiring.features, strict=True)):
            if head is not None and scoring.of is not None:
                part = _Scored(head, scoring.of)
                yield file(f"head{index}", part, (features,), ("output", "score"), scored=True)
            elif head is not None:
                yield file(f"head{index}", head, (features,), ("output",))
        if scoring.distance is not None:
            output = parts.examples[wiring.features[-1]]
            yield OnnxFile(
                name=COMPARE,
                part=_Compared(scoring.distance),
                takes={"output": output, "before": output},
                dims=[parts.free_dims(wiring.features[-1])] * 2,
                gives=("score",),
                scored=True,
            )
    yield file("whole", parts.whole, wiring.inputs, ("output",))


class _Scored(nn.Module):
    """A head that also says how sure its output looks."""

    def __init__(self, head: nn.Module, score: Score) -> None:
        super().__init__()
        self._head = head
        self._score = score

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        output = self._head(features)
        return output, self._score(output).float()


class _Compared(nn.Module):
    """Agreement of an output with the one before: their distance, negated."""

    def __init__(self, distance: Judge) -> None:
        super().__init__()
        self._distance = distance

    def forward(self, output: Tensor, before: Tensor) -> Tensor:
        return -self._distance(output, before).float()


class _AllExits(nn.Module):
    """All stages and heads as one module, with outputs that are readable early.

    portable/streamed.py reads the outputs while the module computes. Each output is written by a
    gather, which copies final values: a row of numbers per sample, with the score behind it.
    The gather repeats the first column, because engines would otherwise remove it as an operation
    without effect.

    Args:
        parts: parts of the network.
        scoring: the score that is written behind each output, if there is any.
        late: write the gathers at the end of the file, the deepest exit's first. ONNX Runtime
            (1.31) computes depth first, beginning at the last node whose output no node takes, so
            that every output then comes as early as possible. OpenVINO (2026.4) computes in the
            order of the file.
    """

    def __init__(self, parts: Parts, scoring: Scoring, *, late: bool) -> None:
        super().__init__()
        self._wiring = parts.wiring
        self._scoring = scoring
        self._late = late
        self._stages = nn.ModuleList(parts.stages)
        self._heads = nn.ModuleList(filter(None, parts.heads))
        width = parts.examples[parts.wiring.features[-1]][0].numel()
        width += scoring != Scoring()
        self.register_buffer("_columns", torch.tensor([*range(width), 0]))

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        values = dict(zip(self._wiring.inputs, inputs, strict=True))
        outputs: list[Tensor] = []
        before = None
        heads = [*self._heads, nn.Identity()]
        for index, (stage, head) in enumerate(zip(self._stages, heads, strict=True)):
            given = stage(*(values[name] for name in self._wiring.takes[index]))
            values.update(zip(self._wiring.gives[index], given, strict=True))
            output = head(values[self._wiring.features[index]])
            row = self._with_score(output, before)
            outputs.append(row if self._late else self._readable(row))
            before = output
        if self._late:
            outputs = [self._readable(output) for output in reversed(outputs)][::-1]
        return tuple(outputs)

    def _with_score(self, output: Tensor, before: Tensor | None) -> Tensor:
        """Make a row of numbers of each sample's output, with its score behind."""
        row = output.reshape(output.shape[0], -1)
        if self._scoring.of is not None:
            score = self._scoring.of(output)
        elif self._scoring.distance is None:
            return row
        elif before is None:
            score = torch.full_like(row[:, 0], -torch.inf)
        else:
            score = -self._scoring.distance(output, before)
        return torch.cat([row, score.to(row.dtype)[:, None]], 1)

    def _readable(self, row: Tensor) -> Tensor:
        return row.index_select(1, self.get_buffer("_columns"))


def write_file(file: OnnxFile, folder: Path) -> None:
    """Write one part with a dynamic batch size."""
    part = file.part
    shapes = any_size(file.dims)
    # Cloned, because torch would merge two inputs that are the same tensor.
    arguments = tuple(tensor.clone() for tensor in file.takes.values())
    size = sum(tensor.nbytes for tensor in (*part.parameters(), *part.buffers()))
    try:
        with torch.no_grad(), warnings.catch_warnings():
            # torch warns about its own use of deprecated names.
            warnings.simplefilter("ignore")
            shapes_as_taken = (shapes,) if _takes_any_number(part) else shapes
            exported = torch.export.export(part, arguments, dynamic_shapes=shapes_as_taken)
            program: Any = torch.onnx.export(exported, arguments, dynamo=True, verbose=False)
            _name_values(program.model.graph, tuple(file.takes), file.gives)
            program.save(str(folder / f"{file.name}.onnx"), external_data=size > LARGEST_FILE)
    except Exception as error:
        # The exporter's passes raise errors of many types.
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        advice = (
            "Its policy's score is part of it: that must be computed by torch alone, from values "
            "of any batch size (x.shape[0], not len(x)). "
            if file.scored
            else ""
        )
        raise ExportFailed(
            f"{file.name} of this network cannot be written as ONNX: {reason} {advice}"
            'engine="eager" and "compile" need no ONNX files.'
        ) from error


def _takes_any_number(part: nn.Module) -> bool:
    """Tell whether a module's forward takes *tensors, which torch.export treats as one argument."""
    kinds = [each.kind for each in inspect.signature(part.forward).parameters.values()]
    return inspect.Parameter.VAR_POSITIONAL in kinds


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
    *,
    progress: bool = False,
) -> None:
    """Replace the files that `write_parts` has written by 8-bit versions.

    Args:
        parts: parts of the network.
        folder: folder of the files.
        settings: engine that the files were written for, and precision. "int8-dynamic" determines
            the ranges of the features while running, "int8-static" determines them now.
        calibration: batches of inputs from which "int8-static" determines the ranges, as tuples in
            the order of `wiring.inputs`.
        progress: whether to show a progress bar.
    """
    if importlib.util.find_spec("onnxruntime") is None:
        raise ExportFailed(
            "8 bits need onnxruntime, whose quantiser writes them for every engine, and it is not "
            "installed: pip install onnxruntime."
        )
    seen = _values_seen(parts, calibration) if settings.precision == "int8-static" else []
    # whole.onnx is optional.
    files = [
        (file, part)
        for part in _files(parts, settings.engine, Scoring())
        if (file := folder / f"{part.name}.onnx").is_file()
    ]
    shown = tracked(files, "writing 8 bits", total=len(files), unit="files", wanted=progress)
    for file, part in shown:
        samples = [{name: values[name] for name in part.takes} for values in seen]
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
    exact = _last_nodes(model.graph) if file.stem.startswith(("head", "session")) else []
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
        nodes_to_exclude=exact,
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


def _last_nodes(graph: Any) -> list[str]:
    """Return the nodes behind the last layers with weights: they shape outputs, and score them."""
    makers = {name: node for node in graph.node for name in node.output}
    found: dict[str, None] = {}
    names = [output.name for output in graph.output]
    while names:
        node = makers.get(names.pop())
        if node is not None and node.op_type not in WEIGHTED and node.name not in found:
            found[node.name] = None
            names += node.input
    return list(found)


class _Samples:
    """Source of samples for ONNX Runtime's calibration."""

    def __init__(self, samples: Iterator[Mapping[str, Any]]) -> None:
        self._samples = samples

    def get_next(self) -> Mapping[str, Any] | None:
        return next(self._samples, None)
