"""Running against the clock: measured costs, contract and interruptible runs."""

from impatient.engines import EngineNetwork, export, load_engine, to_engine
from impatient.runtime.answer import Answer
from impatient.runtime.interruptible import Run
from impatient.runtime.profile import profile, time_in_turn
from impatient.runtime.runner import OpenRun, Runner

__all__ = [
    "Answer",
    "EngineNetwork",
    "OpenRun",
    "Run",
    "Runner",
    "export",
    "load_engine",
    "profile",
    "time_in_turn",
    "to_engine",
]
