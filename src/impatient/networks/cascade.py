"""Run networks made apart as one, each sample on its own way."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from impatient.anytime import Exit, Network, Run
from impatient.counting import StageFacts, count_macs
from impatient.errors import ClassCountMismatch, NetworkError
from impatient.inputs import (
    batch_size_of,
    call_model,
    evaluating,
    input_tensor,
    output_tensor,
)
from impatient.networks.ambient import Ambient
from impatient.trees import map_samples


class Router(Protocol):
    """A rule for the ways of samples through a cascade.

    It is any `impatient.Policy`, or a class that derives from this one.
    """

    def for_rows(self, rows: Tensor) -> Router:  # noqa: ARG002  most treat all rows alike
        """Return the rule for these samples of the batch, in their order."""
        return self

    def sees(self, node: int) -> tuple[int, ...]:
        """Return the networks whose outputs decide at this network."""
        ...

    def next_node(
        self, node: int, outputs: Mapping[int, Tensor], pooled: Tensor | None = None
    ) -> Tensor:
        """Return the next network of each sample that has run this one.

        It is a larger number, or negative for a sample that this network answers.
        """
        ...


class RoutedExit(Exit):
    """An exit of a cascade: one network has just run on its samples.

    Attributes:
        index: number of the network.
        features: input of its last linear layer, for its samples; None if it has no such layer.
        exits: network whose output is the answer so far, for each sample of the batch.
        upcoming: number of the network that would run next; None if every sample has its answer.
        whole: whether the network ran on all samples.
    """

    __slots__ = ("exits", "upcoming", "whole")

    exits: tuple[int, ...]
    upcoming: int | None
    whole: bool

    def __init__(
        self,
        index: int,
        features: Tensor | None,
        output: Tensor,
        *,
        exits: tuple[int, ...],
        upcoming: int | None,
        whole: bool,
    ) -> None:
        super().__init__(index, features, output)
        self.exits = exits
        self.upcoming = upcoming
        self.whole = whole


class CascadeRun(Run):
    """A run in which networks run the samples sent to them.

    The samples keep their order. After `close()` no further network runs.

    Thread:
        May be advanced from any thread, but only by one at a time. It runs in the gradient,
        inference and autocast modes in which it was created.
    """

    def __init__(self, cascade: Cascade, x: Any, router: Router | None) -> None:
        self._cascade = cascade
        self._router = router
        self._x = x
        self._count = batch_size_of(x)
        self._ambient = Ambient.now()
        device = input_tensor(x).device
        # Samples that are sent to each network.
        self._waiting = {0: torch.arange(self._count, device=device)}
        # Outputs of each network for all samples; 0 for samples that it did not run.
        self._outputs: dict[int, Tensor] = {}
        self._answer: Tensor | None = None
        self._answering = torch.zeros(self._count, dtype=torch.long, device=device)

    def __next__(self) -> Exit:
        node = self._upcoming()
        if node is None:
            raise StopIteration
        rows = self._waiting.pop(node)
        whole = len(rows) == self._count
        try:
            part = self._x if whole else map_samples(lambda value: value[rows], self._x)
            output, features = self._cascade._call(self._ambient, node, part)
            self._answer_with(node, rows, output, whole)
            self._send_on(node, rows, features)
        except BaseException:
            self.close()
            raise
        assert self._answer is not None
        return RoutedExit(
            node,
            features,
            self._answer,
            exits=tuple(self._answering.tolist()),
            upcoming=self._upcoming(),
            whole=whole,
        )

    def close(self) -> None:
        self._waiting.clear()
        self._outputs.clear()
        self._x = None

    def _upcoming(self) -> int | None:
        return min(self._waiting, default=None)

    def _answer_with(self, node: int, rows: Tensor, output: Tensor, whole: bool) -> None:
        if self._answer is not None and output.shape[1:] != self._answer.shape[1:]:
            raise ClassCountMismatch(
                f"network {self._cascade.exit_names[node]} gives {tuple(output.shape[1:])}, those "
                f"before it {tuple(self._answer.shape[1:])}; expected the same classes in the same "
                "order."
            )
        if whole:
            self._outputs[node] = output
            self._answer = output
        else:
            # Never in place, because earlier answers were given to the caller.
            zeros = output.new_zeros(self._count, *output.shape[1:])
            self._outputs[node] = zeros.index_copy(0, rows, output)
            answer = zeros if self._answer is None else self._answer
            self._answer = answer.index_copy(0, rows, output)
        self._answering[rows] = node

    def _send_on(self, node: int, rows: Tensor, features: Tensor | None) -> None:
        """Send samples that are not answered to their next networks."""
        last = self._cascade.num_exits - 1
        if self._router is None:
            if node < last:
                self._waiting[node + 1] = rows
            return
        router = self._router.for_rows(rows)
        seen = {known: self._outputs[known][rows] for known in router.sees(node) or (node,)}
        going = router.next_node(node, seen, features)
        for following in going.unique().tolist():
            if following < 0:
                continue
            if not node < following <= last:
                raise NetworkError(
                    f"the router sends samples from network {node} to {following}; expected a "
                    f"larger number, at most {last}. Order the networks so that every move goes up."
                )
            sent = rows[going == following]
            if following in self._waiting:
                sent = torch.cat([self._waiting[following], sent]).sort().values
            self._waiting[following] = sent


class Cascade(Network):
    """Networks made apart, the less expensive first, as one anytime network.

    Exit k is the answer of network k. Without a router every sample runs every network, as for a
    profile or a recording. With a router (`routed`) each sample goes its own way. A network then
    runs only the samples that are sent to it, and `output()` gives the answers of all samples so
    far.

    Args:
        networks: callables (modules, engines, functions) whose output is [B, num_classes], or holds
            such a tensor (`logits`).
        names: names of the networks; the default is their numbers.
        router: rule that says where samples go; None sends them to the next network.
    Attributes:
        networks: networks as modules.
        router: rule that says where samples go, or None.
    Raises:
        NetworkError: if there is no network, or names do not fit.
    Source:
        Adaptive Neural Networks (Bolukbasi et al. 2017), network selection.
    Example:
        >>> large = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3))
        >>> cascade = Cascade([nn.Linear(4, 3), large], ["small", "large"])
        >>> with cascade.exits(torch.zeros(2, 4)) as run:
        ...     [(exit.index, exit.exits) for exit in run]
        [(0, (0, 0)), (1, (1, 1))]
    """

    def __init__(
        self,
        networks: Sequence[Callable[..., Any]],
        names: Sequence[str] | None = None,
        *,
        router: Router | None = None,
    ) -> None:
        super().__init__()
        if not networks:
            raise NetworkError("a cascade of no networks; expected at least one.")
        self.networks = nn.ModuleList(
            net if isinstance(net, nn.Module) else _Called(net) for net in networks
        )
        self._names = tuple(names) if names is not None else tuple(map(str, range(len(networks))))
        if len(self._names) != len(networks) or len(set(self._names)) < len(networks):
            raise NetworkError(
                f"names {self._names} for {len(networks)} networks; expected one for each, all "
                "different."
            )
        self.router = router
        # Found once, because a network has hundreds of modules.
        self._linear = [_last_linear(network) for network in self.networks]

    @property
    def num_exits(self) -> int:
        return len(self.networks)

    @property
    def exit_names(self) -> tuple[str, ...]:
        return self._names

    @property
    def exit_free(self) -> nn.Module:
        """Return the last network."""
        return self.networks[-1]

    @property
    def mechanism(self) -> str:
        """Describe in words how the cascade is divided into stages."""
        way = "one after the other" if self.router is None else "each sample on its own way"
        return f"{self.num_exits} networks, {way}"

    def routed(self, router: Router | None) -> Cascade:
        """Return a cascade of the same networks with this router."""
        return Cascade(list(self.networks), self.exit_names, router=router).train(self.training)

    def forward(self, x: Any) -> tuple[Tensor, ...]:
        """Compute the outputs of all networks on all samples, without the router."""
        return tuple(output_tensor(call_model(network, x)) for network in self.networks)

    def exits(self, x: Any, *, keep: bool = False) -> CascadeRun:  # noqa: ARG002  outputs are kept
        """Run network by network.

        Leaving the loop early runs no further network.

        Args:
            x: input of every network: a tensor, or a tuple, list or mapping of tensors, with the
                samples first.
            keep: accepted for the protocol; all outputs are kept anyway.
        """
        return CascadeRun(self, x, self.router)

    def routed_exits(self, x: Any, router: Router) -> CascadeRun:
        return CascadeRun(self, x, router)

    def pooled(self, exit: Exit) -> Tensor:
        """Return the input of a network's last linear layer, shape [B, D].

        Raises:
            NetworkError: if it has none.
        """
        if exit.features is None:
            raise NetworkError(
                f"network {self.exit_names[exit.index]} has no linear layer; expected one, whose "
                "input serves as features."
            )
        features: Tensor = exit.features
        return features if features.dim() == 2 else features.flatten(1, -2).mean(1)

    def stage_facts(self, x: Any) -> list[StageFacts]:
        """Return shape, MACs and parameters of each network."""
        with evaluating(self), torch.no_grad():
            return [
                StageFacts(
                    exit=name,
                    features=tuple(output.shape),
                    head="(the network's own)",
                    stage_macs=count_macs(network, x),
                    head_macs=0,
                    stage_parameters=sum(map(Tensor.numel, network.parameters())),
                    head_parameters=0,
                )
                for name, network, output in zip(
                    self.exit_names, self.networks, self(x), strict=True
                )
            ]

    def _call(self, ambient: Ambient, node: int, x: Any) -> tuple[Tensor, Tensor | None]:
        """Return a network's output, and the input of its last linear layer."""
        network = self.networks[node]
        here = threading.get_ident()
        read: list[Tensor] = []

        def keep(_: nn.Module, args: tuple[Any, ...]) -> None:
            # Other threads may run the same network.
            if threading.get_ident() == here:
                read[:] = args[:1]

        layer = self._linear[node]
        hook = layer.register_forward_pre_hook(keep) if layer is not None else None
        try:
            output = output_tensor(ambient.within(call_model, network, x))
        finally:
            if hook is not None:
                hook.remove()
        return output, read[0] if read else None


def _last_linear(network: nn.Module) -> nn.Linear | None:
    return next(
        (layer for layer in reversed(list(network.modules())) if isinstance(layer, nn.Linear)), None
    )


class _Called(nn.Module):
    """A callable as a module."""

    def __init__(self, call: Callable[..., Any]) -> None:
        super().__init__()
        self.call = call

    def forward(self, *args: Any, **options: Any) -> Any:
        return self.call(*args, **options)
