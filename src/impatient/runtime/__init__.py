"""Running against the clock: measured costs, contract and interruptible runs, several workers."""

from impatient.runtime.profile import profile, time_in_turn
from impatient.runtime.runner import Answer, Run, Runner
from impatient.runtime.workers import ParallelEANN, ParallelRun

__all__ = ["Answer", "ParallelEANN", "ParallelRun", "Run", "Runner", "profile", "time_in_turn"]
