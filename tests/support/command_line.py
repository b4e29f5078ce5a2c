"""What the tests of the command line share."""

from collections.abc import Callable

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
