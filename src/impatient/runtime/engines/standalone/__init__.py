"""What runs an exported network: numpy and an engine, nothing else.

These files import neither torch nor impatient: `impatient export` copies them into the directories
    it writes.
"""

from .answers import Answer
from .bundle import Bundle, Started
from .errors import BundleError, Cancelled
from .pace import Drift, Pace
from .parts import ENGINES, EnginePart, OnnxRuntimePart, OpenVinoPart
from .sessions import SESSIONS
from .staged import Head, Part, PartExit, Run, Staged, StagedRun, Wiring
from .streamed import Streamed, StreamedRun
from .thresholds import Thresholds

__all__ = [
    "ENGINES",
    "SESSIONS",
    "Answer",
    "Bundle",
    "BundleError",
    "Cancelled",
    "Drift",
    "EnginePart",
    "Head",
    "OnnxRuntimePart",
    "OpenVinoPart",
    "Pace",
    "Part",
    "PartExit",
    "Run",
    "Staged",
    "StagedRun",
    "Started",
    "Streamed",
    "StreamedRun",
    "Thresholds",
    "Wiring",
]
