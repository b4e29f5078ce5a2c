"""Write the page about a run."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import impatient
from impatient.errors import StorageError
from impatient.files import is_file, write_text
from impatient.verbs.evaluate import beside_eager
from impatient.verbs.network_spec import NetworkSpec
from impatient.verbs.notes import log
from impatient.verbs.options import AnyProfile, Directory, Threads, use_threads
from impatient.verbs.processes import alone
from impatient.verbs.run_directory import RunDirectory

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportOptions:
    """Write one self-contained HTML page about the run."""

    directory: Directory
    any_profile: AnyProfile = False
    threads: Threads = 0


@alone()
def report(options: ReportOptions) -> Path:
    """Write one self-contained HTML page about the run."""
    use_threads(options.threads)
    run = RunDirectory(options.directory)
    if not is_file(run.evaluation_file):
        raise StorageError(
            f"{run.path} has not been evaluated; run `impatient evaluate {run.path}`."
        )
    evaluation = impatient.Evaluation.load(run.evaluation_file)
    spec = run.spec()
    policies = run.policies()
    evaluation.provenance.require(
        "the evaluation",
        f"run `impatient evaluate {run.path}` again",
        weights=run.weights_fingerprint(),
    )
    # others are the standard ones, or cannot be drawn over time
    chosen = (
        (name, budget)
        for name, budget in evaluation.budgets.items()
        if ":" in name and budget.cost == "time"
    )
    early, late = _examples(run, spec, policies)
    page = impatient.evaluation.Report(
        title=run.path.resolve().name,
        evaluation=evaluation,
        costs=run.profile(any_machine=options.any_profile),
        policies=policies,
        chosen_budget=next(chosen, None),
        early=early,
        late=late,
        engines={
            name: (
                beside_eager(run.path, name),
                impatient.Evaluation.load(run.engine(name).evaluation_file),
            )
            for name in run.engine_names()
        },
        facts=_facts(spec),
    )
    write_text(run.report_file, impatient.evaluation.report_html(page))
    log.info("report: %s", run.report_file)
    return run.report_file


def _facts(spec: NetworkSpec) -> dict[str, str]:
    facts = {
        "model": spec.model,
        "members": ", ".join(member.model for member in spec.members),
        "exits after": ", ".join(spec.after),
        "heads": spec.heads,
        "exits answer together": spec.ensembling,
        "data": spec.data,
        "classes": str(spec.num_classes),
        "seed": str(spec.seed),
    }
    optional = ("members", "exits answer together")
    return {name: fact for name, fact in facts.items() if fact or name not in optional}


def _examples(
    run: RunDirectory, spec: NetworkSpec, policies: Mapping[str, impatient.Policy]
) -> tuple[list[impatient.evaluation.Example], list[impatient.evaluation.Example]]:
    """Pick test inputs that left early and late under the first policy."""
    if not policies:
        return [], []
    policy = next(iter(policies.values()))
    recording = run.recording("test")
    data = run.data()
    exits = policy.exits_on(recording)
    score = impatient.policies.scores.SCORES[policy.shown_score()]

    def example(index: int) -> impatient.evaluation.Example:
        exit = int(exits[index])
        output = recording.outputs[exit, index]
        return impatient.evaluation.Example(
            picture=_png(data.examples("test").take([index])[0]) if spec.preprocess.size else None,
            label=spec.class_names[int(recording.labels[index])],
            predicted=spec.class_names[int(output.argmax())],
            exit=exit,
            score=float(score(output)),
        )

    early, late = impatient.evaluation.select_examples(recording, policy)
    return [example(index) for index in early], [example(index) for index in late]


def _png(raw: Tensor) -> bytes | None:
    """Encode a raw input [C, H, W] as PNG if it holds bytes."""
    import torch
    from PIL import Image

    if raw.dtype != torch.uint8 or raw.dim() != 3 or raw.shape[0] not in (1, 3):
        return None
    pixels = raw[0].numpy() if raw.shape[0] == 1 else raw.permute(1, 2, 0).numpy()
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format="PNG")
    return stream.getvalue()
