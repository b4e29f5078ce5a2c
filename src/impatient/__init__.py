"""Make any PyTorch network anytime: a crude answer early, better ones as time allows, an answer by
the deadline.
"""

from impatient import budgets, errors, networks, training
from impatient.budgets import Budget, exit_weights, expected_accuracy
from impatient.clock import NEVER, Deadline, FakeClock, SystemClock
from impatient.costs import CostProfile
from impatient.errors import ImpatientError
from impatient.evaluation import Evaluation, Recording, evaluate, record
from impatient.networks import MultiExitNetwork, attach_exits, load_model
from impatient.policies import Policy, ThresholdPolicy, fit_thresholds
from impatient.provenance import own_version
from impatient.runtime import Answer, Run, Runner, export, load_engine, profile, to_engine
from impatient.training import Data, Recipe, fit, load_data

__version__ = own_version()

__all__ = [
    "NEVER",
    "Answer",
    "Budget",
    "CostProfile",
    "Data",
    "Deadline",
    "Evaluation",
    "FakeClock",
    "ImpatientError",
    "MultiExitNetwork",
    "Policy",
    "Recipe",
    "Recording",
    "Run",
    "Runner",
    "SystemClock",
    "ThresholdPolicy",
    "__version__",
    "attach_exits",
    "budgets",
    "errors",
    "evaluate",
    "exit_weights",
    "expected_accuracy",
    "export",
    "fit",
    "fit_thresholds",
    "load_data",
    "load_engine",
    "load_model",
    "networks",
    "profile",
    "record",
    "to_engine",
    "training",
]
