"""Samples in files: sound, text and archives of one array, as `impatient run` reads them."""

import dataclasses
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import texts
from impatient.errors import DataError
from impatient.provenance import Provenance
from impatient.training import Preprocess
from impatient.verbs.input_files import read_raw
from impatient.verbs.network_spec import NetworkSpec, SampleArray

FRAMES = 50
SPEC = NetworkSpec(
    model="torchvision:resnet18",
    after=(),
    heads="linear",
    num_classes=1,
    example_shape=(1, FRAMES),
    example_dtype="float32",
    class_names=(),
    preprocess=Preprocess(mean=(0.5,), std=(0.25,), dtype="float32"),
    data="npz:sounds.npz",
    data_fingerprint="",
    seed=0,
    validation=0.1,
    provenance=Provenance(versions={}, created=""),
    task="binary",
)


def read_input(spec: NetworkSpec, file: Path) -> Any:
    """Read a sample as `impatient run` does."""
    return spec.preprocess(read_raw(spec, file))


def save_sound(file: Path, numbers: np.ndarray, width: int) -> Path:
    """Write numbers [T, C] from -1 to 1 as a .wav file."""
    largest = 2 ** (8 * width - 1)
    whole = np.round(numbers * largest).clip(-largest, largest - 1).astype(np.int64)
    stored = (whole + 128).astype("u1") if width == 1 else whole.astype(f"<i{width}")
    with wave.open(str(file), "wb") as opened:
        opened.setnchannels(numbers.shape[1])
        opened.setsampwidth(width)
        opened.setframerate(8000)
        opened.writeframes(stored.tobytes())
    return file


@pytest.mark.parametrize("width", [1, 2, 4])
@pytest.mark.parametrize(
    ("channels", "shape"),
    [(1, (1, FRAMES)), (1, (FRAMES,)), (1, (FRAMES, 1)), (2, (2, FRAMES)), (2, (FRAMES, 2))],
)
def test_sound_has_the_layout_that_the_network_takes(
    tmp_path: Path, width: int, channels: int, shape: tuple[int, ...]
) -> None:
    numbers = np.random.default_rng(0).uniform(-0.9, 0.9, (FRAMES, channels))
    file = save_sound(tmp_path / "a.wav", numbers, width)
    spec = dataclasses.replace(SPEC, example_shape=shape)
    laid = numbers.T if shape[0] == channels else numbers
    wanted = (laid.reshape(1, *shape) - 0.5) / 0.25
    np.testing.assert_allclose(read_input(spec, file).numpy(), wanted, atol=0.04 / width**4)


def test_sound_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    long = save_sound(tmp_path / "long.wav", np.zeros((FRAMES + 1, 1)), 2)
    with pytest.raises(DataError, match=r"51 numbers in 1 channels; expected the shape \(1, 50\)"):
        read_input(SPEC, long)
    with pytest.raises(DataError, match="24 bits a number"):
        read_input(SPEC, save_24_bits(tmp_path / "fine.wav"))
    (tmp_path / "letter.wav").write_text("dear sir")
    with pytest.raises(DataError, match="cannot be read as sound"):
        read_input(SPEC, tmp_path / "letter.wav")


def save_24_bits(file: Path) -> Path:
    with wave.open(str(file), "wb") as opened:
        opened.setnchannels(1)
        opened.setsampwidth(3)
        opened.setframerate(8000)
        opened.writeframes(bytes(3 * FRAMES))
    return file


def test_an_archive_of_one_array_is_that_array(tmp_path: Path) -> None:
    numbers = np.linspace(0, 1, FRAMES, dtype=np.float32)[None]
    np.savez(tmp_path / "one.npz", anything=numbers)
    np.save(tmp_path / "one.npy", numbers)
    found = read_input(SPEC, tmp_path / "one.npz")
    assert torch.equal(found, read_input(SPEC, tmp_path / "one.npy"))
    assert float(found.max()) == pytest.approx(2.0)
    np.savez(tmp_path / "two.npz", a=numbers, b=numbers)
    with pytest.raises(DataError, match="holds a, b; expected one array"):
        read_input(SPEC, tmp_path / "two.npz")


def test_text_becomes_the_tokens_of_the_training_data(tmp_path: Path) -> None:
    tokenizer = texts.save_tokenizer(tmp_path / "tokenizer")
    part = SampleArray(shape=(9,), dtype="int64", fill=1)
    spec = dataclasses.replace(
        SPEC,
        data=f"text:anything.csv:tokenizer={tokenizer},length=4",
        example_parts={"input_ids": part, "attention_mask": part},
        preprocess=Preprocess(mean=(), std=()),
    )
    (tmp_path / "a.txt").write_text("word0 good never word2 word3\n")
    found = read_input(spec, tmp_path / "a.txt")
    # cut off after four tokens; the third word is unknown
    assert found["input_ids"].tolist() == [[5, 3, 1, 7]]
    assert found["attention_mask"].tolist() == [[1, 1, 1, 1]]
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(DataError, match=r"b.txt cannot be read"):
        read_input(spec, tmp_path / "b.txt")
