"""How good it is: recordings, metrics, evaluation and reports."""

import importlib
import typing

from impatient.evaluation.evaluate import BudgetRow, Evaluation, Row, evaluate
from impatient.evaluation.metrics import Estimate
from impatient.evaluation.recording import Recording, record

if typing.TYPE_CHECKING:
    from impatient.evaluation.plots import accuracy_time, exit_shares, save_figure, where_time_goes
    from impatient.evaluation.report import Example, figure_svg, report_html, select_examples

__all__ = [
    "BudgetRow",
    "Estimate",
    "Evaluation",
    "Example",
    "Recording",
    "Row",
    "accuracy_time",
    "evaluate",
    "exit_shares",
    "figure_svg",
    "record",
    "report_html",
    "save_figure",
    "select_examples",
    "where_time_goes",
]

# imported when first asked for: matplotlib would make every `import impatient` half a second slower
_LATER = dict.fromkeys(("accuracy_time", "exit_shares", "save_figure", "where_time_goes"), "plots")
_LATER |= dict.fromkeys(("Example", "figure_svg", "report_html", "select_examples"), "report")


def __getattr__(name: str) -> typing.Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_LATER[name]}"), name)
