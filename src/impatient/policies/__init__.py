"""Decide when to stop, or which network comes next, from recordings alone."""

from impatient.policies import bounds
from impatient.policies.calibration import fit_temperatures
from impatient.policies.costsensitive import Decision, fit_decision
from impatient.policies.gate_fitting import SweepPoint, fit_gates, sweep_gates
from impatient.policies.gates import GatePolicy, gate_time_s
from impatient.policies.mixing import DrawnPolicy, MixedPolicy, PolicyPoint, lower_hull, mix
from impatient.policies.outcome import Outcome, node_times_s
from impatient.policies.policy import STOP, Description, Policy
from impatient.policies.risk import (
    Certificate,
    ControlledPolicy,
    control_risk,
    samples_needed,
    scaled_family,
    threshold_family,
)
from impatient.policies.routing import Route, SelectionPolicy
from impatient.policies.rules import ThresholdPolicy, fit_thresholds, thresholds_for_shares
from impatient.policies.selection import (
    SelectionPoint,
    fit_selection,
    sweep_selection,
)
from impatient.policies.splits import split_recording
from impatient.policies.targets import FittedTo
from impatient.policies.topology import Topology

__all__ = [
    "STOP",
    "Certificate",
    "ControlledPolicy",
    "Decision",
    "Description",
    "DrawnPolicy",
    "FittedTo",
    "GatePolicy",
    "MixedPolicy",
    "Outcome",
    "Policy",
    "PolicyPoint",
    "Route",
    "SelectionPoint",
    "SelectionPolicy",
    "SweepPoint",
    "ThresholdPolicy",
    "Topology",
    "bounds",
    "control_risk",
    "fit_decision",
    "fit_gates",
    "fit_selection",
    "fit_temperatures",
    "fit_thresholds",
    "gate_time_s",
    "lower_hull",
    "mix",
    "node_times_s",
    "samples_needed",
    "scaled_family",
    "split_recording",
    "sweep_gates",
    "sweep_selection",
    "threshold_family",
    "thresholds_for_shares",
]
