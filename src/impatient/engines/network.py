"""Networks whose stages an engine computes, with the same exits.

An `EngineNetwork` consists of a wiring and of functions, so an engine is what these functions call:
the exported graphs as they are (`exported`, the reference), graphs compiled by torch (`compiled`),
packages of AOTInductor (`aoti`), or sessions of an engine on numpy arrays.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from impatient import portable
from impatient.anytime import Exit, Network, Run
from impatient.counting import StageFacts
from impatient.engines.partition import Parts, any_size, exporting, input_tensors, pools_of
from impatient.errors import NetworkError, RunError, StaleInput, StorageError
from impatient.inputs import resized
from impatient.networks.heads import Layout, pooled
from impatient.networks.multi_exit import MultiExitNetwork
from impatient.portable import Staged, Streamed, Wiring
from impatient.progress import tracked
from impatient.store import Stored
from impatient.tasks import Task, named

Arrays = Literal["torch", "numpy"]
PRECISIONS = ("fp32", "int8-dynamic", "int8-static")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """An engine, and how it computes.

    Attributes:
        engine: name of the engine, such as "compile", "onnxruntime" or "openvino-session".
        precision: "fp32", "int8-dynamic" or "int8-static".
        threads: threads of one operation; None for torch's number.
    """

    engine: str
    precision: str = "fp32"
    threads: int | None = None


def engine_label(engine: str, precision: str) -> str:
    """Join an engine and a precision to one name, such as "openvino-int8-static".

    With fp32 the name is that of the engine.
    """
    return engine if precision == "fp32" else f"{engine}-{precision}"


def engine_and_precision(label: str) -> tuple[str, str]:
    """Split a name from `engine_label` into engine and precision."""
    precision = next(
        (precision for precision in PRECISIONS if label.endswith(f"-{precision}")), "fp32"
    )
    return label.removesuffix(f"-{precision}"), precision


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkFacts:
    """Facts about the eager network that hold in every engine.

    Attributes:
        exit_names: names of the exits.
        num_classes: width of every output.
        layouts: layout of the features at each early exit.
        stages: shapes, MACs and parameters of each stage and head.
        structure: fingerprint of the network's structure, for profiles.
        weights: fingerprint of its weights, for recordings.
        task: name of the task of its outputs.
    """

    exit_names: tuple[str, ...]
    num_classes: int
    layouts: tuple[Layout, ...]
    stages: tuple[StageFacts, ...]
    structure: str
    weights: str
    task: str = "classification"

    def __post_init__(self) -> None:
        count = len(self.exit_names)
        if (len(self.stages), len(self.layouts)) != (count, count - 1):
            raise NetworkError(
                f"facts of {len(self.stages)} stages and {len(self.layouts)} early exits; expected "
                f"{count} and {count - 1}, as the network has {count} exits. Export it again."
            )

    @classmethod
    def of(cls, network: MultiExitNetwork, x: Any) -> Self:
        """Find the facts by running a network on one sample."""
        return cls(
            exit_names=network.exit_names,
            num_classes=network.num_classes,
            # what a stage has pooled is [B, D]
            layouts=tuple(
                layout if pool is None else "ND"
                for layout, pool in zip(network.layouts, pools_of(network, x), strict=True)
            ),
            stages=tuple(network.stage_facts(resized(x, 1))),
            structure=network.structure_fingerprint,
            weights=network.weights_fingerprint,
            task=network.task.name,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Packages(Stored, kind="impatient_aoti", made_by="`impatient export --engine aoti`"):
    """Description of a directory of packages compiled by AOTInductor.

    Attributes:
        threads: number of threads that is built into the packages.
        torch: version of torch that compiled them.
        wiring: connections between the parts.
        facts: facts about the eager network.
    """

    threads: int
    torch: str
    wiring: Wiring
    facts: NetworkFacts


class EngineExit(Exit):
    """One exit of a run in an engine.

    Attributes:
        index: number of the exit, from 0 (shallow) to deep.
        whole: whether the time since the previous exit was spent on this exit alone; False if the
            engine was busy with another run at first.
    """

    __slots__ = ("_exit", "whole")

    whole: bool

    def __init__(self, exit: portable.Exit) -> None:
        self._exit = exit
        self._output = None
        # stages have pooled already what is masked
        self.mask = None
        self.index = exit.index
        self.whole = exit.whole

    @property
    def features(self) -> Tensor:
        """Return the input of the head.

        An engine on numpy arrays copies it each time.

        Raises:
            RunError: if all exits are in one session, which gives no features.
        """
        features = self._exit.features
        if features is None:
            raise RunError(
                "an engine with one session of all exits gives no features; use one with a session "
                "per stage."
            )
        return _to_torch(features)

    @property
    def row_bytes(self) -> float:
        """Return the size of one sample's features, 0 in a session."""
        return self._exit.row_bytes

    def output(self) -> Tensor:
        """Compute the head at the first call, which may also come later.

        Returns:
            Output of this exit, the samples first, such as [B, num_classes] before softmax.
        """
        if self._output is None:
            with torch.inference_mode(), _run_errors():
                self._output = _to_torch(self._exit.output())
        return torch.as_tensor(self._output)


class EngineRun(Run):
    """A run that computes a stage when asked for the next exit.

    Thread:
        `cancel` may be called from any thread, everything else from one thread at a time.
    """

    def __init__(self, run: portable.Run, arrays: Arrays) -> None:
        self._run = run
        self._arrays = arrays

    def __next__(self) -> EngineExit:
        # try costs nothing, where a context takes a microsecond
        try:
            if self._arrays == "numpy":
                # Nothing of torch runs, and the mode takes some microseconds to enter.
                return EngineExit(next(self._run))
            with torch.inference_mode():
                return EngineExit(next(self._run))
        except portable.BundleError as error:
            raise RunError(str(error)) from error

    def keep(self, rows: Tensor) -> None:
        with torch.inference_mode():
            self._run.keep(_from_torch(rows, self._arrays))

    def cancel(self) -> None:
        self._run.cancel()

    def close(self) -> None:
        self._run.close()


@contextlib.contextmanager
def _run_errors() -> Iterator[None]:
    """Turn errors of an exported directory into ours."""
    try:
        yield
    except portable.BundleError as error:
        raise RunError(str(error)) from error


def _from_torch(value: Tensor, arrays: Arrays) -> Any:
    """View a tensor as the engine's kind of array, to be read only."""
    return value if arrays == "torch" else value.detach().cpu().numpy()


def _to_torch(value: Any) -> Tensor:
    # A copy, because an engine may write its next answer to the same memory.
    return value if isinstance(value, Tensor) else torch.tensor(value)


class ExitFreeNetwork(nn.Module):
    """The backbone without exits in an engine, called as the backbone is."""

    def __init__(self, call: Callable[..., Any], inputs: Sequence[str], arrays: Arrays) -> None:
        super().__init__()
        # In a list, so that it is not registered as a submodule.
        self._call = [call]
        self._inputs = tuple(inputs)
        self._arrays = arrays

    def forward(self, *tensors: Any, **named: Any) -> Tensor:
        given = (
            input_tensors(named, self._inputs)
            if named
            else [entry for entry in tensors if isinstance(entry, Tensor)]
        )
        with torch.inference_mode(), _run_errors():
            output = self._call[0](*(_from_torch(tensor, self._arrays) for tensor in given))
        return _to_torch(output)


class EngineNetwork(Network):
    """A network with exits whose stages an engine runs.

    Args:
        facts: facts about the eager network.
        parts: stages and heads, called to begin a run; `Staged`, or `Streamed` where all exits are
            in one session.
        whole: function from the inputs, in order, to the output of the network without exits.
        settings: engine, precision and threads.
        arrays: kind of array that `parts` and `whole` take and return.
        task: what the outputs mean; needed only where it is not ready-made.

    Attributes:
        backbone: network without exits in the same engine, a module that is called as the backbone.

    Thread:
        As the engine's functions: several threads may run one network at once if those allow it.
    """

    def __init__(
        self,
        facts: NetworkFacts,
        parts: Staged | Streamed,
        whole: Callable[..., Any],
        settings: EngineSettings,
        arrays: Arrays = "torch",
        task: Task | None = None,
    ) -> None:
        if parts.num_exits != len(facts.exit_names):
            raise NetworkError(
                f"{parts.num_exits} exits in parts for a network with {len(facts.exit_names)}; "
                "expected the same number."
            )
        super().__init__()
        self.facts = facts
        self.engine = engine_label(settings.engine, settings.precision)
        self.precision = settings.precision
        self.threads = settings.threads
        self.num_classes = facts.num_classes
        self.task = named(facts.task) if task is None else task
        self.backbone = ExitFreeNetwork(whole, parts.wiring.inputs, arrays)
        self._parts = parts
        self._arrays = arrays
        # An engine computes in eval mode only.
        self.eval()

    @property
    def num_exits(self) -> int:
        return len(self.facts.exit_names)

    @property
    def exit_names(self) -> tuple[str, ...]:
        return self.facts.exit_names

    @property
    def mechanism(self) -> str:
        how = (
            f"one artifact for each of {self.num_exits} stages"
            if self._parts.shrinks
            else "one session with all exits"
        )
        return f"{self.engine}, {how}"

    @property
    def exit_free(self) -> nn.Module:
        return self.backbone

    @property
    def structure_fingerprint(self) -> str:
        """Return the fingerprint of the eager network."""
        return self.facts.structure

    @property
    def weights_fingerprint(self) -> str:
        """Return the fingerprint of the eager network's weights.

        Unless it is fp32, the precision is appended, because it changes the weights.
        """
        return engine_label(self.facts.weights, self.precision)

    def exits(self, x: Any, *, keep: bool = False) -> EngineRun:  # noqa: ARG002  features stay valid
        """Run stage by stage, with `for exit in network.exits(x)`.

        Leaving the loop early computes nothing deeper.

        Args:
            x: input as for the eager network, of any batch size. All other sizes must be as
                exported.
            keep: ignored, because the features of an engine's exits are never overwritten.
        Raises:
            NetworkError: if the input has other tensors than the one the network was exported with.
        """
        values = [
            _from_torch(tensor, self._arrays)
            for tensor in input_tensors(x, self._parts.wiring.inputs)
        ]
        return EngineRun(self._parts(values), self._arrays)

    def shrinks(self, x: Any) -> bool:  # noqa: ARG002
        """Tell whether removing samples saves time, as it does outside a session."""
        return self._parts.shrinks

    def pooled(self, exit: Exit) -> Tensor:
        if exit.index == len(self.facts.layouts):
            return torch.as_tensor(exit.features)
        return pooled(exit.features, self.facts.layouts[exit.index])

    def stage_facts(self, x: Any) -> list[StageFacts]:  # noqa: ARG002  an engine does not show them
        """Return the facts that were found in the eager network."""
        return list(self.facts.stages)


def exported(parts: Parts, facts: NetworkFacts, task: Task | None = None) -> EngineNetwork:
    """Run the exported graphs in torch, as a reference for engines."""
    staged = Staged(parts.wiring, parts.stages, parts.heads)
    settings = EngineSettings(engine="exported")
    return EngineNetwork(facts, staged, parts.whole, settings, task=task)


def compiled(parts: Parts, facts: NetworkFacts, task: Task | None = None) -> EngineNetwork:
    """Compile every part by torch.compile, with the weights as constants.

    Later changes to the weights have no effect. The first run compiles, which takes seconds per
    stage. So does the first run with another batch size, until torch makes the size a variable
    (from the second or third size on). Warm the network up with every batch size before anything
    has a deadline.

    Raises:
        NetworkError: if there is no C++ compiler, which torch needs on CPUs.
    """
    _require_compiler()

    def made(part: nn.Module) -> Any:
        return torch.compile(part, options={"freezing": True})

    heads = [head and made(head) for head in parts.heads]
    staged = Staged(parts.wiring, [made(stage) for stage in parts.stages], heads)
    settings = EngineSettings(engine="compile")
    return EngineNetwork(facts, staged, made(parts.whole), settings, task=task)


def aoti(
    parts: Parts,
    facts: NetworkFacts,
    directory: str | Path,
    *,
    threads: int = 1,
    progress: bool = False,
) -> None:
    """Compile every part ahead of time by AOTInductor.

    Args:
        parts: parts of the network.
        facts: facts about the network.
        directory: directory for the packages, which is made if necessary.
        threads: threads of one operation, which must be torch's number. It is built into the
            packages. With another number they may be several times slower, so loading refuses that.
        progress: whether to show a progress bar.
    Raises:
        NetworkError: if there is no C++ compiler.
        StaleInput: if torch uses another number of threads here.
    """
    _require_compiler()
    if torch.get_num_threads() != threads:
        raise StaleInput(
            f"packages for {threads} threads were asked for, but torch uses "
            f"{torch.get_num_threads()} here, which is what it builds into them; call "
            f"torch.set_num_threads({threads}) first."
        )
    directory = Path(directory)
    wiring = parts.wiring
    directory.mkdir(parents=True, exist_ok=True)
    # Packages that are half built must not look complete.
    (directory / _AOTI).unlink(missing_ok=True)
    heads = zip(parts.heads, wiring.features, strict=True)
    packages: list[tuple[str, nn.Module, Sequence[str]]] = [
        *((f"stage{k}", part, wiring.takes[k]) for k, part in enumerate(parts.stages)),
        *((f"head{k}", head, [on]) for k, (head, on) in enumerate(heads) if head is not None),
        ("whole", parts.whole, wiring.inputs),
    ]
    shown = tracked(packages, "compiling", total=len(packages), unit="parts", wanted=progress)
    for name, part, takes in shown:
        _package(part, takes, parts, directory / f"{name}.pt2")
    made = Packages(threads=threads, torch=str(torch.__version__), wiring=wiring, facts=facts)
    made.save(directory / _AOTI)


def load_aoti(directory: str | Path, task: Task | None = None) -> EngineNetwork:
    """Load packages that `aoti` wrote.

    The packages are machine code and run as such: load only what you have built.

    Raises:
        StorageError: if there is no such directory, or it was not finished.
        StaleInput: if it was built with another thread count or version of torch than here.
    """
    directory = Path(directory)
    try:
        made = Packages.load(directory / _AOTI)
    except StorageError as error:
        raise StorageError(
            f"{directory} is not a directory that aoti has finished ({error}); build it again."
        ) from error
    for name, built, here in (
        ("threads", made.threads, torch.get_num_threads()),
        ("torch", made.torch, str(torch.__version__)),
    ):
        if built != here:
            raise StaleInput(
                f"the packages in {directory} were built with {name} {built}, but here it is "
                f"{here}; they would be slow or wrong. Build them again, or call "
                f"torch.set_num_threads({made.threads}) with torch {made.torch}."
            )
    count = len(made.wiring.takes)
    stages = [_load(directory / f"stage{index}.pt2") for index in range(count)]
    heads = [_load(directory / f"head{index}.pt2") for index in range(count - 1)]
    return EngineNetwork(
        made.facts,
        Staged(made.wiring, stages, [*heads, None]),
        _load(directory / "whole.pt2"),
        EngineSettings(engine="aoti", threads=made.threads),
        task=task,
    )


_AOTI = "aoti.json"


def _require_compiler() -> None:
    name = os.environ.get("CXX", "g++")
    if shutil.which(name) is None:
        raise NetworkError(
            f"torch compiles with {name}, and there is none here. Install a C++ compiler (apt "
            'install g++), set CXX, or use engine="onnxruntime", "openvino" or "eager".'
        )


def _package(part: nn.Module, takes: Sequence[str], parts: Parts, path: Path) -> None:
    """Export one part with a batch of any size, and write its package."""
    shapes = any_size([parts.free_dims(name) for name in takes])
    with exporting(path.stem):
        program = torch.export.export(
            part, tuple(parts.examples[name] for name in takes), dynamic_shapes=shapes
        )
        torch._inductor.aoti_compile_and_package(program, package_path=str(path))


def _load(path: Path) -> Callable[..., Any]:
    package: Callable[..., Any] = torch._inductor.aoti_load_package(str(path))
    return package
