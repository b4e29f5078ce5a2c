"""How good it is: recordings, metrics, evaluation and reports."""

from impatient.evaluation.evaluate import BudgetRow, Evaluation, Row, evaluate
from impatient.evaluation.metrics import Estimate
from impatient.evaluation.recording import Recording, record

__all__ = ["BudgetRow", "Estimate", "Evaluation", "Recording", "Row", "evaluate", "record"]
