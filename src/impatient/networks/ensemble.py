"""Run networks of growing depth one after the other as one network (EANN)."""

from __future__ import annotations

import bisect
import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn

from impatient.anytime import Exit, Network, Run, check_network
from impatient.counting import StageFacts
from impatient.errors import ClassCountMismatch, NetworkError, PolicyError

Errors = tuple[tuple[float, ...], ...]


def answering_exits(validation_errors: Sequence[Sequence[float]]) -> tuple[int, ...]:
    """Choose which exit's output each exit of an ensemble gives.

    Exits are numbered through all members. An exit gives its own output if its error is at most
    that of the best last exit before it. Otherwise it gives the output of that last exit. Early
    exits of members that have finished are not used again.

    Args:
        validation_errors: errors of the exits, one sequence per member.
    Returns:
        One exit per exit, never a deeper one.
    Source:
        EANN (Hu et al.): the better by validation of the last finished network's output and the
        running one's. We differ: the best finished network instead of the last, because a deeper
        one may be worse.
    Example:
        >>> # the first exit of the second network is worse than the first network
        >>> answering_exits([[0.5, 0.3], [0.4, 0.3, 0.2]])
        (0, 1, 1, 3, 4)
    """
    table: list[int] = []
    best = -1
    best_error = math.inf
    for errors in validation_errors:
        begin = len(table)
        table += [
            begin + index if error <= best_error else best for index, error in enumerate(errors)
        ]
        if table[-1] == len(table) - 1:
            best = table[-1]
            best_error = errors[-1]
    return tuple(table)


class EnsembleRun(Run):
    """A run through the members, one after the other.

    Thread:
        Must be advanced and closed on the thread that first advanced it.
    """

    def __init__(self, runs: Sequence[Run], first: Sequence[int], answers: Sequence[int]) -> None:
        self._waiting = list(enumerate(runs))
        self._first = first
        self._answers = answers
        # Closes the run of the present member.
        self._open = contextlib.ExitStack()
        self._member = -1
        self._run: Iterator[Exit] = iter(())
        # The best last exit so far, and its output.
        self._best: tuple[int, Tensor] | None = None

    def __next__(self) -> Exit:
        try:
            while (inner := next(self._run, None)) is None:
                self._open.close()
                if not self._waiting:
                    raise StopIteration
                self._member, run = self._waiting.pop(0)
                self._run = self._open.enter_context(run)
            return self._wrapped(inner)
        except BaseException:
            # Otherwise the next member would go on where this one has failed.
            self.close()
            raise

    def _wrapped(self, inner: Exit) -> Exit:
        index = self._first[self._member] + inner.index
        answer = self._answers[index]
        if answer != index:
            assert self._best is not None
            assert self._best[0] == answer
            return Exit(index, inner.features, self._best[1])
        if index == self._first[self._member + 1] - 1:
            # It is computed already, as the last exit of a member.
            self._best = index, inner.output()
        # The member's head runs only if its output is the answer.
        return Exit(index, inner.features, lambda _: inner.output())

    def close(self) -> None:
        self._open.close()
        self._waiting.clear()
        self._run = iter(())


class EANN(Network):
    """An ensemble of networks of growing depth, run as one anytime network.

    A network with exits is good at its deeper exits. At a small part of its depth it answers worse
    than a network made for that depth. So this runs a small network first, then larger ones, and
    uses the answers of a larger one as soon as they are better. In `papers`,
    `anytime_neural_networks.inflation` computes what running the first layers again costs.

    All members see the same input, and none may change it. Train each by itself before.

    Args:
        networks: networks from `attach_exits`, or of your own, shallow to deep.
        validation_errors: errors in [0, 1] of the exits on a validation split, one sequence per
            network: `1 - record(network, data).quality.mean(1)`. They are kept in single precision
            in the state_dict.
    Attributes:
        networks: members of the ensemble.
        num_classes: width of every output.
    Raises:
        NetworkError: if there is no network.
        ClassCountMismatch: if the networks do not have the same number of classes.
        PolicyError: unless there is one error in [0, 1] per exit.
    Source:
        Anytime Neural Networks (Hu et al.), "EANN". We differ: see `answering_exits`.
    Example:
        >>> from impatient.networks import attach_exits
        >>> small = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        >>> large = nn.Sequential(*(nn.Linear(4, 4) for _ in range(4)))
        >>> x = torch.zeros(1, 4)
        >>> networks = [attach_exits(small, after=["0"], example=x)]
        >>> networks += [attach_exits(large, after=["0", "2"], example=x)]
        >>> network = EANN(networks, [[0.5, 0.3], [0.6, 0.25, 0.2]])
        >>> network.exit_names, network.switches
        (('0/0', '0/output', '1/0', '1/2', '1/output'), (0, 1))
        >>> outputs = network(x)
        >>> # the large network's first exit gives the output of the small network's last exit
        >>> outputs[2] is outputs[1]
        True
    """

    errors: Tensor

    def __init__(
        self, networks: Sequence[Network], validation_errors: Sequence[Sequence[float]]
    ) -> None:
        super().__init__()
        self.num_classes = _common_classes(networks)
        self.networks = nn.ModuleList(networks)
        counts: list[int] = [network.num_exits for network in self._members()]
        self._first = tuple(accumulate(counts, initial=0))
        self._use(_checked(validation_errors, counts))
        place = next((tensor.device for tensor in self.networks.state_dict().values()), None)
        flat = [error for member in self.validation_errors for error in member]
        self.register_buffer("errors", torch.tensor(flat, dtype=torch.float32, device=place))
        self.register_load_state_dict_post_hook(_reread)  # type: ignore[no-untyped-call]

    @property
    def num_exits(self) -> int:
        return self._first[-1]

    @property
    def exit_names(self) -> tuple[str, ...]:
        """Name each exit by its member's number and the member's name for it."""
        return tuple(
            f"{number}/{name}"
            for number, network in enumerate(self._members())
            for name in network.exit_names
        )

    @property
    def exit_free(self) -> nn.Module:
        """Return the deepest member without its exits."""
        return self._members()[-1].exit_free

    @property
    def mechanism(self) -> str:
        """Describe in words how the network is divided into stages."""
        return (
            f"{len(self.networks)} networks one after the other, the last by "
            f"{self._members()[-1].mechanism}"
        )

    @property
    def validation_errors(self) -> Errors:
        """Return the errors that decide which exit answers, one tuple per member."""
        return self._errors

    @property
    def answers(self) -> tuple[int, ...]:
        """Return for every exit the exit whose output it gives."""
        return self._answers

    @property
    def switches(self) -> tuple[int, ...]:
        """Return each member's first exit that gives its own output.

        If none does, it is the member's number of exits.
        """
        return tuple(
            next(
                (exit - begin for exit in range(begin, end) if self._answers[exit] == exit),
                end - begin,
            )
            for begin, end in pairwise(self._first)
        )

    def forward(self, x: Any) -> tuple[Tensor, ...]:
        """Compute the answers of all exits.

        Args:
            x: input of every member.
        Returns:
            Outputs of shape [B, num_classes], one per exit of each member; several exits may share
            one tensor.
        """
        outputs = [output for network in self._members() for output in network(x)]
        return tuple(outputs[answer] for answer in self._answers)

    def exits(self, x: Any, *, keep: bool = False) -> EnsembleRun:
        """Run stage by stage, member after member.

        Leaving the loop early computes nothing more.

        Args:
            x: input of every member.
            keep: copy the features of each exit, so that `output()` may be asked for later.

        Thread:
            A run belongs to the thread that advances it. Several threads may each run the same
            ensemble.
        """
        # All runs are made now, so that each runs in the modes of this call. They begin later.
        return EnsembleRun(
            [network.exits(x, keep=keep) for network in self._members()], self._first, self._answers
        )

    def pooled(self, exit: Exit) -> Tensor:
        """Return the running member's features averaged over space or tokens, shape [B, D]."""
        member = bisect.bisect_right(self._first, exit.index) - 1
        index = exit.index - self._first[member]
        inner = Exit(index, exit.features, lambda _: exit.output(), mask=exit.mask)
        return self._members()[member].pooled(inner)

    def stage_facts(self, x: Any) -> list[StageFacts]:
        """Return the facts of all members' stages and heads.

        A head that never answers never runs, and has no MACs.
        """
        members = [fact for network in self._members() for fact in network.stage_facts(x)]
        facts = []
        for exit, (fact, name) in enumerate(zip(members, self.exit_names, strict=True)):
            answer = self._answers[exit]
            if answer != exit:
                fact = replace(fact, head=f"(answer of exit {answer})", head_macs=0)
            facts.append(replace(fact, exit=name))
        return facts

    def describe(self, x: Any) -> str:
        """Describe all members' stages, and where each member takes over.

        Args:
            x: an example input; MACs are per sample.
        """
        taking_over = [
            f"network {number} from {self.exit_names[begin + switch]}"
            if begin + switch < end
            else f"network {number} never"
            for number, (begin, end, switch) in enumerate(
                zip(self._first, self._first[1:], self.switches, strict=False)
            )
        ]
        return f"{super().describe(x)}\nanswers: {', '.join(taking_over)}."

    def _members(self) -> tuple[Network, ...]:
        return tuple(self.networks)  # type: ignore[arg-type]  # checked to be networks

    def _use(self, errors: Errors) -> None:
        self._errors = errors
        self._answers = answering_exits(errors)


def _common_classes(networks: Sequence[Network]) -> int:
    if not networks:
        raise NetworkError(
            "an ensemble of no networks; expected at least one, made with attach_exits."
        )
    for network in networks:
        check_network(network)
    classes = [network.num_classes for network in networks]
    if None in classes:
        raise NetworkError(
            f"networks with num_classes {classes}; expected each to say its own. Set num_classes."
        )
    if len(set(classes)) > 1:
        raise ClassCountMismatch(
            f"networks with {classes} classes; expected the same classes in all, trained on the "
            "same data."
        )
    return int(classes[0])  # type: ignore[arg-type]  # checked above


def _checked(validation_errors: Sequence[Sequence[float]], counts: Sequence[int]) -> Errors:
    """Check the errors, and return them as tuples of floats."""
    errors = tuple(tuple(float(error) for error in member) for member in validation_errors)
    if [len(member) for member in errors] != list(counts):
        raise PolicyError(
            f"validation errors for networks of {[len(member) for member in errors]} exits; the "
            f"networks have {list(counts)}. Give one error per exit of each network: "
            "1 - recording.quality.mean(1)."
        )
    for number, member in enumerate(errors):
        wrong = [error for error in member if not 0.0 <= error <= 1.0]
        if wrong:
            raise PolicyError(
                f"validation errors {wrong} of network {number}; expected shares of wrong answers, "
                "in [0, 1]."
            )
    return errors


def _reread(network: nn.Module, _incompatible: Any) -> None:
    """Use the errors of a state_dict that has just been loaded."""
    assert isinstance(network, EANN)
    # Single precision has seven digits.
    flat = [round(error, 7) for error in network.errors.tolist()]
    network._use(tuple(tuple(flat[begin:end]) for begin, end in pairwise(network._first)))
