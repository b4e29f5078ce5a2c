"""Serving: many callers, each with a deadline."""

from impatient.serving.model import GainTable, ServedModel
from impatient.serving.rules import (
    ClockworkLike,
    DynamicProgramme,
    EdgeServingLike,
    FirstThenRoundRobin,
    Fixed,
    GreedyGain,
    InfaasLike,
    SymphonyLike,
)
from impatient.serving.scheduler import (
    Choice,
    Pending,
    Refuse,
    Reply,
    Request,
    Rule,
    Scheduler,
    Work,
)
from impatient.serving.simulator import Simulation, fluid_bound, simulate

__all__ = [
    "Choice",
    "ClockworkLike",
    "DynamicProgramme",
    "EdgeServingLike",
    "FirstThenRoundRobin",
    "Fixed",
    "GainTable",
    "GreedyGain",
    "InfaasLike",
    "Pending",
    "Refuse",
    "Reply",
    "Request",
    "Rule",
    "Scheduler",
    "ServedModel",
    "Simulation",
    "SymphonyLike",
    "Work",
    "fluid_bound",
    "simulate",
]
