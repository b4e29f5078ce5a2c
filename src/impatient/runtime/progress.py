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
    """Outputs of a batch whose samples may stop at different exits.

    Where it saves time, the other samples continue in a smaller batch. After each exit, call `add`.
    If the run is to continue, then call `go_on` before asking for the next exit.

    Args:
        policy: policy that stops samples; None stops none.
        network: network of the run.
        x: input of the run.
        run: run of the network on the input. If the network does not shrink, all samples stay in
            the batch.
        compaction: rule for continuing with fewer rows; None always continues with all.
    Attributes:
        size: number of rows that the next stage runs.
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
        self.size = batch_size_of(x)
        # Rows at the present exit.
        self._present = self.size
        # Rows that have not stopped.
        self._left = self.size
        self._alone = self.size == 1
        wanted = (
            policy is not None
            and self.size > 1
            and compaction is not None
            and compaction.when != "never"
        )
        self._compaction = compaction if wanted and network.shrinks(x) else None
        # Outputs and exits of all samples, in their original order. The exit is -1 where a sample
        # has not stopped. None: no sample has stopped.
        self._output: Tensor | None = None
        self._exits: Tensor | None = None
        # The following four describe the rows of the present exit.
        # Places in the original batch. None: all rows, in order.
        self._places: Tensor | None = None
        # Mask of the rows that have not stopped. None: no row has stopped.
        self._going: Tensor | None = None
        # Number of rows without the copies that fill the batch up. None: there are no copies.
        self._count: int | None = None
        # Rows to continue with. None: all rows.
        self._keep: Tensor | None = None

    def add(self, exit: Exit) -> bool:
        """Ask the policy which samples stop here, and tell whether all have stopped.

        Sync:
            Waits for the device once, for the number of samples that continue. Does not wait where
            the policy does not look at this exit.
        """
        if self._policy is None or not self._policy.looks_at(exit.index):
            return False
        # With one sample there is nothing to merge or remove, and every operator here adds to the
        # time of each answer.
        if self._alone:
            policy = self._policy
            return policy.stops_one(
                exit.index,
                exit.output() if policy.needs_outputs else None,
                self._network.pooled(exit) if policy.needs_features else None,
            )
        stops = self._stops(exit)
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
        """Remove stopped samples from the run, where `add` has decided to."""
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
        """Use another policy from here on.

        Stopped samples that are still in the batch continue. Removed samples keep their outputs.
        """
        # The rows that were to be removed are still in the batch.
        self._keep = None
        self.size = self._present
        rows = self._places
        self._policy = policy if policy is None or rows is None else policy.for_rows(rows)
        if self._exits is not None:
            here = slice(None) if rows is None else rows
            self._exits[here] = -1
            self._going = None
            self._left = len(self._exits[here])

    def finish(self, exit: Exit) -> tuple[Tensor, tuple[int, ...]]:
        """Return outputs and exits of all samples, in the original order.

        Samples that have not stopped get the output of this exit.
        """
        if self._exits is None:
            return exit.output(), exit.exits
        if self._left:
            return self.snapshot(exit)
        assert self._output is not None
        return self._output, tuple(self._exits.tolist())

    def snapshot(self, exit: Exit) -> tuple[Tensor, tuple[int, ...]]:
        """Return a copy of what `finish` would return, without stopping any sample."""
        if self._exits is None:
            # A copy: a head may return a view of the features, which a later stage may overwrite.
            return exit.output().clone(), exit.exits
        output, exits = self._merged(exit, self._going)
        return output, tuple(exits.tolist())

    def _stops(self, exit: Exit) -> Tensor:
        """Return a mask of the present rows that stop."""
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
        """Merge this exit's outputs into those of all samples.

        Args:
            exit: present exit.
            now: mask of these rows; None for all of them.
        """
        output = self._real(exit.output())
        if now is None:
            now = torch.ones(output.shape[0], dtype=torch.bool, device=output.device)
        if self._output is None or self._exits is None:
            return output.clone(), torch.where(now, exit.index, -1)
        here = slice(None) if self._places is None else self._places
        outputs = self._output.clone()
        exits = self._exits.clone()
        chosen = now.reshape(-1, *(1,) * (output.dim() - 1))
        outputs[here] = torch.where(chosen, output, outputs[here])
        exits[here] = torch.where(now, exit.index, exits[here])
        return outputs, exits

    def _reduce(self, exit: Exit, left: Tensor) -> None:
        """Decide with how many rows to continue."""
        if self._compaction is None or not self._left or exit.index == self._network.num_exits - 1:
            return
        size = self._compaction.size(exit.index, self.size, self._left, exit.row_bytes)
        if size < self.size:
            self._keep = filled(left, size)
            self.size = size


def asked(
    policy: Policy, exit: int, outputs: Callable[[], Tensor], pooled: Callable[[], Tensor]
) -> Tensor:
    """Return which rows a policy stops at an exit.

    Outputs are computed only if the policy looks at them, and so are pooled features.
    """
    seen = outputs() if policy.needs_outputs else None
    return policy.stops(exit, seen, pooled() if policy.needs_features else None)


def filled(rows: Tensor, size: int) -> Tensor:
    """Repeat the last row to get the number an engine needs."""
    return torch.cat([rows, rows[-1:].expand(size - len(rows))]) if size > len(rows) else rows
