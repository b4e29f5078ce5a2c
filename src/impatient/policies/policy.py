"""What a policy is, and all that the library asks of one.

A new kind of policy derives from `Policy`, says what it does at an exit, and is at once evaluated,
reported, saved and run like any other. To write one of your own, define `num_exits`, `looks_at` and
`stops`; all else has a default.

    class EveryOther(impatient.Policy):
        num_exits = 4

        def looks_at(self, exit):
            return exit % 2 == 1

        def stops(self, exit, outputs=None, pooled=None):
            return outputs.softmax(-1).amax(-1) > 0.9
"""

from __future__ import annotations

import abc
import dataclasses
import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Protocol, Self, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from impatient import checks
from impatient.costs import Cost, CostProfile, Statistic
from impatient.errors import CostError, ImpatientError, PolicyError
from impatient.policies.outcome import Outcome, as_doubles
from impatient.provenance import Provenance
from impatient.store import Stored
from impatient.tasks import Task

# the move that answers here, where a policy says which network comes next
STOP = -1


class Recorded(Protocol):
    """What policies, and fitting them, need of a recording."""

    @property
    def quality(self) -> Float[Tensor, "K N"]: ...

    @property
    def scores(self) -> Mapping[str, Tensor]: ...

    @property
    def task(self) -> str: ...

    @property
    def outputs(self) -> Float[Tensor, "K N *C"] | None: ...

    @property
    def features(self) -> tuple[Tensor, ...]: ...

    @property
    def split(self) -> str: ...

    @property
    def provenance(self) -> Provenance: ...

    @property
    def labels(self) -> Int[Tensor, "N"]: ...

    def __len__(self) -> int: ...

    def logits(self) -> Float[Tensor, "K N C"]: ...

    def take(self, places: Int[Tensor, "M"], split: str) -> Self: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Description:
    """A policy in words, for tables and reports.

    Attributes:
        looks_at: what it looks at.
        rules: per exit, what it does there in a word or two.
    """

    looks_at: str
    rules: tuple[str, ...]


class Policy(Stored, abc.ABC, made_by="`impatient fit`"):
    """A rule that stops samples at exits, or sends them to networks."""

    __slots__ = ()

    def __new__(cls, *_: Any, **__: Any) -> Self:
        """Make one, if the class defines all that must be defined.

        Raises:
            PolicyError: if something is missing, with the names that were perhaps meant.
        """
        missing = sorted(cls.__abstractmethods__)
        if missing:
            own = [name for name in vars(cls) if not name.startswith("_") and name not in missing]
            near = {
                close for name in missing for close in difflib.get_close_matches(name, own, 1, 0.7)
            }
            meant = f" ({', '.join(sorted(near))} in its place?)" if near else ""
            raise PolicyError(
                f"{cls.__name__} does not define {', '.join(missing)}{meant}; a policy defines "
                "num_exits, looks_at and stops."
            )
        return super().__new__(cls)

    # --- must be defined --------------------------------------------------------------------------

    @property
    @abc.abstractmethod
    def num_exits(self) -> int:
        """How many exits, or networks, it is for."""

    @abc.abstractmethod
    def looks_at(self, exit: int) -> bool:
        """Whether it is asked at this exit.

        If not, the exit's head need not run.
        """

    @abc.abstractmethod
    def stops(
        self,
        exit: int,
        outputs: Float[Tensor, "B *C"] | None = None,
        pooled: Float[Tensor, "B *D"] | None = None,
    ) -> Bool[Tensor, "B"]:
        """Which samples are done at this exit.

        Args:
            exit: its index.
            outputs: outputs of the exit's head, before softmax; given if `needs_outputs`.
            pooled: features before the head, `network.pooled(exit)`; given if `needs_features`.
        """

    def stops_one(self, exit: int, output: Tensor | None, pooled: Tensor | None) -> bool:
        """Whether the only sample of a batch is done at this exit.

        A runner asks this where it can. Plain numbers decide it several times faster than tensors,
        so a kind of policy may define it; it must agree with `stops`.

        Args:
            exit: its index.
            output: output of the exit's head, one row; given if `needs_outputs`.
            pooled: features before the head, one row; given if `needs_features`.
        """
        return bool(self.stops(exit, output, pooled))

    # --- what it looks at, and what it costs ------------------------------------------------------

    @property
    def needs_outputs(self) -> bool:
        """Whether it looks at outputs.

        If not, a head runs only where samples leave.
        """
        return True

    @property
    def reads_classes(self) -> bool:
        """Whether it takes outputs for the logits of two or more classes."""
        return False

    @property
    def needs_features(self) -> bool:
        """Whether it looks at pooled features."""
        return False

    def open_exits(self) -> tuple[bool, ...]:
        """Per exit, whether its head runs when it is passed.

        The head of the last exit always runs.
        """
        early = (self.needs_outputs and self.looks_at(exit) for exit in range(self.num_exits - 1))
        return (*early, True)

    def added_s(self) -> tuple[float, ...]:
        """Per exit, seconds that asking the policy takes until that exit answers."""
        return (0.0,) * self.num_exits

    # --- where it comes from ----------------------------------------------------------------------

    @property
    def split(self) -> str | None:
        """The split on which it was fitted, or None."""
        return None

    @property
    def provenance(self) -> Provenance | None:
        """Weights and data that it belongs to."""
        return None

    @property
    def target(self) -> Mapping[str, float]:
        """What was asked for when it was fitted, and what was reached."""
        return _NOTHING

    @property
    def cost(self) -> Cost:
        """What the target's `mean_cost` is in."""
        return "time"

    def marked(self, *, split: str, provenance: Provenance) -> Policy:
        """Give the policy this split and these weights and data.

        A policy that has no such fields is given back as it is.
        """
        value: Any = self
        fields = dataclasses.fields(value) if dataclasses.is_dataclass(value) else ()
        if {"split", "provenance"} <= {field.name for field in fields}:
            value = dataclasses.replace(value, split=split, provenance=provenance)
        return cast("Policy", value)

    # --- running it -------------------------------------------------------------------------------

    def for_run(self, samples: int, run: int = 0) -> Policy:  # noqa: ARG002  most draw nothing
        """Return the rule of one run.

        A policy that draws at random gives its draw for these samples.

        Args:
            samples: batch size.
            run: its number; count runs, or each would draw the same.
        """
        return self

    def for_task(self, task: Task) -> Policy:  # noqa: ARG002  most ask nothing of it
        """Return the policy with the functions of the network's task.

        Runners ask for it; it matters for tasks that are not ready-made.

        Raises:
            TaskError: if the policy was fitted for another task.
        """
        return self

    def for_rows(self, rows: Int[Tensor, "R"]) -> Policy:  # noqa: ARG002  most treat all rows alike
        """Return the rule for these samples of the batch.

        It is used when the run goes on with them only.
        """
        return self

    @property
    def routes(self) -> bool:
        """Whether it chooses the next network: only a cascade can run it."""
        return False

    def sees(self, node: int) -> tuple[int, ...]:
        """Return the networks whose outputs are needed to decide at this one."""
        return (node,)

    def next_node(
        self,
        node: int,
        outputs: Mapping[int, Float[Tensor, "B C"]],
        pooled: Float[Tensor, "B D"] | None = None,
    ) -> Int[Tensor, "B"]:
        """Where samples that have run a network of a cascade go from there.

        Args:
            node: the network at which all of them are.
            outputs: outputs of the networks they have run, at least of those it `sees`, before
                softmax.
            pooled: features of this node's network, if it `needs_features`.
        Returns:
            The next network of each sample; -1 where this one's output is the answer.
        """
        here = outputs[node]
        going = torch.full((len(here),), node + 1, dtype=torch.long, device=here.device)
        if node == self.num_exits - 1:
            return torch.full_like(going, STOP)
        if self.looks_at(node):
            going[self.stops(node, here, pooled).to(here.device)] = STOP
        return going

    # --- judging it on a recording ----------------------------------------------------------------

    def exits_of(
        self, outputs: Float[Tensor, "K N C"], features: Sequence[Tensor] = ()
    ) -> Int[Tensor, "N"]:
        """Return the exit that answers each recorded sample.

        Args:
            outputs: outputs of all exits.
            features: pooled features of all exits, if it `needs_features`.
        Raises:
            PolicyError: if numbers of exits differ.
        """
        self._check_count(len(outputs))
        done = [
            self.stops(exit, output, features[exit] if features else None)
            if self.looks_at(exit)
            else torch.zeros(len(output), dtype=torch.bool, device=output.device)
            for exit, output in enumerate(outputs[:-1])
        ]
        last = torch.ones(outputs.shape[1], dtype=torch.bool, device=outputs.device)
        return torch.stack([*done, last]).int().argmax(0)

    def exits_on(self, recording: Recorded) -> Int[Tensor, "N"]:
        """Return the exit that answers each sample of a recording.

        Raises:
            PolicyError: if it looks at features and the recording has none.
        """
        if recording.outputs is None:
            raise PolicyError(
                f"a {type(self).__name__} looks at outputs, and the recording holds none; record "
                "with keep_outputs=True."
            )
        return self.exits_of(
            recording.outputs, features_of(recording) if self.needs_features else ()
        )

    @classmethod
    def exits_of_each(
        cls, policies: Sequence[Self], recording: Recorded
    ) -> Iterator[Int[Tensor, "N"]]:
        """Give the exits under each of several policies of this kind."""
        return (policy.exits_on(recording) for policy in policies)

    def outcome(
        self,
        recording: Recorded,
        costs: CostProfile,
        *,
        cost: Cost = "time",
        statistic: Statistic = "mean",
        batch_size: int = 1,
    ) -> Outcome:
        """Apply it to every sample of a recording.

        Args:
            recording: the recording, with pooled features if it looks at them.
            costs: cost profile of the same network.
            cost: what is spent, instead of time: multiply-accumulates, bytes or joules. What asking
                the policy takes is known in seconds only, and counts as nothing in these.
            statistic: which measured number of each stage and head is used.
            batch_size: batch size at which the costs were measured.
        Raises:
            PolicyError: if it looks at what the recording lacks.
        """

        def until(heads: Sequence[bool] | None) -> Float[Tensor, "K"]:
            return as_doubles(
                costs.cumulative(
                    cost, "interruptible", statistic=statistic, batch_size=batch_size, heads=heads
                )
            )

        exits = self.exits_on(recording)
        heads = self.open_exits()
        asking = as_doubles(self.added_s() if cost == "time" else (0.0,) * costs.num_exits)
        return Outcome(
            exits=exits,
            visited=torch.arange(costs.num_exits) <= exits[:, None],
            contract_s=(until(heads) + asking)[exits],
            interruptible_s=(until(None) + asking).expand(len(exits), -1),
            macs=as_doubles(costs.cumulative("macs", "interruptible", heads=heads))[exits],
        )

    def full_network(self) -> Policy | None:
        """Return the policy that always gives the last network's answer.

        None where a kind of policy has no such form.
        """
        return None

    # --- telling what it is -----------------------------------------------------------------------

    def described(self, exits: Sequence[str]) -> Description:
        """Describe the policy in words.

        Args:
            exits: names of the exits, or networks.
        """
        rules = ("asked" if self.looks_at(exit) else "closed" for exit in range(len(exits) - 1))
        return Description(looks_at=type(self).__name__, rules=(*rules, "always"))

    def summary(self) -> str:
        """Describe a fitted policy in one line, or say nothing."""
        return ""

    def shown_score(self) -> str:
        """Return the name of the score by which answers are shown.

        "" for the task's default.
        """
        return ""

    def portable_rule(self) -> dict[str, Any]:
        """Return what an exported network needs to stop without torch.

        Raises:
            PolicyError: if it cannot be exported.
        """
        raise PolicyError(
            f"a {type(self).__name__} cannot be exported; an exported network takes thresholds: "
            "fit some with `impatient fit`, without --learner."
        )

    def _check_count(self, exits: int) -> None:
        if exits != self.num_exits:
            raise PolicyError(
                f"the policy is for {self.num_exits} exits, the recording has {exits}."
            )


_NOTHING: Mapping[str, float] = MappingProxyType({})


class CombinedPolicy(Policy):
    """A policy made of others, of which the last speaks for it."""

    __slots__ = ()

    @property
    @abc.abstractmethod
    def parts(self) -> tuple[Policy, ...]:
        """The policies it is made of."""

    @property
    def asked(self) -> tuple[Policy, ...]:
        """The parts that some sample follows."""
        return self.parts

    @property
    def num_exits(self) -> int:
        """How many exits, or networks, its parts are for."""
        return self.parts[-1].num_exits

    @property
    def split(self) -> str | None:
        """The split on which its last part was fitted, or an earlier one."""
        return next((part.split for part in reversed(self.parts) if part.split), None)

    @property
    def provenance(self) -> Provenance | None:
        """Weights and data that its last part belongs to, or an earlier one."""
        return next((part.provenance for part in reversed(self.parts) if part.provenance), None)

    @property
    def target(self) -> Mapping[str, float]:
        """What was asked for when its last part was fitted."""
        return self.parts[-1].target

    @property
    def cost(self) -> Cost:
        """What the target's `mean_cost` is in."""
        return self.parts[-1].cost

    @property
    def routes(self) -> bool:
        """Whether a part chooses the network that comes next."""
        return any(part.routes for part in self.parts)

    @property
    def reads_classes(self) -> bool:
        return any(part.reads_classes for part in self.asked)

    @property
    def needs_outputs(self) -> bool:
        """Whether a part that is asked looks at outputs."""
        return any(part.needs_outputs for part in self.asked)

    @property
    def needs_features(self) -> bool:
        """Whether a part that is asked looks at pooled features."""
        return any(part.needs_features for part in self.asked)

    def looks_at(self, exit: int) -> bool:
        """Whether a part is asked at this exit.

        Never where a cascade asks it.
        """
        return not self.routes and any(part.looks_at(exit) for part in self.asked)

    def full_network(self) -> Policy | None:
        """Return the last part's policy that always gives the last network's answer."""
        return self.parts[-1].full_network()


def check_policy(policy: object) -> None:
    """Raise PolicyError unless this is a policy.

    Example:
        >>> check_policy(len)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        impatient.errors.PolicyError: a builtin_function_or_method is no policy; expected ...
    """
    if not isinstance(policy, Policy):
        raise PolicyError(
            f"a {type(policy).__name__} is no policy; expected a class derived from "
            "impatient.Policy that defines num_exits, looks_at and stops."
        )


def check_costs(costs: object) -> None:
    """Raise CostError unless an object is a cost profile."""
    if not isinstance(costs, CostProfile):
        raise CostError(
            f"costs is a {type(costs).__name__}; expected a CostProfile, from profile(network, x) "
            "or, for times that you know, CostProfile.of(cumulative_s=...)."
        )


def check_exits(error: type[ImpatientError], recording: Recorded, costs: CostProfile) -> None:
    """Raise an error unless recording and profile are such, and have as many exits."""
    checks.provides(
        error,
        "recording",
        recording,
        ("quality", "scores", "split", "take"),
        "Expected a Recording, from record(network, data) or, of outputs of your own, "
        "Recording.of(outputs, targets, split=...).",
    )
    check_costs(costs)
    count = len(recording.quality)
    if count != costs.num_exits:
        raise error(f"the recording has {count} exits, the cost profile {costs.num_exits}.")


def errors_of(recording: Recorded) -> Float[Tensor, "K N"]:
    """Compute what each answer lacks to the best quality: 1 where a class is wrong, else 0."""
    return 1.0 - recording.quality.double()


def hits_of(recording: Recorded, exits: Int[Tensor, "N"]) -> Float[Tensor, "N"]:
    """Return the quality of the exit that answers each sample."""
    return recording.quality[exits, torch.arange(len(exits))]


def features_of(recording: Recorded) -> tuple[Tensor, ...]:
    """Pooled features of every exit.

    Raises:
        PolicyError: if the recording has none.
    """
    if len(recording.features) != len(recording.quality):
        raise PolicyError(
            f"the recording holds the features of {len(recording.features)} of "
            f"{len(recording.quality)} exits; gates on features need them all. Record it with "
            "record(..., features=True), or `impatient record DIR --features`."
        )
    return recording.features
