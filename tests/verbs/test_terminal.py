"""What the terminal shows: tables as wide as it is, JSON for scripts, no colours in pipes."""

import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from command_line import TINY, Call, run_command_line
from impatient import CostProfile, Evaluation, cli, progress
from impatient.evaluation import tables
from impatient.evaluation.report import select_examples
from impatient.files import read_json, write_json
from impatient.table import Cell, Column, Table
from impatient.terminal import rich_table
from impatient.verbs.as_json import to_json
from impatient.verbs.run_directory import RunDirectory

EXAMPLE = Path(__file__).parents[2] / "examples" / "cifar10"


def printed(table: Table, width: int) -> list[str]:
    stream = io.StringIO()
    Console(width=width, file=stream).print(rich_table(table, width))
    return [line.rstrip() for line in stream.getvalue().splitlines()]


def the_tables() -> list[Table]:
    evaluation = Evaluation.load(EXAMPLE / "evaluation.json")
    costs = CostProfile.load(EXAMPLE / "profile.json")
    return [
        tables.evaluation_table(evaluation),
        tables.budgets_table(evaluation),
        tables.costs_table(costs, 1),
    ]


@pytest.mark.parametrize("width", [80, 100, 140])
def test_numbers_are_whole_at_every_width(width: int) -> None:
    for table in the_tables():
        lines = printed(table, width)
        assert max(map(len, lines)) <= width
        text = "\n".join(lines)
        for row in table.rows:
            number = row[1] if isinstance(row[1], str) else row[1].text
            assert number in text


def test_standard_budgets_are_called_in_words() -> None:
    titles = [column.text for column in the_tables()[1].columns[1:]]
    assert titles == ["uniform", "small budgets likely", "large budgets likely", "normal"]


def test_a_narrow_terminal_leaves_optional_columns_out_and_says_so() -> None:
    table = the_tables()[0]
    narrow = " ".join(" ".join(printed(table, 80)).split())
    assert "not shown at this width: interruptible, ms, MACs, calibration error" in narrow
    assert "95 % interval" in narrow
    assert "not shown" not in " ".join(printed(table, 200))


def test_details_stand_beside_their_cells_or_below_them() -> None:
    table = Table(title="", columns=("name", "value"), rows=[("a", Cell("57 %", "56 to 58 %"))])
    assert any("57 % (56 to 58 %)" in line for line in printed(table, 80))
    below = printed(table, 16)
    assert [line.split()[-1] for line in below if "%" in line] == ["%", "%"]
    assert not any("(" in line for line in below)


def test_optional_columns_go_one_by_one_from_the_right() -> None:
    columns = ["name", *(Column(f"c{k}", optional=True) for k in range(6))]
    table = Table(title="", columns=columns, rows=[("a", *("12345678",) * 6)])
    shown = [sum(f"c{k}" in printed(table, width)[0] for k in range(6)) for width in (70, 46, 26)]
    assert shown == [6, 4, 2]


def test_json_has_no_infinities_and_no_nan() -> None:
    assert json.loads(to_json([math.inf, -math.inf, math.nan, 0.5])) == ["inf", "-inf", None, 0.5]


def test_what_has_no_json_is_refused() -> None:
    with pytest.raises(TypeError, match="object has no JSON"):
        to_json(object())


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the error stream pass for a terminal."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")


@pytest.mark.usefixtures("terminal")
def test_progress_says_what_how_far_and_how_fast() -> None:
    with progress.display(wanted=True) as shown:
        shown.console.file = io.StringIO()
        task = shown.add_task("recording", total=10, unit="batches", note="loss 0.5")
        shown.update(task, completed=4)
        text = "".join(part.text for part in shown.console.render(shown.get_renderable()))
    for word in ("recording", "40%", "loss 0.5"):
        assert word in text


def test_progress_disappears_where_it_is_not_wanted(capsys: pytest.CaptureFixture[str]) -> None:
    given = progress.tracked(range(5), "counting", total=5, unit="numbers", wanted=False)
    assert list(given) == list(range(5))
    captured = capsys.readouterr()
    assert captured.out + captured.err == ""


def test_nothing_is_written_into_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    with progress.waiting("for something", wanted=True):
        pass
    assert capsys.readouterr().err == ""


@pytest.mark.usefixtures("terminal")
def test_while_something_is_timed_no_thread_draws(capsys: pytest.CaptureFixture[str]) -> None:
    before = threading.active_count()
    given = progress.tracked(range(3), "timing", total=3, unit="runs", wanted=True, between=True)
    for _ in given:
        assert threading.active_count() == before
    with progress.display(wanted=True):
        assert threading.active_count() > before


def test_work_that_is_done_again_and_again_is_counted(capsys: pytest.CaptureFixture[str]) -> None:
    with progress.counted(divmod, "dividing", total=3, unit="numbers", wanted=False) as divided:
        assert [divided(number, 2) for number in (1, 2, 3)] == [(0, 1), (1, 0), (1, 1)]
    assert capsys.readouterr().err == ""


# --- on a real run --------------------------------------------------------------------------------


RUN = "the run directory"
NEW = "a new one"
BLOCKS = ["--model", "impatient:anytimenet:width=2", "--repeats", 5, "--quiet"]
RUNS = {
    "train": [RUN, *TINY],
    "profile": [RUN, "--repeats", 20, "--quiet"],
    "record": [RUN, "--quiet"],
    "fit": [RUN, "--max-loss", 3],
    "evaluate": [RUN],
    "report": [RUN],
    "show": [RUN],
    "describe": [RUN],
    "compare": [RUN, RUN],
    "tune": [RUN, "--settings", "gc", "--runs", 20, "--quiet"],
    "tail": [RUN, "--runs", 1000, "--deadline-ms", 5, "--quiet"],
    "recalibrate": [RUN, "--quiet"],
    "ensemble": [NEW, RUN],
    "plan": BLOCKS,
    "export": [RUN, "--repeats", 20, "--quiet"],
    "select": [NEW, RUN, RUN, "--repeats", 20, "--quiet"],
    "demo": [NEW, "--epochs", 1, "--quiet"],
}
LONG = ("export", "select", "demo")


@pytest.mark.parametrize(
    "verb",
    ["profile", "evaluate", "show", "describe", "compare", "tail", "tune", "recalibrate", "plan"],
)
def test_tables_of_every_verb_are_whole_in_80_columns(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    tables: list[Table] = []
    monkeypatch.setattr(
        cli, "print_part", lambda part: tables.append(part) if isinstance(part, Table) else None
    )
    arguments = [run_dir if part == RUN else part for part in RUNS[verb]]
    assert run_command_line(monkeypatch, verb, *arguments) == 0
    assert tables
    for table in tables:
        lines = printed(table, 80)
        assert max(map(len, lines)) <= 80
        words = " ".join(lines).split()
        must = [
            index
            for index, column in enumerate(table.columns)
            if index >= table.left and not isinstance(column, Column)
        ]
        for row in table.rows:
            for cell in (row[index] for index in must):
                text = cell if isinstance(cell, str) else cell.text
                # nothing is cut off or folded
                assert set(text.split()) <= set(words), (verb, text)


SHOWN = {
    "profile": ("profiling batch size 1", [RUN, "--force", "--repeats", 20]),
    "record": ("recording test", [RUN, "--force", "--splits", "test"]),
    "recalibrate": ("recalibrating", [RUN]),
    "fit": ("fitting gates", [RUN, "--mean-ms", 1000, "--learner", "logistic"]),
    "evaluate": ("answering", [RUN, "--real", 20]),
    "plan": ("timing blocks", BLOCKS[:-1]),
}


@pytest.mark.usefixtures("terminal")
@pytest.mark.parametrize("verb", SHOWN)
def test_long_verbs_show_their_progress_unless_asked_not_to(
    call: Call, run_dir: Path, verb: str
) -> None:
    description, arguments = SHOWN[verb]
    command = [run_dir if part == RUN else part for part in arguments]
    code, text = call(verb, *command)
    assert code == 0, text
    assert description in text
    code, text = call(verb, *command, "--quiet")
    assert code == 0, text
    assert description not in text


@pytest.mark.parametrize(
    "verb", [pytest.param(verb, marks=pytest.mark.slow) if verb in LONG else verb for verb in RUNS]
)
def test_every_verb_prints_json(
    run_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    verb: str,
) -> None:
    places = {RUN: run_dir, NEW: tmp_path / "new"}
    arguments = [places.get(part, part) for part in RUNS[verb]]
    code = run_command_line(monkeypatch, verb, *arguments, "--json")
    printed = capsys.readouterr()
    assert code == 0, printed.err
    value = json.loads(printed.out)
    assert value
    if verb == "evaluate":
        assert {row["name"] for row in value["rows"]} >= {"exit 0", "oracle"}
    if verb == "show":
        assert {entry["state"] for entry in value} <= {"up to date", "out of date", "missing"}
    if verb == "fit":
        assert value["thresholds"][-1] == "-inf"
    if verb == "describe":
        assert sum(p["stage_share"] + p["head_share"] for p in value["parts"]) == pytest.approx(1)


def test_piped_output_has_no_colours(run_dir: Path) -> None:
    for verb in ("show", "describe", "evaluate"):
        result = subprocess.run(
            [sys.executable, "-m", "impatient.cli", verb, str(run_dir)],
            capture_output=True,
            check=False,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert result.returncode == 0, result.stderr
        assert b"\x1b" not in result.stdout + result.stderr


# --- the report -----------------------------------------------------------------------------------


def test_a_report_shows_other_runs_beside_it(call: Call, run_dir: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(run_dir, tmp_path / "the other run"))
    code, _ = call("report", run_dir, "--beside", other)
    page = (run_dir / "report.html").read_text("utf-8")
    assert code == 0
    content = json.loads(re.findall(r'id="data">(.*?)</script>', page, re.DOTALL)[0])
    (beside,) = content["compared"]
    assert beside["name"] == "the other run"
    assert len(beside["exits"]) == 3
    assert {policy["name"] for policy in beside["policies"]} == {"loss-2", "ms-1000"}
    assert "Beside others" in page


def test_only_runs_on_the_same_data_stand_beside_each_other(
    call: Call, run_dir: Path, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(run_dir, tmp_path / "other"))
    evaluation = read_json(other / "evaluation.json")
    evaluation["provenance"]["data"] = "others"
    write_json(other / "evaluation.json", evaluation)
    code, text = call("report", run_dir, "--beside", other)
    assert (code, "compare runs on the same data" in text) == (1, True)
    (other / "evaluation.json").unlink()
    code, text = call("report", run_dir, "--beside", other)
    assert (code, "has not been evaluated" in text) == (1, True)
    code, text = call("report", tmp_path / "nowhere")
    assert (code, "is no run directory" in text) == (1, True)


def test_the_report_draws_the_network_and_shows_samples(run_dir: Path) -> None:
    page = (run_dir / "report.html").read_text("utf-8")
    assert 'aria-label="The network: 3 stages' in page
    run = RunDirectory(run_dir)
    chosen = select_examples(run.recording("test"), run.policy("loss-2"))
    assert page.count("data:image/png;base64,") == sum(map(len, chosen)) >= 8
    content = json.loads(re.findall(r'id="data">(.*?)</script>', page, re.DOTALL)[0])
    for example in content["examples"]:
        for answer in example["answers"]:
            assert answer["said"] == answer["top"][0][0]
            assert sum(share for _, share in answer["top"]) <= 1.001


def test_names_cannot_control_the_terminal(call: Call, run_dir: Path, tmp_path: Path) -> None:
    wild = "ant\x1b[2J\x9b2J\u202e"
    spec = read_json(run_dir / "network.json")
    write_json(run_dir / "network.json", spec | {"class_names": [wild] * 10})
    np.save(tmp_path / "x.npy", np.zeros((1, 8, 8), np.uint8))
    for more in ([], ["--json"]):
        code, text = call("run", run_dir, tmp_path / "x.npy", *more)
        assert code == 0
        assert r"ant\u001b[2J\u009b2J\u202e" in text
        assert not set(text) & set(wild) - set("ant[2J")
    assert json.loads(text)[0]["answer"] == wild
    # names that are no text cannot be printed at all
    code, text = call("run", run_dir, tmp_path / "\udcffx\x1b[2J.npy")
    assert (code, r"\udcffx\u001b[2J.npy" in text) == (1, True)


@pytest.mark.parametrize("verb", ["show", "describe", "evaluate", "report", "fit"])
def test_hostile_directories_and_specs_are_text(
    call: Call, run_dir: Path, tmp_path: Path, verb: str
) -> None:
    wild = "a\u202eb[red]\u2066<script>{{7*7}}\x1b[2J:warning:'\""
    place = Path(shutil.copytree(run_dir, tmp_path / wild))
    if verb == "show":
        write_json(place / "network.json", read_json(place / "network.json") | {"data": wild})
    more = ["--max-loss", "5"] if verb == "fit" else []
    code, text = call(verb, place, *more)
    assert code == 0, text
    assert not set("\u202e\u2066\x1b") & set(text)
    if verb != "describe":
        assert r"a\u202eb[red]\u2066" in "".join(text.split())
    if verb == "report":
        page = (place / "report.html").read_text("utf-8")
        assert not set("\u202e\u2066\x1b") & set(page)
        assert "<script>{{" not in page
        assert "&lt;script&gt;{{7*7}}" in page


# --- show and describe ----------------------------------------------------------------------------


def test_show_says_that_all_is_up_to_date(call: Call, run_dir: Path) -> None:
    code, text = call("show", run_dir)
    assert code == 0
    assert "all is up to date" in text
    for file in ("network.json", "profile.json", "recordings/test.safetensors", "report.html"):
        assert file in text


def test_show_says_what_is_missing_and_what_to_run(call: Call, run_dir: Path) -> None:
    (run_dir / "profile.json").unlink()
    (run_dir / "recordings" / "test.safetensors").unlink()
    _, text = call("show", run_dir)
    assert re.search(r"next: impatient profile \S+ impatient record \S+", text)


def test_show_says_what_other_weights_make_out_of_date(call: Call, run_dir: Path) -> None:
    from safetensors.torch import load_file

    from impatient.files import write_tensors

    state = load_file(run_dir / "weights.safetensors")
    changed = {name: value + 1 for name, value in state.items() if value.is_floating_point()}
    write_tensors(run_dir / "weights.safetensors", state | changed, {"kind": "weights"})
    _, text = call("show", run_dir, "--json")
    entries = {entry["file"]: entry for entry in json.loads(text)}
    for file in ("recordings/test.safetensors", "policies/loss-2.json", "evaluation.json"):
        assert entries[file]["state"] == "out of date"
        assert entries[file]["command"].startswith("impatient ")


def test_show_says_that_an_evaluation_misses_a_policy(call: Call, run_dir: Path) -> None:
    call("fit", run_dir, "--max-loss", "4")
    _, text = call("show", run_dir)
    assert "it judged other policies than are there: loss-4." in text


def test_show_says_what_is_damaged_and_changes_nothing(call: Call, run_dir: Path) -> None:
    (run_dir / "evaluation.json").write_text("{")
    before = {file: file.read_bytes() for file in run_dir.rglob("*") if file.is_file()}
    _, text = call("show", run_dir)
    assert "evaluation.json: " in text
    assert "not valid JSON" in text
    assert {file: file.read_bytes() for file in run_dir.rglob("*") if file.is_file()} == before


def test_show_needs_a_run_directory(call: Call, tmp_path: Path) -> None:
    code, text = call("show", tmp_path)
    assert (code, "no run directory" in text) == (1, True)


def test_describe_draws_stages_and_their_shares(call: Call, run_dir: Path) -> None:
    picture = run_dir / "network.svg"
    code, text = call("describe", run_dir, "--svg", picture)
    assert code == 0
    assert "share of time" in text
    svg = picture.read_text("utf-8")
    assert svg.count('class="number"') == 3
    (run_dir / "profile.json").unlink()
    assert "share of MACs" in call("describe", run_dir)[1]
