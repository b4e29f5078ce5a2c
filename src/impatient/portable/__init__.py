"""Run an exported network with numpy and an engine, nothing else.

These files import neither torch nor impatient. `impatient export` copies them into the directories
that it writes.
"""

from .answers import Answer
from .bundle import Bundle, Started
from .errors import BundleError, Cancelled
from .parts import ENGINES, EnginePart, OnnxRuntimePart, OpenVinoPart
from .sessions import SESSIONS
from .staged import Head, Part, PartExit, Run, Staged, StagedRun, Wiring
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
    "Head",
    "OnnxRuntimePart",
    "OpenVinoPart",
    "Part",
    "PartExit",
    "Run",
    "SlowdownEstimator",
    "Staged",
    "StagedRun",
    "Started",
    "Streamed",
    "StreamedRun",
    "Thresholds",
    "TimePredictor",
    "Wiring",
]
