"""Run networks that were made apart as one, each sample on its own way."""

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
    first_tensor,
    map_samples,
    output_tensor,
)
from impatient.networks.stages import Ambient


class Router(Protocol):
    """What a cascade asks where samples go: any `impatient.Policy`, or a class derived from this."""

    def for_rows(self, rows: Tensor) -> Router:  # noqa: ARG002  most treat all rows alike
        """The rule for these samples of the batch, in their order."""
        return self

    def sees(self, node: int) -> tuple[int, ...]:
        """The networks whose outputs are needed to decide at this one."""
        ...

    def next_node(
        self, node: int, outputs: Mapping[int, Tensor], pooled: Tensor | None = None
    ) -> Tensor:
        """For samples that have run a network, the number of the next, a larger one; negative where
        this one answers.
        """
        ...


class RoutedExit(Exit):
    """One network of a cascade has just run, on the samples that came to it.

    Attributes:
        index: the network's number.
        features: what its last linear layer read, for the samples that came to it; None if it has
            no such layer.
        exits: per sample of the batch, the network whose output is its answer so far.
        upcoming: number of the network that would run next; None when every sample has its answer.
        whole: whether all samples came here.
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
    """One run, network by network; each runs the samples that are sent to it, in their old order.

    Stop asking, or call `close()`, and no further network runs.

    Thread:
        May be advanced from any thread, by one at a time. It runs in the modes in which it was
        asked for.
    """

    def __init__(self, cascade: Cascade, x: Any, router: Router | None) -> None:
        self._cascade = cascade
        self._router = router
        self._x = x
        self._count = batch_size_of(x)
        self._ambient = Ambient.now()
        device = first_tensor(x).device
        # per network, the samples that are sent to it
        self._waiting = {0: torch.arange(self._count, device=device)}
        # per network, of all samples; 0 where it did not run
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
            self._keep(node, rows, output, whole)
            self._send(node, rows, features)
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

    def _keep(self, node: int, rows: Tensor, output: Tensor, whole: bool) -> None:
        if self._answer is not None and output.shape[1:] != self._answer.shape[1:]:
            raise ClassCountMismatch(
                f"network {self._cascade.exit_names[node]} gives {tuple(output.shape[1:])}, those "
                f"before it "
                f"{tuple(self._answer.shape[1:])}; expected the same classes in the same order."
            )
        everyone = (
            output
            if whole
            else output.new_zeros(self._count, *output.shape[1:]).index_copy(0, rows, output)
        )
        self._outputs[node] = everyone
        # never written into again: what has been given away stays as it was
        self._answer = (
            everyone if whole or self._answer is None else self._answer.index_copy(0, rows, output)
        )
        self._answering[rows] = node

    def _send(self, node: int, rows: Tensor, features: Tensor | None) -> None:
        """Put the samples that go on to the networks they go to."""
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
                    f"larger number, at "
                    f"most {last}. Order the networks so that every move goes up."
                )
            sent = rows[going == following]
            others = self._waiting.get(following)
            self._waiting[following] = (
                sent if others is None else torch.cat([others, sent]).sort().values
            )


class Cascade(Network):
    """Networks that were made apart, the cheap ones first, as one anytime network: exit k is the
    answer of network k.

    Without a router every sample runs every network, which is how it is profiled and recorded. With
    one (`routed`) each
    sample goes its own way: a network runs the samples that are sent to it, and `output()` gives
        all samples' answers so far.

    Args:
        networks: any callables from an input to [B, num_classes], or to what holds it (`logits`);
            modules, engines, functions.
        names: of the networks; by default their numbers.
        router: where samples go; None: to the next network.
    Attributes:
        networks: the callables, those that are no modules wrapped in one.
        router: as given.
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
                f"different."
            )
        self.router = router
        # found once: a network has hundreds of modules
        self._linear = [_last_linear(network) for network in self.networks]

    @property
    def num_exits(self) -> int:
        return len(self.networks)

    @property
    def exit_names(self) -> tuple[str, ...]:
        return self._names

    @property
    def exit_free(self) -> nn.Module:
        """What runs where nobody wants a cascade: the last network."""
        return self.networks[-1]

    @property
    def mechanism(self) -> str:
        """How it is staged, in words."""
        return (
            f"{self.num_exits} networks, "
            f"{'one after the other' if self.router is None else 'each sample on its own way'}"
        )

    def routed(self, router: Router | None) -> Cascade:
        """The same networks under a router."""
        return Cascade(list(self.networks), self.exit_names, router=router).train(self.training)

    def forward(self, x: Any) -> tuple[Tensor, ...]:
        """Outputs of all networks on all samples, without the router."""
        return tuple(output_tensor(call_model(network, x)) for network in self.networks)

    def exits(self, x: Any, *, keep: bool = False) -> CascadeRun:  # noqa: ARG002  outputs are there
        """Run network by network; stop asking, and no further one runs.

        Args:
            x: as every network takes it: a tensor, or a tuple, list or mapping of tensors with the
                samples first.
            keep: of no consequence; the outputs are there already.
        """
        return CascadeRun(self, x, self.router)

    def routed_exits(self, x: Any, router: Router) -> CascadeRun:
        return CascadeRun(self, x, router)

    def pooled(self, exit: Exit) -> Tensor:
        """What the last linear layer of a network read, shape [B, D].

        Raises:
            NetworkError: if it has none.
        """
        if exit.features is None:
            raise NetworkError(
                f"network {self.exit_names[exit.index]} has no linear layer whose input could "
                f"serve as features."
            )
        features: Tensor = exit.features
        return features if features.dim() == 2 else features.flatten(1, -2).mean(1)

    def stage_facts(self, x: Any) -> list[StageFacts]:
        """Shape, MACs and parameters of each network."""
        facts = []
        with evaluating(self), torch.no_grad():
            for name, network in zip(self.exit_names, self.networks, strict=True):
                facts.append(
                    StageFacts(
                        exit=name,
                        features=tuple(output_tensor(call_model(network, x)).shape),
                        head="(the network's own)",
                        stage_macs=count_macs(network, x),
                        head_macs=0,
                        stage_parameters=sum(
                            parameter.numel() for parameter in network.parameters()
                        ),
                        head_parameters=0,
                    )
                )
        return facts

    def _call(self, ambient: Ambient, node: int, x: Any) -> tuple[Tensor, Tensor | None]:
        """Output of a network, and what its last linear layer read."""
        network = self.networks[node]
        here = threading.get_ident()
        read: list[Tensor] = []

        def keep(_: nn.Module, args: tuple[Any, ...]) -> None:
            # other threads may run the same network
            if threading.get_ident() == here:
                read[:] = args[:1]

        layer = self._linear[node]
        hook = layer.register_forward_pre_hook(keep) if layer is not None else None
        try:
            output = ambient.call(lambda _: output_tensor(call_model(network, x)), first_tensor(x))
        finally:
            if hook is not None:
                hook.remove()
        return output, read[0] if read else None


def _last_linear(network: nn.Module) -> nn.Linear | None:
    return next(
        (layer for layer in reversed(list(network.modules())) if isinstance(layer, nn.Linear)), None
    )


class _Called(nn.Module):
    """A callable that is no module."""

    def __init__(self, call: Callable[..., Any]) -> None:
        super().__init__()
        self.call = call

    def forward(self, *args: Any, **options: Any) -> Any:
        return self.call(*args, **options)
