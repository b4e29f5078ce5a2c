"""Measure joules of processors, GPUs and systems on a chip.

Status: tested on a made-up powercap tree and a stand-in for zeus 0.16. Never run on a real counter:
no machine we had shows one.

A meter sees the whole package or board, whoever uses it, idle power included: measure on a machine
that does nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from impatient.errors import EnergyUnavailable
from impatient.runtime.joules import EnergyMeter

POWERCAP = Path("/sys/class/powercap")


class RaplMeter:
    """Energy of all processor packages, without memory, from Linux's powercap.

    Args:
        powercap: directory of the counters; the default is where Linux shows them.
    Raises:
        EnergyUnavailable: if there are no counters, or they may not be read.
    """

    def __init__(self, powercap: Path | None = None) -> None:
        powercap = powercap or POWERCAP
        zones = [
            zone
            for zone in sorted(powercap.glob("intel-rapl:*"))
            if _word(zone / "name").startswith("package")
        ]
        if not zones:
            raise EnergyUnavailable(
                f"{powercap} has no energy counter of a processor package (RAPL)."
            )
        self._counters = [zone / "energy_uj" for zone in zones]
        self._ranges = [_number(zone / "max_energy_range_uj") for zone in zones]
        self._before = self._read()
        self.name = f"RAPL, {len(zones)} processor package{'s' if len(zones) > 1 else ''}"

    def begin(self) -> None:
        self._before = self._read()

    def end(self) -> float:
        """Return the joules since `begin`.

        A counter wraps round after minutes. More than one wrap cannot be noticed.
        """
        passed = zip(self._before, self._read(), self._ranges, strict=True)
        return sum(after - before + most * (after < before) for before, after, most in passed) / 1e6

    def _read(self) -> list[int]:
        return [_number(counter) for counter in self._counters]


def _word(file: Path) -> str:
    return file.read_text(encoding="ascii").strip() if file.is_file() else ""


def _number(file: Path) -> int:
    try:
        return int(file.read_text(encoding="ascii"))
    except PermissionError as error:
        raise EnergyUnavailable(
            f"{file} may not be read. Run as root, or let everybody read it: sudo chmod a+r "
            f"{file.parent.parent}/*/energy_uj."
        ) from error
    except (OSError, ValueError) as error:
        raise EnergyUnavailable(f"{file} holds no energy counter ({error}).") from error


class ZeusMeter:
    """Energy of one GPU or system on a chip, from zeus.

    Systems on a chip are Jetson and Apple silicon.

    Args:
        device: "cuda" or "cuda:1"; on a system on a chip, which is measured as a whole, also "cpu"
            or "mps".
    Raises:
        EnergyUnavailable: if zeus is not installed, or sees no such device.
    """

    def __init__(self, device: str) -> None:
        kind, _, index = device.partition(":")
        try:
            from zeus.exception import ZeusBaseError
            from zeus.monitor import ZeusMonitor
        except ImportError as error:
            raise EnergyUnavailable(
                f"zeus is not installed ({error}); pip install zeus."
            ) from error
        self._gpu = int(index or 0)
        try:
            # cpu_indices=[]: for processors, zeus would start a process that watches RAPL.
            self._monitor: Any = ZeusMonitor(gpu_indices=[], cpu_indices=[])
            self._on_chip = bool(getattr(self._monitor, "soc_is_present", False))
            if kind == "cuda" and not self._on_chip:
                self._monitor = ZeusMonitor(gpu_indices=[self._gpu], cpu_indices=[])
        except (ZeusBaseError, RuntimeError, ValueError, OSError) as error:
            raise EnergyUnavailable(f"zeus cannot measure {device} ({error}).") from error
        if kind != "cuda" and not self._on_chip:
            raise EnergyUnavailable(
                f"zeus sees no system on a chip here, so it cannot measure {device}."
            )
        self.name = "zeus, system on a chip" if self._on_chip else f"zeus, GPU {self._gpu}"
        self._window = 0

    def begin(self) -> None:
        # A new name each time: zeus refuses a name that an error has left open.
        self._window += 1
        self._monitor.begin_window(f"impatient {self._window}")

    def end(self) -> float:
        """Return the joules since `begin`."""
        measured = self._monitor.end_window(f"impatient {self._window}")
        return (
            _on_chip_joules(measured.soc_energy)
            if self._on_chip
            else float(measured.gpu_energy[self._gpu])
        )


def _on_chip_joules(measured: Any) -> float:
    """Return the board's total, or else the sum of its parts.

    Zeus has a total for Jetson and parts for Apple silicon, in millijoules.
    """
    total = getattr(measured, "total_energy_mj", None)
    parts = [
        getattr(measured, name, None) for name in ("cpu_total_mj", "gpu_mj", "dram_mj", "ane_mj")
    ]
    known = [part for part in (parts if total is None else [total]) if part is not None]
    if not known:
        raise EnergyUnavailable(f"zeus measured nothing of this system on a chip: {measured}.")
    return float(sum(known)) / 1e3


def find_meter(device: str, *, powercap: Path | None = None) -> EnergyMeter:
    """Find the meter of a device.

    "cpu" stands for the processor packages, "cuda" for the GPU.

    Example:
        meter = find_meter("cpu")
        costs = impatient.profile(network, x, energy=meter)
    Raises:
        EnergyUnavailable: if there is no meter, with the reasons.
    """
    makers: list[Callable[[], EnergyMeter]] = [lambda: ZeusMeter(device)]
    if device.startswith("cpu"):
        makers.insert(0, lambda: RaplMeter(powercap))
    reasons = []
    for make in makers:
        try:
            return make()
        except EnergyUnavailable as reason:
            reasons.append(str(reason))
    raise EnergyUnavailable(f"the energy of {device} cannot be measured here: {' '.join(reasons)}")
