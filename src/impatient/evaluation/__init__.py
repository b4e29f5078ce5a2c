"""How good it is: recordings, metrics, evaluation and reports."""

import importlib
import typing

from impatient.evaluation.derived import calibrated, ensembled
from impatient.evaluation.evaluate import BudgetRow, Evaluation, Row, StaticBaseline, evaluate
from impatient.evaluation.metrics import (
    Estimate,
    Monotonicity,
    conditional_monotonicity,
    true_label_probabilities,
)
from impatient.evaluation.recording import Recording, record
from impatient.evaluation.vectorised import PolicyOutcomes, expected_accuracies, judge_policies

if typing.TYPE_CHECKING:
    from impatient.evaluation.plots import (
        accuracy_time,
        exit_shares,
        save_figure,
        where_time_goes,
    )
    from impatient.evaluation.report import Example, figure_svg, report_html, select_examples

__all__ = [
    "BudgetRow",
    "Estimate",
    "Evaluation",
    "Example",
    "Monotonicity",
    "PolicyOutcomes",
    "Recording",
    "Row",
    "StaticBaseline",
    "accuracy_time",
    "calibrated",
    "conditional_monotonicity",
    "ensembled",
    "evaluate",
    "exit_shares",
    "expected_accuracies",
    "figure_svg",
    "judge_policies",
    "record",
    "report_html",
    "save_figure",
    "select_examples",
    "true_label_probabilities",
    "where_time_goes",
]

# imported when first asked for: matplotlib and scikit-learn would make every `import impatient` a
# second slower
_LATER = dict.fromkeys(
    ("accuracy_time", "exit_shares", "save_figure", "where_time_goes"),
    "plots",
)
_LATER |= dict.fromkeys(("Example", "figure_svg", "report_html", "select_examples"), "report")


def __getattr__(name: str) -> typing.Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_LATER[name]}"), name)
