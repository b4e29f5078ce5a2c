"""Checksums of the files of an exported directory: one flipped bit is noticed."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .errors import BundleError

# What a JSON file with a checksum ends with, without white space.
_LAST_ENTRY = re.compile(r',?"checksum":"([0-9a-f]{64})"\}$')


def file_checksum(path: Path) -> str:
    """Compute the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def files_below(folder: Path) -> dict[str, str]:
    """Compute the checksums of all files in a folder, by their paths in it."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        path.relative_to(folder).as_posix(): file_checksum(path)
        for path in files
        if "__pycache__" not in path.parts
    }


def check_file(directory: Path, name: str, checksums: Mapping[str, str]) -> None:
    """Compare a file with its checksum, and files that ONNX keeps beside it.

    Raises:
        BundleError: if the file was changed, or cannot be read.
    """
    for each in (name, f"{name}.data"):
        path = directory / each
        if each not in checksums:
            continue
        try:
            found = file_checksum(path)
        except OSError as error:
            raise BundleError(f"cannot read {path}: {error}. Export the network again.") from error
        if found != checksums[each]:
            raise BundleError(
                f"{path} does not fit its checksum in bundle.json: it was damaged, or changed by "
                "hand. Copy the directory again, or export the network again."
            )


def with_checksum(value: Mapping[str, Any]) -> dict[str, Any]:
    """Add the checksum of a JSON object as its last entry.

    White space does not count.
    """
    return {**value, "checksum": _of_text("".join(json.dumps(value).split()))}


def fits_its_checksum(text: str) -> bool:
    """Compare the text of a JSON object with the checksum that is its last entry."""
    squeezed = "".join(text.split())
    last = _LAST_ENTRY.search(squeezed)
    return last is not None and last[1] == _of_text(squeezed[: last.start()] + "}")


def _of_text(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
