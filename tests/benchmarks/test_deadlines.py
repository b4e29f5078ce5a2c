"""The bare thread that interruptible runs are held against, and what a row says of callers."""

import math
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from torch import nn

from impatient import Deadline, MultiExitNetwork, attach_exits


@pytest.fixture
def script(load_script: Callable[[str], ModuleType]) -> ModuleType:
    return load_script("deadlines")


@pytest.fixture
def network() -> MultiExitNetwork:
    backbone = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3))
    return attach_exits(backbone, example=torch.zeros(1, 4), after=["0", "1"]).eval()


def test_bare_thread_answers_with_the_last_exit_where_time_is_left(
    script: ModuleType, network: MultiExitNetwork
) -> None:
    bare = script.BareThread(network, torch.zeros(1, 4))
    waited = bare(Deadline.after(60.0))
    assert waited.exit == network.num_exits - 1
    assert waited.in_time
    assert waited.late_s < 0.0


def test_bare_thread_answers_late_with_the_first_exit_where_none_is_left(
    script: ModuleType, network: MultiExitNetwork
) -> None:
    waited = script.BareThread(network, torch.zeros(1, 4))(Deadline(0.0))
    assert waited.exit == 0
    assert not waited.in_time


def test_a_late_exit_does_not_replace_one_in_time(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    instants = iter([0.5, 1.5])
    monkeypatch.setattr(script.SYSTEM_CLOCK.__class__, "now", staticmethod(lambda: next(instants)))
    job = script.Job(1.0)
    assert not job.posted(0, last=False)
    assert job.posted(1, last=False)
    assert (job.exit, job.posted_at) == (0, 0.5)


def test_returns_are_told_apart_by_whether_there_was_an_answer(
    script: ModuleType, network: MultiExitNetwork
) -> None:
    waited = [script.Waited(1, True, 0.001), script.Waited(0, False, 0.009)]
    given = script.Trained(
        network=network, images=torch.zeros(1, 4), labels=None, accuracy=(0.5, 1.0), data="toy"
    )
    row = script.waiting("bare thread", "all", script.np.array([1.0]), [waited], [0.5], given)
    assert row["without an answer"].startswith("50.00%")
    assert row["back after the deadline ms p50 / p99 / max"].endswith("9.000 (n=2)")
    assert row["back, with an answer"] == "1.000 / 1.000 / 1.000 (n=1)"
    assert row["accuracy bought"] == "75.00%"
    assert script.back([-math.inf]).endswith("(n=0)")
