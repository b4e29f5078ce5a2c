import gc

import pytest


@pytest.fixture(scope="session", autouse=True)
def _collecting_is_quick() -> None:
    """Leave what torch imports when it first counts operations out of all collections."""
    import torch._dynamo  # noqa: F401

    gc.collect()
    gc.freeze()
