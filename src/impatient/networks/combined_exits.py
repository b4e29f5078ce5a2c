"""A network whose exits answer together: every exit's output is an ensemble of its own and those
before.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from impatient.ensembling import Rule, RuleName, Running, as_temperatures
from impatient.errors import StaleInput
from impatient.networks.heads import Layout
from impatient.networks.multi_exit import MultiExitNetwork
from impatient.networks.stages import Cut, Exit, Walk

if TYPE_CHECKING:
    from impatient.networks.describe import StageFacts


class CombinedExit:
    """One exit of a run over an ensemble; its output is there already.

    Attributes:
        index: 0-based, shallow to deep.
        features: as the inner network gives them.
    """

    __slots__ = ("_output", "features", "index")

    def __init__(self, index: int, features: Tensor, output: Tensor) -> None:
        self.index = index
        self.features = features
        self._output = output

    def output(self) -> Tensor:
        """The combined output of this exit and those before, shape [B, num_classes]; before
        softmax.
        """
        return self._output

    def __repr__(self) -> str:
        return f"CombinedExit(index={self.index}, features={tuple(self.features.shape)})"


class CombinedWalk(Iterator[CombinedExit]):
    """One staged run over an ensemble; stop, close and drop it like the `Walk` inside it.

    Thread:
        As `Walk`.
    """

    def __init__(self, walk: Walk, running: Running) -> None:
        self._walk = walk
        self._running = running

    def __next__(self) -> CombinedExit:
        exit = next(self._walk)
        try:
            output = self._running.add(exit.output(), exit.index)
        except BaseException:
            # without this exit, those after it would be combined wrongly
            self.close()
            raise
        return CombinedExit(exit.index, exit.features, output)

    def close(self) -> None:
        """Throw away what has not been computed; harmless when there is nothing to throw away."""
        self._walk.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class RunningEnsemble(nn.Module):
    """A network with exits, each of which answers for all exits so far. Same protocol as the
    network inside it.

    An exit needs the outputs of all before it, so its head runs, and its output is combined, when
    the run reaches it: heads belong to their stages, and `output()` costs nothing. So the stages of
    a cost profile contain the heads, contract and interruptible costs are equal, and profile,
    record, policies, runner and fit need not know. The price: no head can be skipped.

    Its weights are those of the network inside, the same tensors; their names begin with
    "network.". The rule and the temperatures are part of the state_dict, so that no policy or
    profile of another rule is taken for its own.

    Args:
        network: from `attach_exits`, or anything with the same protocol.
        rule: how outputs are combined: "boosted", "arithmetic", "geometric", "poe", "caching", or a
            `Rule`. "boosted" is for training, too; the others are meant for a network that is
            trained already.
        temperatures: one per exit, its output is divided by it before it is combined
            (`fit_temperatures` on a recording of the network).
        recalibration: one per exit, its combined output is divided by it (`fit_temperatures` on a
            recording of the ensemble).
    Attributes:
        network: the network inside.
        rule: how outputs are combined.
        temperatures, recalibration: buffers of shape [K], 1 where nothing is changed.
    Raises:
        PolicyError: if the rule is unknown, or there are not K positive temperatures.
    Example:
        >>> from impatient.networks import attach_exits
        >>> backbone = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> network = RunningEnsemble(attach_exits(backbone, after=["0"], example=torch.zeros(1, 8)), "poe")
        >>> with network.exits(torch.zeros(5, 8)) as run:
        ...     [tuple(exit.output().shape) for exit in run]
        [(5, 3), (5, 3)]
    """

    temperatures: Tensor
    recalibration: Tensor

    def __init__(
        self,
        network: MultiExitNetwork,
        rule: RuleName | Rule,
        temperatures: Sequence[float] | None = None,
        *,
        recalibration: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        self.network = network
        self.rule = Rule.of(rule)
        place = next((tensor.device for tensor in network.state_dict().values()), None)
        for name, values in (("temperatures", temperatures), ("recalibration", recalibration)):
            checked = as_temperatures(values, network.num_exits)
            self.register_buffer(
                name,
                (torch.ones(network.num_exits) if checked is None else checked.clone()).to(place),
            )

    @property
    def num_exits(self) -> int:
        return self.network.num_exits

    @property
    def exit_names(self) -> tuple[str, ...]:
        return self.network.exit_names

    @property
    def num_classes(self) -> int:
        return self.network.num_classes

    @property
    def backbone(self) -> nn.Module:
        return self.network.backbone

    @property
    def heads(self) -> nn.ModuleList:
        return self.network.heads

    @property
    def cuts(self) -> tuple[Cut, ...]:
        return self.network.cuts

    @property
    def layouts(self) -> tuple[Layout, ...]:
        return self.network.layouts

    @property
    def mechanism(self) -> str:
        """How it is staged, in words."""
        return (
            f"{self.network.mechanism}; heads run with their stages, outputs combined: "
            f"{self.rule.name}"
        )

    def forward(self, x: Any, **options: Any) -> tuple[Tensor, ...]:
        """Combined outputs of all exits, for training.

        Args:
            x: as for the network inside.
            options: for the forward of the network inside, such as `gradients`.
        Returns:
            K outputs of shape [B, num_classes], shallow to deep.
        """
        return self._running().add_all(self.network(x, **options))

    def exits(self, x: Any, **options: Any) -> CombinedWalk:
        """Run stage by stage, each with its head; stop asking, and nothing deeper is computed.

        Args:
            x: as for `forward`.
            options: for the network inside, such as `keep`, which here only concerns the features.
        """
        return CombinedWalk(self.network.exits(x, **options), self._running())

    def pooled(self, exit: Exit | CombinedExit) -> Tensor:
        """Features of an exit averaged over space or tokens, shape [B, D]."""
        return self.network.pooled(exit)  # type: ignore[arg-type]  # looks at index and features only

    def stage_facts(self, x: Any) -> list[StageFacts]:
        """As the network's inside, with the MACs and parameters of each head moved into its stage."""
        return [
            replace(
                fact,
                stage_macs=fact.stage_macs + fact.head_macs,
                head_macs=0,
                stage_parameters=fact.stage_parameters + fact.head_parameters,
                head_parameters=0,
            )
            for fact in self.network.stage_facts(x)
        ]

    def describe(self, x: Any) -> str:
        """As the network inside describes itself, with the heads counted to the stages."""
        from impatient.networks.describe import describe

        return describe(self, x)

    def get_extra_state(self) -> Tensor:
        """The rule, as a tensor, so that it is saved, compared and fingerprinted with the weights."""
        return torch.tensor(list(_spelled(self.rule).encode()), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        """Refuse weights that were saved with another rule."""
        saved = bytes(state.tolist()).decode()
        if saved != _spelled(self.rule):
            raise StaleInput(
                f"these weights were saved with the rule {saved}, but here it is "
                f"{_spelled(self.rule)}. Make the ensemble "
                "with that rule, or load the weights of the network inside alone."
            )

    def _running(self) -> Running:
        return Running(
            self.rule,
            self.num_exits,
            temperatures=self.temperatures,
            recalibration=self.recalibration,
        )


def _spelled(rule: Rule) -> str:
    return json.dumps(asdict(rule), sort_keys=True)
