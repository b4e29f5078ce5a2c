"""Everything this library raises, as one tree.

ImpatientError
├── NetworkError                 a model cannot be cut, loaded or run as asked
│   ├── ExitNotFound             no such module; the message names the candidates
│   ├── AmbiguousCut             a module is called several times and the cut does not say which
call │   ├── CutOrderError            the cuts are not in the order in which the model runs
│   ├── HeadError                no head can be built for these features
│   ├── ClassCountMismatch       two places disagree on the number of classes
│   ├── ExitNotReached           this input never came to an exit that was asked for
│   ├── ExitPassed               the output of an exit was asked for after the run had moved on
│   ├── ExportFailed             torch.export cannot turn this model into a graph
│   └── ModelSpecError           a model spec string cannot be read or loaded
├── BudgetError                  a budget or deadline is not a positive time
├── CostError                    a cost profile is malformed
│   ├── CostOrderError           cumulative costs do not increase
│   └── EnergyUnavailable        this machine cannot measure joules, or does not let us
├── DataError                    a data set is missing, empty or malformed
├── TrainingError                training cannot go on
│   └── TrainingDiverged         a loss is NaN or infinite
├── RecordingError               a recording is malformed
│   └── SplitReuseError          a policy is judged on the data it was fitted on
├── PolicyError                  a policy is malformed or does not fit the network
│   └── InfeasibleTarget         no policy of this family reaches the target
├── RunError                     a run against the clock cannot give what was asked
│   └── NoAnswerInTime           not even the first exit fits, and the caller wanted an error
├── StaleInput                   a file was made by another model, data set, machine or version
└── StorageError                 a file cannot be read or written

Each message says what was given, what was needed and what to do. Errors that mean "bad value" are
ValueErrors too, so that callers who know nothing of this library can catch them.
"""


class ImpatientError(Exception):
    """Root of everything this library raises on purpose."""


class NetworkError(ImpatientError):
    """A model cannot be cut, loaded or run as asked."""


class ExitNotFound(NetworkError, ValueError):
    """No module has this name."""


class AmbiguousCut(NetworkError, ValueError):
    """A module is called several times and the cut does not say after which call."""


class CutOrderError(NetworkError, ValueError):
    """The cuts are not in the order in which the model runs."""


class HeadError(NetworkError, ValueError):
    """No head can be built for these features."""


class ClassCountMismatch(NetworkError, ValueError):
    """Two places disagree on the number of classes."""


class ExitNotReached(NetworkError, RuntimeError):
    """This input never came to an exit that was asked for."""


class ExitPassed(NetworkError, RuntimeError):
    """The output of an exit was asked for after the run had moved on."""


class ExportFailed(NetworkError, RuntimeError):
    """torch.export cannot turn this model into a graph."""


class ModelSpecError(NetworkError, ValueError):
    """A model spec string cannot be read or loaded."""


class BudgetError(ImpatientError, ValueError):
    """A budget or a deadline is not a positive time."""


class CostError(ImpatientError, ValueError):
    """A cost profile is malformed."""


class CostOrderError(CostError):
    """Cumulative costs do not increase."""


class EnergyUnavailable(CostError):
    """This machine cannot measure joules, or does not let us."""


class DataError(ImpatientError, ValueError):
    """A data set is missing, empty or malformed."""


class TrainingError(ImpatientError, RuntimeError):
    """Training cannot go on."""


class TrainingDiverged(TrainingError):
    """A loss is NaN or infinite."""


class RecordingError(ImpatientError, ValueError):
    """A recording is malformed."""


class SplitReuseError(RecordingError):
    """A policy is judged on the data it was fitted on."""


class PolicyError(ImpatientError, ValueError):
    """A policy is malformed or does not fit the network."""


class InfeasibleTarget(PolicyError):
    """No policy of this family reaches the target."""


class RunError(ImpatientError, RuntimeError):
    """A run against the clock cannot give what was asked."""


class NoAnswerInTime(RunError):
    """Not even the first exit fits, and the caller asked for an error instead of a late answer."""


class StaleInput(ImpatientError, RuntimeError):
    """A file was made by another model, data set, machine or version than the one at hand."""


class StorageError(ImpatientError, OSError):
    """A file cannot be read or written."""


class NoEffectWarning(UserWarning):
    """A call changed nothing: an exit that never fires, a threshold nobody reaches."""
