"""The command line of learning to be impatient: weightings, samplers, gradients, ensembles."""

import json
from pathlib import Path

import pytest

from command_line import TINY, Call
from impatient.files import read_json
from impatient.verbs.run_directory import RunDirectory

BRIEF = [*TINY[:4], "--epochs", "1", "--batch-size", "128", "--quiet", "--no-exit-free"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        ["--weights", "sieve:last_to_early=2,total=all", "--sampler", "alternating"],
        ["--weights", "adaloss"],
        ["--weights", "1,0.5,1", "--equilibrium", "--detach", "0.5"],
        ["--heads", "conv1x1", "--head-decay", "scaled"],
        ["--distillation", "0.5", "--temperature", "2", "--ensembling", "boosted"],
    ],
    ids=" ".join,
)
def test_every_option_trains_and_goes_on(call: Call, tmp_path: Path, options: list[str]) -> None:
    # the second time there is nothing left to do, and the same words are understood
    for again in range(2):
        code, text = call("train", tmp_path, *BRIEF, *options)
        assert (again, code) == (again, 0), text
    assert RunDirectory(tmp_path).network()[0].num_exits == 3


@pytest.mark.slow
def test_a_period_places_the_exits(call: Call, tmp_path: Path) -> None:
    options = ["--model", "impatient:resnet:n=2,c=4", "--after", "every:2", *BRIEF[4:]]
    for _ in range(2):
        code, text = call("train", tmp_path, *options)
        assert code == 0, text
    assert RunDirectory(tmp_path).spec().after == ("blocks.1", "blocks.3")
    code, text = call("train", tmp_path, *options[:3], "every:3", *options[4:])
    assert code == 1
    assert "was begun with --after blocks.1,blocks.3, not blocks.2" in text


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--weights", "heavy"], "cannot read 'heavy' as exit weights"),
        (["--detach", "1"], "detach=1.0"),
        (["--after", "every:9"], "a period of 9 blocks"),
        (["--seed", "-1"], "seed=-1"),
        (["--precision", "fp16"], "Lightning Fabric cannot train with --accelerator auto"),
        (["--accelerator", "abacus"], "--accelerator abacus"),
        (["--strategy", "none-such"], "--strategy none-such"),
    ],
)
def test_senseless_options_are_one_message(
    call: Call, tmp_path: Path, options: list[str], complaint: str
) -> None:
    code, text = call("train", tmp_path / "run", *BRIEF, *options)
    assert code == 1
    assert text.count("error (") == 1
    assert complaint in text


@pytest.mark.parametrize(
    ("option", "choices"),
    [
        ("--sampler", "('none', 'alternating', 'exp3', 'rwm', 'avgl')"),
        ("--ensembling", "('boosted', 'arithmetic', 'geometric', 'poe', 'caching')"),
    ],
)
def test_an_unknown_choice_is_answered_with_the_choices(
    call: Call, tmp_path: Path, option: str, choices: str
) -> None:
    code, text = call("train", tmp_path / "run", *BRIEF, option, "none of these")
    assert code == 2
    assert f"for argument '{option}'. Expected one of {choices}" in text


def test_the_exits_of_one_network_answer_together_through_every_verb(
    call: Call, finished: Path, tmp_path: Path
) -> None:
    together = tmp_path / "together"
    for verb in (
        ["ensemble", together, finished, "--rule", "geometric"],
        ["profile", together, "--repeats", "30", "--quiet"],
        ["record", together, "--quiet"],
        ["fit", together, "--max-loss", "2"],
        ["evaluate", together],
        ["report", together],
    ):
        code, text = call(*verb)
        assert code == 0, text
    names = {row["name"] for row in read_json(together / "evaluation.json")["rows"]}
    assert "no exits, trained alone" in names
    # the last exit's output is no longer the backbone's
    assert "no exits, same weights" not in names
    assert "geometric" in (together / "report.html").read_text()
    costs = RunDirectory(together).profile()
    # no head can be skipped
    assert costs.contract_s() == pytest.approx(costs.interruptible_s(), rel=0.02)
    assert costs.exit_free_macs < sum(costs.stage_macs)
    code, text = call("ensemble", together, finished)
    assert code == 1
    assert "is a run directory already" in text
    code, text = call("ensemble", tmp_path / "twice", together)
    assert code == 1
    assert "is an ensemble already" in text


@pytest.mark.slow
def test_an_early_head_dearer_than_the_rest_of_the_network_weighs_nothing_in_contract_mode(
    call: Call, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    code, text = call(
        "train",
        run,
        *BRIEF,
        *("--exits", "3", "--heads", "msdnet", "--mode", "contract"),
        *("--weights", "uniform:0:1mmacs"),
    )
    assert code == 0, text
    costs = RunDirectory(run).profile().cumulative("macs", "contract")
    dominated = [
        exit for exit, cost in enumerate(costs) if any(later <= cost for later in costs[exit + 1 :])
    ]
    numbers = read_json(run / "training.json")["numbers"]
    assert dominated
    assert [exit for exit, number in enumerate(numbers) if number == 0.0] == dominated
    assert sum(numbers) == pytest.approx(1.0)
    assert "exits of weight 0, which are not trained" in text


@pytest.mark.slow
def test_networks_of_growing_depth_are_one_network_through_every_verb(
    call: Call, tmp_path: Path
) -> None:
    members = []
    for n in (1, 2):
        members.append(tmp_path / f"n{n}")
        for verb in (
            [
                "train",
                members[-1],
                "--model",
                f"impatient:resnet:n={n},c=4",
                *TINY[2:4],
                "--epochs",
                "2",
                *TINY[6:],
            ],
            ["record", members[-1], "--quiet"],
        ):
            code, text = call(*verb)
            assert code == 0, text
    together = tmp_path / "eann"
    for verb in (
        ["ensemble", together, *members],
        ["profile", together, "--repeats", "30", "--quiet"],
        ["record", together, "--quiet"],
        ["fit", together, "--max-loss", "5"],
        ["evaluate", together, "--against", members[0], "--against", members[1]],
        ["report", together],
    ):
        code, text = call(*verb)
        assert code == 0, text
    network, _ = RunDirectory(together).network()
    assert network.num_exits == 6
    rows = {row["name"]: row for row in read_json(together / "evaluation.json")["rows"]}
    best = max(1.0 - errors[-1] for errors in RunDirectory(together).spec().validation_errors)
    validation = RunDirectory(together).recording("validation").quality.mean(1)
    # the best last exit by validation answers at the end
    assert float(validation[-1]) == pytest.approx(best)
    assert rows["no exits, trained alone"]["macs"] < rows["exit 5"]["macs"]
    small = rows["static n1"]
    large = rows["static n2"]
    # the very same network
    assert large["accuracy"] == rows["no exits, trained alone"]["accuracy"]
    assert large["macs"] == rows["no exits, trained alone"]["macs"] > small["macs"]
    assert large["contract_s"] > small["contract_s"] > 0.0
    code, text = call("train", together, *BRIEF)
    assert code == 1
    assert "train those" in text
    picture = tmp_path / "picture.npy"
    import numpy as np

    np.save(picture, np.zeros((1, 8, 8), np.uint8))
    code, text = call("run", together, picture, "--deadline-ms", 10_000, "--json")
    assert code == 0, text
    assert json.loads(text)[0]["exit"] == 5


@pytest.mark.slow
def test_members_of_different_data_are_refused(call: Call, finished: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    assert call("train", other, *BRIEF, "--seed", 1)[0] == 0
    assert call("record", other, "--quiet")[0] == 0
    code, text = call("ensemble", tmp_path / "both", finished, other)
    assert code == 1
    assert "are not of the same data: --seed: 0 and 1;" in text
    assert not (tmp_path / "both").exists()


GROWING = "impatient:anytimenet:schedule=1-1/2-1/2-2,width=4"


@pytest.mark.slow
def test_a_network_that_grows_goes_through_every_verb(call: Call, tmp_path: Path) -> None:
    run = tmp_path / "run"
    together = tmp_path / "together"
    train = ["train", run, "--model", GROWING, "--epochs", "1", "--quiet"]
    for verb in (
        train,
        train,
        ["profile", run, "--repeats", "30", "--quiet"],
        ["record", run, "--quiet"],
        ["fit", run, "--max-loss", "5"],
        ["evaluate", run],
        ["report", run],
        ["ensemble", together, run, "--rule", "caching"],
        ["record", together, "--quiet"],
    ):
        code, text = call(*verb)
        assert code == 0, text
    spec = RunDirectory(run).spec()
    assert (spec.after, spec.heads) == (("1-1", "2-1"), "own")
    # the paper's, unless another is asked for
    assert read_json(run / "training.json")["weights"] == "inverse_square"
    assert "2-1" in (run / "report.html").read_text()
    surest = RunDirectory(together).recording("test").outputs.softmax(-1).amax(-1)
    # caching: the answer's confidence never falls
    assert (surest.diff(dim=0) >= 0).all()
    for option, value in (("--exits", "2"), ("--heads", "mlp"), ("--after", "stem")):
        code, text = call("train", tmp_path / "other", *train[2:], option, value)
        assert (option, code) == (option, 1)
        assert "3 exits of its own" in text


@pytest.mark.slow
def test_plan_finds_the_order_of_growing_and_says_how_to_train_it(call: Call) -> None:
    dearest_first = "impatient:anytimenet:schedule=1-1-1/1-1-3/1-3-3/3-3-3,width=4"
    code, text = call("plan", "--model", dearest_first, "--sizes", "3,5,7,9", "--repeats", "20")
    assert code == 0, text
    assert "schedule=1-1-1/3-1-1/3-3-1/3-3-3" in text
    # beside the model's own
    assert text.count("of a plain run") == 2
    code, text = call("plan", "--model", dearest_first, "--repeats", "20")
    assert (code, text.count("1-3-3")) == (0, 1)
    code, text = call("plan", "--model", dearest_first, "--times-ms", "0.1,1000", "--repeats", "20")
    assert "1-1-1/3-3-3" in text, text
    for options, complaint in (
        (["--model", "impatient:resnet"], "which does not grow"),
        (["--iterations", "2", "--sizes", "3,5"], "expected one of"),
        (["--iterations", "90"], "no schedule to"),
    ):
        code, text = call("plan", "--repeats", "5", *options)
        assert (options, code) == (options, 1)
        assert complaint in text
    code, text = call("plan", "--times-ms", "soon")
    assert (code, "--times-ms: 'soon'; expected a number" in text) == (2, True)
