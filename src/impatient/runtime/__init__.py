"""Running against the clock: measured costs, contract and interruptible runs, several workers."""

from impatient.engines import EngineNetwork, export, load_engine, to_engine
from impatient.experimental.workers import ParallelEANN, ParallelRun
from impatient.runtime.answer import Answer
from impatient.runtime.interruptible import Run
from impatient.runtime.profile import profile, time_in_turn
from impatient.runtime.runner import OpenRun, Runner

__all__ = [
    "Answer",
    "EngineNetwork",
    "OpenRun",
    "ParallelEANN",
    "ParallelRun",
    "Run",
    "Runner",
    "export",
    "load_engine",
    "profile",
    "time_in_turn",
    "to_engine",
]
