"""The command line in this process, and a run directory in which every verb has run."""

import shutil
from pathlib import Path

import pytest
import torch

from command_line import TINY, Call, run_command_line


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """Run the command line; returns the exit code and everything it printed, on one line."""

    def run(*arguments: object) -> tuple[int, str]:
        code = run_command_line(monkeypatch, *arguments)
        captured = capsys.readouterr()
        return code, " ".join((captured.out + captured.err).split())

    return run


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory in which every verb has run once."""
    directory = tmp_path_factory.mktemp("runs") / "digits"
    # a profile belongs to its thread count, which is that of the tests
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        for verb in (
            ["train", *TINY],
            ["profile", "--repeats", "30", "--quiet"],
            ["record", "--features", "--quiet"],
            ["fit", "--max-loss", "2"],
            ["fit", "--mean-ms", "1000"],
            ["evaluate", "--budget", "uniform:0:10"],
            ["report"],
        ):
            assert run_command_line(patch, verb[0], directory, *verb[1:]) == 0
    return directory


@pytest.fixture
def run_dir(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run directory, to spoil."""
    return Path(shutil.copytree(finished, tmp_path / "run"))
