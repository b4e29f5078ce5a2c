"""The command line in this process, and a run directory in which every verb has run."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from command_line import TINY, Call
from impatient import cli


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
