"""Find which architectures of torchvision, timm and transformers take exits.

Writes docs/coverage.md.

    # what works, about ten minutes
    python -m benchmarks.coverage --no-times
    # also what staging costs, on an idle machine; only what is missing runs
    python -m benchmarks.coverage
    # these once more
    python -m benchmarks.coverage --only resnet --again

Each architecture runs in a process of its own with a time limit; its row is in results/coverage.csv
as soon as it is known.
"""

from __future__ import annotations

import argparse
import copy
import csv
import io
import multiprocessing
import random
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.zoo import ARCHITECTURES, Architecture, build, text
from impatient import attach_exits
from impatient.errors import ImpatientError
from impatient.files import write_text
from impatient.inputs import call_model, first_tensor, output_tensor
from impatient.networks import MultiExitNetwork
from impatient.networks.stages import Cut, StagedRun

HERE = Path(__file__).parent
CSV = HERE / "results" / "coverage.csv"
PAGE = HERE.parent / "docs" / "coverage.md"
COUNT = 4
# tokens of padding that are added to texts
PADDING = 5
EXACT = "exact"
OWN = "no: the model's own answer"
RUNS = "runs"
# between several runs of a row
AND = " & "
Row = dict[str, str]

# what is found out, and the column that is empty where it has not been tried
PARTS = {
    "exactness": "gradients",
    "padding": "padding",
    "parts": "exported parts",
    "times": "staged / untouched",
}
# change by padding, as a share of the largest output, that is only rounding
ROUNDING = 1e-4
CHECKS = ("output", "forward()", "exits()", "gradients")
COLUMNS = (
    "library",
    "architecture",
    "spec",
    "task",
    "mechanism",
    "exits after",
    "features",
    *CHECKS,
    "batches shrink",
    "padding",
    "exported parts",
    "staged / untouched",
    "untouched / untouched",
    "reason",
    # the commands that found it out, with commit and date
    RUNS,
)


# --- exactness ------------------------------------------------------------------------------------


def findings(
    architecture: Architecture, wanted: Sequence[str], after: Sequence[str] = ()
) -> Iterator[Row]:
    """Yield findings about an architecture, part by part.

    They end with a "reason" if no exits can be attached.
    Args:
        wanted: some of the PARTS.
        after: where exits were found before; they are looked for if this is empty.
    """
    model = build(architecture)
    x = architecture.batch(3)
    truth = _untouched(model, x) if "exactness" in wanted else None
    try:
        network = attach_exits(
            model,
            example=architecture.batch(2),
            # cuts, for the name alone does not say which call of a module is meant
            after=[Cut.named(name) for name in after] or "auto",
            count=COUNT,
            task=architecture.task,
        ).eval()
    except ImpatientError as error:
        yield {"reason": _first_line(error)}
        return
    if truth:
        yield {
            "mechanism": network.mechanism.split(",")[0],
            "exits after": " ".join(network.exit_names[:-1]),
        }
        yield compare(network, x, truth)
    if "padding" in wanted:
        yield pad(network, x)
    if "parts" in wanted:
        yield export(network, architecture.batch(2), x)
    if "times" in wanted:
        yield measure(network, architecture.batch(1))


@dataclass(frozen=True, slots=True)
class Untouched:
    """What a model gives before it has exits."""

    output: Tensor
    gradients: Mapping[str, Tensor]
    # how far it differs from itself
    again: float


def _untouched(model: nn.Module, x: Any) -> Untouched:
    state = copy.deepcopy(model.state_dict())
    output = _output(model, x)
    gradients = _gradients(model, x, lambda x: output_tensor(call_model(model, x)))
    # the training step has moved batch-norm statistics
    model.load_state_dict(state)
    return Untouched(output, gradients, _difference(output, _output(model, x)))


def compare(network: MultiExitNetwork, x: Any, truth: Untouched) -> Row:
    """Compare outputs and gradients of a network before and after it has exits."""
    with torch.no_grad():
        _seed()
        all_at_once = network(x)
        _seed()
        exits = [(exit.features.shape, exit.output()) for exit in network.exits(x)]
    staged = [answer for _, answer in exits]
    early = max(_difference(one, other) for one, other in zip(all_at_once, staged, strict=True))
    # the last exit has none
    layouts = zip(exits, network.layouts, strict=False)
    row = {
        "features": " ".join(
            f"{'x'.join(map(str, shape[1:]))}:{layout}" for (shape, _), layout in layouts
        ),
        "output": _informative(network, x, staged),
        "forward()": _exactness(_difference(all_at_once[-1], truth.output)),
        "exits()": _exactness(max(early, _difference(staged[-1], truth.output))),
        "batches shrink": "yes" if network.shrinks(x) else "no",
        "gradients": _compare_gradients(
            _gradients(network.backbone, x, lambda x: network(x)[-1]), truth.gradients
        ),
    }
    if truth.again:
        row["reason"] = f"the untouched model differs from itself by {truth.again:.1g}"
    return row


def _compare_gradients(ours: Mapping[str, Tensor], truth: Mapping[str, Tensor]) -> str:
    if truth.keys() != ours.keys():
        return f"{len(ours)} instead of {len(truth)}"
    if sum(bool(gradient.any()) for gradient in truth.values()) < 0.8 * len(truth):
        return "uninformative: most are zero"
    return _exactness(max(_difference(ours[name], gradient) for name, gradient in truth.items()))


def _seed() -> None:
    torch.manual_seed(1)
    # transformers' masks of sound
    np.random.seed(1)
    random.seed(1)


def _output(model: nn.Module, x: Any) -> Tensor:
    _seed()
    with torch.no_grad():
        return output_tensor(call_model(model.eval(), x)).clone()


def _gradients(model: nn.Module, x: Any, run: Callable[[Any], Tensor]) -> dict[str, Tensor]:
    """Compute the gradients of one training step, by parameter and from one seed."""
    model.train()
    model.zero_grad()
    _seed()
    run(x).square().mean().backward()
    model.eval()
    return {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def _informative(network: MultiExitNetwork, x: Any, staged: Sequence[Tensor]) -> str:
    """Tell whether equal outputs are informative.

    They are if they differ between samples and depend on the features at every cut.
    """
    last = staged[-1]
    if not last.isfinite().all():
        return "uninformative: not finite"
    if last.std(dim=0).mean() < 1e-3 * last.abs().mean():
        return "uninformative: the same for every input"
    for cut in network.cuts:
        hook = network.backbone.get_submodule(cut.module).register_forward_hook(_disturb)
        with torch.no_grad():
            disturbed = output_tensor(call_model(network.backbone, x))
        hook.remove()
        if not _difference(disturbed, last) > 1e-5 * float(last.abs().max()):
            return f"uninformative: does not hang on {cut}"
    return "informative"


def _disturb(module: nn.Module, args: Any, output: Any) -> None:  # noqa: ARG001  the signature of a forward hook
    features = first_tensor(output)
    features += features.abs().mean() * torch.randn_like(features)


def _difference(one: Tensor, other: Tensor) -> float:
    return 0.0 if torch.equal(one, other) else (one - other).abs().max().item()


def _exactness(difference: float) -> str:
    return EXACT if difference == 0.0 else f"{difference:.1g}"


def _first_line(error: BaseException) -> str:
    message = str(error).strip().split("\n")[0]
    return f"{type(error).__name__}: {message[:600]}"


# --- padding --------------------------------------------------------------------------------------


def pad(network: MultiExitNetwork, x: Mapping[str, Tensor]) -> Row:
    """Compare the exits of texts in a batch, each alone without padding, and with more of it.

    The figure is the largest change of any exit, divided by the largest output where that is above
    1.
    """
    longer = {name: nn.functional.pad(value, (0, PADDING)) for name, value in x.items()}
    lengths = x["attention_mask"].sum(1).tolist()
    with torch.no_grad():
        together = network(x)
        padded = network(longer)
        alone = [
            network({name: value[row : row + 1, :length] for name, value in x.items()})
            for row, length in enumerate(lengths)
        ]
    changes = [
        max(
            _difference(exit, padded[place]),
            *(_difference(exit[row], one[place][0]) for row, one in enumerate(alone)),
        )
        / max(1.0, float(exit.abs().max()))
        for place, exit in enumerate(together)
    ]
    early, last = max(changes[:-1]), changes[-1]
    if last > ROUNDING:
        said = f"{OWN} changes by {last:.1g}, early ones by {early:.1g}"
        return {"padding": said}
    return {"padding": _exactness(max(changes)) if early <= ROUNDING else f"no: {early:.1g}"}


# --- parts and times ------------------------------------------------------------------------------


def export(network: MultiExitNetwork, example: Any, x: Any) -> Row:
    """Export the parts of a network and run them one after the other.

    The result is the largest difference of any exit.
    """
    from impatient.engines.partition import input_tensors, partition
    from impatient.portable import StagedRun

    try:
        parts = partition(network, example)
        with torch.no_grad():
            run = StagedRun(
                parts.wiring, parts.stages, parts.heads, input_tensors(x, parts.wiring.inputs)
            )
            got = [exit.output() for exit in run]
            truth = network(x)
    except Exception as error:
        return {"exported parts": f"no: {_first_line(error)}"}
    differences = [_difference(one, other) for one, other in zip(got, truth, strict=True)]
    return {"exported parts": _exactness(max(differences) / max(1.0, float(truth[-1].abs().max())))}


def measure(network: MultiExitNetwork, x: Any, seconds: float = 2.0, most: int = 100) -> Row:
    """Measure the time of all stages without heads over the untouched model's.

    It is the median of paired, interleaved ratios.
    """
    from benchmarks.common import in_turn, with_interval

    cuts = network._cut_map()
    heads = [None] * network.num_exits

    def untouched() -> object:
        return call_model(network.backbone, x)

    def staged() -> object:
        return list(StagedRun(network.backbone, x, cuts, heads))

    with torch.inference_mode():
        times = in_turn(
            {"untouched": untouched, "again": untouched, "staged": staged},
            rounds=most,
            most_s=seconds,
        )
    return {
        "staged / untouched": with_interval(times["staged"] / times["untouched"], 3),
        "untouched / untouched": with_interval(times["again"] / times["untouched"], 3),
    }


# --- one process per architecture -----------------------------------------------------------------


def apart(
    architecture: Architecture, wanted: Sequence[str], after: Sequence[str], limit_s: float
) -> Row:
    """Run `findings` in a forked process.

    The findings have a "reason" if it failed, died or took too long.
    """
    # the libraries are imported once, here
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(architecture, wanted, after, sender), daemon=True)
    process.start()
    sender.close()
    row: Row = {}
    deadline = time.monotonic() + limit_s
    try:
        while receiver.poll(max(0.0, deadline - time.monotonic())):
            row |= receiver.recv()
        row["reason"] = f"took longer than {limit_s:.0f} s"
    except EOFError:
        # it has ended
        process.join()
        if process.exitcode:
            row["reason"] = f"its process died with exit code {process.exitcode}"
    finally:
        process.kill()
        process.join()
        receiver.close()
    return row


def _send(
    architecture: Architecture, wanted: Sequence[str], after: Sequence[str], sender: Connection
) -> None:
    # the libraries' own
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    try:
        for found in findings(architecture, wanted, after):
            sender.send(found)
    except Exception as error:
        sender.send({"reason": _first_line(error)})


def import_libraries() -> None:
    from impatient.networks.specs import import_torchvision

    import_torchvision()
    import timm  # noqa: F401
    import transformers

    transformers.logging.set_verbosity_error()


def cover(
    architecture: Architecture, known: Row, parts: Sequence[str], limit_s: float, run: str
) -> Row:
    """Find out what a row does not have yet.

    Args:
        run: what is said of this run in the row.
    """
    row = {
        "library": architecture.library,
        "architecture": _title(architecture),
        "spec": architecture.spec,
        "task": architecture.task,
        **known,
    }
    wanted = [
        part
        for part in parts
        if not row.get(PARTS[part]) and (part != "padding" or architecture.batch is text)
    ]
    # else no exits can be attached
    if wanted and ("exactness" in wanted or row.get("mechanism")):
        after = [] if "exactness" in wanted else row["exits after"].split()
        row |= apart(architecture, wanted, after, limit_s)
        runs = [before for before in _runs(row) if before != run]
        row[RUNS] = AND.join([*runs, run])
    return row


def _runs(row: Row) -> list[str]:
    return row[RUNS].split(AND) if row.get(RUNS) else []


def _this_run() -> str:
    from benchmarks.common import commit

    command = " ".join(["python -m benchmarks.coverage", *sys.argv[1:]])
    return f"commit {commit()}, {datetime.now(UTC):%Y-%m-%d}, `{command}`"


def _title(architecture: Architecture) -> str:
    options = architecture.spec.split(":")[2:]
    name = architecture.name.removesuffix("Config")
    says = [option for option in options if option != "weights_backbone=None"]
    return f"{name} ({says[0]})" if says and architecture.library == "torchvision" else name


# --- rows and page --------------------------------------------------------------------------------


def read_rows() -> dict[str, Row]:
    if not CSV.exists():
        return {}
    with CSV.open(newline="") as file:
        return {
            row["spec"]: {name: value for name, value in row.items() if value}
            for row in csv.DictReader(file)
        }


def write_rows(rows: Mapping[str, Row]) -> None:
    stream = io.StringIO()
    table = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
    table.writeheader()
    table.writerows(rows[spec] for spec in _in_order(rows))
    write_text(CSV, stream.getvalue())


def _in_order(rows: Mapping[str, Row]) -> list[str]:
    return [architecture.spec for architecture in ARCHITECTURES if architecture.spec in rows]


def works(row: Row) -> bool:
    """Tell whether exits were attached and all informative comparisons are exact."""
    return row.get("output") == "informative" and all(row.get(name) == EXACT for name in CHECKS[1:])


TEXT = """# Coverage

What `attach_exits(model, example=x, count=4)` does with models that were not prepared for it.
Places are found by structure and measured time (`after="auto"`). The models have random weights and
small inputs. They are the smallest sensible variants; those of transformers have small
configurations of about four layers. There is one row per architecture, also in
`benchmarks/results/coverage.csv` with its spec, which `load_model` takes.

* **Mechanism**: the untouched forward runs in a greenlet, which is paused in a hook at each cut.
  **Exits after**: the modules whose features the first three heads read. The fourth exit is the
  model's own output.
* **forward()** and **exits()**: the last output is compared with that of the model before it had
  exits, in eval mode. For `exits()`, every early output is compared with that of `forward()`, too.
  *Exact* is `torch.equal`; a number is the largest difference.
* **Gradients**: those of every parameter in one training step through the last exit are compared
  with the model before it had exits, with dropout and stochastic depth from one seed.
* These comparisons are *informative*: zero-initialised heads and tiny layer scales are replaced by
  random values, batch-norm statistics are those of the data, and the output differs between inputs
  and changes when the features at any of the cuts are disturbed. Otherwise the row says so.
* **Batches shrink**: whether finished samples can be taken out of a running batch
  (`network.shrinks(x)`).
* **Padding**: three texts, one of them padded, are compared with each alone without padding, and
  with five more tokens of padding, by their attention mask. The figure is the largest change of
  any exit, divided by the largest output where that is above 1; up to 1e-4 is rounding.
* **Task**: what the outputs mean. Early heads of segmentation give maps.
* **Exported parts**: the network is cut into one graph per stage by `torch.export`, and the parts
  run one after the other at another batch size than the exported one. The figure is the largest
  difference of any exit, divided by the largest output where that is above 1.
* **Staging**: time of all stages without heads over that of the untouched model, at batch size 1
  with one thread. It is the median of paired interleaved ratios with its 95 % interval, beside the
  same ratio of the untouched model with itself.
"""


def page(rows: Mapping[str, Row]) -> str:
    """Write the coverage page."""
    from benchmarks.common import facts

    listed = [rows[spec] for spec in _in_order(rows)]
    parts = [row for row in listed if row.get("exported parts")]
    exported = sum(not row["exported parts"].startswith("no") for row in parts)
    count = (
        f"**{sum(map(works, listed))} of {len(listed)} architectures work**: four exits found, and "
        "the rest as it should be."
    )
    texts = [row["padding"] for row in listed if row.get("padding")]
    if texts:
        same = sum(not said.startswith("no") for said in texts)
        own = sum(said.startswith(OWN) for said in texts)
        count += (
            f" **{same} of {len(texts)}** models of texts answer alike at any padding; in {own} it "
            "changes the model's own answer, too."
        )
    if parts:
        count += f" **{exported} of {len(parts)}** can be exported as parts."
    tables = [
        _table(library, [row for row in listed if row["library"] == library])
        for library in dict.fromkeys(row["library"] for row in listed)
    ]
    libraries = ", ".join(
        f"{name} {metadata.version(name)}" for name in ("torchvision", "timm", "transformers")
    )
    counted = Counter(run for row in listed for run in _runs(row))
    runs = [f"* rows of {times}: {run}" for run, times in counted.items()]
    said = ["## Where this comes from", "", *runs, "", f"Written with {libraries}; {facts()}"]
    return "\n".join([TEXT, count, "", *tables, *said, ""])


def _table(library: str, rows: Sequence[Row]) -> str:
    hidden = ("library", "spec", "mechanism", "features", "output", "reason", RUNS)
    shown = [name for name in COLUMNS if name not in hidden and any(row.get(name) for row in rows)]
    lines = [f"## {library}", "", "| " + " | ".join(shown) + " |", "|" + "---|" * len(shown)]
    lines += ["| " + " | ".join(_cell(row.get(name, "")) for name in shown) + " |" for row in rows]
    reasons = [
        f"* {row['architecture']}: {reason}" for row in rows for reason in [_reason(row)] if reason
    ]
    return "\n".join([*lines, "", *reasons, *[""] * bool(reasons)])


def _cell(value: str) -> str:
    return "no" if value.startswith("no:") else value.replace("|", "\\|")


def _reason(row: Row) -> str:
    """Why a row is not as it should be."""
    texts = [row.get("reason", ""), *(row.get(name, "") for name in ("output", "gradients"))]
    padding = row.get("padding", "")
    export = row.get("exported parts", "")
    found = [text for text in texts if text not in ("", "informative") and not _is_number(text)]
    found += [f"padding: {padding.removeprefix('no: ')}"] if padding.startswith("no") else []
    found += [f"no export: {export.removeprefix('no: ')}"] if export.startswith("no") else []
    return "; ".join(found)


def _is_number(text: str) -> bool:
    return text == EXACT or text.replace(".", "").replace("e-", "").isdigit()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--no-times",
        action="store_true",
        help="leave out what staging costs, which needs an idle machine",
    )
    parser.add_argument("--no-parts", action="store_true", help="leave out the export")
    parser.add_argument("--padding", action="store_true", help="only compare texts by padding")
    parser.add_argument("--only", default="", help="those whose spec contains this")
    parser.add_argument("--again", action="store_true", help="throw away what is known of them")
    parser.add_argument("--limit", type=float, default=120.0, help="seconds per architecture")
    arguments = parser.parse_args()
    left_out = {"times"} if arguments.no_times else set()
    left_out |= {"parts"} if arguments.no_parts else set()
    parts = ["padding"] if arguments.padding else [part for part in PARTS if part not in left_out]
    chosen = [architecture for architecture in ARCHITECTURES if arguments.only in architecture.spec]
    rows = {} if arguments.again and not arguments.only else read_rows()
    import_libraries()
    run = _this_run()
    for number, architecture in enumerate(chosen, 1):
        known = {} if arguments.again else rows.get(architecture.spec, {})
        rows[architecture.spec] = cover(architecture, known, parts, arguments.limit, run)
        write_rows(rows)
        row = rows[architecture.spec]
        print(
            (
                f"{number}/{len(chosen)} {row['architecture']}: "
                f"{'works' if works(row) else _reason(row) or row}"
            ),
            flush=True,
        )
    write_text(PAGE, page(rows))
    print(f"wrote {CSV} and {PAGE}")


if __name__ == "__main__":
    main()
