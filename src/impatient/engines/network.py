"""Networks whose stages an engine computes, with the same exits.

An `EngineNetwork` is made of a wiring and of callables, so that an engine is what it calls:
exported graphs as they are (`exported`, the reference), compiled by torch (`compiled`), packages of
AOTInductor (`aoti`), or sessions of an engine on numpy arrays.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from impatient import portable
from impatient.anytime import Exit, Network, Run
from impatient.counting import StageFacts
from impatient.engines.partition import Parts, any_batch, exporting, input_tensors
from impatient.errors import NetworkError, RunError, StaleInput, StorageError
from impatient.inputs import resized
from impatient.networks.heads import Layout, Pool
from impatient.networks.multi_exit import MultiExitNetwork
from impatient.portable import Staged, Streamed, Wiring
from impatient.store import Stored

Arrays = Literal["torch", "numpy"]


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkFacts:
    """What is known of a network whatever engine runs it, from the eager one.

    Attributes:
        exit_names, num_classes, layouts: as of the network.
        stages: per exit, shapes, MACs and parameters.
        structure, weights: fingerprints of its state, by which profiles and recordings know it.
    """

    exit_names: tuple[str, ...]
    num_classes: int
    layouts: tuple[Layout, ...]
    stages: tuple[StageFacts, ...]
    structure: str
    weights: str

    @classmethod
    def of(cls, network: MultiExitNetwork, x: Any) -> Self:
        """The facts of a network, found by running it once on one sample of an example input."""
        return cls(
            exit_names=network.exit_names,
            num_classes=network.num_classes,
            layouts=network.layouts,
            stages=tuple(network.stage_facts(resized(x, 1))),
            structure=network.structure_fingerprint,
            weights=network.weights_fingerprint,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Packages(Stored, kind="impatient_aoti", made_by="`impatient export --engine aoti`"):
    """What is known of a directory of packages that AOTInductor has compiled.

    Attributes:
        threads: intra-op threads that are built into them.
        torch: the version that compiled them.
        wiring: what passes between the parts.
        facts: of the eager network.
    """

    threads: int
    torch: str
    wiring: Wiring
    facts: NetworkFacts


class EngineExit(Exit):
    """One exit of a run in an engine.

    Attributes:
        index: 0-based, shallow to deep.
        whole: whether the time it took was its own; not if the engine was busy with something else
            at first.
    """

    __slots__ = ("_arrays", "_exit", "whole")

    whole: bool

    def __init__(self, exit: portable.Exit, arrays: Arrays) -> None:
        self._exit = exit
        self._arrays = arrays
        self._output = None
        self.index = exit.index
        self.whole = exit.whole

    @property
    def features(self) -> Tensor:
        """What the head sees; of an engine on numpy arrays, a copy each time.

        Raises:
            RunError: where all exits are in one session, which keeps its features to itself.
        """
        if self._exit.features is None:
            raise RunError(
                "an engine with one session of all exits gives no features; use one with a session "
                "per stage."
            )
        return _to_torch(self._exit.features, self._arrays)

    @property
    def row_bytes(self) -> float:
        """Size of one sample's features, without copying them; 0 where they stay in a session."""
        if self._exit.features is None:
            return 0.0
        return float(self._exit.features.nbytes / self._exit.features.shape[0])

    def output(self) -> Tensor:
        """Compute the head, once; it may be asked for later, too.

        Returns:
            Output of this exit, shape [B, num_classes]; before softmax.
        """
        if self._output is None:
            with torch.inference_mode():
                self._output = _to_torch(self._exit.output(), self._arrays)
        return torch.as_tensor(self._output)


class EngineRun(Run):
    """One run: computes a stage when asked for the next exit, in inference mode.

    Thread:
        `cancel` may be called from any thread, everything else from one at a time.
    """

    def __init__(self, run: portable.Run, arrays: Arrays) -> None:
        self._run = run
        self._arrays = arrays

    def __next__(self) -> EngineExit:
        with torch.inference_mode():
            return EngineExit(next(self._run), self._arrays)

    def keep(self, rows: Tensor) -> None:
        with torch.inference_mode():
            self._run.keep(_from_torch(rows, self._arrays))

    def cancel(self) -> None:
        self._run.cancel()

    def close(self) -> None:
        self._run.close()


def _from_torch(value: Tensor, arrays: Arrays) -> Any:
    """The same memory as the engine's kind of array; the engine must not write to it."""
    return value if arrays == "torch" else value.detach().cpu().numpy()


def _to_torch(value: Any, arrays: Arrays) -> Tensor:
    # copied: an engine may write its next answer to the same memory
    return value if arrays == "torch" else torch.tensor(value)


class ExitFreeNetwork(nn.Module):
    """The backbone without exits in an engine: called as the backbone is, gives its output, shape
    [B, num_classes].
    """

    def __init__(self, call: Callable[..., Any], inputs: Sequence[str], arrays: Arrays) -> None:
        super().__init__()
        # in a list: no submodule of this one
        self._call = [call]
        self._inputs = tuple(inputs)
        self._arrays = arrays

    def forward(self, *tensors: Any, **named: Any) -> Tensor:
        given = (
            input_tensors(named, self._inputs)
            if named
            else [entry for entry in tensors if isinstance(entry, Tensor)]
        )
        with torch.inference_mode():
            output = self._call[0](*(_from_torch(tensor, self._arrays) for tensor in given))
        return _to_torch(output, self._arrays)


class EngineNetwork(Network):
    """A network with exits whose stages an engine runs.

    Args:
        facts: of the eager network.
        parts: what begins a run: `Staged`, or `Streamed` where all exits are in one session.
        whole: a callable, the inputs as positions, the output back.
        engine: "compile", "aoti", "onnxruntime", "openvino", "onnxruntime-session", ... or
            "exported".
        precision: "fp32", "int8-dynamic", ...
        threads: intra-op threads of the engine; None where they are torch's.
        arrays: what parts and whole take and give.
        buckets: the only numbers of rows that run, where the engine wants fixed shapes; empty: any.
        mechanism: how it is staged, in words.

    Attributes:
        backbone: the exit-free network in the same engine, a module that is called as the backbone
            is.

    Thread:
        As the engine's callables. Runs of one network in several threads at once are right if those
        allow it.
    """

    def __init__(
        self,
        facts: NetworkFacts,
        parts: Staged | Streamed,
        whole: Callable[..., Any],
        *,
        engine: str,
        precision: str = "fp32",
        threads: int | None = None,
        arrays: Arrays = "torch",
        buckets: Sequence[int] = (),
        mechanism: str | None = None,
    ) -> None:
        if parts.num_exits != len(facts.exit_names):
            raise NetworkError(
                f"{parts.num_exits} exits in parts for a network with {len(facts.exit_names)}; "
                f"expected as many."
            )
        super().__init__()
        self.facts = facts
        self.engine = engine
        self.precision = precision
        self.threads = threads
        self.num_classes = facts.num_classes
        self.buckets = tuple(buckets)
        how = (
            f"one artifact for each of {parts.num_exits} stages"
            if parts.shrinks
            else "one session with all exits"
        )
        self._mechanism = mechanism or f"{engine}, {how}"
        self.backbone = ExitFreeNetwork(whole, parts.wiring.inputs, arrays)
        self._parts = parts
        self._arrays = arrays
        # what an engine has made of the weights knows no other mode
        self.eval()

    @property
    def num_exits(self) -> int:
        return len(self.facts.exit_names)

    @property
    def exit_names(self) -> tuple[str, ...]:
        return self.facts.exit_names

    @property
    def mechanism(self) -> str:
        return self._mechanism

    @property
    def exit_free(self) -> nn.Module:
        return self.backbone

    @property
    def structure_fingerprint(self) -> str:
        """That of the eager network."""
        return self.facts.structure

    @property
    def weights_fingerprint(self) -> str:
        """That of the eager network, with the precision where that changes the weights."""
        weights = self.facts.weights
        return weights if self.precision == "fp32" else f"{weights}-{self.precision}"

    def exits(self, x: Any, *, keep: bool = False) -> EngineRun:  # noqa: ARG002  features are never overwritten here
        """Run stage by stage: `for exit in network.exits(x)`; stop asking, and nothing deeper is
        computed.

        Args:
            x: as the eager network takes it; any batch size, all other sizes as exported.
            keep: of no consequence; the features of an engine's exits stay as they are.
        Returns:
            An iterator of `EngineExit`, to be used in a `with` block.
        Raises:
            NetworkError: if the input has other tensors than the one the network was exported with.
        """
        values = [
            _from_torch(tensor, self._arrays)
            for tensor in input_tensors(x, self._parts.wiring.inputs)
        ]
        return EngineRun(self._parts(values), self._arrays)

    def shrinks(self, x: Any) -> bool:  # noqa: ARG002
        """Whether it pays to take samples out of a run: not out of one session of all exits, which
        computes them all.
        """
        return self._parts.shrinks

    def pooled(self, exit: Exit) -> Tensor:
        if exit.index == len(self.facts.layouts):
            return torch.as_tensor(exit.features)
        return torch.as_tensor(Pool(self.facts.layouts[exit.index])(exit.features))

    def stage_facts(self, x: Any) -> list[StageFacts]:  # noqa: ARG002  an engine's stages cannot be looked into
        """Return the facts as found in the eager network."""
        return list(self.facts.stages)


def exported(parts: Parts, facts: NetworkFacts) -> EngineNetwork:
    """The exported graphs as they are, run by torch: what the engines are compared with."""
    return EngineNetwork(
        facts, Staged(parts.wiring, parts.stages, parts.heads), parts.whole, engine="exported"
    )


def compiled(parts: Parts, facts: NetworkFacts) -> EngineNetwork:
    """Every part compiled by torch.compile, with the weights as constants; changes to them
    afterwards have no effect.

    The first run compiles, which takes seconds a stage; so does the first with another batch size,
    until torch makes the size a variable (from the second or third size on). Warm it up with every
    batch size before anything has a deadline.

    Raises:
        NetworkError: if there is no C++ compiler, which torch needs on CPUs.
    """
    _require_compiler()

    def made(part: nn.Module) -> Any:
        return torch.compile(part, options={"freezing": True})

    heads = [None if head is None else made(head) for head in parts.heads]
    stages = [made(stage) for stage in parts.stages]
    return EngineNetwork(
        facts, Staged(parts.wiring, stages, heads), made(parts.whole), engine="compile"
    )


def aoti(
    parts: Parts, facts: NetworkFacts, directory: str | Path, *, threads: int = 1
) -> EngineNetwork:
    """Every part compiled ahead of time by AOTInductor, written to a directory, and loaded from
    there.

    Args:
        directory: where the packages go; made if it is not there.
        threads: intra-op threads, which must be torch's. They are built into the packages, and
            another number is refused
            at loading: run with it, they may be several times slower.
    Raises:
        NetworkError: if there is no C++ compiler.
        StaleInput: if torch does not use that many threads here.
    """
    _require_compiler()
    if torch.get_num_threads() != threads:
        raise StaleInput(
            f"packages for {threads} threads were asked for, but torch uses "
            f"{torch.get_num_threads()} here, which is what it "
            f"builds into them; call torch.set_num_threads({threads}) first."
        )
    directory = Path(directory)
    wiring = parts.wiring
    directory.mkdir(parents=True, exist_ok=True)
    # nothing half-built may look finished
    (directory / _AOTI).unlink(missing_ok=True)
    for index, (stage, takes) in enumerate(zip(parts.stages, wiring.takes, strict=True)):
        _package(stage, takes, parts, directory / f"stage{index}.pt2")
    for index, head in enumerate(parts.heads):
        if head is not None:
            _package(head, [wiring.features[index]], parts, directory / f"head{index}.pt2")
    _package(parts.whole, wiring.inputs, parts, directory / "whole.pt2")
    made = Packages(threads=threads, torch=str(torch.__version__), wiring=wiring, facts=facts)
    made.save(directory / _AOTI)
    return load_aoti(directory)


def load_aoti(directory: str | Path) -> EngineNetwork:
    """Load what `aoti` wrote. The packages are machine code and run as such: load only what you
    have built.

    Raises:
        StorageError: if there is no such directory, or it was not finished.
        StaleInput: if it was built with another thread count than torch's here, or another version
            of torch.
    """
    directory = Path(directory)
    try:
        made = Packages.load(directory / _AOTI)
    except StorageError as error:
        raise StorageError(
            f"{directory} is not a directory that aoti has finished ({error}); build it again."
        ) from error
    here = {"threads": torch.get_num_threads(), "torch": str(torch.__version__)}
    for name, value in here.items():
        if getattr(made, name) != value:
            raise StaleInput(
                f"the packages in {directory} were built with {name} {getattr(made, name)}, but here it is "
                f"{value}; they would be slow "
                f"or wrong. Build them again, or call torch.set_num_threads({made.threads}) "
                f"with torch {made.torch}."
            )
    wiring = made.wiring
    stages = [_load(directory / f"stage{index}.pt2") for index in range(len(wiring.takes))]
    heads = [_load(directory / f"head{index}.pt2") for index in range(len(stages) - 1)]
    whole = _load(directory / "whole.pt2")
    return EngineNetwork(
        made.facts,
        Staged(wiring, stages, [*heads, None]),
        whole,
        engine="aoti",
        threads=made.threads,
    )


_AOTI = "aoti.json"


def _require_compiler() -> None:
    name = os.environ.get("CXX", "g++")
    if shutil.which(name) is None:
        raise NetworkError(
            f"torch compiles with {name}, and there is none here. Install a C++ compiler (apt "
            f"install g++), set CXX, or use "
            'engine="onnxruntime", "openvino" or "eager".'
        )


def _package(part: nn.Module, takes: Sequence[str], parts: Parts, path: Path) -> None:
    """Export a part once more, by itself and with a batch of any size, and write its package."""
    shapes = any_batch([parts.wiring.batch_dims[name] for name in takes])
    with exporting(path.stem):
        program = torch.export.export(
            part, tuple(parts.examples[name] for name in takes), dynamic_shapes=shapes
        )
        torch._inductor.aoti_compile_and_package(program, package_path=str(path))


def _load(path: Path) -> Callable[..., Any]:
    package: Callable[..., Any] = torch._inductor.aoti_load_package(str(path))
    return package
