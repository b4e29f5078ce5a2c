"""What an output means: losses, quality and scores, as plain functions."""

from impatient.tasks.binary import binary
from impatient.tasks.classification import classification
from impatient.tasks.detection import detection
from impatient.tasks.embedding import embedding
from impatient.tasks.multi_label import multi_label
from impatient.tasks.named import READY, is_classification, known, named
from impatient.tasks.regression import regression
from impatient.tasks.segmentation import segmentation
from impatient.tasks.task import Task

__all__ = [
    "READY",
    "Task",
    "binary",
    "classification",
    "detection",
    "embedding",
    "is_classification",
    "known",
    "multi_label",
    "named",
    "regression",
    "segmentation",
]
