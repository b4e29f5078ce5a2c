"""A network whose exits answer together: ensembles of the exits so far."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor, nn

from impatient.anytime import Exit, Network, Run
from impatient.counting import StageFacts
from impatient.ensembling import Rule, RuleName, Running, as_temperatures
from impatient.errors import StaleInput
from impatient.networks.heads import Layout
from impatient.networks.multi_exit import MultiExitNetwork
from impatient.networks.stages import Cut


class CombinedRun(Run):
    """A run that combines the outputs of all exits so far.

    It is stopped, closed and dropped like the run inside it.

    Thread:
        The rules of the run inside apply.
    """

    def __init__(self, run: Run, running: Running) -> None:
        self._run = run
        self._running = running

    def __next__(self) -> Exit:
        exit = next(self._run)
        try:
            output = self._running.add(exit.output(), exit.index)
        except BaseException:
            # Without this exit, later exits would be combined wrongly.
            self.close()
            raise
        return Exit(exit.index, exit.features, output, mask=exit.mask)

    def close(self) -> None:
        self._run.close()


class RunningEnsemble(Network):
    """A network with exits, each of which answers for all exits so far.

    It has the protocol of the network inside it. An exit needs the outputs of all earlier exits. So
    its head runs, and its output is combined, when the run reaches it; no head can be skipped, and
    `output()` costs nothing. In a cost profile the stages contain their heads, and contract and
    interruptible costs are equal. Profiles, recordings, policies, the runner and `fit` treat it
    like any other network.

    Its weights are the tensors of the network inside; their names begin with "network.". The rule
    and the temperatures are part of the state_dict, so that a policy or profile of another rule is
    refused.

    Args:
        network: network from `attach_exits`, or a `Network` of your own.
        rule: how outputs are combined: "boosted", "arithmetic", "geometric", "poe", "caching", or a
            `Rule`. "boosted" is also for training; the others are meant for a trained network.
        temperatures: K positive numbers by which the exits' outputs are divided first
            (`fit_temperatures` on a recording of the network).
        recalibration: K positive numbers by which the combined outputs are divided
            (`fit_temperatures` on a recording of the ensemble).
    Attributes:
        network: network inside.
        rule: how outputs are combined.
        temperatures: buffer of shape [K]; 1 leaves an output as it is.
        recalibration: buffer of shape [K]; 1 leaves a combined output as it is.
    Raises:
        PolicyError: if the rule is unknown, or there are not K positive temperatures.
    Example:
        >>> from impatient.networks import attach_exits
        >>> backbone = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> exits = attach_exits(backbone, after=["0"], example=torch.zeros(1, 8))
        >>> network = RunningEnsemble(exits, "poe")
        >>> with network.exits(torch.zeros(5, 8)) as run:
        ...     [tuple(exit.output().shape) for exit in run]
        [(5, 3), (5, 3)]
    """

    temperatures: Tensor
    recalibration: Tensor
    num_classes: int

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
        self.num_classes = network.num_classes
        self.rule = Rule.of(rule)
        device = next((tensor.device for tensor in network.state_dict().values()), None)
        for name, values in (("temperatures", temperatures), ("recalibration", recalibration)):
            checked = as_temperatures(values, network.num_exits)
            self.register_buffer(
                name,
                (torch.ones(network.num_exits) if checked is None else checked.clone()).to(device),
            )

    @property
    def num_exits(self) -> int:
        return self.network.num_exits

    @property
    def exit_names(self) -> tuple[str, ...]:
        return self.network.exit_names

    @property
    def backbone(self) -> nn.Module:
        return self.network.backbone

    @property
    def exit_free(self) -> nn.Module:
        return self.network.exit_free

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
        """Describe in words how the network is divided into stages."""
        return (
            f"{self.network.mechanism}; heads run with their stages, outputs combined: "
            f"{self.rule.name}"
        )

    def forward(self, x: Any, **options: Any) -> tuple[Tensor, ...]:
        """Compute the combined outputs of all exits, for training.

        Args:
            x: input of the network inside.
            options: options of its forward, such as `gradients`.
        Returns:
            K outputs of shape [B, num_classes], shallow to deep.
        """
        return self._running().add_all(self.network(x, **options))

    def exits(self, x: Any, **options: Any) -> CombinedRun:
        """Run stage by stage, each with its head.

        Leaving the loop early computes nothing more.

        Args:
            x: input of the network inside.
            options: options of its run, such as `keep`, which here only concerns the features.
        """
        return CombinedRun(self.network.exits(x, **options), self._running())

    def early_heads(self) -> Sequence[nn.Module]:
        return self.network.early_heads()

    def pooled(self, exit: Exit) -> Tensor:
        return self.network.pooled(exit)

    def stage_facts(self, x: Any) -> list[StageFacts]:
        """Return the facts of the network inside, each head counted in its stage."""
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

    def get_extra_state(self) -> Tensor:
        """Return the rule as a tensor.

        So the rule is saved, compared and fingerprinted with the weights.
        """
        return torch.tensor(list(_rule_text(self.rule).encode()), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        """Refuse weights that were saved with another rule."""
        saved = bytes(state.tolist()).decode()
        if saved != _rule_text(self.rule):
            raise StaleInput(
                f"these weights were saved with the rule {saved}, but here it is "
                f"{_rule_text(self.rule)}. Make the ensemble with that rule, or load only the "
                "weights of the network inside."
            )

    def _running(self) -> Running:
        return Running(
            self.rule,
            self.num_exits,
            temperatures=self.temperatures,
            recalibration=self.recalibration,
        )


def _rule_text(rule: Rule) -> str:
    return json.dumps(asdict(rule), sort_keys=True)
