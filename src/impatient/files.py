"""Plain files, written atomically: JSON and safetensors, never pickle."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from impatient.errors import StorageError

if TYPE_CHECKING:
    from torch import Tensor

# What to do where nothing could be written.
UNCHANGED = (
    "Nothing was changed; free some space or choose another folder, then run the same command "
    "again."
)


@contextlib.contextmanager
def file_errors(doing: str, remedy: str = "") -> Iterator[None]:
    """Turn errors of the file system into ours, which say what could not be done.

    Args:
        doing: what is done in the block, for the message, such as "read FILE".
        remedy: what to do if it fails.
    Raises:
        StorageError: if the block raises an OSError.
    """
    try:
        yield
    except StorageError:
        # It says already what went wrong.
        raise
    except OSError as error:
        raise StorageError(
            f"cannot {doing}: {error.strerror or error}. {remedy}".rstrip()
        ) from error


@contextlib.contextmanager
def written_whole(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path that becomes the file if the block succeeds.

    If the block fails, the temporary file is removed and an old file stays as it is.

    Raises:
        StorageError: if the disk is full or the folder cannot be written.
    """
    path = Path(path)
    with file_errors(f"write {path}", UNCHANGED):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        try:
            yield temporary
            _flush_to_disk(temporary)
            # mkstemp makes files private, but results are for others to read.
            temporary.chmod(0o644)
            temporary.replace(path)
        finally:
            with contextlib.suppress(OSError):
                # An error of its own must not hide the first one.
                temporary.unlink(missing_ok=True)


def plain_name(name: str, what: str) -> str:
    """Give a name back if it can be the name of one file.

    Raises:
        StorageError: if it is empty, hidden, too long, or leads to another folder.
    """
    unfit = not name.isprintable() or name != name.strip() or name.startswith(".")
    if unfit or not name or any(letter in name for letter in "/\\") or len(name.encode()) > 200:
        raise StorageError(
            f"{what} {name!r} cannot be a file name; expected one plain name without slashes, "
            "such as fast-1."
        )
    return name


def is_file(path: Path) -> bool:
    """Tell whether a file is there.

    Raises:
        StorageError: if its folder cannot be read.
    """
    with file_errors(f"read {path}"):
        return path.is_file()


def remove(path: Path) -> None:
    """Remove a file if it is there.

    Raises:
        StorageError: if it cannot be removed.
    """
    with file_errors(f"remove {path}"):
        path.unlink(missing_ok=True)


def move(path: Path, target: Path) -> None:
    """Move a file or a folder to a place on the same disk, and make that place's folder.

    Raises:
        StorageError: if it cannot be moved.
    """
    with file_errors(f"move {path} to {target}"):
        target.parent.mkdir(parents=True, exist_ok=True)
        path.replace(target)


def _flush_to_disk(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def write_text(path: str | Path, text: str) -> None:
    """Write a text file atomically."""
    with written_whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


# What `write_json` ends a file with, without white space.
_LAST_ENTRY = re.compile(r',?"checksum":"([0-9a-f]{64})"\}$')


def write_json(path: str | Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object and its checksum atomically.

    Infinities are written as Python's json writes them. Line ends and indentation do not count for
    the checksum.
    """
    checksum = _text_checksum("".join(json.dumps(value).split()))
    write_text(path, json.dumps({**value, "checksum": checksum}, indent=1) + "\n")


def read_json(path: str | Path) -> dict[str, Any]:
    """Read a JSON object, and compare its checksum if it has one.

    Raises:
        StorageError: if the file is missing, not JSON, not an object or does not fit its checksum.
    """
    path = Path(path)
    try:
        with file_errors(f"read {path}"):
            text = path.read_text(encoding="utf-8")
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise StorageError(
            f"{path} is not valid JSON ({error}); it was damaged or is another file. Make it again."
        ) from error
    if not isinstance(value, dict):
        raise StorageError(
            f"{path} holds a JSON {type(value).__name__}; expected an object. Make it again."
        )
    if value.pop("checksum", None) is not None and not _fits_its_checksum(text):
        raise StorageError(
            f"{path} does not fit its checksum: it was damaged, or changed by hand. Make it again; "
            'if the change is yours, remove the entry "checksum".'
        )
    return value


def _fits_its_checksum(text: str) -> bool:
    """Compare the text of a JSON object with the checksum that is its last entry."""
    squeezed = "".join(text.split())
    last = _LAST_ENTRY.search(squeezed)
    return last is not None and last[1] == _text_checksum(squeezed[: last.start()] + "}")


def _text_checksum(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def write_tensors(
    path: str | Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any]
) -> None:
    """Write named tensors and a JSON header as one safetensors file, atomically."""
    from safetensors.torch import save_file

    # Each tensor is copied, because safetensors refuses shared memory (tied weights).
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    text = json.dumps(dict(header))
    metadata = {"header": text, "checksum": _checksum(text, plain)}
    with written_whole(path) as temporary:
        try:
            save_file(plain, str(temporary), metadata=metadata)
        except Exception as error:
            # safetensors wraps OSError in its own type.
            if isinstance(error, OSError):
                raise
            raise StorageError(f"cannot write {path}: {error}. Nothing was changed.") from error


def read_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a file of `write_tensors`: the tensors and the header.

    The checksum is compared; files of 0.1.0 have none.

    Raises:
        StorageError: if the file is missing, damaged or was written by something else.
    """
    with _opened(path) as (file, header):
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  safe_open is no mapping
        metadata = file.metadata()
        without = metadata.keys() == {"header"}
        if not without and _checksum(metadata["header"], tensors) != metadata.get("checksum"):
            raise StorageError("its content does not fit its checksum")
    return tensors, header


def read_header(path: str | Path) -> dict[str, Any]:
    """Read only the JSON header of a file of `write_tensors`."""
    with _opened(path) as (_, header):
        return header


@contextlib.contextmanager
def _opened(path: str | Path) -> Iterator[tuple[Any, dict[str, Any]]]:
    from safetensors import safe_open

    if not is_file(Path(path)):
        raise StorageError(f"cannot read {path}: no such file.")
    try:
        with safe_open(str(path), framework="pt") as file:
            header = json.loads((file.metadata() or {}).get("header", "null"))
            if not isinstance(header, dict):
                raise StorageError("it lacks the header that impatient writes")
            yield file, header
    except Exception as error:
        raise StorageError(
            f"{path} cannot be read as safetensors ({error}); it was damaged or is another file. "
            "Make it again."
        ) from error


def _checksum(header: str, tensors: Mapping[str, Tensor]) -> str:
    """Compute a checksum over a header and the names, types, shapes and bytes of tensors."""
    digest = hashlib.sha256(header.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"\0{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(bytes_of(tensor))
    return digest.hexdigest()


def bytes_of(tensor: Tensor) -> memoryview:
    """Return the memory of a tensor, in the order of its entries."""
    import torch

    return tensor.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().data


def entries_under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors whose names begin with a prefix, without the prefix."""
    return {
        name.removeprefix(prefix): value
        for name, value in tensors.items()
        if name.startswith(prefix)
    }
