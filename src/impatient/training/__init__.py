"""Train networks with exits: data, exit weights, losses, and the loop."""

from impatient.recipe import Recipe
from impatient.training import balancing, losses, schedules, weights
from impatient.training.balancing import AdaLoss
from impatient.training.data import Data, load_data
from impatient.training.history import EpochMetrics, History
from impatient.training.loop import fit
from impatient.training.options import DataOptions
from impatient.training.preprocess import Preprocess
from impatient.training.samples import Samples
from impatient.training.trainer import ForTrainer

__all__ = [
    "AdaLoss",
    "Data",
    "DataOptions",
    "EpochMetrics",
    "ForTrainer",
    "History",
    "Preprocess",
    "Recipe",
    "Samples",
    "balancing",
    "fit",
    "load_data",
    "losses",
    "schedules",
    "weights",
]
