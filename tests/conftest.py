"""Shared by all tests: a toy backbone, a network on a fake clock, the command line.

Every test is seeded and has one torch thread: tiny networks gain nothing from more.
"""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fakes import FakeNetwork, all_forgotten, wait_until
from impatient import cli
from impatient.clock import FakeClock


class ToyBackbone(nn.Module):
    """Four small blocks and a classifier on [B, 8]; quick enough for thousands of runs."""

    def __init__(self, num_classes: int = 3, width: int = 8) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(width, width), nn.ReLU()) for _ in range(4)
        )
        self.classifier = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.classifier(x)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)


@pytest.fixture
def toy() -> ToyBackbone:
    return ToyBackbone()


@pytest.fixture
def toy_input() -> Tensor:
    return torch.randn(5, 8)


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def network(clock: FakeClock) -> FakeNetwork:
    """Exit k answers at k + 1.5 seconds."""
    return FakeNetwork(clock, [1.0] * 4, [0.5] * 4)


@pytest.fixture
def no_thread_stays() -> Iterator[None]:
    """When the test is over, its runners' threads end, since nobody holds the runners any more."""
    yield
    wait_until(all_forgotten)


TINY = [
    "--model",
    "impatient:resnet:n=1,c=8",
    "--exits",
    "3",
    "--epochs",
    "3",
    "--batch-size",
    "64",
    "--quiet",
]
Call = Callable[..., tuple[int, str]]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """Run the command line in this process; returns the exit code and everything it printed, on one
    line.
    """

    def run(*arguments: object) -> tuple[int, str]:
        monkeypatch.setenv("COLUMNS", "200")
        monkeypatch.setattr(sys, "argv", ["impatient", *map(str, arguments)])
        code = 0
        try:
            cli.main()
        except SystemExit as exit:
            code = int(exit.code or 0)
        captured = capsys.readouterr()
        return code, " ".join((captured.out + captured.err).split())

    return run


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory in which every verb has run once."""
    directory = tmp_path_factory.mktemp("runs") / "digits"
    # as in the tests: a profile belongs to its thread count
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
    }
    for verb in (
        ["train", *TINY],
        ["profile", "--repeats", "30", "--quiet"],
        ["record", "--features", "--quiet"],
        ["fit", "--max-loss", "2"],
        ["fit", "--mean-ms", "1000"],
        ["evaluate", "--budget", "uniform:0:10"],
        ["report"],
    ):
        done = subprocess.run(
            [sys.executable, "-m", "impatient.cli", verb[0], str(directory), *verb[1:]],
            capture_output=True,
            text=True,
            env=environment,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
    return directory
