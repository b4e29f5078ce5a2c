"""A network with exits as the Trainer of transformers wants its models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from impatient.anytime import Network, check_network
from impatient.training.losses import task_losses, weighted_loss
from impatient.training.weights import parse_weights


class ForTrainer(nn.Module):
    """Take keywords, and return the loss of all exits and the last exit's output.

    That is what the Trainer of transformers, and loops made for its models, ask for. Only the
    wrapper is new: the network inside is trained in place, and used by itself afterwards. Give
    `TrainingArguments` remove_unused_columns=False, since the wrapper takes any column.

    Args:
        network: network from `attach_exits`, or a `Network` of your own.
        weights: weight of each exit in the loss, or the text of a scheme, such as "sieve"; by
            default the network's own.
    Raises:
        NetworkError: if the network is not a `Network`.
        TrainingError: if there is not one weight per exit.
    Example:
        >>> class Echo(Network):
        ...     num_exits = 1
        ...
        ...     def exits(self, x, *, keep=False):
        ...         return Run(Exit(0, None, x[name]) for name in ["values"])
        >>> from impatient.anytime import Exit, Run
        >>> found = ForTrainer(Echo())(values=torch.zeros(2, 4), labels=torch.tensor([0, 1]))
        >>> round(float(found["loss"]), 3), tuple(found["logits"].shape)
        (1.386, (2, 4))
    """

    def __init__(self, network: Network, weights: str | Sequence[float] | None = None) -> None:
        super().__init__()
        check_network(network)
        self.network = network
        wanted = network.default_weights if weights is None else weights
        text = wanted if isinstance(wanted, str) else ",".join(map(str, wanted))
        self._weights = parse_weights(text, network.num_exits)

    def forward(self, labels: Any = None, **inputs: Any) -> dict[str, Tensor]:
        """Compute the outputs, and with labels the loss.

        Args:
            labels: targets of the network's task; for classes [B].
            **inputs: inputs of the network, by name.
        Returns:
            "loss", if there are labels, and "logits", the last exit's output.
        """
        outputs = self.network(inputs)
        found = {"logits": outputs[-1]}
        if labels is None:
            return found
        losses_K = task_losses(self.network.task, outputs, labels).mean(1)
        weights_K = torch.tensor(self._weights, dtype=losses_K.dtype, device=losses_K.device)
        return {"loss": weighted_loss(losses_K, weights_K), **found}
