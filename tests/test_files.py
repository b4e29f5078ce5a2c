"""Files are written whole or not at all, and nothing is ever unpickled."""

import contextlib
import errno
import json
import math
import os
import pickle
import resource
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

from impatient.errors import StorageError
from impatient.files import (
    read_header,
    read_json,
    read_tensors,
    write_json,
    write_tensors,
    write_text,
    written_whole,
)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def disk_full(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def break_while_writing(path: Path, error: type[BaseException]) -> None:
    with written_whole(path) as temporary:
        temporary.write_text("half of the n")
        raise error


@contextlib.contextmanager
def files_limited_to(count: int) -> Iterator[None]:
    """The kernel refuses to let any file grow beyond so many bytes: as real as a full disk, and
    undone afterwards.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (count, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


class Trap:
    """Unpickling this makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.marker,)


# --- whole or not at all --------------------------------------------------------------------------


def test_a_block_that_succeeds_puts_the_file_in_place(tmp_path):
    with written_whole(tmp_path / "new" / "deep" / "file.txt") as temporary:
        temporary.write_text("done")
        assert not (tmp_path / "new" / "deep" / "file.txt").exists()
    assert content(tmp_path / "new" / "deep") == {"file.txt": b"done"}


def test_an_old_file_is_replaced_and_readable_for_all(tmp_path):
    write_text(tmp_path / "file", "old")
    write_text(str(tmp_path / "file"), "new \u00d7")
    assert content(tmp_path) == {"file": "new \u00d7".encode()}
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit, GeneratorExit])
def test_whatever_breaks_the_block_leaves_the_old_file_and_no_other(tmp_path, error):
    write_text(tmp_path / "file", "old")
    with pytest.raises(error):
        break_while_writing(tmp_path / "file", error)
    assert content(tmp_path) == {"file": b"old"}


def test_without_an_old_file_a_broken_block_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        break_while_writing(tmp_path / "file", KeyboardInterrupt)
    assert content(tmp_path) == {}


@pytest.mark.parametrize(
    "place", ["os.fsync", "pathlib.Path.write_text", "pathlib.Path.replace", "tempfile.mkstemp"]
)
def test_a_full_disk_anywhere_on_the_way_leaves_the_old_file(tmp_path, monkeypatch, place):
    write_json(tmp_path / "file.json", {"a": 1})
    before = content(tmp_path)
    monkeypatch.setattr(place, disk_full)
    with pytest.raises(
        StorageError,
        match=r"cannot write .*file\.json: No space left on device\. Nothing was changed",
    ):
        write_json(tmp_path / "file.json", {"a": 2})
    monkeypatch.undo()
    assert content(tmp_path) == before


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left"), safetensors.SafetensorError("No space left")]
)
def test_a_full_disk_while_tensors_are_saved_leaves_the_old_file(tmp_path, monkeypatch, error):
    write_tensors(tmp_path / "file", {"a": torch.ones(2)}, {})
    before = content(tmp_path)

    def half_saved(_tensors: Any, name: str, **_: Any) -> None:
        Path(name).write_bytes(b"half")
        raise error

    monkeypatch.setattr(safetensors.torch, "save_file", half_saved)
    with pytest.raises(StorageError, match="No space left") as caught:
        write_tensors(tmp_path / "file", {"a": torch.zeros(2)}, {})
    assert content(tmp_path) == before
    assert caught.value.__cause__ is error


def test_a_limit_of_the_kernel_on_text_leaves_the_old_file(tmp_path):
    write_text(tmp_path / "file", "old")
    with files_limited_to(1000), pytest.raises(StorageError, match="cannot write"):
        write_text(tmp_path / "file", "x" * 5000)
    assert content(tmp_path) == {"file": b"old"}


def test_a_limit_of_the_kernel_on_tensors_leaves_the_old_file(tmp_path):
    write_tensors(tmp_path / "file", {"a": torch.ones(2)}, {"n": 1})
    before = content(tmp_path)
    with files_limited_to(1000), pytest.raises(StorageError, match="cannot write"):
        write_tensors(tmp_path / "file", {"a": torch.ones(50_000)}, {"n": 2})
    assert content(tmp_path) == before


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    write_text(tmp_path / "taken", "a file")
    with pytest.raises(StorageError, match=r"cannot write .*taken/file"):
        write_text(tmp_path / "taken" / "file", "text")
    assert content(tmp_path) == {"taken": b"a file"}


def test_a_folder_is_not_overwritten_by_a_file(tmp_path):
    (tmp_path / "folder" / "inside").mkdir(parents=True)
    with pytest.raises(StorageError, match="cannot write"):
        write_text(tmp_path / "folder", "text")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_what_is_no_json_is_refused_before_the_file_is_touched(tmp_path):
    write_json(tmp_path / "file", {"a": 1})
    before = content(tmp_path)
    with pytest.raises(TypeError):
        write_json(tmp_path / "file", {"a": object()})
    assert content(tmp_path) == before


# --- JSON -----------------------------------------------------------------------------------------


def test_json_comes_back_as_it_went_infinities_included(tmp_path):
    value = {"a": [1, 2.5, None, True], "b": {"c": "\u00d7"}, "d": float("inf"), "e": 0.1 + 0.2}
    write_json(tmp_path / "file.json", value)
    assert read_json(tmp_path / "file.json") == value


@pytest.mark.parametrize(
    ("written", "complaint"),
    [
        (b"", "not valid JSON"),
        (b'{"a": [1, 2', "not valid JSON"),
        (b"hello", "not valid JSON"),
        (b"\xff\xfe\x00\x01", "not valid JSON"),
        (b"[1, 2]", "holds a JSON list; expected an object"),
        (b'"text"', "holds a JSON str"),
    ],
)
def test_a_file_that_holds_no_json_object_is_refused(tmp_path, written, complaint):
    (tmp_path / "file.json").write_bytes(written)
    with pytest.raises(StorageError, match=complaint):
        read_json(tmp_path / "file.json")


def test_one_flipped_bit_anywhere_in_json_is_noticed(tmp_path):
    path = tmp_path / "file.json"
    # many digits: of two texts that are one number the other is noticed, too
    write_json(path, {"a": 0.1 + 0.2, "b": [1, None], "c d": {"e": "f \u00d7 g", "h": math.inf}})
    good = path.read_bytes()
    # 3 and 8 have no common factor: every place of a bit in a byte has its turn
    for bit in range(0, 8 * len(good), 3):
        damaged = bytearray(good)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        try:
            found = read_json(path)
        except StorageError:
            continue
        # the name of the checksum was hit: its reader does not know the entry
        assert "checksum" not in found
        assert len(found) == 4


def test_json_may_be_laid_out_anew(tmp_path):
    path = tmp_path / "file.json"
    for value in ({"a": 0.1 + 0.2, "b": [1, "two  three"]}, {}):
        write_json(path, value)
        path.write_text(json.dumps(json.loads(path.read_text()), indent=4).replace("\n", "\r\n"))
        assert read_json(path) == value


def test_json_that_is_not_there_is_named(tmp_path):
    with pytest.raises(StorageError, match=r"cannot read .*none\.json: No such file"):
        read_json(tmp_path / "none.json")
    with pytest.raises(StorageError, match="cannot read"):
        read_json(tmp_path)


# --- tensors --------------------------------------------------------------------------------------


def test_tensors_of_every_kind_come_back_bit_for_bit(tmp_path):
    tensors = {
        # not contiguous
        "float": torch.randn(3, 4).T,
        "half": torch.randn(5).bfloat16(),
        "scalar": torch.tensor(7),
        "empty": torch.zeros(0, 3),
        "mask": torch.tensor([True, False]),
        "bytes": torch.get_rng_state(),
        "odd": torch.tensor([float("nan"), float("inf"), -0.0]),
        "learned": nn.Parameter(torch.ones(2)),
    }
    write_tensors(tmp_path / "file", tensors, {"seed": 1, "names": ["a", "b"]})
    back, header = read_tensors(tmp_path / "file")
    assert header == read_header(tmp_path / "file") == {"seed": 1, "names": ["a", "b"]}
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert back[name].dtype == tensor.dtype
        torch.testing.assert_close(back[name], tensor.detach(), rtol=0, atol=0, equal_nan=True)


def test_tied_tensors_are_written_each_for_itself(tmp_path):
    first = nn.Linear(3, 3, bias=False)
    second = nn.Linear(3, 3, bias=False)
    second.weight = first.weight
    both = nn.ModuleDict({"first": first, "second": second})
    write_tensors(tmp_path / "file", both.state_dict(), {})
    back, _ = read_tensors(tmp_path / "file")
    assert torch.equal(back["first.weight"], first.weight)
    assert torch.equal(back["second.weight"], first.weight)


def test_views_of_one_tensor_are_written_each_for_itself(tmp_path):
    whole = torch.arange(6.0)
    write_tensors(tmp_path / "file", {"whole": whole, "part": whole[2:4]}, {})
    back, _ = read_tensors(tmp_path / "file")
    assert back["part"].tolist() == [2.0, 3.0]


def pickled(path: Path) -> None:
    path.write_bytes(pickle.dumps({"a": Trap(path.parent / "sprung")}))


def torch_saved(path: Path) -> None:
    torch.save({"a": Trap(path.parent / "sprung")}, path)


def truncated(path: Path) -> None:
    write_tensors(path, {"a": torch.ones(1000)}, {})
    path.write_bytes(path.read_bytes()[:2000])


def header_cut(path: Path) -> None:
    write_tensors(path, {"a": torch.ones(1000)}, {})
    path.write_bytes(path.read_bytes()[:20])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def huge_header(path: Path) -> None:
    path.write_bytes(struct.pack("<Q", 2**62) + b"{}")


def json_file(path: Path) -> None:
    path.write_text(json.dumps({"a": 1}))


def header_no_json(path: Path) -> None:
    safetensors.torch.save_file({"a": torch.ones(1)}, path, metadata={"header": "{"})


def header_no_object(path: Path) -> None:
    safetensors.torch.save_file({"a": torch.ones(1)}, path, metadata={"header": "[1]"})


def foreign(path: Path) -> None:
    safetensors.torch.save_file({"a": torch.ones(1)}, path)


WRONG = [
    pickled,
    torch_saved,
    header_cut,
    empty,
    huge_header,
    json_file,
    header_no_json,
    header_no_object,
    foreign,
]


@pytest.mark.parametrize("make", [*WRONG, truncated])
def test_a_file_that_is_damaged_or_another_is_refused_and_never_unpickled(tmp_path, make):
    path = tmp_path / "file.safetensors"
    make(path)
    with pytest.raises(StorageError, match=r"file\.safetensors"):
        read_tensors(path)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("make", WRONG)
def test_a_header_of_a_damaged_or_other_file_is_refused(tmp_path, make):
    path = tmp_path / "file.safetensors"
    make(path)
    with pytest.raises(StorageError, match=r"file\.safetensors"):
        read_header(path)
    assert not (tmp_path / "sprung").exists()


def test_the_trap_would_spring_if_anything_were_unpickled(tmp_path):
    pickled(tmp_path / "file")
    pickle.loads((tmp_path / "file").read_bytes())
    assert (tmp_path / "sprung").exists()


def test_tensors_that_are_not_there_are_named(tmp_path):
    for read in (read_tensors, read_header):
        with pytest.raises(StorageError, match="none"):
            read(tmp_path / "none")
    with pytest.raises(StorageError, match="cannot read"):
        read_tensors(tmp_path)
