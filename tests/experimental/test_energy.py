"""Joules: counters in a made-up powercap tree, zeus as it speaks, and what repeated windows make of
a known truth.
"""

import sys
import types
from pathlib import Path
from typing import Any

import pytest

from impatient.clock import FakeClock
from impatient.errors import EnergyUnavailable
from impatient.experimental.energy import RaplMeter, ZeusMeter, find_meter
from impatient.runtime.joules import joules_per_run

# microjoules, of a real processor
RANGE = 262_143_328_850


def zone(powercap: Path, number: str, name: str, energy_uj: int, most: int = RANGE) -> Path:
    """One counter as Linux shows it."""
    folder = powercap / f"intel-rapl:{number}"
    folder.mkdir(parents=True)
    (folder / "name").write_text(f"{name}\n")
    (folder / "energy_uj").write_text(f"{energy_uj}\n")
    (folder / "max_energy_range_uj").write_text(f"{most}\n")
    return folder


def spend(folder: Path, joules: float) -> None:
    """Let a counter go on, round if it must."""
    counter = folder / "energy_uj"
    most = int((folder / "max_energy_range_uj").read_text())
    counter.write_text(f"{(int(counter.read_text()) + round(joules * 1e6)) % most}\n")


# --- RAPL -----------------------------------------------------------------------------------------


def test_the_packages_are_added_and_their_parts_are_not(tmp_path: Path) -> None:
    packages = [
        zone(tmp_path, "0", "package-0", 5_000_000),
        zone(tmp_path, "1", "package-1", 7_000_000),
    ]
    parts = [
        zone(tmp_path, "0:0", "core", 0),
        zone(tmp_path, "0:1", "dram", 0),
        zone(tmp_path, "2", "psys", 0),
    ]
    (tmp_path / "intel-rapl").mkdir()
    meter = RaplMeter(tmp_path)
    assert meter.name == "RAPL, 2 processor packages"
    meter.begin()
    for folder, joules in zip((*packages, *parts), (1.5, 0.25, 100.0, 100.0, 100.0), strict=True):
        spend(folder, joules)
    assert meter.end() == pytest.approx(1.75)


def test_a_counter_that_wraps_round_loses_nothing(tmp_path: Path) -> None:
    package = zone(tmp_path, "0", "package-0", RANGE - 1_000_000)
    meter = RaplMeter(tmp_path)
    meter.begin()
    spend(package, 3.5)
    assert int((package / "energy_uj").read_text()) < RANGE - 1_000_000
    assert meter.end() == pytest.approx(3.5)


def test_every_window_begins_anew(tmp_path: Path) -> None:
    package = zone(tmp_path, "0", "package-0", 0)
    meter = RaplMeter(tmp_path)
    for joules in (1.0, 2.0):
        # between the windows
        spend(package, 50.0)
        meter.begin()
        spend(package, joules)
        assert meter.end() == pytest.approx(joules)


def test_a_machine_without_packages_is_told_so(tmp_path: Path) -> None:
    with pytest.raises(EnergyUnavailable, match="no energy counter of a processor package"):
        RaplMeter(tmp_path / "nowhere")
    zone(tmp_path, "0", "psys", 0)
    with pytest.raises(EnergyUnavailable, match="no energy counter of a processor package"):
        RaplMeter(tmp_path)


def test_a_counter_that_may_not_be_read_says_how_it_could(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counter = zone(tmp_path, "0", "package-0", 0) / "energy_uj"
    read = Path.read_text

    # chmod forbids nothing to root
    def forbidden(path: Path, **options: Any) -> str:
        if path == counter:
            raise PermissionError(13, "Permission denied")
        return read(path, **options)

    monkeypatch.setattr(Path, "read_text", forbidden)
    with pytest.raises(
        EnergyUnavailable, match=r"energy_uj may not be read. Run as root, .*sudo chmod a\+r"
    ):
        RaplMeter(tmp_path)


@pytest.mark.parametrize("content", ["", "much"])
def test_a_counter_that_is_no_number_is_refused(tmp_path: Path, content: str) -> None:
    (zone(tmp_path, "0", "package-0", 0) / "energy_uj").write_text(content)
    with pytest.raises(EnergyUnavailable, match="holds no energy counter"):
        RaplMeter(tmp_path)


# --- zeus -----------------------------------------------------------------------------------------


class FakeZeus:
    """`ZeusMonitor` of zeus 0.16: the arguments it takes, the keys it refuses, the names it answers
    with.
    """

    gpus = (0, 1)
    soc_is_present = False
    soc: Any = None
    gpu_joules = 0.0

    def __init__(self, gpu_indices: list[int], cpu_indices: list[int]) -> None:
        assert cpu_indices == []
        if not set(gpu_indices) <= set(self.gpus):
            raise ValueError("No GPUs available.")
        self.gpu_indices = gpu_indices
        self._before: dict[str, float] = {}

    def begin_window(self, key: str, sync_execution: bool = True) -> None:
        if key in self._before:
            raise ValueError(f"Measurement window '{key}' already exists")
        self._before[key] = type(self).gpu_joules

    def end_window(self, key: str, sync_execution: bool = True, cancel: bool = False) -> Any:
        spent = type(self).gpu_joules - self._before.pop(key)
        return types.SimpleNamespace(
            gpu_energy=dict.fromkeys(self.gpu_indices, spent), soc_energy=self.soc
        )


@pytest.fixture
def zeus(monkeypatch: pytest.MonkeyPatch) -> type[FakeZeus]:
    kind = type("Monitor", (FakeZeus,), {})
    modules = {
        "zeus": {},
        "zeus.monitor": {"ZeusMonitor": kind},
        "zeus.exception": {"ZeusBaseError": type("E", (Exception,), {})},
    }
    for name, entries in modules.items():
        module = types.ModuleType(name)
        vars(module).update(entries)
        monkeypatch.setitem(sys.modules, name, module)
    return kind


def test_the_gpu_that_is_asked_for_is_measured(zeus: type[FakeZeus]) -> None:
    meter = ZeusMeter("cuda:1")
    assert meter.name == "zeus, GPU 1"
    for joules in (2.5, 4.0):
        zeus.gpu_joules += 10.0
        meter.begin()
        zeus.gpu_joules += joules
        assert meter.end() == joules
    meter.begin()
    # after a window that an error left open
    meter.begin()
    assert meter.end() == 0.0


@pytest.mark.parametrize(
    ("soc", "joules"),
    [
        (
            types.SimpleNamespace(total_energy_mj=1500.0, cpu_energy_mj=400.0, gpu_energy_mj=900.0),
            1.5,
        ),
        (
            types.SimpleNamespace(
                cpu_total_mj=1000, gpu_mj=200, dram_mj=40, ane_mj=None, efficiency_cores_mj=[900]
            ),
            1.24,
        ),
    ],
    ids=["Jetson", "Apple"],
)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_of_a_system_on_a_chip_all_is_measured(
    zeus: type[FakeZeus], soc: Any, joules: float, device: str
) -> None:
    zeus.soc_is_present = True
    zeus.soc = soc
    zeus.gpus = ()
    meter = ZeusMeter(device)
    meter.begin()
    assert meter.end() == pytest.approx(joules)
    zeus.soc = types.SimpleNamespace(total_energy_mj=None)
    meter.begin()
    with pytest.raises(EnergyUnavailable, match="measured nothing"):
        meter.end()


def test_a_device_that_zeus_does_not_see_is_refused(zeus: type[FakeZeus]) -> None:
    with pytest.raises(EnergyUnavailable, match=r"zeus cannot measure cuda:7 \(No GPUs available"):
        ZeusMeter("cuda:7")
    with pytest.raises(EnergyUnavailable, match="no system on a chip"):
        ZeusMeter("cpu")


def test_without_zeus_the_way_to_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "zeus.exception", None)
    with pytest.raises(EnergyUnavailable, match="pip install zeus"):
        ZeusMeter("cuda")


# --- which meter ----------------------------------------------------------------------------------


def test_a_processor_is_measured_by_its_counters_and_a_gpu_by_zeus(
    tmp_path: Path, zeus: type[FakeZeus]
) -> None:
    zone(tmp_path, "0", "package-0", 0)
    assert isinstance(find_meter("cpu", powercap=tmp_path), RaplMeter)
    assert isinstance(find_meter("cuda:0", powercap=tmp_path), ZeusMeter)


def test_where_nothing_measures_all_reasons_are_given(tmp_path: Path, zeus: type[FakeZeus]) -> None:
    with pytest.raises(
        EnergyUnavailable,
        match=r"energy of cpu cannot be measured here: .*\(RAPL\)\. .*system on a chip",
    ):
        find_meter("cpu", powercap=tmp_path)


# --- windows --------------------------------------------------------------------------------------


class FakeMeter:
    """Counts what is spent; `watts` are drawn whether or not anything runs."""

    name = "abacus"

    def __init__(self, clock: FakeClock, watts: float = 0.0) -> None:
        self.clock = clock
        self.watts = watts
        self.spent = 0.0

    def _joules(self) -> float:
        return self.spent + self.watts * self.clock.now()

    def begin(self) -> None:
        self._before = self._joules()

    def end(self) -> float:
        return self._joules() - self._before


class Job:
    def __init__(self, meter: FakeMeter, seconds: float, joules: float) -> None:
        self.meter = meter
        self.seconds = seconds
        self.joules = joules
        self.runs = 0

    def __call__(self) -> None:
        self.runs += 1
        self.meter.clock.advance(self.seconds)
        self.meter.spent += self.joules


def test_joules_of_a_run_are_those_of_a_window_by_its_runs() -> None:
    meter = FakeMeter(FakeClock(), watts=8.0)
    jobs = [Job(meter, 0.125, 1.0), Job(meter, 0.0625, 0.25), Job(meter, 2.0, 3.0)]
    assert joules_per_run(meter, jobs, window_s=0.5, rounds=3, clock=meter.clock) == (
        2.0,
        0.75,
        19.0,
    )
    assert [job.runs for job in jobs] == [4 * 3, 8 * 3, 1 * 3]


def test_one_window_in_which_something_else_ran_does_not_count() -> None:
    meter = FakeMeter(FakeClock())
    jobs = [Job(meter, 0.25, 1.0), Job(meter, 0.25, 2.0)]
    end = meter.end
    windows = []

    def disturbed() -> float:
        windows.append(len(windows))
        return end() + (100.0 if len(windows) == 3 else 0.0)

    meter.end = disturbed  # type: ignore[method-assign]
    assert joules_per_run(meter, jobs, window_s=0.5, rounds=3, clock=meter.clock) == (1.0, 2.0)


def test_jobs_take_turns() -> None:
    meter = FakeMeter(FakeClock())
    order = []

    def job(name: str) -> Any:
        return lambda: (order.append(name), Job(meter, 1.0, 1.0)())

    joules_per_run(meter, [job("a"), job("b")], window_s=0.5, rounds=3, clock=meter.clock)
    assert "".join(order) == "baabba"


def test_a_meter_that_stands_still_is_refused() -> None:
    meter = FakeMeter(FakeClock())
    with pytest.raises(EnergyUnavailable, match=r"abacus measured 0.0 J in 0.5 s"):
        joules_per_run(meter, [Job(meter, 0.25, 0.0)], window_s=0.5, clock=meter.clock)
