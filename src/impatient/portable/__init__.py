"""Run an exported network with numpy and an engine, nothing else.

These files import neither torch nor impatient. `impatient export` copies them into the directories
that it writes.
"""

from .answers import Answer
from .bundle import Bundle, InterruptibleRun
from .checksums import check_file, files_below
from .errors import BundleError, Cancelled
from .parts import ENGINES, EnginePart, OnnxRuntimePart, OpenVinoPart
from .sessions import SESSIONS
from .staged import Exit, Head, Part, Run, Staged, StagedRun, Wiring
from .streamed import Streamed, StreamedRun
from .thresholds import Thresholds
from .timing import SlowdownEstimator, TimePredictor

__all__ = [
    "ENGINES",
    "SESSIONS",
    "Answer",
    "Bundle",
    "BundleError",
    "Cancelled",
    "EnginePart",
    "Exit",
    "Head",
    "InterruptibleRun",
    "OnnxRuntimePart",
    "OpenVinoPart",
    "Part",
    "Run",
    "SlowdownEstimator",
    "Staged",
    "StagedRun",
    "Streamed",
    "StreamedRun",
    "Thresholds",
    "TimePredictor",
    "Wiring",
    "check_file",
    "files_below",
]
