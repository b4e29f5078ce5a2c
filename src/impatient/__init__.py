"""Make any PyTorch network answer by a deadline, and better as time allows."""

import typing

from impatient.deferred import deferred
from impatient.provenance import own_version

if typing.TYPE_CHECKING:
    from impatient import budgets, errors, networks, training
    from impatient.anytime import Exit, Network, Run
    from impatient.budgets import Budget, exit_weights, expected_accuracy
    from impatient.clock import NEVER, Deadline, FakeClock, SystemClock
    from impatient.costs import CostProfile
    from impatient.engines.export import export, load_engine, to_engine
    from impatient.errors import ImpatientError
    from impatient.evaluation.evaluate import Evaluation, evaluate
    from impatient.evaluation.recording import Recording, record
    from impatient.networks import (
        MultiExitNetwork,
        attach_exits,
        load_model,
        load_weights,
        load_zoo,
    )
    from impatient.policies import Policy, ThresholdPolicy, fit_thresholds
    from impatient.runtime import Answer, ContractRun, InterruptibleRun, Runner
    from impatient.runtime.profile import profile
    from impatient.training import Data, Recipe, fit, load_data


__version__ = own_version()

__all__ = [
    "NEVER",
    "Answer",
    "Budget",
    "ContractRun",
    "CostProfile",
    "Data",
    "Deadline",
    "Evaluation",
    "Exit",
    "FakeClock",
    "ImpatientError",
    "InterruptibleRun",
    "MultiExitNetwork",
    "Network",
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
    "load_weights",
    "load_zoo",
    "networks",
    "profile",
    "record",
    "to_engine",
    "training",
]

if not typing.TYPE_CHECKING:
    # `impatient --help` then needs no torch, and who only wants a runner no training
    __getattr__, __dir__ = deferred(
        __name__,
        {
            "anytime": ["anytime", "Exit", "Network", "Run"],
            "budgets": ["budgets", "Budget", "exit_weights", "expected_accuracy"],
            "clock": ["clock", "NEVER", "Deadline", "FakeClock", "SystemClock"],
            "costs": ["costs", "CostProfile"],
            "engines": ["engines", "export", "load_engine", "to_engine"],
            "ensembling": ["ensembling"],
            "errors": ["errors", "ImpatientError"],
            "evaluation": ["evaluation", "Evaluation", "Recording", "evaluate", "record"],
            "networks": [
                "networks",
                "MultiExitNetwork",
                "attach_exits",
                "load_model",
                "load_weights",
                "load_zoo",
            ],
            "policies": ["policies", "Policy", "ThresholdPolicy", "fit_thresholds"],
            "provenance": ["provenance"],
            "runtime": [
                "runtime",
                "Answer",
                "ContractRun",
                "InterruptibleRun",
                "Runner",
                "profile",
            ],
            "tasks": ["tasks"],
            "training": ["training", "Data", "Recipe", "fit", "load_data"],
        },
    )
