"""Whatever is sent to the server, it answers rightly, or refuses with a reason.

The long run of the same is `benchmarks/serving_fuzz.py`.
"""

import pytest

from benchmarks import serving_fuzz
from impatient.serving import app


def test_no_input_of_any_way_in_is_a_fault_of_the_server() -> None:
    tally = serving_fuzz.fuzz(http=150, rpc=40, socket=25, number=0)
    assert tally.faults == []
    assert tally.inputs >= 215
    assert {way for way, _ in tally.results} == {"HTTP application", "gRPC", "socket"}
    rightly = [found["200"] + found["OK"] for found in tally.results.values()]
    assert sum(rightly) > 30


def test_the_fuzzer_notices_wrong_answers_and_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = app.write_reply

    def wrong(model, name, output, *rest, **options):
        return whole(model, name, output + 0.1, *rest, **options)

    monkeypatch.setattr(app, "write_reply", wrong)
    tally = serving_fuzz.fuzz(http=60, rpc=0, socket=0, number=0)
    assert any("wrong answer" in fault for fault in tally.faults)

    def failing(*_, **__) -> None:
        raise KeyError("a fault of ours")

    monkeypatch.setattr(app, "read_request", failing)
    tally = serving_fuzz.fuzz(http=20, rpc=0, socket=0, number=0)
    assert any("a fault of ours" in fault for fault in tally.faults)
