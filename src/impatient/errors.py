"""All errors of this library, as one tree.

    ImpatientError
    ├── NetworkError                 a model cannot be cut, loaded or run as asked
    │   ├── ExitNotFound             no such module; the message names the candidates
    │   ├── AmbiguousCut             a module is called several times and the cut names no call
    │   ├── CutOrderError            the cuts are not in the order in which the model runs
    │   ├── HeadError                no head can be built for these features
    │   ├── ClassCountMismatch       two places disagree on the number of classes
    │   ├── ExitNotReached           this input did not reach an exit that was asked for
    │   ├── ExitPassed               the output of an exit was asked for after the run had moved on
    │   ├── ExportFailed             torch.export cannot turn this model into a graph
    │   └── ModelSpecError           a model spec string cannot be read or loaded
    ├── BudgetError                  a budget or deadline is not a positive time
    ├── CostError                    a cost profile is malformed
    │   ├── CostOrderError           cumulative costs do not increase
    │   └── EnergyUnavailable        joules cannot be measured on this machine or by this user
    ├── TreeError                    samples, targets or outputs do not fit together
    ├── TaskError                    a task does not fit the outputs, targets or policy
    ├── DataError                    a data set is missing, empty or malformed
    ├── TrainingError                training cannot start or continue
    │   └── TrainingDiverged         a loss is NaN or infinite
    ├── RecordingError               a recording is malformed
    │   └── SplitReuseError          a policy is evaluated on the data it was fitted on
    ├── PolicyError                  a policy is malformed or does not fit the network
    │   └── InfeasibleTarget         no policy of this family reaches the target
    ├── RunError                     a run against the clock cannot be done as asked
    │   └── NoAnswerInTime           not even the first exit fits, and the caller wanted an error
    ├── ServingError                 a server cannot be set up, or a request cannot be served
    │   └── BadRequest               a request breaks the protocol or a limit
    ├── StaleInput                   a file was made by another model, data set, machine or version
    └── StorageError                 a file cannot be read or written

Each message says what was given, what was expected and what to do. Errors that mean "bad value" are
also ValueErrors, so that callers who do not know this library can catch them.
"""


class ImpatientError(Exception):
    """Base class of all errors that this library raises on purpose."""


class NetworkError(ImpatientError):
    """A model cannot be cut, loaded or run as asked."""


class ExitNotFound(NetworkError, ValueError):
    """No module has this name."""


class AmbiguousCut(NetworkError, ValueError):
    """A module is called several times and the cut names no call."""


class CutOrderError(NetworkError, ValueError):
    """The cuts are not in the order in which the model runs."""


class HeadError(NetworkError, ValueError):
    """No head can be built for these features."""


class ClassCountMismatch(NetworkError, ValueError):
    """Two places disagree on the number of classes."""


class ExitNotReached(NetworkError, RuntimeError):
    """This input did not reach an exit that was asked for."""


class ExitPassed(NetworkError, RuntimeError):
    """An exit's output was asked for after the run had moved on."""


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
    """Joules cannot be measured on this machine or by this user."""


class TreeError(ImpatientError, ValueError):
    """Samples, targets or outputs do not fit together."""


class TaskError(ImpatientError, ValueError):
    """A task does not fit the outputs, targets or policy."""


class DataError(ImpatientError, ValueError):
    """A data set is missing, empty or malformed."""


class TrainingError(ImpatientError, RuntimeError):
    """Training cannot start or continue."""


class TrainingDiverged(TrainingError):
    """A loss is NaN or infinite."""


class RecordingError(ImpatientError, ValueError):
    """A recording is malformed."""


class SplitReuseError(RecordingError):
    """A policy is evaluated on the data it was fitted on."""


class PolicyError(ImpatientError, ValueError):
    """A policy is malformed or does not fit the network."""


class InfeasibleTarget(PolicyError):
    """No policy of this family reaches the target."""


class RunError(ImpatientError, RuntimeError):
    """A run against the clock cannot be done as asked."""


class NoAnswerInTime(RunError):
    """Not even the first exit fits, and the caller wanted an error."""


class ServingError(ImpatientError, RuntimeError):
    """A server cannot be set up, or a request cannot be served."""


class BadRequest(ServingError, ValueError):
    """A request breaks the protocol or a limit."""


class StaleInput(ImpatientError, RuntimeError):
    """A file was made by another model, data set, machine or version."""


class StorageError(ImpatientError, OSError):
    """A file cannot be read or written."""


class NoEffectWarning(UserWarning):
    """A call changed nothing, such as a threshold that no sample reaches."""


class LogitsWarning(UserWarning):
    """An output does not look like the logits of two or more classes."""


# What to do where one output column is taken for a class.
ONE_COLUMN = (
    "The softmax of one number is always 1, so that every sample would look sure at the first "
    "exit. Give the model two columns, such as torch.cat([-z, z], 1) / 2 for a logit z, or stop "
    "with a policy of your own that does without scores."
)
