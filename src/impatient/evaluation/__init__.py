"""How good it is: recordings, metrics, evaluation and reports."""

import typing

from impatient.deferred import deferred
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
    from impatient.evaluation.picture import Part, network_svg, parts_of
    from impatient.evaluation.plots import (
        accuracy_time,
        exit_shares,
        save_figure,
        where_time_goes,
    )
    from impatient.evaluation.report import (
        Example,
        Report,
        Said,
        figure_svg,
        report_html,
        select_examples,
    )

__all__ = [
    "BudgetRow",
    "Estimate",
    "Evaluation",
    "Example",
    "Monotonicity",
    "Part",
    "PolicyOutcomes",
    "Recording",
    "Report",
    "Row",
    "Said",
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
    "network_svg",
    "parts_of",
    "record",
    "report_html",
    "save_figure",
    "select_examples",
    "true_label_probabilities",
    "where_time_goes",
]

# matplotlib and scikit-learn would make every recording wait for a second
if not typing.TYPE_CHECKING:
    __getattr__, __dir__ = deferred(
        __name__,
        {
            "picture": ["picture", "Part", "network_svg", "parts_of"],
            "plots": [
                "plots",
                "accuracy_time",
                "exit_shares",
                "save_figure",
                "where_time_goes",
            ],
            "report": [
                "report",
                "Example",
                "Report",
                "Said",
                "figure_svg",
                "report_html",
                "select_examples",
            ],
        },
    )
