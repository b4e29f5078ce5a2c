"""A network that counts the calls of its heads, for several files of tests."""

import pytest
from torch import nn

from impatient.networks import MultiExitNetwork
from staging import Counting, toy_network


@pytest.fixture
def counted(toy: nn.Module) -> MultiExitNetwork:
    network = toy_network(toy, heads=lambda features, classes: Counting())
    for head in network.heads:
        head.seen.clear()
    return network
