"""What the plain networks share: checked sizes and initial weights."""

from __future__ import annotations

from torch import nn

from impatient.errors import ModelSpecError


def check_sizes(model: str, counts: tuple[str, object], **sizes: object) -> None:
    """Refuse sizes that are not whole numbers of at least 1.

    Args:
        model: name of the model.
        counts: name and value of its numbers of blocks, a list or tuple.
        sizes: names and values of its other sizes.
    """
    name, blocks = counts
    listed = list(blocks) if isinstance(blocks, (list, tuple)) else []
    if not listed or any(type(size) is not int or size < 1 for size in (*listed, *sizes.values())):
        given = ", ".join(f"{option}={size!r}" for option, size in {name: blocks, **sizes}.items())
        raise ModelSpecError(
            f"{model}({given}); expected whole numbers of at least 1. {name} is a list of the "
            "numbers of blocks."
        )


def initialise_convolutions(model: nn.Module) -> None:
    """Draw the weights of all convolutions as in He et al. 2015."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
