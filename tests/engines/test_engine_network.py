"""Networks that an engine runs: everything that takes an eager network takes them, and gets the
same answers.
"""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from impatient.anytime import Network
from impatient.engines.network import (
    EngineNetwork,
    EngineSettings,
    NetworkFacts,
    aoti,
    compiled,
    exported,
    load_aoti,
)
from impatient.engines.partition import Parts, partition
from impatient.errors import NetworkError, StaleInput, StorageError
from impatient.evaluation import record
from impatient.networks import MultiExitNetwork, attach_exits
from impatient.policies import ThresholdPolicy
from impatient.portable import BundleError, Staged
from impatient.portable.staged import CancellablePart
from impatient.runtime import Runner, profile
from impatient.store import from_plain, to_plain
from recordings import Samples
from toys import ToyBackbone

EXAMPLE = torch.zeros(1, 8)


@pytest.fixture(scope="module")
def eager() -> MultiExitNetwork:
    torch.manual_seed(0)
    return attach_exits(ToyBackbone(), after=["blocks.0", "blocks.2"], example=EXAMPLE).eval()


@pytest.fixture(scope="module")
def parts(eager: MultiExitNetwork) -> Parts:
    return partition(eager, EXAMPLE)


@pytest.fixture(scope="module")
def facts(eager: MultiExitNetwork) -> NetworkFacts:
    return NetworkFacts.of(eager, EXAMPLE)


class Reusing:
    """A part on numpy arrays that gives the same memory each time, as an engine may."""

    def __init__(self, part: nn.Module) -> None:
        self._part = part
        self._memory: dict[Any, np.ndarray] = {}

    def __call__(self, *arrays: np.ndarray) -> Any:
        assert all(isinstance(array, np.ndarray) for array in arrays)
        given = self._part(*map(torch.from_numpy, arrays))
        return (
            self._kept(0, given)
            if isinstance(given, Tensor)
            else [self._kept(*entry) for entry in enumerate(given)]
        )

    def _kept(self, place: int, value: Tensor) -> np.ndarray:
        memory = self._memory.setdefault(
            (place, tuple(value.shape)), np.empty(tuple(value.shape), np.float32)
        )
        memory[...] = value.detach().numpy()
        return memory


@pytest.fixture(params=["torch", "numpy"])
def network(request: pytest.FixtureRequest, parts: Parts, facts: NetworkFacts) -> EngineNetwork:
    if request.param == "torch":
        return exported(parts, facts)
    heads = [head and Reusing(head) for head in parts.heads]
    stages = [Reusing(stage) for stage in parts.stages]
    return EngineNetwork(
        facts,
        Staged(parts.wiring, stages, heads),
        Reusing(parts.whole),
        EngineSettings(engine="reusing", precision="int8", threads=3),
        arrays="numpy",
    )


def agree(network: EngineNetwork, eager: MultiExitNetwork, batch: int) -> None:
    x = torch.randn(batch, 8)
    with torch.no_grad():
        wanted = eager(x)
    with network.exits(x) as run:
        given = [exit.output() for exit in run]
    for one, other in zip((*given, network.backbone(x)), (*wanted, wanted[-1]), strict=True):
        assert torch.allclose(one, other, atol=1e-6)
        assert float(other.std()) > 1e-2


# --- exits ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_outputs_are_those_of_the_eager_network(
    network: EngineNetwork, eager: MultiExitNetwork, batch: int
) -> None:
    agree(network, eager, batch)


def test_features_and_pooled_features_are_those_of_the_eager_network(
    network: EngineNetwork, eager: MultiExitNetwork
) -> None:
    x = torch.randn(3, 8)
    with network.exits(x) as ours, eager.exits(x) as theirs:
        for exit, other in zip(ours, theirs, strict=True):
            assert torch.equal(exit.features, other.features)
            assert torch.equal(network.pooled(exit), eager.pooled(other))
            assert exit.row_bytes == other.features.nbytes / 3


def test_answers_outlive_later_runs(network: EngineNetwork) -> None:
    """An engine may write its next answer to the same memory."""
    first = list(network.exits(torch.randn(2, 8)))
    outputs = [exit.output() for exit in first]
    features = [exit.features for exit in first]
    whole = network.backbone(torch.ones(2, 8))
    before = [value.clone() for value in (*outputs, *features, whole)]
    for exit in network.exits(torch.randn(2, 8)):
        exit.output()
    network.backbone(torch.zeros(2, 8))
    assert all(
        torch.equal(value, other)
        for value, other in zip((*outputs, *features, whole), before, strict=True)
    )


def test_kept_rows_alone_go_on(network: EngineNetwork) -> None:
    x = torch.randn(5, 8)
    rows = torch.tensor([4, 1])
    full = [exit.output() for exit in network.exits(x)]
    with network.exits(x) as run:
        next(run)
        run.keep(rows)
        rest = [exit.output() for exit in run]
    assert [output.shape[0] for output in rest] == [2, 2]
    for given, wanted in zip(rest, full[1:], strict=True):
        assert torch.allclose(given, wanted[rows], atol=1e-6)


def test_closed_run_computes_nothing_more(network: EngineNetwork) -> None:
    with network.exits(torch.randn(2, 8)) as run:
        next(run)
    assert list(run) == []


def test_cancel_reaches_the_stage_in_flight(parts: Parts, facts: NetworkFacts) -> None:
    cancelled: list[Any] = []

    class Slow(CancellablePart):
        def __call__(self, *values: Tensor) -> Sequence[Tensor]:
            run.cancel()
            return parts.stages[0](*values)  # type: ignore[no-any-return]

        def cancel(self, *thread: Any) -> None:
            cancelled.append(thread)

    slow = Staged(parts.wiring, [Slow(), *parts.stages[1:]], parts.heads)
    network = EngineNetwork(facts, slow, parts.whole, EngineSettings(engine="slow"))
    run = network.exits(torch.randn(1, 8))
    next(run)
    assert len(cancelled) == 1


def test_values_carry_no_gradients(network: EngineNetwork) -> None:
    x = torch.randn(2, 8, requires_grad=True)
    assert not any(exit.output().requires_grad for exit in network.exits(x))
    assert not network.backbone(x).requires_grad


def test_other_inputs_than_exported_are_refused(network: EngineNetwork) -> None:
    with pytest.raises(NetworkError, match="the tensors input; expected x"):
        network.exits({"input": EXAMPLE})


def test_parts_of_another_number_of_exits_are_refused(parts: Parts, facts: NetworkFacts) -> None:
    with pytest.raises(BundleError, match="3 stages, 2 heads and a wiring of 3 exits; expected"):
        Staged(parts.wiring, parts.stages, parts.heads[1:])
    fewer = replace(
        facts,
        exit_names=facts.exit_names[1:],
        layouts=facts.layouts[1:],
        stages=facts.stages[1:],
    )
    with pytest.raises(NetworkError, match="3 exits in parts for a network with 2"):
        exported(parts, fewer)


# --- inputs with names ----------------------------------------------------------------------------


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.last = nn.Linear(8, 3)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return self.last(self.first(left).relu() - right)


@pytest.mark.parametrize("kind", [dict, tuple])
def test_mappings_and_tuples_are_taken_as_by_the_eager_network(kind: Callable[..., Any]) -> None:
    def batch(size: int) -> Any:
        values = {"left": torch.randn(size, 8), "right": torch.randn(size, 8)}
        return values if kind is dict else tuple(values.values())

    eager = attach_exits(Named(), after=["first"], example=batch(1)).eval()
    network = exported(partition(eager, batch(1)), NetworkFacts.of(eager, batch(1)))
    x = batch(3)
    with torch.no_grad():
        wanted = eager(x)
    assert all(
        torch.equal(exit.output(), other)
        for exit, other in zip(network.exits(x), wanted, strict=True)
    )
    assert torch.equal(network.backbone(**x) if kind is dict else network.backbone(*x), wanted[-1])


# --- what takes an eager network takes it ---------------------------------------------------------


def test_it_is_described_as_the_eager_network_is(
    network: EngineNetwork, eager: MultiExitNetwork
) -> None:
    assert isinstance(network, Network)
    ours = network.describe(EXAMPLE).splitlines()
    theirs = eager.describe(EXAMPLE).splitlines()
    assert ours[:-2] == theirs[:-2]
    assert ours[-1] == f"mechanism: {network.engine}, one artifact for each of 3 stages."
    assert network.exit_names == eager.exit_names
    assert network.num_exits == 3


def test_profile_knows_the_engine_and_serves_its_runner(
    network: EngineNetwork, eager: MultiExitNetwork
) -> None:
    costs = profile(network, EXAMPLE, batch_sizes=[1, 3], repeats=20, warm_up=1)
    assert costs.provenance.engine == network.engine
    assert costs.stage_macs == profile(eager, EXAMPLE, repeats=1, warm_up=0).stage_macs
    x = torch.randn(3, 8)
    with Runner(network, costs) as runner:
        answer = runner.run(x)
        with runner.start(x) as run:
            started = run.result()
    with torch.no_grad():
        wanted = eager(x)[-1]
    assert torch.allclose(answer.output, wanted, atol=1e-6)
    assert torch.allclose(started.output, wanted, atol=1e-6)
    with pytest.raises(StaleInput, match="engine"):
        Runner(eager, costs)


def test_samples_leave_a_batch_at_their_exits(
    network: EngineNetwork, eager: MultiExitNetwork
) -> None:
    x = torch.randn(6, 8)
    with torch.no_grad():
        outputs = torch.stack(eager(x))
    confidence = outputs.softmax(-1).amax(-1)
    thresholds = (float(confidence[0].median()), float(confidence[1].median()), -torch.inf)
    policy = ThresholdPolicy(score="max_probability", thresholds=thresholds)
    costs = profile(network, EXAMPLE, batch_sizes=[6], repeats=20, warm_up=1)
    with Runner(network, costs, policy) as runner:
        answer = runner.run(x)
    assert set(answer.exits) == {0, 1, 2}
    wanted = torch.stack([outputs[exit, row] for row, exit in enumerate(answer.exits)])
    assert torch.allclose(answer.output, wanted, atol=1e-6)


def test_recordings_equal_those_of_the_eager_network(
    network: EngineNetwork, eager: MultiExitNetwork
) -> None:
    samples = Samples(torch.randn(11, 8), torch.randint(3, (11,)))
    ours = record(network, samples, split="validation", features=True, batch_size=4)
    theirs = record(eager, samples, split="validation", features=True, batch_size=4)
    assert torch.allclose(ours.outputs, theirs.outputs, atol=1e-6)
    assert all(
        torch.allclose(one, other, atol=1e-6)
        for one, other in zip(ours.features, theirs.features, strict=True)
    )
    assert ours.provenance.network == theirs.provenance.network
    same_weights = ours.provenance.weights == theirs.provenance.weights
    assert same_weights == (network.precision == "fp32")


def test_facts_survive_json(facts: NetworkFacts) -> None:
    assert from_plain(json.loads(json.dumps(to_plain(facts))), NetworkFacts) == facts


# --- compiled by torch ----------------------------------------------------------------------------

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="torch compiles with g++")


@pytest.fixture
def shallow() -> MultiExitNetwork:
    return attach_exits(ToyBackbone(), after=["blocks.0"], example=EXAMPLE).eval()


@pytest.mark.slow
@needs_compiler
# torch's own, when its compiler is imported
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_stages_give_the_same_answers(shallow: MultiExitNetwork) -> None:
    network = compiled(partition(shallow, EXAMPLE), NetworkFacts.of(shallow, EXAMPLE))
    assert network.engine == "compile"
    for batch in (2, 3, 1):
        agree(network, shallow, batch)


@pytest.mark.slow
@needs_compiler
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_packages_give_the_same_answers_with_their_own_thread_count_only(
    shallow: MultiExitNetwork, tmp_path: Path
) -> None:
    parts, facts = partition(shallow, EXAMPLE), NetworkFacts.of(shallow, EXAMPLE)
    aoti(parts, facts, tmp_path / "packages", threads=1)
    network = load_aoti(tmp_path / "packages")
    assert (network.engine, network.threads) == ("aoti", 1)
    for batch in (1, 3):
        agree(network, shallow, batch)
    torch.set_num_threads(2)
    try:
        with pytest.raises(StaleInput, match="built with threads 1, but here it is 2"):
            load_aoti(tmp_path / "packages")
    finally:
        torch.set_num_threads(1)


def test_without_a_compiler_the_error_says_what_to_install(
    parts: Parts, facts: NetworkFacts, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CXX", str(tmp_path / "no-such-compiler"))
    for build in (
        lambda: compiled(parts, facts),
        lambda: aoti(parts, facts, tmp_path / "packages"),
    ):
        with pytest.raises(
            NetworkError, match=r"torch compiles with .*no-such-compiler.*apt install g\+\+"
        ):
            build()
    assert not (tmp_path / "packages").exists()


@needs_compiler
def test_packages_for_other_threads_than_torchs_are_not_built(
    parts: Parts, facts: NetworkFacts, tmp_path: Path
) -> None:
    with pytest.raises(StaleInput, match=r"for 2 threads were asked for, but torch uses 1 here"):
        aoti(parts, facts, tmp_path / "packages", threads=2)
    assert not (tmp_path / "packages").exists()


def test_packages_that_were_not_finished_are_refused(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="not a directory that aoti has finished"):
        load_aoti(tmp_path)
