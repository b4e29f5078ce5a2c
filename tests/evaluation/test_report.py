"""Figures and the report: complete, honest, self-contained, safe, and the same every time."""

import base64
import dataclasses
import hashlib
import io
import itertools
import json
import math
import re
import sys
from html.parser import HTMLParser

import matplotlib as mpl
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from impatient import budgets
from impatient.costs import BatchCosts, Quantiles
from impatient.errors import StorageError
from impatient.evaluation import (
    Example,
    Recording,
    Report,
    Said,
    accuracy_time,
    evaluate,
    exit_shares,
    figure_svg,
    report_html,
    save_figure,
    select_examples,
    where_time_goes,
)
from impatient.policies import (
    ThresholdPolicy,
    Topology,
    fit_selection,
    fit_thresholds,
    node_times_s,
)
from impatient.provenance import provenance
from recordings import costs_of, drawn, recording_of, sure

HOSTILE = (
    """"><script>alert(1)</script><img src=http://evil.test/x onerror='alert(2)'>${broken & {0}"""
)
COSTS = costs_of(
    [1e-3] * 4,
    [1e-4] * 3 + [0.0],
    exit_free_s=3.9e-3,
    stage_macs=[10**6] * 4,
    head_macs=[1000] * 3 + [0],
)
BUDGETS = {
    "uniform": budgets.uniform(0.0, 5e-3),
    "log-uniform": budgets.log_uniform(1e-4, 5e-3),
    "point": budgets.point(2e-3),
    "log": budgets.empirical([1e-3, 1e-3, 3e-3]),
}


def picture():
    stream = io.BytesIO()
    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).save(stream, format="PNG")
    return stream.getvalue()


def made(name="one point", **changes):
    """Everything that a report is made of; `name` is the policy's and everybody else's."""
    policies = {
        name: fit_thresholds(drawn(300, seed=1), COSTS, max_accuracy_loss=0.01),
        "by hand": ThresholdPolicy(score="margin", thresholds=(0.9, math.inf, 0.9, -math.inf)),
    }
    recording = drawn(300, seed=2, split="test")
    alone = drawn(300, seed=3, split="test", gains=(4.0,))
    said = Said(answer="something else", top=(("something else", 0.75), (name, 0.25)))
    example = Example(sample=0, picture=picture(), label=name, exits=(said,) * 4)
    report = Report(
        title=name,
        evaluation=evaluate(
            recording, COSTS, policies, exit_free=alone, budgets={name: BUDGETS["uniform"]}
        ),
        recording=recording,
        costs=dataclasses.replace(COSTS, exits=("block0", "block1", name, "output")),
        policies=policies,
        chosen_budget=(name, BUDGETS["uniform"]),
        examples=[example, dataclasses.replace(example, sample=1, picture=None)],
        compared={name: evaluate(recording, COSTS, {name: policies[name]})},
        facts={"model": name, name: "a fact"},
    )
    return dataclasses.replace(report, **changes)


@pytest.fixture(scope="module")
def page():
    return report_html(made())


class Page(HTMLParser):
    """What a browser would see: the tree's balance, the text, and every address."""

    VOID = frozenset({"meta", "link", "br", "img", "input", "hr"})
    ADDRESSES = frozenset(
        {
            "src",
            "href",
            "xlink:href",
            "srcset",
            "action",
            "data",
            "poster",
            "background",
            "formaction",
        }
    )

    def __init__(self, text):
        super().__init__()
        self.open = []
        self.tags = []
        self.ids = []
        self.addresses = []
        self.handlers = []
        self.text = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        self._attributes(attributes)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self._attributes(attributes)

    def _attributes(self, attributes):
        for name, value in attributes:
            self.ids += [value] if name == "id" else []
            self.addresses += [value] if name in self.ADDRESSES else []
            self.handlers += [name] if name.startswith("on") else []

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)

    @property
    def words(self):
        return " ".join("".join(self.text).replace("\N{NO-BREAK SPACE}", " ").split())


# --- the page -------------------------------------------------------------------------------------


def check_self_contained(text):
    page = Page(text)
    assert page.open == []
    assert not {"iframe", "object", "embed", "base", "form", "link rel=stylesheet"} & set(page.tags)
    # the recording, and the one script, whose hash is the only one that may run
    data, script = re.findall(r"<script[^>]*>(.*?)</script>", text, re.DOTALL)
    json.loads(data)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert re.findall(r"script-src ([^;]*);", text) == [f"'sha256-{digest}'"]
    # pictures, the icon and references inside the figures
    assert page.addresses
    assert [address for address in page.addresses if not address.startswith(("#", "data:"))] == []
    assert page.handlers == []
    assert "@import" not in text
    assert [part[:20] for part in text.split("url(")[1:] if not part.startswith("#")] == []
    assert len(text) < 250_000
    return page


def test_the_page_is_well_formed_and_loads_nothing(page):
    assert page.startswith("<!DOCTYPE html>")
    seen = check_self_contained(page)
    assert len(seen.ids) == len(set(seen.ids))
    assert {address[1:] for address in seen.addresses if address.startswith("#")} <= set(seen.ids)
    assert "default-src 'none'" in page


def test_the_page_shows_every_row_and_number(page):
    words = Page(page).words
    evaluation = made().evaluation
    for row in evaluation.rows:
        assert row.name in words
        assert f"{row.accuracy.value * 100:.1f} %" in words
        assert f"{row.accuracy.low * 100:.1f} to {row.accuracy.high * 100:.1f} %" in words
        assert f"{row.calibration_error:.3f}" in words
    for row in evaluation.under_budgets:
        assert row.name in words
        assert f"{row.accuracy.value * 100:.1f} %" in words
    for word in (
        "p50",
        "stage 3",
        "head 2",
        "without exits",
        "closed",
        "always",
        "abacus",
        "weights",
        "a fact",
    ):
        assert word in words


@pytest.mark.parametrize("runs", [4_999, 5_000])
def test_a_quantile_that_too_few_runs_are_beyond_is_not_shown(runs):
    times = Quantiles.of([1e-3] * runs)
    batch = BatchCosts(stages=(times,) * 4, heads=(times,) * 4, exit_free=times)
    costs = dataclasses.replace(COSTS, batches={1: batch})
    text = report_html(made(costs=costs))
    assert ("p99.9" in Page(text).words) == (runs == 5_000)


def test_figures_and_examples_are_inside(page):
    seen = Page(page)
    # without JavaScript a figure stands for those that the script draws
    assert seen.tags.count("svg") == 1
    assert sum(address.startswith("data:image/png;base64,") for address in seen.addresses) == 1
    assert re.search(r"one point exit \d: something else [✓✗]", seen.words)


def test_the_same_values_give_the_same_bytes():
    again = made()
    assert report_html(again) == report_html(again)
    assert figure_svg(exit_shares(again.evaluation)) == figure_svg(exit_shares(again.evaluation))


def test_hostile_names_are_only_text():
    seen = check_self_contained(report_html(made(HOSTILE)))
    # the example's own
    assert seen.tags.count("img") == 1
    # title, heading, policy, budget, exits, class, facts
    assert seen.words.count("<script>alert(1)</script>") >= 8
    page = report_html(made("a\u202eb\x1b[31m\ud800\uffff"))
    # neither half a character nor a number that is none: the file can be written
    assert "\uffff" not in page.encode("utf-8").decode("utf-8")
    assert "\u202e" not in page
    assert "\x1b" not in page
    assert "a\\u202eb\\u001b[31m" in page


@pytest.mark.parametrize(
    "changes",
    [
        {"policies": {}, "examples": (), "compared": {}},
        {"chosen_budget": None, "facts": {}},
        {"chosen_budget": ("not judged", BUDGETS["log"])},
    ],
)
def test_a_page_with_less_is_still_a_page(changes):
    check_self_contained(report_html(made(**changes)))


def test_a_network_with_one_exit_and_no_policy_has_a_page():
    recording = recording_of(*sure([[1, 0, 1]], [[0.9] * 3]), split="test")
    costs = costs_of([1e-3], [0.0])
    report = Report(
        title="plain",
        evaluation=evaluate(recording, costs),
        recording=recording,
        costs=costs,
        policies={},
    )
    words = Page(report_html(report)).words
    assert "it is right on 66.7 %, after 1.00 ms" in words
    assert "This network has one exit" in words


# --- the headline ---------------------------------------------------------------------------------


def headline(exit_free_s, head_s=1e-4):
    costs = costs_of(
        [1e-3] * 2, [head_s, 0.0], exit_free_s=exit_free_s, stage_macs=[100] * 2, head_macs=[1, 0]
    )
    recording = recording_of(
        *sure([[1, 1, 1, 0], [1, 1, 0, 1]], [[0.9, 0.9, 0.6, 0.6], [0.9] * 4]), split="test"
    )
    half = ThresholdPolicy(score="max_probability", thresholds=(0.8, -math.inf))
    evaluation = evaluate(recording, costs, {"half": half})
    report = Report(
        title="t",
        evaluation=evaluation,
        recording=recording,
        costs=costs,
        policies={"half": half},
    )
    return Page(report_html(report)).words


def test_the_first_sentence_says_what_a_policy_saves():
    # two of four leave after 1.1 ms, two after 2.1 ms; all exits fit 2.1 ms and the reserve
    words = headline(2e-3)
    assert (
        "With a deadline of 2.20 ms it is right on 75.0 %, after 1.60 ms on average: 20 % less "
        "time than the network without exits."
    ) in words
    assert (
        "Policy half: leaving early costs no accuracy (all samples at exit 1: 75.0 % after 2.10 ms)"
        in words
    )
    assert "Every exit fits this deadline. 95 % interval of this accuracy:" in words
    assert "Exits pay here: policy half takes 20 % less time" in words


@pytest.mark.parametrize(
    ("exit_free_s", "verdict"), [(1e-3, "60 % more time than"), (1.6e-3, "as long as")]
)
def test_the_first_sentence_says_when_a_policy_saves_nothing(exit_free_s, verdict):
    words = headline(exit_free_s)
    assert f"after 1.60 ms on average: {verdict} the network without exits." in words
    assert "Exits save no time on average here: policy half takes 1.60 ms" in words
    assert "Exits pay here" not in words


def test_the_first_sentence_is_of_the_first_policy_whatever_its_kind():
    fitted_on = drawn(300, seed=1)
    recording = drawn(300, seed=2, split="test")
    chosen = fit_selection(
        fitted_on, node_times_s(COSTS), Topology.chain(fitted_on.exits), mean_time_s=2.5e-3
    )
    policies = {"chosen": chosen, "thresholds": fit_thresholds(fitted_on, COSTS, mean_macs=4e6)}
    evaluation = evaluate(recording, COSTS, policies)
    report = Report(
        title="t", evaluation=evaluation, recording=recording, costs=COSTS, policies=policies
    )
    words = Page(report_html(report)).words
    accuracy = evaluation["chosen"].accuracy.value
    assert f"Without a deadline it is right on {accuracy * 100:.1f} %, after" in words
    assert "Policy chosen: leaving early " in words
    assert "the deadline is not applied to it here. 95 % interval" in words


def test_a_page_of_another_task_calls_quality_by_its_name():
    truth = torch.linspace(-1.0, 1.0, 200)
    errors = torch.tensor([[0.8], [0.1]]) * torch.cos(50 * truth)
    made = Recording.of(
        (truth + errors)[..., None],
        truth[:, None],
        split="test",
        task="regression",
        provenance=provenance(network="network", weights="weights", data="data"),
    )
    costs = costs_of([1e-3, 1e-3], [1e-4, 0.0])
    report = Report(
        title="t", evaluation=evaluate(made, costs), recording=made, costs=costs, policies={}
    )
    text = report_html(report)
    words = Page(text).words
    assert "its quality is" in words
    assert "right on" not in words
    check_self_contained(text)


# --- examples -------------------------------------------------------------------------------------


def test_examples_are_the_surest_of_the_first_and_the_least_sure_of_the_last():
    surety = [[0.9, 0.95, 0.6, 0.6, 0.6, 0.99], [0.7, 0.7, 0.8, 0.75, 0.85, 0.7]]
    recording = recording_of(*sure([[1] * 6] * 2, surety))
    policy = ThresholdPolicy(score="max_probability", thresholds=(0.8, -math.inf))
    assert select_examples(recording, policy, count=2) == ([5, 1], [3, 2])
    assert select_examples(recording, policy) == ([5, 1, 0], [3, 2, 4])


def test_samples_that_stayed_are_those_that_stayed():
    policy = ThresholdPolicy(score="margin", thresholds=(0.5, -math.inf))
    for samples in (1, 2, 5, 20):
        recording = drawn(samples, seed=4, gains=(1.0, 2.0))
        exits = policy.exits_on(recording)
        early, late = select_examples(recording, policy)
        first = exits.min()
        assert all(exits[sample] == first for sample in early)
        assert all(exits[sample] > first for sample in late)
        assert len(early) == min(8, int((exits == first).sum()))
        assert len(late) == min(8, int((exits > first).sum()))
    # nobody stays where all leave at once
    everybody = ThresholdPolicy(score="margin", thresholds=(0.0, -math.inf))
    assert select_examples(drawn(20, seed=4, gains=(1.0, 2.0)), everybody)[1] == []


# --- figures --------------------------------------------------------------------------------------


def figures(**changes):
    report = made(**changes)
    for budget in (None, *BUDGETS.items()):
        yield accuracy_time(report.evaluation, budget)
    yield exit_shares(report.evaluation)
    yield where_time_goes(report.costs)


def words_of(figure):
    return " ".join(text.get_text() for text in figure.findobj(mpl.text.Text)).replace(
        "\N{NO-BREAK SPACE}", " "
    )


@pytest.mark.slow
def test_figures_are_kept_whole_in_both_formats_and_alike_each_time(tmp_path):
    for kind, magic in (("png", b"\x89PNG"), ("svg", b"<?xml")):
        first = tmp_path / f"first.{kind}"
        again = tmp_path / f"again.{kind}"
        for figure, equal in zip(figures(), figures(), strict=True):
            save_figure(figure, first)
            save_figure(equal, again)
            assert first.read_bytes().startswith(magic)
            assert first.read_bytes() == again.read_bytes()
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "again.png",
        "again.svg",
        "first.png",
        "first.svg",
    ]


@pytest.mark.parametrize("name", ["figure.pdf", "figure", "figure.png.txt"])
def test_other_formats_are_refused(tmp_path, name):
    with pytest.raises(StorageError, match=r"\.png or \.svg"):
        save_figure(Figure(), tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_figures_leave_no_state_behind(tmp_path):
    # others may have imported it
    before = dict(mpl.rcParams)
    interactive = "matplotlib.pyplot" in sys.modules
    for figure in figures():
        save_figure(figure, tmp_path / "figure.png")
    assert dict(mpl.rcParams) == before
    assert ("matplotlib.pyplot" in sys.modules) == interactive
    assert not interactive or sys.modules["matplotlib.pyplot"].get_fignums() == []


def test_the_curve_names_everything_it_draws():
    words = words_of(accuracy_time(made().evaluation, ("mine", BUDGETS["uniform"])))
    for name in (
        "policy one point",
        "policy by hand",
        "no exits, same weights",
        "no exits, trained alone",
        "oracle",
        "mine",
    ):
        assert name in words


def test_the_curve_is_a_right_continuous_staircase_through_the_exits():
    evaluation = made().evaluation
    (axes, *_) = accuracy_time(evaluation).axes
    line = next(line for line in axes.lines if line.get_drawstyle() == "steps-post")
    exits = evaluation.of("exit")
    assert line.get_xdata()[:-1] == pytest.approx([row.interruptible_s * 1e3 for row in exits])
    assert line.get_ydata()[:-1] == pytest.approx([row.accuracy.value for row in exits])
    # held to the end
    assert line.get_ydata()[-1] == exits[-1].accuracy.value


@pytest.mark.parametrize(("first_s", "scale"), [(1e-3, "linear"), (1e-5, "log")])
def test_the_time_axis_is_logarithmic_where_times_are_far_apart(first_s, scale):
    costs = costs_of([first_s, 4e-3], [0.0, 0.0])
    evaluation = evaluate(drawn(50, seed=5, gains=(1.0, 2.0), split="test"), costs)
    assert accuracy_time(evaluation, ("b", BUDGETS["uniform"])).axes[0].get_xscale() == scale


def test_shares_add_up_to_all_samples():
    evaluation = made().evaluation
    (axes,) = exit_shares(evaluation).axes
    for place, row in enumerate([*evaluation.of("policy"), *evaluation.of("oracle")]):
        bars = [container[place] for container in axes.containers]
        assert [bar.get_width() for bar in bars] == pytest.approx(row.shares)
        assert all(
            left.get_x() + left.get_width() == pytest.approx(right.get_x())
            for left, right in itertools.pairwise(bars)
        )


def test_bars_end_where_interruptible_answers_come():
    (axes,) = where_time_goes(COSTS).axes
    heads = next(bars for bars in axes.containers if bars.get_label() == "head, mean")
    assert [bar.get_x() + bar.get_width() for bar in heads] == pytest.approx(
        [time * 1e3 for time in COSTS.interruptible_s()]
    )


def test_one_slow_run_does_not_squeeze_the_rest():
    slow = Quantiles(mean=1e-3, p50=1e-3, p90=1e-3, p99=0.5, p999=0.5, max=0.5, n=300)
    batch = dataclasses.replace(COSTS.at(), stages=(slow, *COSTS.at().stages[1:]))
    figure = where_time_goes(dataclasses.replace(COSTS, batches={1: batch}))
    assert figure.axes[0].get_xlim()[1] < 2 * COSTS.interruptible_s()[-1] * 1e3
    assert "500 ms" in words_of(figure)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["$\\frac{$", "_hidden", "深度神经网络", "x" * 300, "a\nb", ""])
def test_any_name_can_be_drawn(name):
    for figure in figures(name=name):
        figure_svg(figure)
