"""Damage files in seeded ways, read them, and count what came of it.

Shared by `benchmarks/fuzz.py` and `tests/verbs/test_fuzz.py`.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import pickle
import random
import signal
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from impatient.errors import ImpatientError, StorageError
from impatient.files import read_json, read_tensors, write_json, write_tensors
from impatient.portable.errors import BundleError

# No reading of a file may take longer.
LIMIT_S = 10
# What is put in the place of an entry.
WRONG = (
    *(None, True, "", "x", "float33", "\x1b[2J", "../x", [], {}, [[]], [None], {"a": 1}),
    *(0, -1, 0.5, 2**31, 2**63, 10**12, 10**30, -1e308, 1e308, math.inf, math.nan),
    json.loads("[" * 300 + "]" * 300),
)
# Keys and numbers that lead to an entry of JSON.
Route = tuple[str | int, ...]


@dataclass
class Found:
    """What came of the damaged files of one format.

    Attributes:
        files: how many were read.
        refused: how many ended in an error of our own.
        raw: other errors, by their place, with how often.
        slow: how many took longer than the limit.
        longest_s: the longest reading.
    """

    files: int = 0
    refused: int = 0
    raw: dict[str, int] = field(default_factory=dict)
    slow: int = 0
    longest_s: float = 0.0

    def add(self, read: Callable[[], object]) -> bool:
        """Read one damaged file.

        Returns whether it was refused.
        """
        self.files += 1
        started = time.perf_counter()
        try:
            with _limited(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                read()
            refused = False
        except (ImpatientError, BundleError):
            refused = True
        except _TooLongError:
            self.slow += 1
            refused = False
        except Exception as error:
            place = _place(error)
            self.raw[place] = self.raw.get(place, 0) + 1
            refused = False
        self.refused += refused
        self.longest_s = max(self.longest_s, time.perf_counter() - started)
        return refused


class _TooLongError(BaseException):
    """The limit is over.

    Nothing that is read may catch this.
    """


@contextlib.contextmanager
def _limited() -> Iterator[None]:
    def over(_number: int, _frame: FrameType | None) -> None:
        raise _TooLongError

    before = signal.signal(signal.SIGALRM, over)
    signal.alarm(LIMIT_S)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def _place(error: BaseException) -> str:
    """Say what was raised, and from which of our lines."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "impatient/" in frame.filename]
    line = f"{Path(own[-1].filename).name}:{own[-1].lineno}" if own else "elsewhere"
    return f"{type(error).__name__} at {line}: {str(error)[:60]}"


# --- bytes ----------------------------------------------------------------------------------------


def flip_a_bit(content: bytes, dice: random.Random) -> bytes:
    """Flip one bit anywhere."""
    damaged = bytearray(content)
    damaged[dice.randrange(len(content))] ^= 1 << dice.randrange(8)
    return bytes(damaged)


def damage_bytes(content: bytes, dice: random.Random) -> bytes:
    """Damage a file as disks, transfers and editors do."""
    begin = dice.randrange(len(content))
    end = min(len(content), begin + dice.choice((1, 8, 64, 512)))
    noise = dice.randbytes(end - begin)
    return dice.choice(
        (
            flip_a_bit(content, dice),
            content[:begin],
            content[begin:],
            content[:begin] + content[end:],
            content[:begin] + bytes(end - begin) + content[end:],
            content[:begin] + noise + content[end:],
            content[:begin] + noise + content[begin:],
            content[:end] + content[begin:],
            content[:begin] + b'[{"a":' * 20_000,
        )
    )


class Trap:
    """Unpickling this makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.marker,)


def pickled(marker: Path, dice: random.Random) -> bytes:
    """Pickle something that leaves a mark if it is ever unpickled."""
    return pickle.dumps({"state_dict": Trap(marker)}, protocol=dice.randrange(6))


# --- entries --------------------------------------------------------------------------------------


def _entries(tree: Any, path: Route = ()) -> Iterator[Route]:
    """List the places of all entries in JSON."""
    if path:
        yield path
    if isinstance(tree, dict | list):
        for key, entry in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from _entries(entry, (*path, key))


def damage_entry(tree: Mapping[str, Any], dice: random.Random) -> dict[str, Any]:
    """Change, remove, rename or double one entry anywhere in JSON."""
    damaged = json.loads(json.dumps(tree))
    path = dice.choice(list(_entries(damaged)))
    holder = damaged
    for key in path[:-1]:
        holder = holder[key]
    key = path[-1]
    way = dice.randrange(8)
    if way < 5:
        holder[key] = dice.choice(WRONG)
    elif way == 5:
        del holder[key]
    elif isinstance(holder, list):
        holder.insert(int(key), holder[int(key)])
    elif way == 6:
        holder[f"{key}\x1b"] = holder.pop(key)
    else:
        holder["unknown"] = dice.choice(WRONG)
    return damaged


def damage_json(path: Path, dice: random.Random) -> None:
    """Change an entry of a JSON file.

    The checksum fits, or is left out.
    """
    damaged = damage_entry(read_json(path), dice)
    if dice.random() < 0.5:
        write_json(path, damaged)
    else:
        path.write_text(json.dumps(damaged))


def damage_tensors(path: Path, dice: random.Random) -> None:
    """Change an entry or a tensor of a safetensors file.

    The checksum fits.
    """
    tensors, header = read_tensors(path)
    if not tensors or dice.random() < 0.5:
        write_tensors(path, tensors, damage_entry(header, dice) if header else {"x": 1})
        return
    name = dice.choice(sorted(tensors))
    value = tensors.pop(name)
    changed = dice.choice(list(_other_tensors(value)))
    if changed is not None:
        tensors[dice.choice((name, name, name, f"{name}x", "../x"))] = changed
    write_tensors(path, tensors, header)


def _other_tensors(value: Tensor) -> Iterator[Tensor | None]:
    yield None
    yield value.reshape(-1)
    yield value[None]
    yield value.to(torch.complex64) if value.is_floating_point() else value.float()
    yield value.to(torch.float64 if value.is_floating_point() else torch.int8)
    yield value.to(torch.int64)
    yield torch.full_like(value, math.nan if value.is_floating_point() else 1)
    yield torch.full_like(value, -1e30) if value.is_floating_point() else value - 2
    if value.dim():
        yield value[:0]
        yield torch.cat([value, value])


def damage(path: Path, dice: random.Random, marker: Path) -> None:
    """Damage a file in one of all these ways."""
    content = path.read_bytes()
    way = dice.random()
    if way < 0.02:
        path.write_bytes(pickled(marker, dice))
        return
    with contextlib.suppress(StorageError):
        if way < 0.6 and path.suffix == ".json":
            damage_json(path, dice)
            return
        if way < 0.6 and path.suffix == ".safetensors":
            damage_tensors(path, dice)
            return
    path.write_bytes(damage_bytes(content, dice))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep notes of the library to itself."""
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)
