"""Move a network to another engine, and export it to a directory."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from impatient import checks, portable
from impatient.costs import CostProfile
from impatient.directories import replaced_whole
from impatient.engines.blocked import enter_blocked
from impatient.engines.comparison import check_agreement, tolerance_of
from impatient.engines.network import (
    PRECISIONS,
    EngineNetwork,
    EngineSettings,
    NetworkFacts,
    aoti,
    compiled,
    engine_label,
    load_aoti,
)
from impatient.engines.onnx_files import COMPARE, Scoring, quantise, write_parts
from impatient.engines.partition import (
    FreeDims,
    Parts,
    input_names,
    input_tensors,
    length_dims,
    partition,
)
from impatient.errors import ExportFailed, RunError, StorageError, TaskError
from impatient.files import read_json, write_json, write_text
from impatient.inputs import batch_size_of, evaluating
from impatient.networks.multi_exit import MultiExitNetwork
from impatient.networks.placement import ENGINES, WRITTEN
from impatient.policies.policy import Policy
from impatient.progress import waiting
from impatient.provenance import dtype_of, machine, provenance
from impatient.store import from_plain, to_plain
from impatient.tasks.task import AGREEMENT, Task
from impatient.training.preprocess import Preprocess

log = logging.getLogger(__name__)

# Most samples from which ranges for 8 bits are determined: all values of all parts are in memory.
MOST_CALIBRATION = 512
BUNDLE = "bundle.json"


def to_engine(
    network: MultiExitNetwork,
    engine: str,
    *,
    example: Any,
    threads: int = 1,
    precision: str = "fp32",
    calibration: Iterable[Any] = (),
    directory: str | Path | None = None,
) -> MultiExitNetwork | EngineNetwork:
    """Make the same network run in another engine.

    Args:
        network: network from `attach_exits`.
        engine: "eager" (the network itself), "compile" (every stage by torch.compile),
            "aoti" (every stage compiled ahead of time), "onnxruntime" or "openvino" (a session per
            stage), "onnxruntime-session" or "openvino-session" (one session with all exits, whose
            answers are read while it runs: faster with many exits, but every head runs and batches
            do not shrink).
        example: a real input; all samples of its batch are used to compare the outputs.
        threads: threads of one operation. "eager" and "compile" use torch's number; with "aoti" it
            must equal torch's.
        precision: "fp32"; for ONNX Runtime and OpenVINO also "int8-dynamic" or "int8-static".
        calibration: batches of inputs for "int8-static", with or without their targets, such as
            those of `data.batches("train", 16)` or a DataLoader; the first 512 samples are used.
        directory: where to keep the files, for `load_engine`; by default they are deleted.
    Returns:
        A network for `Runner`, `profile` and `record`, whose outputs agree with the given one's.
    Raises:
        ExportFailed: if the network cannot be exported, or its outputs differ.
    """
    _check(EngineSettings(engine=engine, precision=precision, threads=threads), ENGINES)
    if engine == "eager":
        return network
    if engine == "compile":
        with evaluating(network):
            facts = NetworkFacts.of(network, example)
            made = compiled(partition(network, example), facts, network.task)
        check_agreement(network, made, example, precision)
        return made
    options: dict[str, Any] = {
        "engine": engine,
        "example": example,
        "threads": threads,
        "precision": precision,
        "calibration": calibration,
    }
    if directory is not None:
        return load_engine(export(network, directory, **options), task=network.task)
    temporary = tempfile.mkdtemp(prefix="impatient-")
    try:
        place = export(network, Path(temporary) / "network", **options)
        made = load_engine(place, task=network.task)
    except BaseException:
        shutil.rmtree(temporary)
        raise
    # Not earlier, because the network without exits is read at its first use.
    weakref.finalize(made, shutil.rmtree, temporary)
    return made


def export(
    network: MultiExitNetwork,
    directory: str | Path,
    *,
    engine: str,
    example: Any,
    threads: int = 1,
    precision: str = "fp32",
    calibration: Iterable[Any] = (),
    costs: CostProfile | None = None,
    policy: Policy | None = None,
    class_names: Sequence[str] = (),
    preprocess: Preprocess | None = None,
    lean: bool = False,
    force: bool = False,
    progress: bool = False,
) -> Path:
    """Write a network to a directory, from which an engine runs it.

    ONNX Runtime and OpenVINO then run it without torch. Nothing is written if the outputs of any
    exit differ from the network's. They are compared with batches of 1, of 3 and of the example's
    size, on the example's samples with noise. In 8 bits they always differ: the difference, without
    noise, is stored in the directory, and a recording shows the effect on accuracy.

    Args:
        network: network from `attach_exits`.
        directory: directory to create.
        engine: an engine of `to_engine` that has files: not "eager" or "compile".
        example: a real input; all samples of its batch are used to compare the outputs.
        threads: threads of one operation; with "aoti" it must equal torch's number.
        precision: "fp32"; for ONNX Runtime and OpenVINO also "int8-dynamic" or "int8-static".
        calibration: batches of inputs for "int8-static", with or without their targets; the first
            512 samples are used.
        costs: profile of this network in this engine (see `add_costs`).
        policy: threshold policy to export with the network. Its score is computed by the files.
        class_names: name of each class, for answers without torch.
        preprocess: what is done to raw inputs, so that the directory takes pictures without torch.
        lean: leave out the backbone without exits, which is only for comparison and takes half of
            the size.
        force: replace an exported network in `directory`.
        progress: whether to show progress bars.
    Returns:
        The directory.
    Raises:
        ExportFailed: if the network cannot be exported, or its outputs differ.
        RunError: if the network is not on the CPU.
        StorageError: if the directory exists already.
    """
    settings = EngineSettings(engine=engine, precision=precision, threads=threads)
    _check(settings, WRITTEN)
    _check_place(Path(directory), force)
    device = next((parameter.device.type for parameter in network.parameters()), "cpu")
    if device != "cpu":
        raise RunError(
            f"the network is on {device}, and {engine} runs on the CPU here; export network.cpu()."
        )
    if engine != "aoti":
        _check_dtypes(network, example, engine)
    samples = samples_of(calibration, input_names(example)) if precision == "int8-static" else []
    rule = None if policy is None else _rule(policy, network.task, settings)
    with evaluating(network), waiting("tracing the network", wanted=progress):
        parts = partition(network, example)
        facts = NetworkFacts.of(network, example)
    scoring = _scoring(network.task, rule)
    about = {
        "costs": costs and _costs_json(costs),
        "policy": rule,
        "class_names": list(class_names),
        "preprocess": None if preprocess is None else to_plain(preprocess),
        "has_classes": network.task.is_logits,
    }

    def write(parts: Parts) -> None:
        with replaced_whole(Path(directory)) as folder:
            _write_parts(
                parts,
                facts,
                folder,
                settings,
                samples,
                scoring,
                whole=not lean,
                progress=progress,
            )
            bundle = _bundle(parts, facts, example, folder, settings) | about
            write_json(folder / BUNDLE, bundle)
            with waiting("comparing it with torch", wanted=progress):
                agreement = _agreement_of(network, folder, example, parts)
            if engine != "aoti":
                copy_standalone(folder)
            write_text(folder / "README.txt", _readme(engine, threads))
            (folder / BUNDLE).unlink()
            checksums = portable.files_below(folder)
            write_json(folder / BUNDLE, {**bundle, "agreement": agreement, "files": checksums})

    try:
        write(parts)
    except ExportFailed as error:
        if not any(parts.length_dims.values()):
            raise
        log.info("token lengths stay those of the example: %s", error)
        with evaluating(network), waiting("tracing the network", wanted=progress):
            fixed = partition(network, example, any_length=False)
        write(fixed)
    return Path(directory)


def _agreement_of(
    network: MultiExitNetwork, folder: Path, example: Any, parts: Parts
) -> list[float]:
    """Compare what was written with the network.

    At half of the token length, too, if it is free.

    Raises:
        ExportFailed: if they differ, or the engine cannot run what was written.
    """
    bundle = read_bundle(folder)
    engine, precision = bundle["engine"], bundle["precision"]
    try:
        made = load_engine(folder, task=network.task)
        agreement = check_agreement(network, made, example, precision)
    except (portable.BundleError, RunError, StorageError) as error:
        raise ExportFailed(f"{engine} cannot run the exported network: {error}") from error
    if engine != "aoti" and any(parts.length_dims[name] for name in parts.wiring.inputs):
        short = _shortened(example)
        try:
            check_agreement(network, made, short, precision)
        except Exception as error:
            # Engines raise errors of many types at a length that they have taken for a constant.
            raise ExportFailed(f"{engine} cannot run texts of other lengths: {error}") from error
    return agreement


def _shortened(example: Any) -> Any:
    """Cut the tokens of an example, and what goes with them, to half of their length."""
    dims = length_dims(example)
    names = input_names(example)
    tensors = input_tensors(example, names)
    cut = {
        name: tensor[:, : max(1, tensor.shape[1] // 2)] if dim else tensor
        for name, tensor, dim in zip(names, tensors, dims, strict=True)
    }
    if isinstance(example, Tensor):
        return cut[names[0]]
    if isinstance(example, Mapping):
        return {**example, **cut}
    return tuple(cut.get(f"x{index}", value) for index, value in enumerate(example))


def _rule(policy: Policy, task: Task, settings: EngineSettings) -> dict[str, Any]:
    """Describe a policy in JSON, and say which file compares outputs, if any does."""
    if settings.engine == "aoti":
        raise RunError(
            "a policy goes with networks that run without torch, and packages of aoti need torch. "
            "Export without it, and give the policy to Runner."
        )
    rule = policy.for_task(task).portable_rule()
    compares = rule["score"] == AGREEMENT
    alone = compares and settings.engine not in portable.SESSIONS
    return {**rule, "compares": compares, "compare": f"{COMPARE}.onnx" if alone else None}


def _scoring(task: Task, rule: Mapping[str, Any] | None) -> Scoring:
    """Find the functions of a policy's score."""
    if rule is None:
        return Scoring()
    if not rule["compares"]:
        return Scoring(of=task.score(rule["score"]))
    if task.distance is None:
        raise TaskError(
            f"task {task.name!r} has no distance, which agreement needs; expected a task with one. "
            "Fit a policy on another score."
        )
    return Scoring(distance=task.distance)


def copy_standalone(folder: Path) -> None:
    """Copy the code that runs an exported network without torch and this package."""
    # The name that run.py imports, and that directories of 0.1.0 have.
    copies = folder / "standalone"
    copies.mkdir()
    for file in Path(portable.__file__).parent.glob("*.py"):
        shutil.copyfile(file, copies / file.name)
    write_text(folder / "run.py", _RUN)


def load_engine(
    directory: str | Path, *, threads: int | None = None, task: Task | None = None
) -> EngineNetwork:
    """Load a network that `export` wrote.

    Args:
        directory: exported directory.
        threads: threads of one operation; the default is the number it was exported with. Packages
            of "aoti" run with that number only.
        task: what the outputs mean; needed only where the task is not ready-made.
    Raises:
        TaskError: if the network was exported with a task of somebody's own, and none is given.
        StorageError: if the directory is not an exported network, or is damaged.
        StaleInput: if it was built for another torch version or thread count, where that matters.
    """
    directory = Path(directory)
    bundle = read_bundle(directory)
    if bundle["engine"] == "aoti":
        _check_files(directory, bundle)
        return load_aoti(directory, task)
    try:
        made = portable.Bundle(directory, threads)
    except portable.BundleError as error:
        raise StorageError(str(error)) from error
    return EngineNetwork(
        _facts(bundle, directory),
        made.parts,
        _exit_free(made),
        EngineSettings(engine=made.engine, precision=bundle["precision"], threads=made.threads),
        arrays="numpy",
        task=task,
    )


def _check_files(directory: Path, bundle: Mapping[str, Any]) -> None:
    """Compare all files with their checksums.

    Raises:
        StorageError: if one was changed.
    """
    checksums = bundle.get("files", {})
    try:
        for name in checksums:
            portable.check_file(directory, name, checksums)
    except portable.BundleError as error:
        raise StorageError(str(error)) from error


def _exit_free(bundle: portable.Bundle) -> Callable[..., Any]:
    """Return the network without exits as a function of positional inputs.

    If it was not exported, this is a run to the last exit.
    """

    def call(*inputs: Any) -> Any:
        x = dict(zip(bundle.wiring.inputs, inputs, strict=True))
        if bundle.description["whole"] is not None:
            return bundle.whole(x)
        *_, last = bundle.exits(x)
        return last.output()

    return call


def read_bundle(directory: str | Path) -> dict[str, Any]:
    """Read the description of an exported directory.

    Raises:
        StorageError: if the directory is not an exported network.
    """
    file = bundle_file(directory)
    if not file.is_file():
        raise StorageError(
            f"{directory} is not an exported network: it has no {BUNDLE}. Make one with `impatient "
            "export`."
        )
    bundle = read_json(file)
    if (
        bundle.get("kind") != "impatient_bundle"
        or bundle.get("schema") != 1
        or bundle.get("engine") not in WRITTEN
        or bundle.get("precision") not in PRECISIONS
    ):
        raise _damaged(directory, f"{BUNDLE} is of another kind, version, engine or precision")
    return bundle


def bundle_file(directory: str | Path) -> Path:
    """Return the path of an exported directory's description."""
    return Path(directory) / BUNDLE


def add_costs(directory: str | Path, costs: CostProfile) -> None:
    """Store a cost profile in an exported directory, for contract runs without torch."""
    write_json(bundle_file(directory), {**read_bundle(directory), "costs": _costs_json(costs)})


def _damaged(directory: str | Path, what: str) -> StorageError:
    return StorageError(
        f"{directory} cannot be loaded: {what}. It was damaged or made by another version; export "
        "it again."
    )


def _check(settings: EngineSettings, engines: Sequence[str]) -> None:
    checks.one_of(RunError, engines, engine=settings.engine)
    checks.one_of(RunError, PRECISIONS, precision=settings.precision)
    portables = (*portable.ENGINES, *portable.SESSIONS)
    if settings.precision != "fp32" and settings.engine not in portables:
        raise RunError(
            f"engine {settings.engine!r} runs in fp32 only; for {settings.precision} use "
            "'onnxruntime' or 'openvino'."
        )
    checks.at_least(RunError, 1, threads=settings.threads or 0)


def _check_dtypes(network: MultiExitNetwork, example: Any, engine: str) -> None:
    """Refuse a network whose numbers are of a type that numpy does not have.

    Raises:
        ExportFailed: if it has parameters, buffers or inputs of such a type.
    """
    inputs = input_tensors(example, input_names(example))
    tensors = itertools.chain(network.parameters(), network.buffers(), inputs)
    for dtype in {tensor.dtype for tensor in tensors}:
        try:
            torch.empty(0, dtype=dtype).numpy()
        except TypeError as error:
            name = str(dtype).removeprefix("torch.")
            raise ExportFailed(
                f"the network or its input is in {name}, which numpy does not have, and {engine} "
                "takes arrays of numpy; export network.float() with example.float(), or use "
                'engine="compile", "aoti" or "eager".'
            ) from error


def samples_of(calibration: Iterable[Any], names: Sequence[str]) -> list[tuple[Tensor, ...]]:
    """Return the inputs of the first batches, without their targets.

    Raises:
        RunError: if there is no batch.
        NetworkError: if a batch has other inputs than the example.
    """
    samples: list[tuple[Tensor, ...]] = []
    count = 0
    for batch in calibration:
        samples.append(tuple(input_tensors(_without_targets(batch, names), names)))
        count += batch_size_of(samples[-1])
        if count >= MOST_CALIBRATION:
            log.info("ranges for 8 bits come from the first %d samples", count)
            break
    if not samples:
        raise RunError(
            "precision='int8-static' without calibration; expected batches of inputs from which to "
            "determine the ranges of features: calibration=[x, ...]."
        )
    return samples


def _without_targets(batch: Any, names: Sequence[str]) -> Any:
    """Return the input of a batch, which data sets give with its targets."""
    if isinstance(batch, Mapping):
        return {name: value for name, value in batch.items() if name in names}
    pair = isinstance(batch, (tuple, list)) and len(batch) == 2
    return batch[0] if pair and set(input_names(batch)) != set(names) else batch


def _check_place(directory: Path, force: bool) -> None:
    if not directory.exists() or (directory.is_dir() and not any(directory.iterdir())):
        return
    if not bundle_file(directory).is_file():
        raise StorageError(
            f"{directory} exists and is not an exported network; choose another place."
        )
    if not force:
        raise StorageError(
            f"{directory} is already an exported network; choose another place, or force=True "
            "(--force)."
        )


def _write_parts(
    parts: Parts,
    facts: NetworkFacts,
    folder: Path,
    settings: EngineSettings,
    samples: Sequence[tuple[Tensor, ...]],
    scoring: Scoring,
    *,
    whole: bool,
    progress: bool,
) -> None:
    if settings.engine == "aoti":
        aoti(parts, facts, folder, threads=settings.threads or 1, progress=progress)
        return
    write_parts(parts, folder, settings.engine, whole=whole, scoring=scoring, progress=progress)
    if settings.precision != "fp32":
        quantise(parts, folder, settings, samples, progress=progress)
    elif settings.engine == "onnxruntime":
        for index, takes in enumerate(parts.wiring.takes):
            names = [name for name in takes if name not in parts.wiring.inputs]
            enter_blocked(folder / f"stage{index}.onnx", names)


def _bundle(
    parts: Parts, facts: NetworkFacts, example: Any, folder: Path, settings: EngineSettings
) -> dict[str, Any]:
    wiring = parts.wiring
    ending = "pt2" if settings.engine == "aoti" else "onnx"
    tensors = zip(wiring.inputs, input_tensors(example, wiring.inputs), strict=True)
    made = provenance(
        network=facts.structure,
        weights=facts.weights,
        engine=engine_label(settings.engine, settings.precision),
        dtype=dtype_of(parts.whole),
        **{**machine("cpu"), "threads": settings.threads},
    )
    return {
        "kind": "impatient_bundle",
        "schema": 1,
        "engine": settings.engine,
        "precision": settings.precision,
        "exits": list(parts.exit_names),
        "num_classes": parts.num_classes,
        "task": facts.task,
        "inputs": [_described(name, value, parts.free_dims(name)) for name, value in tensors],
        "outputs": [
            _described("output", parts.examples[output], parts.free_dims(output))
            for output in wiring.features[-1:]
        ],
        "wiring": dataclasses.asdict(wiring),
        **_files(parts, settings.engine, ending),
        "whole": f"whole.{ending}" if (folder / f"whole.{ending}").is_file() else None,
        "threads": settings.threads,
        "agreement": None,
        "tolerance": tolerance_of(parts.whole) if settings.precision == "fp32" else None,
        "costs": None,
        "policy": None,
        "facts": list(map(dataclasses.asdict, facts.stages)),
        "layouts": list(facts.layouts),
        "provenance": to_plain(made),
    }


def _files(parts: Parts, engine: str, ending: str) -> dict[str, Any]:
    """Return the file names of stages and heads, or of the session."""
    if engine in portable.SESSIONS:
        return {"session": f"session.{ending}"}
    return {
        "stages": [f"stage{index}.{ending}" for index in range(len(parts.stages))],
        "heads": [head and f"head{index}.{ending}" for index, head in enumerate(parts.heads)],
    }


def _described(name: str, value: Tensor, free: FreeDims) -> dict[str, Any]:
    """Describe a tensor.

    Sizes that are free are None.
    """
    return {
        "name": name,
        "dtype": str(value.dtype).removeprefix("torch."),
        "shape": [
            None if dim == free.batch or dim in free.lengths else size
            for dim, size in enumerate(value.shape)
        ],
    }


def _costs_json(costs: CostProfile) -> dict[str, Any]:
    return {
        str(size): {
            "stages": list(map(dataclasses.asdict, batch.stages)),
            "heads": list(map(dataclasses.asdict, batch.heads)),
        }
        for size, batch in costs.batches.items()
    }


def _facts(bundle: Mapping[str, Any], directory: Path) -> NetworkFacts:
    """Read the facts about a network.

    Raises:
        StorageError: if one is missing or of another type.
    """
    for name in ("facts", "layouts", "provenance"):
        if name not in bundle:
            raise _damaged(directory, f"{BUNDLE} lacks {name!r}")
    made = bundle["provenance"] or {}
    stored = {
        "exit_names": bundle["exits"],
        "num_classes": bundle["num_classes"],
        "layouts": bundle["layouts"],
        "stages": bundle["facts"],
        "structure": made.get("network"),
        "weights": made.get("weights"),
        "task": bundle.get("task", "classification"),
    }
    return from_plain(stored, NetworkFacts, where=str(bundle_file(directory)))


_RUN = '''"""Run the network in this directory: python run.py --help.

In Python: from standalone import Bundle.
"""

from pathlib import Path

from standalone.command import main

if __name__ == "__main__":
    main(Path(__file__).resolve().parent)
'''

_PLAIN_README = """A network with exits, exported by impatient for {package}.
It needs Python, numpy and {package}; no torch.

bundle.json describes this directory. FILES

    python run.py --help

In Python, from this folder: `from standalone import Bundle`. Its docstrings say how to use it.
"""
_STAGES = """stageK.onnx computes the features at exit K from those at exit K - 1.
headK.onnx computes the output of exit K from its features; the last stage computes the last output.
whole.onnx, if it is here, is the same network without exits."""
_SESSION = """session.onnx computes the outputs of all exits.
Each output is read as soon as it is complete; its last column repeats the first one.
whole.onnx, if it is here, is the same network without exits."""
_AOTI_README = """A network with exits, compiled ahead of time by torch (AOTInductor).
It runs only with the torch version and the number of threads ({threads}) it was built with:

    import impatient, torch
    torch.set_num_threads({threads})
    network = impatient.load_engine("THIS FOLDER")

The packages are machine code: load only what you have built yourself.
"""


def _readme(engine: str, threads: int) -> str:
    if engine == "aoti":
        return _AOTI_README.format(threads=threads)
    files = _SESSION if engine in portable.SESSIONS else _STAGES
    return _PLAIN_README.replace("FILES", files).format(package=engine.partition("-")[0])
