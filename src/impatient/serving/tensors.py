"""What a model takes: the arrays of a sample, and how those of several requests become a batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from impatient import checks
from impatient.errors import ServingError

if TYPE_CHECKING:
    from torch import Tensor

# Names of the protocol, and how numbers lie in binary tensors: little-endian, row by row.
DATATYPES: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype("?"),
    "UINT8": np.dtype("<u1"),
    "UINT16": np.dtype("<u2"),
    "UINT32": np.dtype("<u4"),
    "UINT64": np.dtype("<u8"),
    "INT8": np.dtype("<i1"),
    "INT16": np.dtype("<i2"),
    "INT32": np.dtype("<i4"),
    "INT64": np.dtype("<i8"),
    "FP16": np.dtype("<f2"),
    "FP32": np.dtype("<f4"),
    "FP64": np.dtype("<f8"),
}
# samples by the names of their arrays, samples first
Inputs = Mapping[str, np.ndarray]


def rows_of(inputs: Inputs) -> int:
    """Return the number of samples."""
    return len(next(iter(inputs.values())))


def all_finite(array: np.ndarray) -> bool:
    """Tell whether no number is NaN or infinite."""
    # For few numbers, numpy's own `all` takes longer than all else here.
    return 0 not in np.isfinite(array).tobytes()


# the size of a dimension that differs from request to request
ANY = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """One of the arrays that make a sample.

    Attributes:
        name: its name.
        datatypes: names of the number types it takes; the first is advertised.
        shape: its shape, without the batch dimension; the first size is -1 where lengths differ.
        filler: what shorter ones are filled up with, such as the number of a padding token.
        usual: a number that occurs in it, of which examples are made; 1 for a mask.
        below: whole numbers must be from 0 to less than this; None takes any.
    """

    name: str
    datatypes: tuple[str, ...]
    shape: tuple[int, ...]
    filler: int = 0
    usual: int = 0
    below: int | None = None

    @property
    def differs(self) -> bool:
        """Whether lengths differ."""
        return self.shape[:1] == (ANY,)

    def joined(self, arrays: Sequence[np.ndarray], side: Literal["left", "right"]) -> Tensor:
        """Join the samples of several requests, filled up to the longest."""
        # Those who only read requests need no torch.
        import torch

        if not self.differs:
            return torch.from_numpy(np.concatenate(arrays))
        from impatient.training.examples import padded

        return padded([torch.tensor(row) for array in arrays for row in array], self.filler, side)


@dataclass(frozen=True, slots=True, kw_only=True)
class InputSpec:
    """What a model takes.

    Attributes:
        tensors: the arrays that make a sample.
        most_rows: most samples in one request.
        length: the usual length, where lengths differ.
        longest: the greatest length, where lengths differ.
        side: where shorter ones are filled up.
        named: whether the network takes its arrays by name; else there is one.
    Raises:
        ServingError: if there is no array, or no usual or greatest length where it is needed.
    """

    tensors: tuple[TensorSpec, ...]
    most_rows: int = 8
    length: int = 0
    longest: int = 0
    side: Literal["left", "right"] = "right"
    named: bool = False

    def __post_init__(self) -> None:
        if not self.tensors or not (self.named or len(self.tensors) == 1):
            raise ServingError(
                f"a sample of {len(self.tensors)} arrays; expected one, or several by name."
            )
        if any(tensor.differs for tensor in self.tensors):
            checks.at_least(ServingError, 1, length=self.length)
            checks.at_least(ServingError, self.length, longest=self.longest)

    @classmethod
    def one(cls, datatypes: Sequence[str], shape: Sequence[int], most_rows: int = 8) -> InputSpec:
        """Describe samples of one array, called "input"."""
        tensor = TensorSpec(name="input", datatypes=tuple(datatypes), shape=tuple(shape))
        return cls(tensors=(tensor,), most_rows=most_rows)

    def example(self, rows: int) -> Inputs:
        """Make raw inputs of so many samples."""
        return {
            one.name: np.full(
                (rows, *(self.length if size == ANY else size for size in one.shape)),
                one.usual,
                DATATYPES[one.datatypes[0]],
            )
            for one in self.tensors
        }

    def alike(self, requests: Sequence[Inputs]) -> bool:
        """Tell whether the numbers of some requests are of the same types."""
        return all(
            len({request[one.name].dtype for request in requests}) == 1 for one in self.tensors
        )

    def batch(self, requests: Sequence[Inputs]) -> Any:
        """Join the samples of several requests to one batch of tensors.

        Returns:
            A tensor, or a dict of them by name.
        """

        def joined(one: TensorSpec) -> Tensor:
            return one.joined([request[one.name] for request in requests], self.side)

        if not self.named:
            return joined(self.tensors[0])
        return {one.name: joined(one) for one in self.tensors}
