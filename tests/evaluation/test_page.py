"""The page in a real Chromium: its numbers, its dials, its console, on every width."""

import math
import re

import pytest
import torch

from impatient import budgets
from impatient.evaluation import (
    Example,
    Report,
    Said,
    StaticBaseline,
    evaluate,
    report_html,
)
from impatient.evaluation.payload import make_payload
from impatient.policies import ThresholdPolicy, fit_gates, fit_thresholds
from recordings import costs_of, drawn, recording_of

pytestmark = [pytest.mark.browser, pytest.mark.slow]

HOSTILE = """</script><img src=x onerror="console.error('ran')">'"`\u202e{{7*7}}"""
COSTS = costs_of(
    [0.7e-3, 0.5e-3, 0.6e-3, 0.4e-3],
    [1e-4, 0.8e-4, 0.9e-4, 0.0],
    exit_free_s=2.1e-3,
    stage_macs=[10**6] * 4,
    head_macs=[1000] * 3 + [0],
)
RECORDING = drawn(10_000, seed=2, split="test")


@pytest.fixture(scope="module")
def policies():
    fitted_on = drawn(1000, seed=1)
    return {
        "one point": fit_thresholds(fitted_on, COSTS, max_accuracy_loss=0.01),
        HOSTILE: ThresholdPolicy(score="margin", thresholds=(0.7, math.inf, 0.4, -math.inf)),
        "gates": fit_gates(fitted_on, COSTS, mean_time_s=1.5e-3),
    }


@pytest.fixture(scope="module")
def page(policies, tmp_path_factory):
    static = StaticBaseline(
        recording=recording_of(RECORDING.outputs[1:2], RECORDING.labels, split="test"),
        time_s=1e-3,
        macs=1e6,
    )
    budget = budgets.uniform(0.0, 3e-3)
    said = tuple(Said(answer=f"say {k}", top=((f"say {k}", 0.6), (HOSTILE, 0.4))) for k in range(4))
    report = Report(
        title=HOSTILE,
        evaluation=evaluate(
            RECORDING, COSTS, policies, static={HOSTILE: static}, budgets={HOSTILE: budget}
        ),
        recording=RECORDING,
        costs=COSTS,
        policies=policies,
        chosen_budget=(HOSTILE, budget),
        examples=[Example(sample=k, label=HOSTILE, exits=said) for k in range(3)],
        compared={HOSTILE: evaluate(RECORDING, COSTS, policies)},
        facts={HOSTILE: HOSTILE},
    )
    file = tmp_path_factory.mktemp("page") / "report.html"
    file.write_text(report_html(report), encoding="utf-8")
    return file


def shown(window, **dials):
    """Turn the dials by the address; returns the sentence and the numbers behind it."""
    window.run("location.hash = arguments[0]", "&".join(f"{k}={v}" for k, v in dials.items()))
    window.run("dispatchEvent(new HashChangeEvent('hashchange'))")
    found = window.run("return {...document.getElementById('sentence').dataset}")
    words = window.run("return document.getElementById('sentence').textContent")
    return words.replace("\N{NO-BREAK SPACE}", " "), {k: float(v) for k, v in found.items()}


def capped(policy, cap):
    """The policy whose samples leave at this exit at the latest."""
    bounds = policy.thresholds[:cap] + (-math.inf,) * (len(policy.thresholds) - cap)
    return ThresholdPolicy(score=policy.score, thresholds=bounds)


@pytest.mark.parametrize(("way", "place"), [(0, 0), (1, 1), (3, 2)])
def test_the_page_computes_what_evaluate_does_for_thresholds(window, page, policies, way, place):
    window.open(page)
    # gates are the page's third way
    family = make_payload(RECORDING, COSTS, policies).families[place]
    # for each cap a deadline that fits it and no more: 1.0 ms, 1.6 ms, 2.3 ms, all
    for deadline, cap in {1.0: 0, 1.6: 1, 2.3: 2, 9.0: 3}.items():
        for step in range(0, len(family.steps), 7):
            _, found = shown(window, policy=way, sure=step, deadline=deadline)
            policy = capped(family.steps[step], cap)
            row = evaluate(RECORDING, COSTS, {"it": policy})["it"]
            assert found["cap"] == cap
            assert found["computed"] == pytest.approx(row.accuracy.value, abs=0.001)
            assert found["computedTime"] == pytest.approx(1e3 * row.contract_s, rel=1e-6)


def test_the_page_computes_what_evaluate_does_for_gates(window, page, policies):
    window.open(page)
    row = evaluate(RECORDING, COSTS, policies)["gates"]
    words, found = shown(window, policy=2, deadline=9.0)
    assert found["computed"] == pytest.approx(row.accuracy.value, abs=0.001)
    assert found["computedTime"] == pytest.approx(1e3 * row.contract_s, rel=1e-6)
    assert f"{row.accuracy.value * 100:.1f} %" in words
    # no sample goes deeper than exit 1: accuracy by hand
    exits = policies["gates"].exits_on(RECORDING).clamp(max=1)
    right = RECORDING.quality[exits, torch.arange(len(exits))].mean()
    assert shown(window, policy=2, deadline=1.6)[1]["computed"] == pytest.approx(
        float(right), abs=0.001
    )


def test_a_fitted_policy_is_quoted_from_full_precision_with_and_without_script(
    window, page, policies
):
    row = evaluate(RECORDING, COSTS, policies)["one point"]
    sentence = re.search(r'<h1 id="sentence">(.*?)</h1>', page.read_text("utf-8"))[1]
    still = re.sub("<.*?>", "", sentence)
    window.open(page)
    live = window.run("return document.getElementById('sentence').textContent")
    assert live == still
    under = re.search(r'<p id="under" class="under">(.*?)</p>', page.read_text("utf-8"))[1]
    lived = window.run("return document.getElementById('under').textContent")
    assert lived.strip() == re.sub("<.*?>", "", under)
    assert f"{row.accuracy.value * 100:.1f}\N{NO-BREAK SPACE}%" in live


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1200, 400])
def test_nothing_is_said_on_the_console_and_nothing_overflows(window, page, width, scheme):
    window.size(width)
    window.scheme(scheme)
    window.messages()
    window.open(page)
    for dials in (
        {"policy": 1, "sure": 3, "deadline": 1.5, "guaranteed": 1, "level": 3},
        {"policy": 3},
        {"deadline": 0.01},
        {"policy": "x", "sure": -1, "deadline": "NaN", "level": 99, "guaranteed": "<b>"},
    ):
        shown(window, **dials)
    assert window.messages() == []
    assert window.run("return document.documentElement.scrollWidth <= innerWidth")
    assert window.run("return document.querySelectorAll('svg text').length") > 20
    cut = "bar => bar.scrollWidth > bar.clientWidth"
    bars = window.run(f"return [...document.querySelectorAll('#mind .bar')].map({cut})")
    assert bars == [False] * 8


def test_names_from_outside_are_text(window, page):
    window.messages()
    window.open(page)
    assert window.messages() == []
    assert window.run("return document.images.length") == 0
    words = window.run("return document.body.innerText")
    assert "</script><img src=x" in words
    assert "\\u202e" in words
    assert "\u202e" not in page.read_text("utf-8")
    assert "{{7*7}}" in words


def test_the_page_says_by_when_each_exit_answers(window, page):
    window.open(page)
    rows = "return [...document.getElementById('exits').rows].map(r => r.innerText)"
    before = [float(row.split("\t")[1].split("\N{NO-BREAK SPACE}")[0]) for row in window.run(rows)]
    assert before == sorted(before)
    assert len(before) == 4
    # the deadline that a row asks for is enough for its exit, and for no deeper one
    for exit, needed in enumerate(before):
        _, found = shown(window, deadline=needed)
        assert found["cap"] == max(k for k, least in enumerate(before) if least <= needed)
        said = window.run(rows)
        assert [row.split("\t")[3] for row in said][exit] == "deepest in time"
        assert all(row.endswith("late") for row in said[exit + 1 :])
        under = window.run("return document.getElementById('under').textContent")
        assert re.search(r"(points of|costs no) accuracy(, before rounding)? \(all samples", under)


def test_a_screen_reader_finds_names_for_all_controls(window, page):
    window.open(page)
    window.tool("Accessibility.enable")
    nodes = window.tool("Accessibility.getFullAXTree")["nodes"]
    window.tool("Accessibility.disable")
    named = [
        (node["role"]["value"], node.get("name", {}).get("value", ""))
        for node in nodes
        if not node["ignored"]
    ]
    roles = ("slider", "combobox", "checkbox", "button", "image", "region", "heading", "table")
    nameless = [role for role, name in named if role in roles[:6] and not name]
    assert nameless == []
    assert {role for role, _ in named} >= set(roles)
    assert [name for role, name in named if role == "slider"] == [
        "deadline",
        "how sure an answer must be to leave early:",
    ]


def test_a_late_deadline_and_an_early_one_are_said(window, page):
    window.open(page)
    words, _ = shown(window, deadline=0.1)
    assert words.startswith(
        "With a deadline of 0.100 ms no answer is sure to be there: the first takes up to 0.9"
    )
    words, found = shown(window, deadline=1.6)
    assert found["cap"] == 1
    under = window.run("return document.getElementById('under').textContent")
    assert "Exit 1 (block1) is the deepest that fits this deadline." in under


def test_the_keyboard_turns_dials_and_the_address_keeps_them(window, page):
    window.open(page)
    window.run("document.getElementById('sure').focus()")
    before = window.run("return document.getElementById('sentence').textContent")
    window.press("End")
    after = window.run("return document.getElementById('sentence').textContent")
    assert after != before
    # the address follows when the dial rests
    address = window.run("return new Promise((done) => setTimeout(() => done(location.hash), 600))")
    assert "sure=" in address
    assert after == window.run("return document.getElementById('spoken').textContent")
    window.open(page, address)
    assert window.run("return document.getElementById('sentence').textContent") == after


def test_the_guarantee_is_that_of_control_risk(window, page, policies):
    window.open(page)
    family = make_payload(RECORDING, COSTS, policies).families[0]
    limit = family.certified[1]
    for step, kept in ((limit, "This one keeps it"), (limit - 1, "could not be shown")):
        shown(window, policy=0, sure=step, guaranteed=1, level=1)
        said = window.run("return document.getElementById('promise').textContent")
        assert kept in said
        assert "at most 1\N{NO-BREAK SPACE}% of inputs" in said
        assert "cuts short" not in said
    # a deadline that sends samples out earlier is no part of what was shown
    shown(window, policy=0, sure=limit, guaranteed=1, level=1, deadline=1.6)
    said = window.run("return document.getElementById('promise').textContent")
    assert "not about answers that the deadline cuts short" in said


def test_a_sample_is_watched_exit_by_exit(window, page):
    window.open(page)
    window.run("document.querySelectorAll('.sample')[0].focus()")
    window.press("ArrowRight")
    chosen = window.run("return document.querySelector('.sample.chosen').dataset.place")
    assert chosen == "1"
    columns = window.run(
        "return [...document.querySelectorAll('#mind strong')].map(e => e.textContent)"
    )
    assert len(columns) == 4
    assert sum(column.endswith("answers") for column in columns) == 1


def test_on_paper_everything_is_open(window, page):
    window.open(page)
    window.run("dispatchEvent(new Event('beforeprint'))")
    closed = "return document.querySelectorAll('details:not([open])').length"
    assert window.run(closed) == 0


def test_without_script_the_result_stands_there(window, page):
    window.tool("Emulation.setScriptExecutionDisabled", value=True)
    try:
        window.open(page)
        words = window.tool("Runtime.evaluate", expression="document.body.innerText")
    finally:
        window.tool("Emulation.setScriptExecutionDisabled", value=False)
    text = words["result"]["value"].replace("\N{NO-BREAK SPACE}", " ")
    assert re.search(
        r"With a deadline of \d.* ms it is right on \d.* %, after \d.* ms on average", text
    )
    # dials that cannot be turned are not there
    assert "how sure an answer must be" not in text
    assert "Which exit answers by when" in text
    assert "policy one point" in text
