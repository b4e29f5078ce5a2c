"""When to stop: scores, rules and their fitting, on recordings alone."""

from impatient.policies import scores
from impatient.policies.calibration import fit_temperatures
from impatient.policies.rules import Policy, ThresholdPolicy, fit_thresholds, thresholds_for_shares

__all__ = ["Policy", "ThresholdPolicy", "fit_temperatures", "fit_thresholds", "scores", "thresholds_for_shares"]
