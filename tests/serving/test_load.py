"""The load generator: its instants, and its times where the server stalls."""

import asyncio
import threading

import numpy as np
import pytest

from impatient.errors import ServingError
from impatient.serving.load import arrivals, send_load
from served import Gated, serving


@pytest.mark.parametrize("kind", ["poisson", "gamma", "mmpp", "ramp"])
def test_instants_increase_at_the_rate_and_repeat_with_the_seed(kind) -> None:
    instants = arrivals(kind, rate=50.0, count=20_000, seed=1)
    assert (np.diff(instants) >= 0).all()
    assert 20_000 / instants[-1] == pytest.approx(50.0, rel=0.1)
    assert (instants == arrivals(kind, rate=50.0, count=20_000, seed=1)).all()
    gaps = np.diff(instants)
    spread = gaps.std() / gaps.mean()
    assert {"poisson": 0.9, "gamma": 2.5, "mmpp": 1.3, "ramp": 0.9}[kind] < spread


def test_a_stall_of_the_server_is_seen_by_all_requests_planned_in_it() -> None:
    network = Gated()
    with serving(network) as (_service, port):
        held = threading.Event()
        network.at[0] = lambda: held.wait(20)
        threading.Timer(0.6, held.set).start()
        result = asyncio.run(
            send_load(
                f"http://127.0.0.1:{port}",
                "net",
                [{"input": np.ones(4, dtype="float32")}],
                [0],
                arrivals_s=np.arange(10) * 0.02,
                budgets_s=np.full(10, 4.0),
            )
        )
    assert (result.status == 200).all()
    # the last was planned 0.18 s after the first, and the stall ended at 0.6 s or a little before
    assert (result.elapsed_s > 0.3).all()
    assert result.elapsed_s[0] > result.elapsed_s[-1] > 0.0
    assert result.summary()["in_time"] == 1.0


def test_bad_loads_say_what_was_expected() -> None:
    with pytest.raises(ServingError, match="rate"):
        arrivals("poisson", rate=0.0, count=1)
    with pytest.raises(ServingError, match=r"expected one such as http://127\.0\.0\.1:8000"):
        asyncio.run(send_load("localhost", "net", [], [0], arrivals_s=[], budgets_s=[]))
