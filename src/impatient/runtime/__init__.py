"""Running against the clock: measured costs, contract and interruptible runs."""

from impatient.runtime.profile import profile
from impatient.runtime.runner import Answer, Run, Runner

__all__ = ["Answer", "Run", "Runner", "profile"]
