"""One row per task: trained, recorded, fitted, judged, run, interrupted and exported by commands.

python benchmarks/tasks.py --data FOLDER     about 1.5 hours on one core
python benchmarks/tasks.py --smoke           a minute, on stand-ins, writes no page
python benchmarks/tasks.py --page            writes the page from what is there

Every step is a call of the command line, in this process. What came of a row and a
seed is kept in results/tasks.json, so that a table that was stopped goes on where it
was, on another machine, too; with another recipe a row is made again. What it was made
of lies under runs/bench/tasks.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import task_data
import torch
from common import KEPT, RESULTS, ROOT, commit, facts, write_results
from matplotlib.figure import Figure

import impatient
from impatient import cli
from impatient.evaluation import Evaluation, plots
from impatient.files import read_json, write_json, write_text
from impatient.trees import map_leaves
from impatient.verbs.run_directory import RunDirectory

CURVES = ROOT / "docs" / "img" / "tasks.svg"
PAGE = ROOT / "docs" / "how-to" / "tasks_table.md"
# what came of each row and seed
FOUND = RESULTS / "tasks.json"
TRUST = ("--trust", "task_models")
# test samples that are run one by one
ASKED = 32
ADAM = ("--optimizer", "adamw", "--weight-decay", "0.01")
# with equal weights the last exit of masks is 5 points lower, the first two are the same
HALF_END = ("--weights", "half_end")
Prepare = Callable[[task_data.Source, Path], str]


@dataclass(frozen=True, kw_only=True)
class Case:
    """A row of the table.

    Attributes:
        task: name of the task, with its options.
        words: what is done, and on what data.
        model: spec of the network; "{inputs}" stands for the number of columns.
        data: makes the data, and returns their spec; or the spec.
        train: options of `impatient train`, but for the epochs.
        epochs: passes over the training split.
        score: how sure answers are; the task's first score by default.
        recalibrate: samples per batch of `impatient recalibrate`, where batch norm needs it.
    """

    task: str
    words: str
    model: str
    data: Prepare | str
    train: Sequence[object]
    epochs: int
    score: str = ""
    recalibrate: int = 0

    @property
    def recipe(self) -> str:
        """What a row is made by: rows of another recipe are not this one's."""
        words = [self.task, self.model, *self.train, "--epochs", self.epochs]
        words += ["; recalibrate --batch-size", self.recalibrate] if self.recalibrate else []
        return " ".join(map(str, words))


CASES: Mapping[str, Case] = {
    "digits": Case(
        task="classification",
        words="handwritten digits of scikit-learn",
        model="impatient:resnet:n=1,c=8",
        data="digits",
        train=("--exits", "3", "--batch-size", "64"),
        epochs=20,
    ),
    "cifar": Case(
        task="classification",
        words="CIFAR-10, 5,000 pictures",
        model="impatient:resnet:n=1,c=16",
        data=task_data.cifar,
        train=("--exits", "4", "--augment", "crop-flip"),
        # after 8 the last exit is an epoch behind the network without exits
        epochs=24,
    ),
    "text": Case(
        task="classification",
        words="SST-2, 12,000 sentences with masks; a small BERT",
        model="transformers:BertConfig:vocab_size=4000,hidden_size=64,num_hidden_layers=4,"
        "num_attention_heads=4,intermediate_size=128,max_position_embeddings=64,text=True",
        data=task_data.sentences,
        train=("--exits", "4", *ADAM, "--lr", "0.001", "--batch-size", "64"),
        epochs=3,
    ),
    "labels": Case(
        task="multi_label",
        words="facts about traffic signs, six labels, 4,000 pictures of GTSRB",
        model="impatient:resnet:n=1,c=16",
        data=task_data.signs,
        train=("--exits", "4", "--lr", "0.05"),
        epochs=6,
    ),
    "numbers": Case(
        task="regression",
        words="diabetes of scikit-learn",
        model="task_models:perceptron:inputs=10",
        data=task_data.diabetes,
        train=("--after", "0,1,2", "--lr", "0.02", "--batch-size", "32"),
        # on the validation split both networks are best after 4 to 11
        epochs=10,
        score="agreement",
    ),
    "masks": Case(
        task="segmentation",
        words="three kinds of shapes, drawn on 4,000 pictures of CIFAR-10",
        model="task_models:painter",
        data=task_data.masks,
        train=(
            "--after",
            "0,1,2,3",
            *HALF_END,
            *ADAM,
            "--lr",
            "0.003",
            "--batch-size",
            "64",
        ),
        epochs=18,
    ),
    "lraspp": Case(
        task="segmentation",
        words="the same, 1,000 of twice the size; lraspp of torchvision",
        model="torchvision:lraspp_mobilenet_v3_large:weights_backbone=None",
        data=task_data.large_masks,
        train=("--exits", "3", *ADAM, "--lr", "0.003", "--batch-size", "16"),
        epochs=4,
        # its batch norm has a momentum of 0.01, too slow for so few steps
        recalibrate=16,
    ),
    "boxes": Case(
        task="detection",
        words="the boxes of the same shapes, 2,000 pictures; a small DETR",
        model="task_models:Finder",
        data=task_data.boxes,
        train=(
            "--after",
            "layers.0,layers.1,layers.2",
            *ADAM,
            "--lr",
            "0.002",
            "--batch-size",
            "64",
        ),
        epochs=15,
    ),
    "loop": Case(
        task="regression:scale=0.1",
        words="noise taken from 1,000 pictures of GTSRB; a loop, every turn an exit",
        # corrections that add up go too far at the last turn, once early turns are exits
        model="task_models:Cleaner:anew=True",
        data=task_data.noise,
        train=(
            "--after",
            "calls:turn",
            "--heads",
            "identity",
            *ADAM,
            "--lr",
            "0.003",
            "--batch-size",
            "32",
        ),
        epochs=18,
        score="agreement",
    ),
}


@dataclass
class Log:
    """Commands of one row and seed: what was called, and what was refused.

    Attributes:
        commands: lines as one would type them.
        refused: by verb, the error of a command that failed.
    """

    commands: list[str] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)

    def call(self, verb: str, *arguments: object, may_fail: bool = False) -> str:
        """Run a command in this process.

        Returns what it printed.
        """
        words = ["impatient", verb, *map(str, arguments)]
        self.commands.append(" ".join(words))
        printed, said = io.StringIO(), io.StringIO()
        before = sys.argv
        sys.argv = words
        try:
            with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(said):
                cli.main()
            code = 0
        except SystemExit as exit:
            code = int(exit.code or 0)
        except Exception as error:
            if not may_fail:
                raise
            code = 1
            said.write(f"{type(error).__name__}, which no error of ours says: {error}")
        finally:
            sys.argv = before
        if code and not may_fail:
            raise RuntimeError(f"{' '.join(words)} ended with {code}:\n{said.getvalue()}")
        if code:
            self.refused[verb] = " ".join(said.getvalue().split())
        return printed.getvalue()


def train_case(name: str, seed: int, source: task_data.Source, place: Path, epochs: int) -> None:
    """Train and record one row and seed, with exits and without."""
    case = CASES[name]
    log = Log()
    begin = time.perf_counter()
    spec = case.data if isinstance(case.data, str) else case.data(source, place / name / "data")
    run = place / name / f"seed-{seed}"
    what = ("--data", spec, "--model", case.model, "--task", case.task, *case.train)
    log.call("train", run, *what, "--epochs", epochs, "--seed", seed, "--quiet")
    if case.recalibrate:
        log.call("recalibrate", run, "--batch-size", case.recalibrate, "--quiet", *TRUST)
    log.call("record", run, "--quiet", *TRUST)
    seconds = round(time.perf_counter() - begin, 1)
    found = {"seconds": seconds, "commands": log.commands, "recipe": case.recipe}
    write_json(run / "trained.json", found)


def judge_case(name: str, seed: int, place: Path, repeats: int) -> None:
    """Profile, fit, judge, report, run and interrupt one row and seed."""
    run = place / name / f"seed-{seed}"
    score = CASES[name].score
    log = Log()
    log.call("profile", run, "--threads", 1, "--repeats", repeats, "--quiet", "--force", *TRUST)
    chosen = ("--name", "chosen", *(("--score", score) if score else ()))
    log.call("fit", run, "--max-loss", 1, *chosen, "--threads", 1)
    log.call("evaluate", run, "--threads", 1, *TRUST)
    log.call("report", run, "--threads", 1, *TRUST)
    found = {
        "case": name,
        "seed": seed,
        "recipe": CASES[name].recipe,
        "commit": commit(),
        **_judged(run),
        **_run_by_deadline(run, log),
        **_interrupted(run, log),
        "commands": log.commands,
    }
    write_json(run / "row.json", found)


def export_case(name: str, seed: int, place: Path) -> None:
    """Export one row and seed to ONNX Runtime, answer its test split there, and keep the result."""
    run = place / name / f"seed-{seed}"
    shutil.rmtree(run / "engines", ignore_errors=True)
    engine = ("--engine", "onnxruntime")
    made = ("--repeats", 20, "--threads", 1, "--quiet")
    log = Log()
    log.call("export", run, *engine, *made, *TRUST, may_fail=True)
    if not log.refused:
        log.call("record", run, *engine, "--splits", "test", "--quiet", *TRUST, may_fail=True)
    found: dict[str, Any] = {}
    if not log.refused:
        mine, there = (
            impatient.Recording.load(part / "recordings" / "test.safetensors").quality.mean(1)
            for part in (run, run / "engines" / "onnxruntime")
        )
        found["off"] = float((mine - there).abs().max())
        found |= _run_by_deadline(run, log, *engine)
    write_json(run / "onnx.json", {**found, "commands": log.commands, "refused": log.refused})


def _judged(run: Path) -> dict[str, Any]:
    """Read what was evaluated."""
    evaluation = Evaluation.load(run / "evaluation.json")
    exits = evaluation.of("exit")
    alone = evaluation["no exits, trained alone"]
    chosen = evaluation.of("policy")[0]
    return {
        "quality_name": evaluation.quality_name,
        "samples": evaluation.samples,
        "quality": [row.accuracy.value for row in exits],
        "interval": [[row.accuracy.low, row.accuracy.high] for row in exits],
        "ms": [row.interruptible_s * 1e3 for row in exits],
        "metrics": dict(exits[-1].metrics),
        "alone": alone.accuracy.value,
        "alone_metrics": dict(alone.metrics),
        "alone_ms": alone.contract_s * 1e3,
        "policy": chosen.accuracy.value,
        "policy_time": chosen.contract_s / alone.contract_s,
        "report_kB": (run / "report.html").stat().st_size / 1e3,
    }


def _inputs(run: Path) -> list[Path]:
    """Write the first test samples as files, one each, as one has them for `impatient run`."""
    data = RunDirectory(run, trust=["task_models"]).data()
    raw = data.examples("test")
    folder = run / "inputs"
    folder.mkdir(exist_ok=True)
    files = []
    for index in range(min(ASKED, data.size("test"))):
        one = map_leaves(lambda leaf: leaf[0], raw.take([index]))
        several = isinstance(one, Mapping)
        file = folder / f"{index}.{'npz' if several else 'npy'}"
        if several:
            np.savez(file, **{key: leaf.numpy() for key, leaf in one.items()})
        else:
            np.save(file, one.numpy())
        files.append(file)
    return files


def _run_by_deadline(run: Path, log: Log, *engine: str) -> dict[str, Any]:
    """Ask for test samples one by one, by a deadline that about half of the exits meet."""
    files = _inputs(run)
    ms = Evaluation.load(run / "evaluation.json").of("exit")
    deadline = 1.3 * ms[len(ms) // 2].interruptible_s * 1e3
    limits = ("--deadline-ms", f"{deadline:.3f}", "--threads", 1)
    printed = log.call(
        "run", run, *files, *limits, "--json", *engine, *TRUST, may_fail=bool(engine)
    )
    if log.refused:
        return {}
    answers = json.loads(printed)
    return {
        "deadline_ms": deadline,
        "asked": len(files),
        "met": sum(answer["deadline_met"] for answer in answers),
        "mean_exit": statistics.fmean(answer["exit"] for answer in answers),
    }


def _interrupted(run: Path, log: Log) -> dict[str, Any]:
    """Interrupt runs when half of the time to the last exit is over."""
    half = 0.5 * Evaluation.load(run / "evaluation.json").of("exit")[-1].interruptible_s * 1e3
    asked = ("--interrupt-ms", f"{half:.3f}", "--threads", 1, "--json")
    answers = json.loads(log.call("run", run, *_inputs(run), *asked, *TRUST))
    return {
        "interrupted_exit": statistics.fmean(answer["exit"] for answer in answers),
        "interrupted_within_ms": statistics.median(answer["back_after_ms"] for answer in answers),
    }


# --- what becomes of it ---------------------------------------------------------------------------


def row_of(run: Path) -> dict[str, Any]:
    """Read what came of a row and seed."""
    return {**read_json(run / "row.json"), "onnx": dict(read_json(run / "onnx.json"))}


def kept() -> list[dict[str, Any]]:
    """Read what is kept of rows and seeds."""
    rows = read_json(FOUND)["rows"] if FOUND.is_file() else []
    return [dict(row) for row in rows if row["case"] in CASES]


def is_fresh(row: Mapping[str, Any]) -> bool:
    """Whether a row was made by the recipe that its case has now."""
    return bool(row["recipe"] == CASES[row["case"]].recipe)


def keep(row: Mapping[str, Any]) -> None:
    """Keep a row and seed beside the others, but for those of the same case by another recipe."""
    others = [one for one in kept() if one["case"] != row["case"] or is_fresh(one)]
    rows = {(one["case"], one["seed"]): one for one in (*others, dict(row))}
    order = list(CASES)
    keys = sorted(rows, key=lambda key: (order.index(key[0]), key[1]))
    write_json(FOUND, {"rows": [rows[key] for key in keys]})


def write_page() -> None:
    """Write the CSV, of every exit and seed, and the page."""
    rows = kept()
    flat = [
        {
            "row": row["case"],
            "task": CASES[row["case"]].task,
            "seed": row["seed"],
            "exit": exit,
            "ms": f"{row['ms'][exit]:.4f}",
            "quality": f"{row['quality'][exit]:.5f}",
            "low": f"{row['interval'][exit][0]:.5f}",
            "high": f"{row['interval'][exit][1]:.5f}",
            "alone": f"{row['alone']:.5f}",
            "n": row["samples"],
        }
        for row in rows
        for exit in range(len(row["quality"]))
    ]
    write_results("tasks", "Every task from the command line", f"The table: {PAGE.name}.", flat)
    write_text(PAGE, page(rows))
    with plots.styled():
        plots.save_figure(curves(rows), CURVES)
    print(f"wrote {PAGE}")


def page(rows: Sequence[Mapping[str, Any]]) -> str:
    """Write the table of tasks as a page."""
    grouped = {name: [row for row in rows if row["case"] == name] for name in CASES}
    older = {(row["case"], row["recipe"]) for row in rows if not is_fresh(row)}
    lines = [
        "# Every task from the command line",
        "",
        "Each row was trained twice alike, with exits and without, then profiled, recorded,",
        "fitted, judged, reported, run by a deadline, interrupted and exported, by commands alone.",
        "The report of each row has its curve of quality over time; all curves are below.",
        "Quality is the mean over the test split (see [tasks](tasks.md)), times 100; mean and",
        "standard deviation over the seeds, which draw weights, order and validation split, or the",
        "95 % interval over test samples where there is one seed. The networks are small and were",
        "trained for minutes: the table shows that every step works, and what exits cost, not what",
        "is possible on these data. Rows are kept as they are made, by the commits named below.",
        "Beside its name stand the metrics of the test split at the last exit, and in brackets",
        "those without exits.",
        "",
        "| task | data | n, seeds | quality | first exit | last | without exits | difference |",
        "|---|---|---|---|---|---|---|---|",
        *(_quality_line(name, found) for name, found in grouped.items() if found),
        "",
        "The difference is that of the last exit and the network without exits, seed by seed.",
        "Where it is below 0, exits cost quality. Tried one by one, these were the reasons:",
        "",
        "* A short training: with exits the last one learns about an epoch later. CIFAR-10 lost",
        "  3.7 points in 8 epochs (one seed) and loses none in 24 (three), masks lost 5.5 in 6",
        "  (one) and lose 1.5 in 18 (three).",
        "* A training that is too long on few samples: exits make the network fit them sooner, and",
        "  then too well (diabetes). Train for fewer epochs.",
        "* A loop whose turns add up: what makes a good early turn goes too far at the last one.",
        "  Let each turn correct the input anew.",
        "* Equal weights, where early exits see too little to be good at all: with them masks lost",
        "  10.6 points in 6 epochs (one seed). `--weights half_end` gives the last exit half of",
        "  the weight, as in these rows of masks, see [training](training.md).",
        "",
        "The numbers are in the [lab log](../lab_log.md).",
        "",
        "## Time",
        "",
        "Times are relative to the network without exits, from a profile of batch size 1 on one",
        "thread. The machine had other work to do, so they are rough; ratios are from one profile.",
        "The policy was fitted to lose one point at most against the last exit, on the validation",
        "split; what it lost is of the test split. Deadlines were 1.3 times the time to the middle",
        "exit, and plans reckon with the slowest of a hundred runs, which other work makes slow,",
        "so that answers come early; runs were interrupted at half of the time to the last.",
        "",
        "| task | exits: time and quality | policy: loss, time | deadline met; mean exit | "
        "interrupted: mean exit; back within | ONNX Runtime; deadlines met |",
        "|---|---|---|---|---|---|",
        *(_time_line(name, found) for name, found in grouped.items() if found),
        "",
        "![Quality over time of every row, one line a seed](../img/tasks.svg)",
        "",
        "## What was refused",
        "",
        *_refused(grouped),
        "",
        "## Where this comes from",
        "",
        f"All exits and seeds: [tasks.csv](../../{RESULTS.relative_to(ROOT)}/tasks.csv). "
        f"Rows are of {', '.join(sorted({row['commit'] for row in rows}))}; the page, and those "
        f"made last, are of: {facts()}",
        "",
        "Rows that were read back from a page are rounded as it was, and their runs were",
        "interrupted from Python, as the command line had no word for it then.",
        "",
        *(f"* {name} is by an older recipe: `{recipe}`" for name, recipe in sorted(older)),
    ]
    return "\n".join(lines)


def curves(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw quality over time of every row, and the networks without exits beside it."""
    names = [name for name in CASES if any(row["case"] == name for row in rows)]
    figure = Figure(figsize=(7.2, 2.3 * -(-len(names) // 3)), layout="constrained")
    for place, name in enumerate(names):
        axes = figure.add_subplot(-(-len(names) // 3), 3, place + 1)
        axes.set_title(name, size=9)
        for row in rows:
            if row["case"] == name:
                times = [ms / row["alone_ms"] for ms in row["ms"]]
                axes.plot(times, row["quality"], marker="o", markersize=3, linewidth=1)
                axes.plot(1.0, row["alone"], marker="*", color="#d55e00")
        axes.tick_params(labelsize=7)
    figure.supxlabel("time of the exit / time of the network without exits (star)", size=9)
    figure.supylabel("quality", size=9)
    return figure


def _quality_line(name: str, rows: Sequence[Mapping[str, Any]]) -> str:
    case = CASES[name]
    gaps = [row["quality"][-1] - row["alone"] for row in rows]
    metrics = ", ".join(
        f"{metric} {statistics.fmean(row['metrics'][metric] for row in rows):.3f} "
        f"({statistics.fmean(row['alone_metrics'][metric] for row in rows):.3f})"
        for metric in rows[0]["metrics"]
    )
    cells = [
        f"`{case.task}`",
        case.words,
        f"{rows[0]['samples']}, {len(rows)}",
        rows[0]["quality_name"] + (f"; {metrics}" if metrics else ""),
        _of_exit(rows, 0),
        _of_exit(rows, -1),
        _spread([row["alone"] for row in rows]),
        _spread(gaps, sign="+"),
    ]
    return f"| {' | '.join(cells)} |"


def _of_exit(rows: Sequence[Mapping[str, Any]], exit: int) -> str:
    """Write the quality of an exit with its spread over seeds, or over samples if there is one."""
    if len(rows) > 1:
        return _spread([row["quality"][exit] for row in rows])
    low, high = (100 * end for end in rows[0]["interval"][exit])
    return f"{100 * rows[0]['quality'][exit]:.1f} ({low:.1f} to {high:.1f})"


def _spread(values: Sequence[float], sign: str = "") -> str:
    middle = f"{100 * statistics.fmean(values):{sign}.1f}"
    return f"{middle} ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else middle


def _time_line(name: str, rows: Sequence[Mapping[str, Any]]) -> str:
    exits = "; ".join(
        f"{statistics.fmean(row['ms'][exit] / row['alone_ms'] for row in rows):.2f}: "
        f"{100 * statistics.fmean(row['quality'][exit] for row in rows):.1f}"
        for exit in range(len(rows[0]["quality"]))
    )
    lost = [row["quality"][-1] - row["policy"] for row in rows]
    asked = sum(row["asked"] for row in rows)
    exported = [row["onnx"] for row in rows if not row["onnx"]["refused"]]
    onnx = "refused"
    if exported:
        off = 100 * max(one["off"] for one in exported)
        met = sum(one["met"] for one in exported)
        onnx = f"same within {off:.2g} points; {met} of {sum(one['asked'] for one in exported)}"
    cells = [
        f"{CASES[name].task.partition(':')[0]}, {name}",
        exits,
        f"{_spread(lost, sign='+')}; {statistics.fmean(row['policy_time'] for row in rows):.2f}",
        f"{sum(row['met'] for row in rows)} of {asked}; "
        f"{statistics.fmean(row['mean_exit'] for row in rows):.1f}",
        f"{statistics.fmean(row['interrupted_exit'] for row in rows):.1f}; "
        f"{max(row['interrupted_within_ms'] for row in rows):.1f} ms",
        onnx,
    ]
    return f"| {' | '.join(cells)} |"


def _refused(grouped: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
    said = [
        f"* {name}, `{verb} --engine onnxruntime`: {reason}"
        for name, rows in grouped.items()
        for verb, reason in (rows[0]["onnx"]["refused"].items() if rows else ())
    ]
    return said or ["Nothing."]


def make_row(
    name: str,
    seed: int,
    source: task_data.Source,
    place: Path,
    *,
    smoke: bool = False,
    again: str | None = None,
) -> None:
    """Take the steps of a row and seed that are not done, and the one that is to be done again."""
    run = place / name / f"seed-{seed}"
    begin = time.perf_counter()
    trained = run / "trained.json"
    if trained.is_file() and read_json(trained)["recipe"] != CASES[name].recipe:
        shutil.rmtree(run)
    if not trained.is_file():
        train_case(name, seed, source, place, 1 if smoke else CASES[name].epochs)
    if again == "judge" or not (run / "row.json").is_file():
        judge_case(name, seed, place, 20 if smoke else 200)
    if again == "export" or not (run / "onnx.json").is_file():
        export_case(name, seed, place)
    print(f"{name}, seed {seed}: {time.perf_counter() - begin:.0f} s", flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="folder of archives")
    parser.add_argument("--only", action="append", choices=CASES, help="rows to make")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--smoke", action="store_true", help="one epoch on stand-ins")
    parser.add_argument("--again", choices=("judge", "export"), help="steps to do again")
    parser.add_argument("--page", action="store_true", help="only write the page")
    parser.add_argument("--place", type=Path, default=KEPT / "tasks", help="where runs are kept")
    options = parser.parse_args(arguments)
    if not (options.data or options.smoke or options.page):
        parser.error("--data FOLDER, or --smoke")
    torch.set_num_threads(1)
    names = options.only or list(CASES)
    if options.smoke:
        with tempfile.TemporaryDirectory() as folder:
            for name in names:
                make_row(name, 0, task_data.Source(None, share=0.01), Path(folder), smoke=True)
            print(page([row_of(Path(folder) / name / "seed-0") for name in names]))
        return
    source = task_data.Source(options.data)
    # a whole table of one seed comes before the next seed
    for seed in range(0 if options.page else options.seeds):
        for name in names:
            done = [(row["case"], row["seed"]) for row in kept() if is_fresh(row)]
            if options.again or (name, seed) not in done:
                make_row(name, seed, source, options.place, again=options.again)
                keep(row_of(options.place / name / f"seed-{seed}"))
    write_page()


if __name__ == "__main__":
    main()
