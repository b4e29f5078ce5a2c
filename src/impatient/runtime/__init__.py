"""Running against the clock: measured costs, contract and interruptible runs."""

from impatient.engines import EngineNetwork, export, load_engine, to_engine
from impatient.runtime.answer import Answer
from impatient.runtime.interruptible import InterruptibleRun
from impatient.runtime.periodic import Latest, Periodic, every, latest
from impatient.runtime.profile import profile, time_in_turn
from impatient.runtime.real_time import RealTime, Setting
from impatient.runtime.report import RunReport
from impatient.runtime.runner import ContractRun, Runner

__all__ = [
    "Answer",
    "ContractRun",
    "EngineNetwork",
    "InterruptibleRun",
    "Latest",
    "Periodic",
    "RealTime",
    "RunReport",
    "Runner",
    "Setting",
    "every",
    "export",
    "latest",
    "load_engine",
    "profile",
    "time_in_turn",
    "to_engine",
]
