"""Options: what they accept, what they show, and that they are those of the library."""

import dataclasses
import subprocess
import sys
from typing import Any, get_args

import pytest

import impatient
from impatient import cli, ensembling
from impatient.costs import Cost
from impatient.engines import network as engine_network
from impatient.networks import heads
from impatient.networks.placement import CUT_ENGINES, WRITTEN
from impatient.policies import costsensitive, gates
from impatient.recipe import Recipe
from impatient.verbs import export, fit, select, train
from impatient.verbs.evaluate import EvaluateOptions

# every option of 0.1.0 but `profile --energy`
OPTIONS_OF_0_1_0 = {
    "train": "model data exits after heads weights mode sampler equilibrium detach distillation "
    "temperature head-decay ensembling epochs batch-size lr weight-decay schedule regime augment "
    "label-smoothing channels-last no-channels-last exit-free no-exit-free validation seed "
    "accelerator devices strategy precision restart quiet",
    "plan": "model data iterations sizes times-ms batch-size repeats threads",
    "ensemble": "rule force",
    "profile": "batch-sizes repeats engine engines threads force quiet",
    "compare": "any",
    "record": "splits features engine force quiet",
    "fit": "max-loss mean-ms mean-mmacs mean-mb mean-mj cost score learner inputs delta name "
    "any-profile threads",
    "select": "data max-loss mean-ms price topology learner method name validation seed repeats "
    "threads force quiet",
    "evaluate": "budget against real engine any-profile threads",
    "report": "any-profile threads",
    "run": "deadline-ms policy when-late engine json any-profile threads",
    "export": "engine precision policy out lean repeats threads force quiet",
    "demo": "epochs quiet",
}


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "300")


def help_of(verb: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit):
        cli.parse([verb, "--help"])
    return capsys.readouterr().out


@pytest.mark.parametrize("verb", OPTIONS_OF_0_1_0)
def test_every_option_of_the_first_version_is_still_there(
    verb: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = help_of(verb, capsys).replace(",", " ").replace("]", " ").split()
    assert [name for name in OPTIONS_OF_0_1_0[verb].split() if f"--{name}" not in words] == []


def test_help_fits_a_narrow_terminal_and_says_nothing_of_defaults_that_are_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    for verb in cli.VERBS:
        # the usage line is not wrapped
        lines = help_of(verb, capsys).splitlines()[1:]
        assert max(map(len, lines)) <= 80
        text = " ".join(" ".join(lines).replace("│", " ").split())
        assert "(default: )" not in text
        assert "(default: '')" not in text
        # of Recipe, which knows nothing of the command line
        optional = sum(field.default is None for field in dataclasses.fields(Recipe))
        assert text.count("(default: None)") == (optional if verb == "train" else 0)


def test_the_first_help_has_one_line_for_each_verb(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        cli.parse(["--help"])
    lines = capsys.readouterr().out.splitlines()
    first = next(place for place, line in enumerate(lines) if "• train" in line)
    shown = [line.strip("│ •").split() for line in lines[first:-1]]
    assert [words[0] for words in shown] == list(cli.VERBS)
    assert all(3 <= len(words) <= 13 and words[-1].endswith(".") for words in shown)


def test_the_version_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["impatient", "--version"])
    cli.main()
    assert capsys.readouterr().out.strip() == f"impatient {impatient.__version__}"
    assert impatient.__version__[0].isdigit()


def test_every_option_has_a_line_of_help(capsys: pytest.CaptureFixture[str]) -> None:
    for verb in cli.VERBS:
        text = help_of(verb, capsys)
        lines = text[text.index("options") :].splitlines()
        for line, following in zip(lines, [*lines[1:], ""], strict=True):
            words = line.strip(" │").split()
            if words and words[0].startswith("--"):
                # a flag, or an option and its metavar, and then words, here or in the next line
                told = following if len(words) <= 2 or words[1].startswith("--") else line
                assert len(told.strip(" │").split()) > 2, (verb, line)


@pytest.mark.parametrize(
    ("shown", "known"),
    [
        (train.Head, heads.HEADS),
        (train.ExitRule, get_args(ensembling.RuleName)),
        (fit.Cost, get_args(Cost)),
        (fit.Learner, get_args(costsensitive.Learner)),
        (fit.GateInputs, get_args(gates.Inputs)),
        (select.Method, get_args(costsensitive.Method)),
        (export.Engine, WRITTEN),
        (train.CutEngine, ("eager", *CUT_ENGINES)),
        (export.Precision, engine_network.PRECISIONS),
    ],
)
def test_choices_are_those_of_the_library(shown: Any, known: Any) -> None:
    assert sorted(get_args(shown)) == sorted(known)


def test_a_recipe_on_the_command_line_is_the_recipe_of_the_library() -> None:
    assert cli.parse(["train", "run"]).recipe == Recipe()
    given = cli.parse(["train", "run", "--momentum", "0.5", "--schedule", "step"]).recipe
    assert given == Recipe(momentum=0.5, schedule="step")
    learner = ["--sampler", "avgl", "--sampler-gamma", "0.3", "--sampler-memory", "0.8"]
    steps = ["--schedule", "step:30,60", "--epochs", "90"]
    given = cli.parse(["train", "run", *steps, *learner]).recipe
    wanted = {"sampler": "avgl", "sampler_gamma": 0.3, "sampler_memory": 0.8}
    assert given == Recipe(schedule="step:30,60", epochs=90, **wanted)


@pytest.mark.parametrize(
    ("arguments", "name", "value"),
    [
        (["fit", "run", "--max-loss", "2"], "max_accuracy_loss", 0.02),
        (["fit", "run", "--mean-ms", "1.5"], "mean_time_s", 0.0015),
        (["fit", "run", "--mean-mmacs", "40"], "mean_macs", 40e6),
        (["fit", "run", "--mean-mj", "2.5"], "mean_energy_j", 0.0025),
        (["run", "run", "a.png", "--deadline-ms", "8"], "deadline_s", 0.008),
        (["plan", "--times-ms", "0.1,1000"], "times_s", (0.0001, 1.0)),
        (["profile", "run", "--engines", "eager,compile"], "engines", ("eager", "compile")),
        (["train", "run", "--after", "every:2"], "after", ("every:2",)),
        # the word of attach_exits, and the default here
        (["train", "run", "--after", "auto"], "after", ()),
    ],
)
def test_units_and_lists_are_read_in_one_place(
    arguments: list[str], name: str, value: object
) -> None:
    assert getattr(cli.parse(arguments), name) == value


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["evaluate", "run", "--threads", "-1"], "expected a whole number from 0 to 1024"),
        (["fit", "run", "--threads", "100000"], "expected a whole number from 0 to 1024"),
        (["profile", "run", "--threads", "1,100000"], "expected a whole number from 0 to 1024"),
        (["train", "run", "--exits", "2.5"], "expected a whole number, 1 or more"),
        (["train", "run", "--validation", "1.5"], "expected a share from 0 to 1"),
        (["fit", "run", "--max-loss", "-1"], "expected points from 0 to below 100"),
        (["fit", "run", "--max-loss", "100"], "expected points from 0 to below 100"),
        (["run", "run", "a.png", "--deadline-ms", "-5"], "expected a positive number"),
        (["profile", "run", "--threads="], "expected COUNT,COUNT,..."),
        (["fit", "run", "--learner", "guess"], "'logistic', 'svm', 'mlp', 'boosting'"),
    ],
)
def test_what_an_option_cannot_take_is_a_usage_error_that_names_it(
    arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.parse(arguments)
    said = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert stopped.value.code == 2
    option = next(word for word in arguments if word.startswith("--")).rstrip("=")
    assert option in said
    assert complaint in said


def test_options_may_be_repeated_where_there_are_several() -> None:
    options = cli.parse(["evaluate", "run", "--against", "a", "--against", "b"])
    assert isinstance(options, EvaluateOptions)
    assert [path.name for path in options.against] == ["a", "b"]


def test_options_are_frozen() -> None:
    for verb in cli.VERBS.values():
        assert verb.options.__dataclass_params__.frozen
        assert dataclasses.fields(verb.options)


def test_the_names_of_policies_are_their_targets() -> None:
    for arguments, name in (
        ([], "loss-1"),
        (["--max-loss", "2"], "loss-2"),
        (["--mean-ms", "0.3"], "ms-0.3"),
        (["--mean-mmacs", "40", "--cost", "time"], "mmacs-40-time"),
        (["--max-loss", "30", "--learner", "svm"], "loss-30-svm-confidences"),
        (["--max-loss", "30", "--delta", "0.05"], "loss-30-sure"),
        (["--name", "mine"], "mine"),
    ):
        assert cli.parse(["fit", "run", *arguments]).policy_name == name


def test_help_needs_no_torch() -> None:
    code = (
        "import sys, impatient.errors\n"
        "before = set(sys.modules)\n"
        "from impatient import cli\n"
        "try:\n"
        "    cli.parse(['train', '--help'])\n"
        "except SystemExit:\n"
        "    pass\n"
        "new = {name.split('.')[0] for name in set(sys.modules) - before}\n"
        "sys.exit(str(new & {'torch', 'numpy', 'matplotlib', 'sklearn'}) if new & "
        "{'torch', 'numpy', 'matplotlib', 'sklearn'} else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
