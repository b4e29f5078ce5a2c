"""The command line: one verb per step, all working on one run directory."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from impatient.errors import ImpatientError, RunError

app = typer.Typer(
    name="impatient",
    help=(
        "Make any PyTorch network anytime: a crude answer early, better ones as time allows, an "
        "answer by the deadline."
    ),
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
# a pipe or a file has no width that tables must fit in
out = Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else 140)
# the shell's own code for a command that Ctrl-C ended
STOPPED = 130
err = Console(stderr=True)

Directory = Annotated[Path, typer.Argument(metavar="DIR", help="The run directory.")]
AnyProfile = Annotated[
    bool,
    typer.Option("--any-profile", help="Use a profile of another machine or version all the same."),
]
Threads = Annotated[int, typer.Option(help="Intra-op threads of torch; 0 leaves its own choice.")]
Engine = Annotated[
    str,
    typer.Option(help="eager, compile, or one that `impatient export` has made in DIR/engines."),
]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress bars.")]
Force = Annotated[bool, typer.Option("--force", help="Do it again although it is up to date.")]


@app.callback()
def _root() -> None:
    """One verb per step."""


def main() -> None:
    """Entry point: errors of ours as one message, Ctrl-C as a clean stop."""
    try:
        code = app(standalone_mode=False)
    except ImpatientError as error:
        err.print(
            f"error ({type(error).__name__}): {error}",
            soft_wrap=True,
            markup=False,
            highlight=False,
        )
        code = 1
    except (KeyboardInterrupt, typer.Abort):
        code = STOPPED
    except Exception as error:
        # click's usage errors
        if hasattr(error, "show") and hasattr(error, "exit_code"):
            error.show()
            sys.exit(error.exit_code)
        raise
    # typer may also turn Ctrl-C into this exit code itself
    if code == STOPPED:
        err.print("\nstopped; what was finished is kept. Run the same command again to go on.")
    sys.exit(code or 0)


@app.command()
def train(
    directory: Directory,
    model: Annotated[
        str,
        typer.Option(
            help="SOURCE:NAME[:key=value,...]: impatient:resnet, torchvision:..., timm:..., "
            "transformers:..., package.module:factory."
        ),
    ] = "impatient:resnet",
    data: Annotated[
        str, typer.Option(help="digits, npz:FILE, imagefolder:DIR or hf:NAME-OR-PATH.")
    ] = "digits",
    exits: Annotated[
        int | None,
        typer.Option(
            help="Number of exits, placed by measured cost; the last is the output. By "
            "default 4; impatient:anytimenet has its own."
        ),
    ] = None,
    after: Annotated[
        str,
        typer.Option(
            help="Instead of --exits: modules to exit after, with commas between, or every:2 for "
            "every second block."
        ),
    ] = "",
    heads: Annotated[
        str | None,
        typer.Option(
            help="linear (the default), relu_linear, mlp, mlp_dropout, flatten, adaptive, "
            "conv1x1, rescale or msdnet."
        ),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(
            help="uniform, linear, half_end, sieve, exp_lin, inverse_square, each with "
            "options (sieve:last_to_early=2,total=all); adaloss; numbers "
            "(1,0.5,1); or a budget in ms: uniform:0:10, small_likely:0:10, "
            "log:FILE, ..., or with a unit: uniform:0:40mmacs, mb, mj. "
            "By default uniform; inverse_square for "
            "impatient:anytimenet."
        ),
    ] = None,
    mode: Annotated[
        str, typer.Option(help="Costs behind a budget's weights: interruptible or contract.")
    ] = "interruptible",
    sampler: Annotated[
        str,
        typer.Option(
            help="Draw an exit that weighs more in each step: none, alternating (AANN), exp3, rwm "
            "or avgl."
        ),
    ] = "none",
    equilibrium: Annotated[
        bool, typer.Option("--equilibrium", help="Balance the gradients of early and later exits.")
    ] = False,
    detach: Annotated[
        float, typer.Option(help="Share of an exit's channels that deeper exits do not train.")
    ] = 0.0,
    distillation: Annotated[
        float, typer.Option(help="Share of early exits' loss that is learning from the last exit.")
    ] = 0.0,
    temperature: Annotated[float, typer.Option(help="Of distillation.")] = 1.0,
    head_decay: Annotated[
        str, typer.Option(help="Weight decay of heads: plain, or scaled by their exits' weights.")
    ] = "plain",
    ensembling: Annotated[
        str,
        typer.Option(
            help="Let exits answer together: boosted, arithmetic, geometric, poe or caching. "
            "boosted is for training; the others, rather for `impatient ensemble`."
        ),
    ] = "",
    epochs: Annotated[int, typer.Option(help="Passes over the training split.")] = 20,
    batch_size: Annotated[int, typer.Option(help="Samples per step and process.")] = 128,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 0.1,
    weight_decay: Annotated[float, typer.Option(help="Of SGD.")] = 5e-4,
    schedule: Annotated[str, typer.Option(help="cosine or step.")] = "cosine",
    regime: Annotated[
        str, typer.Option(help="joint, frozen (heads only) or mixed (backbone first).")
    ] = "joint",
    augment: Annotated[str, typer.Option(help="none, crop or crop-flip.")] = "none",
    label_smoothing: Annotated[float, typer.Option(help="Of the cross-entropy.")] = 0.0,
    channels_last: Annotated[
        bool, typer.Option(help="Memory format of convolutions; usually faster.")
    ] = False,
    exit_free: Annotated[
        bool, typer.Option(help="Also train the backbone without exits, to compare with.")
    ] = True,
    validation: Annotated[
        float, typer.Option(help="Share of the training examples held out.")
    ] = 0.1,
    seed: Annotated[int, typer.Option(help="Of weights, order and splits.")] = 0,
    accelerator: Annotated[
        str, typer.Option(help="As in Lightning Fabric: auto, cpu, cuda, mps.")
    ] = "auto",
    devices: Annotated[int, typer.Option(help="Number of processes, one per device.")] = 1,
    strategy: Annotated[str, typer.Option(help="As in Lightning Fabric: auto, ddp, ...")] = "auto",
    precision: Annotated[
        str, typer.Option(help="As in Lightning Fabric: 32-true, bf16-mixed, 16-mixed, ...")
    ] = "32-true",
    restart: Annotated[
        bool, typer.Option("--restart", help="Throw an earlier run in DIR away.")
    ] = False,
    quiet: Quiet = False,
) -> None:
    """Train a network with exits; go on from the checkpoint if there is one."""
    from impatient import workflow
    from impatient.training.loop import Recipe

    recipe = Recipe(
        epochs=epochs,
        batch_size=batch_size,
        lr=lr,
        weight_decay=weight_decay,
        schedule=schedule,  # type: ignore[arg-type]
        regime=regime,  # type: ignore[arg-type]
        augment=augment,  # type: ignore[arg-type]
        label_smoothing=label_smoothing,
        channels_last=channels_last,
        seed=seed,
        sampler=sampler,
        equilibrium=equilibrium,
        detach=detach,
        distillation=distillation,
        temperature=temperature,
        head_decay=head_decay,  # type: ignore[arg-type]
    )
    plan = workflow.Plan(
        model=model,
        data=data,
        exits=exits,
        after=tuple(name for name in after.split(",") if name),
        heads=heads,
        weights=weights,
        mode=mode,  # type: ignore[arg-type]
        recipe=recipe,
        exit_free=exit_free,
        validation=validation,
        ensembling=ensembling,
        fabric={
            "accelerator": accelerator,
            "devices": devices,
            "strategy": strategy,
            "precision": precision,
        },
    )
    workflow.train(directory, plan, restart=restart, progress=not quiet, say=_say)


@app.command()
def plan(
    model: Annotated[
        str,
        typer.Option(
            help="A network that grows: impatient:anytimenet[:key=value,...], or "
            "package.module:factory of a GrowingNetwork."
        ),
    ] = "impatient:anytimenet",
    data: Annotated[
        str, typer.Option(help="As for train: it decides the size of the input.")
    ] = "digits",
    iterations: Annotated[
        int | None, typer.Option(help="How many, in the order of least overhead.")
    ] = None,
    sizes: Annotated[
        str,
        typer.Option(help="Instead: blocks that the iterations are to have, with commas between."),
    ] = "",
    times_ms: Annotated[
        str, typer.Option(help="Instead: times at which they are to end, with commas between.")
    ] = "",
    batch_size: Annotated[int, typer.Option(help="Samples at a time.")] = 1,
    repeats: Annotated[int, typer.Option(help="Measurements of each block.")] = 200,
    threads: Threads = 0,
) -> None:
    """Measure the blocks of a network that grows, and find the order of growing that costs least."""
    from impatient import assembly, tables
    from impatient.clock import positive_ms

    _use_threads(threads)
    times = [positive_ms(time, "--times-ms") / 1e3 for time in _numbers(times_ms, "--times-ms")]
    found = assembly.plan_growth(
        model,
        data,
        iterations=iterations,
        sizes=_integers(sizes, "--sizes") if sizes else None,
        times_s=times or None,
        batch_size=batch_size,
        repeats=repeats,
    )
    _say(
        tables.growth_table(
            "planned" if found.schedule != found.own_schedule else "the model's own",
            found.costs,
            found.schedule,
        )
    )
    if found.schedule != found.own_schedule:
        _say(tables.growth_table("the model's own", found.own_costs, found.own_schedule))
        _say(f"to train it: schedule={found.schedule}")


@app.command()
def ensemble(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="The run directory to make.")],
    members: Annotated[
        list[Path],
        typer.Argument(metavar="MEMBER...", help="Trained run directories, shallow to deep."),
    ],
    rule: Annotated[
        str,
        typer.Option(
            help="With one member: how its exits answer together: arithmetic, geometric, poe or "
            "caching."
        ),
    ] = "geometric",
    force: Force = False,
) -> None:
    """Make one network of several, run one after the other (EANN), or let the exits of one answer
    together.
    """
    from impatient import assembly

    assembly.ensemble_run(directory, members, rule=rule, force=force, say=_say)


@app.command()
def profile(
    directory: Directory,
    batch_sizes: Annotated[
        str, typer.Option(help="Batch sizes to measure, with commas between.")
    ] = "1",
    repeats: Annotated[int, typer.Option(help="Measurements of each.")] = 300,
    engine: Annotated[
        str,
        typer.Option(
            "--engine",
            "--engines",
            help="Engines to measure, with commas between: eager, compile, or one that `impatient "
            "export` has made in "
            "DIR/engines. Each has its own profile.json.",
        ),
    ] = "eager",
    threads: Annotated[
        str,
        typer.Option(
            help="Thread counts to measure, with commas between; 0 leaves torch's own choice. The "
            "first is that of "
            "profile.json, another that of profile-t2.json."
        ),
    ] = "0",
    force: Force = False,
    quiet: Quiet = False,
) -> None:
    """Measure what every stage and head costs on this machine."""
    from impatient import tables, workflow

    sizes = _integers(batch_sizes, "--batch-sizes")
    counts = _integers(threads, "--threads")
    for count in counts:
        _check_threads(count)
    made = workflow.profile_runs(
        directory,
        engines=engine.split(","),
        threads=counts,
        batch_sizes=sizes,
        repeats=repeats,
        force=force,
        progress=not quiet,
        say=_say,
    )
    for costs in made.values():
        for size in sizes:
            _say(tables.costs_table(costs, size))


@app.command()
def compare(
    a: Annotated[
        Path, typer.Argument(metavar="A", help="A profile, or a directory with a profile.json.")
    ],
    b: Annotated[
        Path,
        typer.Argument(metavar="B", help="Another; how many times as fast it is is what is shown."),
    ],
    any_network: Annotated[
        bool, typer.Option("--any", help="Compare although they are of different networks.")
    ] = False,
) -> None:
    """Compare two profiles exit by exit, and say which differences are more than noise."""
    from impatient import tables, workflow

    first = workflow.load_profile(a)
    second = workflow.load_profile(b)
    rows = first.compare(second, any_network=any_network)
    for name, (one, other) in first.differences(second).items():
        _say(f"{name}: {one} (A), {other} (B)")
    for size in dict.fromkeys(row.batch_size for row in rows):
        _say(
            tables.comparison_table([row for row in rows if row.batch_size == size], first, second)
        )


@app.command()
def record(
    directory: Directory,
    splits: Annotated[
        str, typer.Option(help="Splits to record, with commas between.")
    ] = "validation,test",
    features: Annotated[
        bool, typer.Option("--features", help="Keep pooled features too, for learned gates.")
    ] = False,
    engine: Engine = "eager",
    force: Force = False,
    quiet: Quiet = False,
) -> None:
    """Record the outputs of all exits, so that policies are fitted and judged without the network."""
    from impatient import workflow

    workflow.record_run(
        directory,
        splits=splits.split(","),
        features=features,
        engine=engine,
        force=force,
        progress=not quiet,
        say=_say,
    )


@app.command()
def fit(
    directory: Directory,
    max_loss: Annotated[
        float | None,
        typer.Option(help="Points of accuracy that may be lost against the last exit."),
    ] = None,
    mean_ms: Annotated[float | None, typer.Option(help="Mean time per sample, ms.")] = None,
    mean_mmacs: Annotated[
        float | None, typer.Option(help="Mean millions of multiply-accumulates per sample.")
    ] = None,
    mean_mb: Annotated[
        float | None, typer.Option(help="Mean megabytes that operators read and write per sample.")
    ] = None,
    mean_mj: Annotated[
        float | None, typer.Option(help="Mean millijoules per sample; needs a profile with joules.")
    ] = None,
    cost: Annotated[
        str | None,
        typer.Option(help="What --max-loss is to save: time (the default), macs, bytes or energy."),
    ] = None,
    score: Annotated[
        str, typer.Option(help="max_probability, margin or entropy.")
    ] = "max_probability",
    learner: Annotated[
        str | None,
        typer.Option(
            help="Learn a gate per exit instead of a threshold: logistic, svm, mlp or boosting."
        ),
    ] = None,
    inputs: Annotated[
        str,
        typer.Option(
            help=(
                "What gates look at: confidences; features, before the head is paid (needs "
                "record "
                "--features); or both."
            )
        ),
    ] = "confidences",
    delta: Annotated[
        float | None,
        typer.Option(
            help="Guarantee --max-loss with probability 1 - DELTA, say 0.05: half of the "
            "validation split is kept back to show it."
        ),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="Name of the policy; by default the target.")
    ] = None,
    any_profile: AnyProfile = False,
    threads: Threads = 0,
) -> None:
    """Fit a policy to a target on the validation split; without a target, to lose at most 1 point
    of accuracy.
    """
    from impatient import workflow

    _use_threads(threads)
    if max_loss is mean_ms is mean_mmacs is mean_mb is mean_mj is None:
        max_loss = 1.0
    targets = {
        "max_accuracy_loss": None if max_loss is None else max_loss / 100,
        "mean_time_s": None if mean_ms is None else mean_ms / 1e3,
        "mean_macs": None if mean_mmacs is None else mean_mmacs * 1e6,
        "mean_bytes": None if mean_mb is None else mean_mb * 1e6,
        "mean_energy_j": None if mean_mj is None else mean_mj / 1e3,
    }
    given = _first_given(loss=max_loss, ms=mean_ms, mmacs=mean_mmacs, mb=mean_mb, mj=mean_mj)
    kind = (f"-{cost}" if cost else "") + ("" if learner is None else f"-{learner}-{inputs}")
    policy = workflow.fit_run(
        directory,
        targets=targets,
        score=score,
        cost=cost,  # type: ignore[arg-type]
        learner=learner,
        inputs=inputs,
        delta=delta,
        name=name or given + kind + ("" if delta is None else "-sure"),
        any_profile=any_profile,
        say=_say,
    )
    bounds = getattr(policy, "thresholds", ())[:-1]
    if bounds:
        _say(
            "thresholds: "
            + ", ".join("closed" if bound == float("inf") else f"{bound:.3f}" for bound in bounds)
        )


@app.command()
def select(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="The run directory to make.")],
    members: Annotated[
        list[str],
        typer.Argument(
            metavar="MEMBER...",
            help="Networks from cheap to dear: run directories, "
            "model specs with pretrained weights, or SPEC@FILE.safetensors.",
        ),
    ],
    data: Annotated[
        str,
        typer.Option(
            help="As for train; the networks should not have been trained on its validation split."
        ),
    ] = "digits",
    max_loss: Annotated[
        float | None,
        typer.Option(
            help="Points of accuracy that may be lost against the last network; 1 "
            "unless another target is given."
        ),
    ] = None,
    mean_ms: Annotated[float | None, typer.Option(help="Mean time per sample, ms.")] = None,
    price: Annotated[
        float | None, typer.Option(help="What a second costs, in wrong answers.")
    ] = None,
    topology: Annotated[
        str,
        typer.Option(
            help="Allowed moves: full (to any later network), chain (to the next) or star (from "
            "the first to any)."
        ),
    ] = "full",
    learner: Annotated[str, typer.Option(help="logistic, svm, mlp or boosting.")] = "logistic",
    method: Annotated[
        str, typer.Option(help="Among more than two moves: filter_tree or regression.")
    ] = "filter_tree",
    name: Annotated[
        str | None, typer.Option(help="Name of the policy; by default the target.")
    ] = None,
    validation: Annotated[
        float, typer.Option(help="Share of the training examples held out, to learn on.")
    ] = 0.1,
    seed: Annotated[int, typer.Option(help="Of the splits.")] = 0,
    repeats: Annotated[int, typer.Option(help="Measurements of each network.")] = 300,
    threads: Threads = 0,
    force: Force = False,
    quiet: Quiet = False,
) -> None:
    """Learn which of several networks each sample needs, without training any of them."""
    from impatient import assembly, tables

    _use_threads(threads)
    if max_loss is None and mean_ms is None and price is None:
        max_loss = 1.0
    targets = {
        "max_accuracy_loss": None if max_loss is None else max_loss / 100,
        "mean_time_s": None if mean_ms is None else mean_ms / 1e3,
        "time_price": price,
    }
    given = _first_given(loss=max_loss, ms=mean_ms, price=price)
    evaluation = assembly.select_run(
        directory,
        members,
        data=data,
        validation=validation,
        seed=seed,
        targets=targets,
        name=name or given,
        topology=topology,
        learner=learner,
        method=method,
        repeats=repeats,
        force=force,
        progress=not quiet,
        say=_say,
    )
    _say(tables.evaluation_table(evaluation))
    _say(tables.saving(evaluation, name or given))


@app.command()
def evaluate(
    directory: Directory,
    budget: Annotated[
        str | None,
        typer.Option(
            help="A distribution over budgets in ms, such as uniform:0:10, or in "
            "mmacs, mb or mj: uniform:0:40mmacs."
        ),
    ] = None,
    against: Annotated[
        list[Path] | None,
        typer.Option(
            help="Run directory of a smaller network: its network without exits is "
            "judged, too, and timed in turn with this one. May be given "
            "several times."
        ),
    ] = None,
    real: Annotated[
        int,
        typer.Option(
            help="Also answer so many test samples one by one under every policy, and show what "
            "that "
            "takes beside what was predicted."
        ),
    ] = 0,
    engine: Engine = "eager",
    any_profile: AnyProfile = False,
    threads: Threads = 0,
) -> None:
    """Judge every exit and policy on the test split."""
    from impatient import tables, workflow

    _use_threads(threads)
    evaluation = workflow.evaluate_run(
        directory,
        budget=budget,
        against=against or (),
        real=real,
        engine=engine,
        any_profile=any_profile,
        say=_say,
    )
    _say(tables.evaluation_table(evaluation))
    if engine != "eager":
        _say(tables.engine_accuracy_table(workflow.beside_eager(directory, engine)))
    if real:
        _say(tables.real_table(evaluation))
    _say(tables.budgets_table(evaluation))


@app.command()
def report(directory: Directory, any_profile: AnyProfile = False, threads: Threads = 0) -> None:
    """Write one self-contained HTML page about the run."""
    from impatient import workflow

    _use_threads(threads)
    workflow.report_run(directory, any_profile=any_profile, say=_say)


@app.command()
def run(
    directory: Directory,
    inputs: Annotated[
        list[Path],
        typer.Argument(
            metavar="IMAGE...",
            help="Image files, or .npy files of one raw sample each, without a batch "
            "dimension: pixels of 0 to 255 (uint8) or 0 to 1; they are "
            "standardised here.",
        ),
    ],
    deadline_ms: Annotated[
        float | None, typer.Option(help="Time for each answer, ms; without it, no limit.")
    ] = None,
    policy: Annotated[
        str | None, typer.Option(help="A fitted policy, to stop when going on is not worth it.")
    ] = None,
    when_late: Annotated[
        str, typer.Option(help="When not even the first exit fits: answer or raise.")
    ] = "answer",
    engine: Engine = "eager",
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    any_profile: AnyProfile = False,
    threads: Threads = 0,
) -> None:
    """Answer for images by a deadline."""
    from impatient import tables, workflow
    from impatient.clock import positive_ms

    _use_threads(threads)
    deadline_s = None if deadline_ms is None else positive_ms(deadline_ms, "--deadline-ms") / 1e3
    answers = workflow.answer_files(
        directory,
        inputs,
        deadline_s=deadline_s,
        policy=policy,
        engine=engine,
        any_profile=any_profile,
        when_late=when_late,
    )
    if json:
        typer.echo(workflow.to_json(answers))
    else:
        _say(tables.answers_table(answers))


@app.command()
def export(
    directory: Directory,
    engine: Annotated[
        str,
        typer.Option(
            help="onnxruntime or openvino, which run without torch, a session per stage; with "
            "-session behind the name, one session with all exits; or aoti (torch's compiler, "
            "ahead of time)."
        ),
    ] = "onnxruntime",
    precision: Annotated[
        str,
        typer.Option(
            help="fp32, int8-dynamic (weights and linear layers in 8 bits) or int8-static "
            "(features, too; their ranges come from the training split)."
        ),
    ] = "fp32",
    policy: Annotated[
        str | None, typer.Option(help="A fitted policy of thresholds, to go with it.")
    ] = None,
    place: Annotated[
        Path | None,
        typer.Option("--out", help="Write there instead of DIR/engines/ENGINE[-PRECISION]."),
    ] = None,
    lean: Annotated[
        bool,
        typer.Option("--lean", help="Leave out the network without exits, for comparisons only."),
    ] = False,
    repeats: Annotated[int, typer.Option(help="Measurements of each stage.")] = 300,
    threads: Threads = 0,
    force: Annotated[bool, typer.Option("--force", help="Replace what is there.")] = False,
    quiet: Quiet = False,
) -> None:
    """Export the network to another engine, check that it answers the same, and measure it there."""
    from impatient import tables, workflow

    _use_threads(threads)
    rows = workflow.export_run(
        directory,
        engine=engine,
        precision=precision,
        policy=policy,
        place=place,
        lean=lean,
        repeats=repeats,
        force=force,
        progress=not quiet,
        say=_say,
    )
    _say(tables.engine_times_table(rows))


@app.command()
def demo(
    directory: Annotated[
        Path, typer.Argument(metavar="[DIR]", help="Where to put the run.")
    ] = Path("impatient-demo"),
    epochs: Annotated[int, typer.Option(help="Passes over the training split.")] = 20,
    quiet: Quiet = False,
) -> None:
    """All of it on the digits that come with scikit-learn, from training to answers by deadlines."""
    from impatient import tables, workflow

    rows, samples = workflow.demo(directory, epochs=epochs, progress=not quiet, say=_say)
    _say(tables.deadlines_table(rows, samples))
    _say(f"the report: {(directory / 'report.html').resolve()}")


def _check_threads(threads: int) -> None:
    if threads < 0:
        raise RunError(f"--threads {threads}; expected 1 or more, or 0 for torch's own choice.")


def _use_threads(threads: int) -> None:
    _check_threads(threads)
    if threads:
        import torch

        torch.set_num_threads(threads)


def _first_given(**targets: float | None) -> str:
    """A policy's name by default: what was asked for."""
    return next(f"{kind}-{value:g}" for kind, value in targets.items() if value is not None)


def _integers(text: str, option: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise RunError(
            f"{option} {text!r}; expected whole numbers with commas between, such as 1,8."
        ) from None


def _numbers(text: str, option: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",") if part]
    except ValueError:
        raise RunError(
            f"{option} {text!r}; expected numbers with commas between, such as 1,2.5."
        ) from None


def _say(text: Any) -> None:
    # other processes of the same training stay silent
    if os.environ.get("LOCAL_RANK", "0") == "0":
        # plain text is not markup: paths and shapes have brackets of their own
        out.print(text, soft_wrap=isinstance(text, str), markup=False, highlight=False)


if __name__ == "__main__":
    main()
