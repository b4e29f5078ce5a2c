"""Show what a run directory holds, and what of it is out of date."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import impatient
from impatient.errors import ImpatientError, StaleInput
from impatient.files import is_file
from impatient.table import Cell, Table
from impatient.verbs.imported import ImportedDirectory, opened
from impatient.verbs.options import Directory, VerbOptions
from impatient.verbs.run_directory import RunDirectory

State = Literal["up to date", "out of date", "missing", "unreadable"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ShowOptions(VerbOptions):
    """Show what a run directory holds, and what is out of date."""

    directory: Directory


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One file of a run directory.

    Attributes:
        file: its path in the run directory.
        holds: what is in it, in a few words.
        state: whether it fits the other files.
        why: why it is not up to date.
        command: the command that makes it again; empty if it is up to date.
    """

    file: str
    holds: str
    state: State
    why: str = ""
    command: str = ""


def show(options: ShowOptions) -> list[Entry]:
    """Look at every file of a run directory, and change none.

    Neither the data nor the network are loaded, so that it is quick.

    Raises:
        StorageError: if it is no run directory.
    """
    run = opened(options.directory)
    if isinstance(run, ImportedDirectory):
        source = run.about()
        exits = f"{len(source.exits)} exits, {source.source}"
        entries = [Entry(file=run.imported_file.name, holds=exits, state="up to date")]
    else:
        spec = run.spec()
        exits = f"{spec.model}, {len(spec.after) + 1} exits, {spec.data}"
        entries = [Entry(file="network.json", holds=exits, state="up to date")]
    entries += _of_part(run, spec_file=not run.has_network)
    policies = run.policy_files()
    for name, file in policies.items():
        entries.append(_entry(run, file, functools.partial(_policy, run, name), f"fit {run.path}"))
    if not policies:
        entries.append(_missing(run, run.path / "policies", "a policy", f"fit {run.path}"))
    entries.append(_evaluation(run, run, list(policies)))
    entries.append(_report(run))
    if run.exit_free.is_trained:
        part = run.exit_free
        entries.append(_weights(part, run))
        entries += [
            _entry(run, file, functools.partial(_samples, part, split), f"record {run.path}")
            for split, file in _recordings(part)
        ]
    for folder in sorted(run.path.glob("engines/*/bundle.json")):
        engine = run.engine(folder.parent.name)
        entries += _of_part(engine, spec_file=True)
        if is_file(engine.evaluation_file):
            entries.append(_evaluation(engine, run, list(policies)))
    if (run.path / "replaced").is_dir():
        held = "the run that is being replaced"
        why = "training of the new one has not ended"
        entries.append(
            Entry(
                file="replaced",
                holds=held,
                state="out of date",
                why=why,
                command=f"impatient train {run.path}",
            )
        )
    return entries


def _of_part(run: RunDirectory, *, spec_file: bool) -> list[Entry]:
    """Look at what torch or another engine has measured and recorded."""
    whole = opened(run.path)
    arguments = f"{run.path}{run.arguments}"
    found = [] if spec_file else [_weights(run, whole)]
    profile, record = (
        (f"{verb} {arguments}" if run.has_network else f"import FILE --into {run.path} --force")
        for verb in ("profile", "record")
    )
    found.append(_entry(whole, run.profile_file, lambda: _profile(run), profile))
    recordings = _recordings(run)
    found += [
        _entry(whole, file, functools.partial(_samples, run, split), record)
        for split, file in recordings
    ]
    there = {split for split, _ in recordings}
    found += [
        _missing(whole, run.recording_file(split), f"a recording of {split}", record)
        for split in ("validation", "test")
        if split not in there
    ]
    return found


def _recordings(run: RunDirectory) -> list[tuple[str, Path]]:
    files = sorted((run.here / "recordings").glob("[!.]*.safetensors"))
    return [(file.stem, file) for file in files]


def _entry(run: RunDirectory, file: Path, look: Callable[[], str], command: str) -> Entry:
    """Read a file as the verbs do, and say what comes of it."""
    name = str(file.relative_to(run.path))
    if not file.exists():
        return _missing(run, file, "", command)
    try:
        return Entry(file=name, holds=look(), state="up to date")
    except StaleInput as reason:
        state: State = "out of date"
        why = str(reason)
    except ImpatientError as reason:
        state = "unreadable"
        why = str(reason)
    return Entry(file=name, holds="", state=state, why=why, command=f"impatient {command}")


def _missing(run: RunDirectory, file: Path, what: str, command: str) -> Entry:
    return Entry(
        file=str(file.relative_to(run.path)),
        holds=what,
        state="missing",
        why="it was not made yet",
        command=f"impatient {command}",
    )


def _weights(run: RunDirectory, whole: RunDirectory) -> Entry:
    def look() -> str:
        return f"weights {run.weights_fingerprint()}"

    return _entry(whole, run.weights_file, look, f"train {run.path}")


def _profile(run: RunDirectory) -> str:
    costs = run.profile()
    noise = costs.at(min(costs.batches)).noise
    noisy = ", too noisy for small differences" if noise is not None and noise.too_noisy else ""
    return f"times at batch size {', '.join(map(str, sorted(costs.batches)))}{noisy}"


def _samples(run: RunDirectory, split: str) -> str:
    recording = run.recording(split)
    exits, samples = recording.quality.shape
    features = ", with features" if recording.features else ""
    return f"{samples} samples, {exits} exit{'' if exits == 1 else 's'}{features}"


def _policy(run: RunDirectory, name: str) -> str:
    policy = run.policy(name)
    return policy.summary() or type(policy).__name__


def _evaluation(part: RunDirectory, run: RunDirectory, policies: Sequence[str]) -> Entry:
    command = f"evaluate {part.path}{part.arguments}"

    def look() -> str:
        evaluation = impatient.Evaluation.load(part.evaluation_file)
        evaluation.provenance.require(
            "the evaluation",
            f"run `impatient {command}` again",
            weights=run.weights_fingerprint(),
        )
        judged = {row.name for row in evaluation.of("policy")}
        differing = sorted(judged ^ set(policies))
        if differing:
            raise StaleInput(
                f"it judged other policies than are there: {', '.join(differing)}. Run "
                f"`impatient {command}` again."
            )
        _newer(part.evaluation_file, [part.profile_file, part.recording_file("test")], command)
        return f"{len(evaluation.rows)} ways to answer, {evaluation.samples} samples"

    return _entry(run, part.evaluation_file, look, command)


def _report(run: RunDirectory) -> Entry:
    def look() -> str:
        _newer(run.report_file, [run.evaluation_file], f"report {run.path}")
        return f"{run.report_file.stat().st_size / 1e3:.0f} kB"

    return _entry(run, run.report_file, look, f"report {run.path}")


def _newer(file: Path, sources: Sequence[Path], command: str) -> None:
    """Raise StaleInput if a file was written before what it is made of."""
    written = file.stat().st_mtime_ns
    for source in sources:
        if source.exists() and source.stat().st_mtime_ns > written:
            raise StaleInput(
                f"{file.name} is older than {source.name}. Run `impatient {command}` again."
            )


def shown(_: ShowOptions, entries: Sequence[Entry]) -> Iterator[Table | str]:
    """Give a row per file, why some are not up to date, and what to run next."""
    yield Table(
        title="",
        columns=("file", "holds", "state"),
        left=3,
        rows=[
            (entry.file, entry.holds, Cell(entry.state, strong=entry.state != "up to date"))
            for entry in entries
        ],
    )
    for entry in entries:
        if entry.state in ("out of date", "unreadable"):
            yield f"{entry.file}: {entry.why}"
    # in the order of the steps, so that the first makes what the others need
    commands = dict.fromkeys(entry.command for entry in entries if entry.command)
    if commands:
        yield "next:"
        for command in commands:
            yield f"  {command}"
    else:
        yield "all is up to date"
