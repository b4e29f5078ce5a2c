"""The answers of a batch whose samples stop at different exits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from impatient.anytime import Exit, Network, Run
from impatient.inputs import batch_size_of
from impatient.policies.policy import Policy
from impatient.runtime.compaction import Compaction


class BatchProgress:
    """Outputs of a batch whose samples may stop at different exits; those that go on run in a
    smaller batch where it pays.

    After each exit: `add` it, then, if the run is to go on, `go_on` before the next one is asked
        for.

    Args:
        policy: says which samples stop; None: none does.
        network: whose run it is.
        x: its input.
        run: of the network on the input; where the network does not shrink, it goes on with all
            samples.
        compaction: when to go on with fewer rows; None: never.
    Attributes:
        size: number of rows the next stage runs.
    """

    def __init__(
        self,
        policy: Policy | None,
        network: Network,
        x: Any,
        run: Run,
        compaction: Compaction | None = None,
    ) -> None:
        self._policy = policy
        self._network = network
        self._run = run
        # rows that run next, still going, and at the present exit
        self.size = self._left = self._present = batch_size_of(x)
        self._alone = self.size == 1
        wanted = (
            policy is not None
            and self.size > 1
            and compaction is not None
            and compaction.when != "never"
        )
        self._compaction = compaction if wanted and network.shrinks(x) else None
        # of all samples, in their original order
        self._output: Tensor | None = None
        # -1 where a sample has not stopped
        self._exits: Tensor | None = None
        # about the rows of the present exit:
        # in the original batch; None: all in order
        self._places: Tensor | None = None
        # which have not stopped; None: none has
        self._going: Tensor | None = None
        # without the fillers behind them; None: no fillers
        self._count: int | None = None
        # rows to go on with; None: all
        self._keep: Tensor | None = None

    def add(self, exit: Exit) -> bool:
        """Ask the policy, and take the output of an exit for the samples that stop there; True when
        all have stopped.

        Sync:
            Waits for the device once, to learn how many go on; not where the policy does not look
            at this exit.
        """
        if self._policy is None or not self._policy.looks_at(exit.index):
            return False
        stops = self._stops(exit)
        # nothing to merge or to take out, and every operator here is part of each answer's time
        if self._alone:
            return bool(stops)
        going = ~stops if self._going is None else self._going & ~stops
        left = going.nonzero()[:, 0]
        if len(left) < self._left:
            self._output, self._exits = self._merged(
                exit, stops if self._going is None else self._going & stops
            )
            self._going = going
            self._left = len(left)
            self._reduce(exit, left)
        return not self._left

    def go_on(self) -> None:
        """Take the finished samples out of the run, where that was found to pay; call it before the
        next exit.
        """
        keep = self._keep
        self._keep = None
        if keep is None:
            return
        self._run.keep(keep)
        self._present = len(keep)
        rows = keep[: self._left]
        self._places = rows if self._places is None else self._places[rows]
        self._going = None
        self._count = self._left if len(keep) > self._left else None
        if self._policy is not None:
            self._policy = self._policy.for_rows(rows)

    def override(self, policy: Policy | None) -> None:
        """From here on, another policy; samples that have stopped but are still in the batch go on,
        the others keep their outputs.
        """
        # those that were to be taken out are still there
        self._keep = None
        self.size = self._present
        rows = self._places
        self._policy = policy if policy is None or rows is None else policy.for_rows(rows)
        if self._exits is not None:
            here = slice(None) if self._places is None else self._places
            self._exits[here] = -1
            self._going, self._left = None, len(self._exits[here])

    def finish(self, exit: Exit) -> tuple[Tensor, tuple[int, ...]]:
        """The outputs in the original order, with this exit's for all samples that have not
        stopped, and their exits.
        """
        if self._exits is None:
            output = exit.output()
            return output, exit.exits
        if self._left:
            return self.snapshot(exit)
        assert self._output is not None
        return self._output, tuple(self._exits.tolist())

    def snapshot(self, exit: Exit) -> tuple[Tensor, tuple[int, ...]]:
        """What `finish` would give, without stopping anything; a copy."""
        if self._exits is None:
            # copied: a head may return a view of the features, which a later stage may write over
            output = exit.output()
            return output.clone(), exit.exits
        output, exits = self._merged(exit, self._going)
        return output, tuple(exits.tolist())

    def _stops(self, exit: Exit) -> Tensor:
        """Which of the present rows stop."""
        assert self._policy is not None
        return asked(
            self._policy,
            exit.index,
            lambda: self._real(exit.output()),
            lambda: self._real(self._network.pooled(exit)),
        )

    def _real(self, value: Tensor) -> Tensor:
        return value if self._count is None else value[: self._count]

    def _merged(self, exit: Exit, now: Tensor | None) -> tuple[Tensor, Tensor]:
        """All samples' outputs and exits with those of this exit for some of the present rows;
        None: for all of these.
        """
        output = self._real(exit.output())
        if now is None:
            now = torch.ones(output.shape[0], dtype=torch.bool, device=output.device)
        if self._output is None or self._exits is None:
            return output.clone(), torch.where(now, exit.index, -1)
        here = slice(None) if self._places is None else self._places
        outputs = self._output.clone()
        exits = self._exits.clone()
        outputs[here] = torch.where(now[:, None], output, outputs[here])
        exits[here] = torch.where(now, exit.index, exits[here])
        return outputs, exits

    def _reduce(self, exit: Exit, left: Tensor) -> None:
        """Decide with how many rows to go on."""
        if self._compaction is None or not self._left or exit.index == self._network.num_exits - 1:
            return
        size = self._compaction.size(exit.index, self.size, self._left, exit.row_bytes)
        if size < self.size:
            self._keep = filled(left, size)
            self.size = size


def asked(
    policy: Policy, exit: int, outputs: Callable[[], Tensor], pooled: Callable[[], Tensor]
) -> Tensor:
    """Which rows a policy of any kind stops at an exit; gates on features alone are asked before
    the head is paid.
    """
    seen = outputs() if policy.needs_outputs else None
    return policy.stops(exit, seen, pooled() if policy.needs_features else None)


def filled(rows: Tensor, size: int) -> Tensor:
    """As many rows as an engine's shape wants: the last one, which is there anyway, fills up."""
    return torch.cat([rows, rows[-1:].expand(size - len(rows))]) if size > len(rows) else rows
