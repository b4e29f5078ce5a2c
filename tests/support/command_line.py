"""What the tests of the command line share."""

import sys
from collections.abc import Callable

import pytest

from impatient import cli

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


def run_command_line(patch: pytest.MonkeyPatch, *arguments: object) -> int:
    """Run it in this process.

    Returns the exit code.
    """
    patch.setenv("COLUMNS", "200")
    patch.setattr(sys, "argv", ["impatient", *map(str, arguments)])
    try:
        cli.main()
    except SystemExit as exit:
        return int(exit.code or 0)
    return 0
