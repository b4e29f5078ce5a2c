"""Results of verbs as JSON, for scripts."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from impatient.store import Stored


def to_json(result: Any) -> str:
    """Write what a verb gave as JSON.

    Dataclasses become objects, with the names that they have in Python: times are in seconds where
    a name ends with `_s`. Infinities are the strings "inf" and "-inf", and NaN is null, since JSON
    has none of them.

    Example:
        >>> print(to_json({"file": Path("a"), "bounds": (0.5, math.inf)}))
        {
         "file": "a",
         "bounds": [
          0.5,
          "inf"
         ]
        }
    """
    return json.dumps(_plain(result), indent=1, allow_nan=False, ensure_ascii=False)


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        if math.isnan(value):
            return None
        return value if math.isfinite(value) else str(value)
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, Path):
        return str(value)
    if dataclasses.is_dataclass(value):
        kind: dict[str, Any] = {"kind": value.kind} if isinstance(value, Stored) else {}
        parts = [part for part in dataclasses.fields(value) if part.metadata.get("stored", True)]
        entries = {part.name: getattr(value, part.name) for part in parts}
        return kind | {name: _plain(entry) for name, entry in entries.items()}
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    from torch import Tensor

    # weights of learned policies; other verbs give no tensors
    if isinstance(value, Tensor):
        return _plain(value.tolist())
    raise TypeError(f"a {type(value).__name__} has no JSON; give plain values.")
