"""Shared by all tests: a toy backbone, a network on a fake clock, the command line.

Every test is seeded and has one torch thread: tiny networks gain nothing from more.
"""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from fakes import FakeNetwork, all_forgotten, wait_until
from impatient.clock import FakeClock
from toys import ToyBackbone


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)


@pytest.fixture
def toy() -> ToyBackbone:
    return ToyBackbone()


@pytest.fixture
def toy_input() -> Tensor:
    return torch.randn(5, 8)


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def network(clock: FakeClock) -> FakeNetwork:
    """Exit k answers at k + 1.5 seconds."""
    return FakeNetwork(clock, [1.0] * 4, [0.5] * 4)


@pytest.fixture
def no_thread_stays() -> Iterator[None]:
    """When the test is over, its runners' threads end, since nobody holds the runners any more."""
    yield
    wait_until(all_forgotten)
