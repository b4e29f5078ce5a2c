"""What policies share that read outputs through a task."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from jaxtyping import Int
from torch import Tensor

from impatient.errors import TaskError
from impatient.policies.policy import Policy, Recorded
from impatient.provenance import Provenance
from impatient.tasks import Task, is_classification, named


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TaskPolicy(Policy):
    """A fitted policy that looks at outputs through a task.

    Attributes:
        split: the split on which it was fitted; None if it was set by hand.
        target: what was asked for, and what was reached on that split.
        provenance: weights and data it belongs to.
        task: name of the task that says what an output means.
        own_task: the task itself, where it is not ready-made; see `for_task`. It is not saved.
    """

    split: str | None = None
    target: Mapping[str, float] = dataclasses.field(default_factory=dict)
    provenance: Provenance | None = None
    task: str = "classification"
    own_task: Any = dataclasses.field(
        default=None, repr=False, compare=False, metadata={"stored": False}
    )

    @property
    def means(self) -> Task:
        """The task: the one it was given, or the ready-made one of this name.

        Raises:
            TaskError: if there is none.
        """
        return named(self.task) if self.own_task is None else self.own_task

    @property
    def reads_classes(self) -> bool:
        return self.needs_outputs and is_classification(self.task)

    def for_task(self, task: Task) -> Self:
        """Return the policy with the functions of this task.

        Raises:
            TaskError: if it was fitted for another one. Options, such as top=5, may differ: scores
                do not.
        """
        if self.task.partition(":")[0] != task.name.partition(":")[0]:
            raise TaskError(
                f"the policy was fitted for task {self.task!r}, the network's is {task.name!r}; "
                "fit a policy on a recording of this network."
            )
        return dataclasses.replace(self, own_task=task)

    @classmethod
    @abc.abstractmethod
    def exits_of_each(
        cls, policies: Sequence[Self], recording: Recorded
    ) -> Iterator[Int[Tensor, "N"]]:
        """Give the exits under each of several policies of this kind."""

    def exits_on(self, recording: Recorded) -> Int[Tensor, "N"]:
        """Return the exit that answers each sample of a recording."""
        [exits] = self.exits_of_each([self], recording)
        return exits
