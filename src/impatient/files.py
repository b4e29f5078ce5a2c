"""Plain files, written atomically: JSON and safetensors, never pickle."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from impatient.errors import StorageError

if TYPE_CHECKING:
    from torch import Tensor


@contextlib.contextmanager
def written_whole(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path that becomes the file if the block succeeds.

    If the block fails, the temporary file is removed and an old file stays as it is.

    Raises:
        StorageError: if the disk is full or the folder cannot be written.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        os.close(handle)
    except OSError as error:
        raise _cannot_write(path, error) from error
    temporary = Path(name)
    try:
        yield temporary
        _flush_to_disk(temporary)
        # mkstemp makes files private, but results are for others to read.
        temporary.chmod(0o644)
        temporary.replace(path)
    except StorageError:
        # It says already what went wrong.
        raise
    except OSError as error:
        raise _cannot_write(path, error) from error
    finally:
        temporary.unlink(missing_ok=True)


def _flush_to_disk(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _cannot_write(path: Path, error: OSError) -> StorageError:
    return StorageError(
        f"cannot write {path}: {error.strerror or error}. Nothing was changed; free some space or "
        "choose another folder, then run the same command again."
    )


def write_text(path: str | Path, text: str) -> None:
    """Write a text file atomically."""
    with written_whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: Any) -> None:
    """Write a JSON file atomically, with infinities as Python's json writes them."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def read_json(path: str | Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        StorageError: if the file is missing, not JSON or not an object.
    """
    path = Path(path)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror or error}.") from error
    except ValueError as error:
        raise StorageError(
            f"{path} is not valid JSON ({error}); it was damaged or is another file. Make it again."
        ) from error
    if not isinstance(value, dict):
        raise StorageError(
            f"{path} holds a JSON {type(value).__name__}; expected an object. Make it again."
        )
    return value


def write_tensors(
    path: str | Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any]
) -> None:
    """Write named tensors and a JSON header as one safetensors file, atomically."""
    from safetensors.torch import save_file

    # Each tensor is copied, because safetensors refuses shared memory (tied weights).
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    with written_whole(path) as temporary:
        try:
            save_file(plain, str(temporary), metadata={"header": json.dumps(dict(header))})
        except Exception as error:
            # safetensors wraps OSError in its own type.
            if isinstance(error, OSError):
                raise
            raise StorageError(f"cannot write {path}: {error}. Nothing was changed.") from error


def read_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a file of `write_tensors`: the tensors and the header.

    Raises:
        StorageError: if the file is missing, damaged or was written by something else.
    """
    with _opened(path) as (file, header):
        return {name: file.get_tensor(name) for name in file.keys()}, header  # noqa: SIM118  safe_open is no mapping


def read_header(path: str | Path) -> dict[str, Any]:
    """Read only the JSON header of a file of `write_tensors`."""
    with _opened(path) as (_, header):
        return header


@contextlib.contextmanager
def _opened(path: str | Path) -> Iterator[tuple[Any, dict[str, Any]]]:
    from safetensors import safe_open

    if not Path(path).is_file():
        raise StorageError(f"cannot read {path}: no such file.")
    try:
        with safe_open(str(path), framework="pt") as file:
            header = json.loads((file.metadata() or {}).get("header", "null"))
            if not isinstance(header, dict):
                raise StorageError("it lacks the header that impatient writes")
            yield file, header
    except Exception as error:
        raise StorageError(
            f"{path} cannot be read as safetensors ({error}); it was damaged or is another file."
        ) from error


def entries_under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors whose names begin with a prefix, without the prefix."""
    return {
        name.removeprefix(prefix): value
        for name, value in tensors.items()
        if name.startswith(prefix)
    }
