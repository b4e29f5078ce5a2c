"""Shared by all tests: a toy backbone, a network on a fake clock, the command line.

Every test is seeded and has one torch thread: tiny networks gain nothing from more.
"""

import functools
import gc
import os
import shutil
import sys
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings
from torch import Tensor

from browser import Browser, browser
from fakes import FakeNetwork, all_forgotten, wait_until
from impatient.clock import FakeClock
from toys import ToyBackbone

# consoles take their width when the command line is imported; pytest-xdist would make it 80
os.environ["COLUMNS"] = "200"

# what fails here fails everywhere; `HYPOTHESIS_PROFILE=search` looks for what has not failed yet
settings.register_profile("repeatable", deadline=None, derandomize=True, database=None)
settings.register_profile("search", deadline=None, max_examples=1000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))

# folders all of whose tests have a mark
FOLDERS = {"docs": "docs", "engines": "engine", "papers": "papers"}
# fixtures whose tests are slow: a trained and measured run directory
SLOW_FIXTURES = {"finished"}


# before -m chooses
@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        mark = FOLDERS.get(item.path.parent.name)
        if mark is not None:
            item.add_marker(mark)
        if SLOW_FIXTURES & set(getattr(item, "fixturenames", ())):
            item.add_marker("slow")


@pytest.fixture(scope="module", autouse=True)
def _collecting_is_quick() -> None:
    """Leave what is there, most of it made at import, out of every collection in the tests."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def window() -> Iterator[Browser]:
    """Open a real Chromium.

    Without one the test is skipped, but never in CI.
    """
    if shutil.which("chromedriver") is None and not os.environ.get("CI"):
        pytest.skip("needs Debian's chromium and chromium-driver")
    with browser() as opened:
        yield opened


@pytest.fixture(autouse=True)
def _exporting_is_quick() -> None:
    """Let torch's exporter make its table of ONNX functions once, instead of once a file."""
    found = sys.modules.get("torch.onnx._internal.exporter._registration")
    if found is not None and isinstance(vars(found.ONNXRegistry)["from_torchlib"], classmethod):
        make = functools.cache(found.ONNXRegistry.from_torchlib)
        found.ONNXRegistry.from_torchlib = staticmethod(make)


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
