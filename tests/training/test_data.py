"""Data sets: what loads, what is refused, what belongs to which split, and what the network is
given.
"""

import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from impatient.errors import DataError
from impatient.store import from_plain, to_plain
from impatient.training import Data, Preprocess, load_data
from impatient.training.data import SPLITS
from impatient.training.pictures import read_image


def split_of(data: Data, split: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Raw inputs and labels of a whole split."""
    examples = data.examples(split)
    return examples.take(range(len(examples.labels))), examples.labels


def rows(inputs: torch.Tensor) -> set[bytes]:
    return {row.numpy().tobytes() for row in inputs}


# --- digits ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits() -> Data:
    return load_data("digits")


def test_the_digits_are_all_there_and_nowhere_twice(digits):
    sizes = {split: digits.size(split) for split in SPLITS}
    assert sum(sizes.values()) == 1797
    assert sizes["test"] == pytest.approx(0.2 * 1797, abs=10)
    assert sizes["validation"] == pytest.approx(0.1 * 0.8 * 1797, abs=10)
    places = [rows(split_of(digits, split)[0]) for split in SPLITS]
    # no digit is there twice to begin with
    assert [len(place) for place in places] == list(sizes.values())
    assert not places[0] & places[1]
    assert not places[0] & places[2]
    assert not places[1] & places[2]


def test_the_digits_are_bytes_of_one_channel_with_ten_classes(digits):
    inputs, labels = split_of(digits, "train")
    assert (inputs.dtype, tuple(inputs.shape[1:])) == (torch.uint8, (1, 8, 8))
    assert (int(inputs.min()), int(inputs.max())) == (0, 255)
    assert labels.unique().tolist() == list(range(10))
    assert digits.class_names == tuple("0123456789")
    assert digits.num_classes == 10


@pytest.mark.parametrize("split", ["validation", "test"])
def test_every_class_gives_its_share(digits, split):
    whole = torch.cat([split_of(digits, each)[1] for each in SPLITS]).bincount()
    part = split_of(digits, split)[1].bincount()
    share = part / whole
    assert share.max() - share.min() < 0.02


def test_the_same_seed_gives_the_same_splits_and_another_seed_another_validation_split(digits):
    again = load_data("digits")
    other = load_data("digits", seed=1)
    assert rows(split_of(again, "validation")[0]) == rows(split_of(digits, "validation")[0])
    assert rows(split_of(other, "validation")[0]) != rows(split_of(digits, "validation")[0])
    assert again.fingerprint == digits.fingerprint != other.fingerprint


def test_the_test_split_is_the_same_for_every_seed(digits):
    other = load_data("digits", seed=1, validation=0.3)
    assert torch.equal(split_of(other, "test")[0], split_of(digits, "test")[0])
    assert torch.equal(split_of(other, "test")[1], split_of(digits, "test")[1])


def test_the_share_of_the_validation_split_is_as_asked(digits):
    larger = load_data("digits", validation=0.25)
    assert larger.size("validation") == pytest.approx(
        0.25 * (larger.size("validation") + larger.size("train")), abs=10
    )
    assert larger.fingerprint != digits.fingerprint


def test_batches_go_through_a_split_in_order(digits):
    inputs, labels = split_of(digits, "test")
    batches = list(digits.batches("test", 100))
    assert [len(batch) for batch, _ in batches] == [100] * (len(labels) // 100) + [
        len(labels) % 100
    ]
    assert torch.equal(torch.cat([batch for _, batch in batches]), labels)
    assert torch.equal(torch.cat([batch for batch, _ in batches]), digits.preprocess(inputs))


def test_examples_are_the_first_training_inputs_and_no_more_than_there_are(digits):
    inputs, _ = split_of(digits, "train")
    assert torch.equal(digits.example(3), digits.preprocess(inputs[:3]))
    assert len(digits.example(10_000)) == digits.size("train")


def test_an_unknown_split_is_refused(digits):
    with pytest.raises(DataError, match="no split 'dev'; there are train, validation, test"):
        digits.size("dev")


# --- specs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "spec", ["", "mnist", "npz", "npz:", "imagefolder:", "hf:", ":x", "csv:file"]
)
def test_an_unknown_spec_is_refused_with_those_that_are_known(spec):
    with pytest.raises(
        DataError,
        match="expected digits, npz:FILE, imagefolder:DIR, text:FILE-OR-DIR or hf:NAME-OR-PATH",
    ):
        load_data(spec)


def test_digits_take_no_options():
    with pytest.raises(DataError, match="digits takes no options, got 'size=8'"):
        load_data("digits:size=8")


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1, 1.5, float("nan")])
def test_a_validation_share_that_is_no_share_is_refused(share):
    with pytest.raises(DataError, match="expected a share between 0 and 1"):
        load_data("digits", validation=share)


def test_a_negative_seed_is_refused():
    with pytest.raises(DataError, match="seed=-1; expected 0 or a positive number"):
        load_data("digits", seed=-1)


# --- npz ------------------------------------------------------------------------------------------


def arrays(**changes: Any) -> dict[str, np.ndarray]:
    """Forty training and ten test vectors of two classes."""
    random = np.random.default_rng(0)
    values: dict[str, Any] = {
        "x_train": random.normal(3.0, 2.0, (40, 5)),
        "y_train": np.arange(40) % 2,
        "x_test": random.normal(3.0, 2.0, (10, 5)),
        "y_test": np.arange(10) % 2,
    }
    return {name: value for name, value in {**values, **changes}.items() if value is not None}


def saved(folder: Path, values: Mapping[str, Any]) -> str:
    np.savez(folder / "data.npz", **values)
    return f"npz:{folder / 'data.npz'}"


def images(shape: tuple[int, ...], kind: str = "uint8") -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    return arrays(
        x_train=random.integers(0, 256, (40, *shape)).astype(kind),
        x_test=random.integers(0, 256, (10, *shape)).astype(kind),
    )


def test_vectors_come_back_as_they_were_split_in_three(tmp_path):
    values = arrays()
    data = load_data(saved(tmp_path, values))
    assert [data.size(split) for split in SPLITS] == [36, 4, 10]
    kept = torch.cat([split_of(data, "train")[0], split_of(data, "validation")[0]])
    assert rows(kept) == rows(torch.from_numpy(values["x_train"].astype(np.float32)))
    assert torch.equal(
        split_of(data, "test")[0], torch.from_numpy(values["x_test"].astype(np.float32))
    )
    assert (data.class_names, data.name) == (("0", "1"), f"npz:{tmp_path / 'data.npz'}")


def test_inputs_keep_their_labels(tmp_path):
    marked = np.repeat(np.arange(40) % 2, 5).reshape(40, 5).astype(np.float32)
    data = load_data(saved(tmp_path, arrays(x_train=marked)))
    for split in ("train", "validation"):
        inputs, labels = split_of(data, split)
        assert torch.equal(inputs[:, 0].long(), labels)


@pytest.mark.parametrize(
    ("shape", "wanted"),
    [
        ((6, 5, 3), (3, 6, 5)),
        ((6, 5, 1), (1, 6, 5)),
        ((6, 5), (1, 6, 5)),
        ((3, 6, 5), (3, 6, 5)),
        ((1, 6, 5), (1, 6, 5)),
    ],
)
def test_images_are_put_channels_first(tmp_path, shape, wanted):
    values = images(shape)
    data = load_data(saved(tmp_path, values))
    inputs, _ = split_of(data, "test")
    assert tuple(inputs.shape) == (10, *wanted)
    assert (data.preprocess.size, data.preprocess.channels) == (wanted[1:], wanted[0])
    moved = (
        values["x_test"].reshape(10, *wanted)
        if shape[-1] == 5
        else np.moveaxis(values["x_test"], 3, 1)
    )
    assert np.array_equal(inputs.numpy(), moved)


def test_float_images_are_not_divided_by_255(tmp_path):
    data = load_data(saved(tmp_path, images((6, 5, 3), "float64")))
    inputs, _ = split_of(data, "train")
    assert inputs.dtype == torch.float32
    assert data.preprocess.mean == pytest.approx(inputs.mean((0, 2, 3)).tolist(), abs=1e-3)


def test_tokens_pass_as_they_are(tmp_path):
    tokens = np.random.default_rng(0).integers(0, 1000, (40, 7)).astype(np.int32)
    data = load_data(saved(tmp_path, arrays(x_train=tokens, x_test=tokens[:10])))
    inputs, _ = split_of(data, "test")
    assert inputs.dtype == torch.int64
    assert torch.equal(data.preprocess(inputs), torch.from_numpy(tokens[:10].astype(np.int64)))
    assert data.preprocess == Preprocess(mean=(), std=(), dtype="int64")


def test_classes_are_named_as_the_file_says(tmp_path):
    named = load_data(saved(tmp_path, arrays(class_names=np.array(["cat", "dog", "emu"]))))
    assert named.class_names == ("cat", "dog", "emu")
    assert named.num_classes == 3


def test_groups_stay_on_one_side(tmp_path):
    groups = np.arange(40) // 4
    data = load_data(saved(tmp_path, grouped(groups)), validation=0.3)
    assert sides(data, groups) == (set(groups.tolist()), set())
    assert data.size("validation") == pytest.approx(12, abs=4)


def test_groups_that_span_classes_stay_on_one_side(tmp_path):
    """A patient has pictures of several findings; half of a patient in training would make
    validation too easy.
    """
    groups = np.random.default_rng(1).integers(0, 8, 40)
    for seed in range(5):
        data = load_data(saved(tmp_path, grouped(groups)), validation=0.3, seed=seed)
        assert sides(data, groups) == (set(groups.tolist()), set())
        assert 4 <= data.size("validation") <= 24
        assert set(split_of(data, "train")[1].tolist()) == {0, 1}


def test_a_class_whose_groups_are_all_wanted_elsewhere_keeps_one_for_training(tmp_path):
    groups = np.array([0] * 10 + [1] * 10 + [2] * 20)
    labels = np.array([0, 1] * 5 + [0] * 10 + [0] * 20)
    # class 1 occurs in group 0 alone
    for seed in range(5):
        data = load_data(
            saved(tmp_path, grouped(groups, y_train=labels)), validation=0.4, seed=seed
        )
        assert sides(data, groups)[1] == set()
        assert set(split_of(data, "train")[1].tolist()) == {0, 1}


def grouped(groups: np.ndarray, **changes: Any) -> dict[str, np.ndarray]:
    """Each input says its own place."""
    return arrays(
        x_train=np.arange(40.0).reshape(40, 1),
        x_test=np.zeros((10, 1)),
        groups_train=groups,
        **changes,
    )


def sides(data: Data, groups: np.ndarray) -> tuple[set[int], set[int]]:
    """All groups seen, and those on both sides."""
    train, held_out = (
        set(groups[split_of(data, split)[0][:, 0].long().numpy()].tolist())
        for split in ("train", "validation")
    )
    return train | held_out, train & held_out


def test_a_rare_class_keeps_an_example_for_training_however_large_the_share(tmp_path):
    labels = np.array([0] * 38 + [1] * 2)
    data = load_data(saved(tmp_path, arrays(y_train=labels)), validation=0.9)
    assert split_of(data, "train")[1].bincount().tolist() == [4, 1]


def test_a_class_with_a_single_example_is_trained_on(tmp_path):
    labels = np.array([0] * 39 + [1])
    data = load_data(saved(tmp_path, arrays(y_train=labels)))
    assert 1 in split_of(data, "train")[1].tolist()


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "missing keys": (
        {"x_test": None, "y_train": None},
        r"lacks y_train, x_test; it contains x_train, y_test",
    ),
    "no training inputs": (
        {"x_train": np.zeros((0, 5)), "y_train": np.zeros(0, int)},
        "train: 0 inputs and 0 labels",
    ),
    "no test inputs": (
        {"x_test": np.zeros((0, 5)), "y_test": np.zeros(0, int)},
        "test: 0 inputs and 0 labels",
    ),
    "fewer labels than inputs": ({"y_train": np.arange(39) % 2}, "train: 40 inputs and 39 labels"),
    "negative labels": (
        {"y_train": np.arange(40) % 2 - 1},
        "labels must be integers from 0|expected numbers",
    ),
    "float labels": (
        {"y_train": np.arange(40) % 2 * 1.0},
        "test targets torch.int64 of shape",
    ),
    "text labels": (
        {"y_train": np.array(["a", "b"] * 20)},
        "labels must be integers from 0|expected numbers",
    ),
    "one-hot labels": (
        {"y_train": np.eye(2, dtype=int)[np.arange(40) % 2]},
        r"torch.int64 of shape \(40, 2\), test targets",
    ),
    "NaN": (
        {"x_train": np.where(np.eye(40, 5), np.nan, 0.0)},
        "train: 5 input values are NaN or infinite",
    ),
    "infinity": ({"x_test": np.full((10, 5), np.inf)}, "test: 50 input values are NaN or infinite"),
    "too large for float32": (
        {"x_test": np.full((10, 5), 1e300)},
        "test: 50 input values are NaN or infinite",
    ),
    "different widths": (
        {"x_test": np.zeros((10, 6))},
        r"training inputs have shape \(5,\), test inputs \(6,\)",
    ),
    "different types": ({"x_test": np.zeros((10, 5), np.uint8)}, "float32.*uint8"),
    "unseen classes": (
        {"y_test": np.arange(10)},
        r"classes 2, 3, 4, 5, 6, 7, 8, 9 are in the test split but not",
    ),
    "too few names": ({"class_names": np.array(["cat"])}, "names 1 classes, but labels go up to 1"),
    "scalar inputs": ({"x_train": np.array(1.0)}, "train"),
    "scalar labels": ({"y_train": np.array(1)}, "train"),
    "inputs without features": ({"x_train": np.zeros(40), "x_test": np.zeros(10)}, "train"),
    "text inputs": ({"x_train": np.array([["a"] * 5] * 40)}, "train"),
    "complex inputs": ({"x_train": np.ones((40, 5)) * 1j}, "train"),
    "too few groups": ({"groups_train": np.arange(39)}, "groups_train"),
    "groups in columns": ({"groups_train": np.zeros((40, 2), int)}, "groups_train"),
    "one group": ({"groups_train": np.zeros(40, int)}, "too few to hold out"),
    "one example": (
        {"x_train": np.ones((1, 5)), "y_train": np.array([0]), "y_test": np.zeros(10, int)},
        "too few to hold out",
    ),
}


@pytest.mark.parametrize(("changes", "complaint"), WRONG.values(), ids=WRONG)
def test_arrays_that_make_no_data_set_are_refused(tmp_path, changes, complaint):
    with pytest.raises(DataError, match=complaint):
        load_data(saved(tmp_path, arrays(**changes)))


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(DataError, match=r"no data file .*none\.npz"):
        load_data(f"npz:{tmp_path / 'none.npz'}")
    with pytest.raises(DataError, match="no data file"):
        load_data(f"npz:{tmp_path}")


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.99])
def test_a_truncated_file_is_refused(tmp_path, share):
    spec = saved(tmp_path, arrays())
    whole = (tmp_path / "data.npz").read_bytes()
    (tmp_path / "data.npz").write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(DataError, match="cannot be read as an npz file of plain arrays"):
        load_data(spec)


def test_a_file_with_flipped_bytes_is_refused(tmp_path):
    spec = saved(tmp_path, arrays())
    whole = bytearray((tmp_path / "data.npz").read_bytes())
    whole[400:440] = bytes(40)
    (tmp_path / "data.npz").write_bytes(whole)
    with pytest.raises(DataError, match="cannot be read as an npz file"):
        load_data(spec)


class Trap:
    """Unpickling this makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return Path.touch, (self.marker,)


def test_nothing_is_ever_unpickled(tmp_path):
    trap = Trap(tmp_path / "sprung")
    objects = np.empty(40, dtype=object)
    objects[:] = [trap] * 40
    with pytest.raises(DataError, match="npz file of plain arrays"):
        load_data(saved(tmp_path, arrays(x_train=objects)))
    (tmp_path / "data.npz").write_bytes(pickle.dumps(trap))
    with pytest.raises(DataError, match="npz file of plain arrays"):
        load_data(f"npz:{tmp_path / 'data.npz'}")
    assert not (tmp_path / "sprung").exists()


def test_a_single_array_is_no_data_set(tmp_path):
    np.save(tmp_path / "data.npy", np.zeros((40, 5)))
    with pytest.raises(DataError, match="npz file"):
        load_data(f"npz:{tmp_path / 'data.npy'}")


# --- fingerprints ---------------------------------------------------------------------------------


def test_the_fingerprint_changes_with_the_data_the_seed_and_the_share(tmp_path):
    def fingerprint(values: Mapping[str, Any], **options: Any) -> str:
        return load_data(saved(tmp_path, values), **options).fingerprint

    plain = arrays()
    changed = {name: array.copy() for name, array in plain.items()}
    changed["x_test"][3, 2] += 1e-3
    relabelled = {**plain, "y_train": 1 - plain["y_train"]}
    groups = [{**plain, "groups_train": np.arange(40) // size} for size in (2, 4)]
    prints = [fingerprint(values) for values in (plain, changed, relabelled, *groups)]
    prints += [fingerprint(plain, seed=1), fingerprint(plain, validation=0.2)]
    assert len(set(prints)) == len(prints)
    assert fingerprint(arrays()) == prints[0]


# --- preprocessing --------------------------------------------------------------------------------


def test_training_inputs_are_standardised_per_channel(tmp_path):
    data = load_data(saved(tmp_path, images((6, 5, 3))))
    x = data.preprocess(split_of(data, "train")[0])
    torch.testing.assert_close(x.mean((0, 2, 3)), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(x.std((0, 2, 3)), torch.ones(3), atol=1e-4, rtol=0)


def test_vectors_are_standardised_over_all_features(tmp_path):
    data = load_data(saved(tmp_path, arrays()))
    inputs, _ = split_of(data, "train")
    assert data.preprocess.mean == pytest.approx([inputs.mean().item()], abs=1e-5)
    assert data.preprocess.std == pytest.approx([inputs.std().item()], abs=1e-5)
    torch.testing.assert_close(
        data.preprocess(inputs), (inputs - inputs.mean()) / inputs.std(), atol=1e-5, rtol=1e-5
    )


def test_preprocessing_is_fitted_on_the_training_split_alone(tmp_path):
    plain = arrays()
    marked = arrays()
    held_out = split_of(load_data(saved(tmp_path, plain)), "validation")[0].numpy()
    places = [
        row.astype(np.float32).tobytes() in {out.tobytes() for out in held_out}
        for row in plain["x_train"]
    ]
    assert sum(places) == 4
    marked["x_train"][places] = 1e6
    marked["x_test"][:] = 1e6
    before, after = (load_data(saved(tmp_path, values)) for values in (plain, marked))
    assert (split_of(after, "validation")[0] == 1e6).all()
    assert after.preprocess == before.preprocess


def test_bytes_are_scaled_before_the_mean_is_taken_off():
    preprocess = Preprocess(mean=(0.5, 0.0), std=(0.25, 1.0), size=(1, 1), channels=2)
    raw = torch.tensor([[[[255]], [[51]]]], dtype=torch.uint8)
    torch.testing.assert_close(preprocess(raw).flatten(), torch.tensor([2.0, 0.2]))


def test_preprocessing_leaves_the_raw_inputs_alone(tmp_path):
    data = load_data(saved(tmp_path, arrays()))
    raw, _ = split_of(data, "train")
    before = raw.clone()
    data.preprocess(raw)
    assert torch.equal(raw, before)


def test_a_constant_input_is_not_divided_by_zero(tmp_path):
    data = load_data(saved(tmp_path, arrays(x_train=np.full((40, 5), 2.0))))
    assert data.preprocess.std == (0.001,)
    assert data.preprocess(split_of(data, "train")[0]).abs().max() == 0


@pytest.mark.parametrize(
    "preprocess",
    [
        Preprocess(mean=(), std=()),
        Preprocess(mean=(0.1,), std=(2.0,)),
        Preprocess(mean=(0.1, 0.2, 0.3), std=(1.0, 1.0, 1.0), size=(4, 6), channels=3),
    ],
)
def test_preprocessing_survives_json(preprocess):
    assert from_plain(json.loads(json.dumps(to_plain(preprocess))), Preprocess) == preprocess


# --- image folders --------------------------------------------------------------------------------

SHADE = {"cat": 40, "dog": 200}


def paint(path: Path, shade: int, size: tuple[int, int] = (7, 5), mode: str = "RGB") -> None:
    """A picture of one shade, `size` wide and high."""
    path.parent.mkdir(parents=True, exist_ok=True)
    colour = {
        "RGB": (shade,) * 3,
        "L": shade,
        "RGBA": (shade, shade, shade, 128),
        "P": 0,
        "LA": (shade, 255),
    }[mode]
    Image.new(mode, size, colour).save(path)


def folder_of(root: Path, counts: Mapping[str, int], **options: Any) -> Path:
    for split, count in counts.items():
        for label, shade in SHADE.items():
            for index in range(count):
                paint(root / split / label / f"{index}.png", shade + index, **options)
    return root


def test_a_folder_of_images_is_read_in_its_own_size(tmp_path):
    data = load_data(f"imagefolder:{folder_of(tmp_path, {'train': 10, 'test': 3})}")
    assert [data.size(split) for split in SPLITS] == [18, 2, 6]
    assert data.class_names == ("cat", "dog")
    assert (data.preprocess.size, data.preprocess.channels) == ((5, 7), 3)
    for split in SPLITS:
        inputs, labels = split_of(data, split)
        assert (inputs.dtype, tuple(inputs.shape[1:])) == (torch.uint8, (3, 5, 7))
        assert torch.equal((inputs[:, 0, 0, 0] > 100).long(), labels)


def test_a_size_asked_for_is_given(tmp_path):
    data = load_data(f"imagefolder:{folder_of(tmp_path, {'train': 4, 'test': 2})}:size=6")
    assert tuple(data.example().shape) == (1, 3, 6, 6)


@pytest.mark.parametrize("second", ["val", "validation"])
def test_a_validation_folder_serves_as_the_test_split(tmp_path, second):
    data = load_data(f"imagefolder:{folder_of(tmp_path, {'train': 4, second: 2})}")
    assert data.size("test") == 4


@pytest.mark.parametrize("inside", ["train", "."])
def test_without_a_test_folder_a_fifth_is_carved_out_whatever_the_seed(tmp_path, inside):
    folder_of(tmp_path, {inside: 10})
    one, other = (
        load_data(f"imagefolder:{tmp_path}", seed=seed, validation=0.25) for seed in (0, 1)
    )
    assert [one.size(split) for split in SPLITS] == [12, 4, 4]
    assert torch.equal(split_of(one, "test")[0], split_of(other, "test")[0])
    assert rows(split_of(one, "validation")[0]) != rows(split_of(other, "validation")[0])
    assert split_of(one, "test")[1].tolist() == [0, 0, 1, 1]


def test_images_of_many_sizes_become_224(tmp_path):
    folder_of(tmp_path, {"train": 4, "test": 2})
    paint(tmp_path / "train" / "cat" / "wide.png", 40, size=(31, 3))
    data = load_data(f"imagefolder:{tmp_path}")
    assert data.preprocess.size == (224, 224)


def test_grey_transparent_and_palette_images_become_rgb(tmp_path):
    folder_of(tmp_path, {"train": 4, "test": 2})
    for mode in ("L", "RGBA", "LA"):
        paint(tmp_path / "train" / "cat" / f"{mode}.png", 40)
        with Image.open(tmp_path / "train" / "cat" / f"{mode}.png") as image:
            image.convert(mode).save(tmp_path / "train" / "cat" / f"{mode}.png")
    paint(tmp_path / "train" / "dog" / "palette.gif", 0, mode="P")
    paint(tmp_path / "train" / "dog" / "deep" / "inside.bmp", 200)
    data = load_data(f"imagefolder:{tmp_path}")
    assert data.size("train") + data.size("validation") == 13
    for split in ("train", "validation"):
        inputs, labels = split_of(data, split)
        assert tuple(inputs.shape[1:]) == (3, 5, 7)
        assert (inputs[labels == 0] < 100).all()


def test_files_that_are_no_images_by_name_are_passed_over(tmp_path):
    folder_of(tmp_path, {"train": 4, "test": 2})
    (tmp_path / "train" / "cat" / "notes.txt").write_text("meow")
    (tmp_path / "train" / "README.md").write_text("cats and dogs")
    assert load_data(f"imagefolder:{tmp_path}").size("test") == 4


def test_one_image_is_read_as_the_network_was_trained(tmp_path):
    data = load_data(f"imagefolder:{folder_of(tmp_path, {'train': 4, 'test': 2})}")
    paint(tmp_path / "new.png", 77, size=(70, 50))
    raw = data.preprocess.image(tmp_path / "new.png")
    assert (tuple(raw.shape), raw.dtype) == ((1, 3, 5, 7), torch.uint8)
    assert (raw == 77).all()


def test_a_frame_in_memory_is_read_as_its_file_is(tmp_path):
    data = load_data(f"imagefolder:{folder_of(tmp_path, {'train': 4, 'test': 2})}")
    frame = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    Image.fromarray(frame).save(tmp_path / "frame.png")
    raw = data.preprocess.image(Image.fromarray(frame))
    assert raw.equal(data.preprocess.image(tmp_path / "frame.png"))
    assert tuple(raw.shape) == (1, 3, 5, 7)


def test_the_middle_of_an_image_is_what_is_seen(tmp_path):
    picture = Image.new("L", (30, 10), 0)
    picture.paste(255, (10, 0, 20, 10))
    picture.save(tmp_path / "middle.png")
    # blurred a little at its edges
    assert read_image(tmp_path / "middle.png", (4, 4), 1).min() > 200


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_an_image_is_read_with_as_many_channels_as_asked(tmp_path, channels):
    paint(tmp_path / "a.png", 9)
    assert tuple(read_image(tmp_path / "a.png", (5, 7), channels).shape) == (channels, 5, 7)


def test_an_image_cannot_be_read_for_a_network_that_takes_none(tmp_path):
    with pytest.raises(DataError, match="inputs that are not images"):
        Preprocess(mean=(0.0,), std=(1.0,)).image(tmp_path / "a.png")


def test_a_damaged_image_is_named(tmp_path):
    folder_of(tmp_path, {"train": 4, "test": 2}, size=(40, 40))
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3)).astype(np.uint8)
    Image.fromarray(noise).save(tmp_path / "test" / "cat" / "0.png")
    whole = (tmp_path / "test" / "cat" / "0.png").read_bytes()
    (tmp_path / "test" / "cat" / "0.png").write_bytes(whole[: len(whole) // 2])
    data = load_data(f"imagefolder:{tmp_path}")
    with pytest.raises(DataError, match=r"cat/0\.png is damaged"):
        list(data.batches("test"))


def test_a_file_that_only_looks_like_an_image_is_named(tmp_path):
    folder_of(tmp_path, {"train": 4, "test": 2})
    (tmp_path / "train" / "cat" / "0.png").write_text("meow")
    with pytest.raises(DataError, match=r"cat/0\.png cannot be read as an image"):
        load_data(f"imagefolder:{tmp_path}")
    with pytest.raises(DataError, match=r"none\.png cannot be read"):
        read_image(tmp_path / "none.png", (5, 7), 3)


def test_a_class_that_is_only_in_the_test_folder_is_refused(tmp_path):
    folder_of(tmp_path, {"train": 4, "test": 2})
    paint(tmp_path / "test" / "emu" / "0.png", 1)
    with pytest.raises(DataError, match=r"emu.* test split but not in the training split"):
        load_data(f"imagefolder:{tmp_path}")


def test_folders_without_images_are_refused(tmp_path):
    with pytest.raises(DataError, match="no folder"):
        load_data(f"imagefolder:{tmp_path / 'none'}")
    with pytest.raises(DataError, match="no images in"):
        load_data(f"imagefolder:{tmp_path}")
    folder_of(tmp_path, {"train": 4})
    (tmp_path / "test").mkdir()
    with pytest.raises(DataError, match="no images for test"):
        load_data(f"imagefolder:{tmp_path}")


def test_too_few_images_to_carve_from_are_refused(tmp_path):
    folder_of(tmp_path, {".": 1})
    with pytest.raises(DataError, match="too few to hold out"):
        load_data(f"imagefolder:{tmp_path}")


@pytest.mark.parametrize(
    "options",
    ["size=large", "size=", "size='6'", "size=0", "size=-3", "size=2.5", "sise=6", "size=6,6"],
)
def test_options_that_make_no_sense_are_refused(tmp_path, options):
    folder_of(tmp_path, {"train": 4, "test": 2})
    with pytest.raises(DataError, match="size=64"):
        load_data(f"imagefolder:{tmp_path}:{options}")


def test_the_fingerprint_of_a_folder_changes_with_its_files_and_their_size(tmp_path):
    folder_of(tmp_path, {"train": 4, "test": 2})
    prints = [
        load_data(f"imagefolder:{tmp_path}").fingerprint,
        load_data(f"imagefolder:{tmp_path}:size=6").fingerprint,
    ]
    (tmp_path / "train" / "cat" / "0.png").rename(tmp_path / "train" / "cat" / "9.png")
    prints.append(load_data(f"imagefolder:{tmp_path}").fingerprint)
    (tmp_path / "test" / "dog" / "1.png").rename(tmp_path / "test" / "cat" / "7.png")
    prints.append(load_data(f"imagefolder:{tmp_path}").fingerprint)
    assert len(set(prints)) == 4
    assert load_data(f"imagefolder:{tmp_path}").fingerprint == prints[-1]


# --- Hugging Face ---------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The package datasets, kept from looking anything up."""
    import datasets as package

    package.disable_progress_bars()
    monkeypatch.setattr(package.config, "HF_HUB_OFFLINE", True)
    return package


def table(hub: Any, count: int, size: tuple[int, int] = (7, 5), **columns: Any) -> Any:
    """Pictures of two classes, one dark and one light."""
    labels = [index % 2 for index in range(count)]
    pictures = [Image.new("RGB", size, (list(SHADE.values())[label],) * 3) for label in labels]
    values = {
        name: value
        for name, value in {"image": pictures, "label": labels, **columns}.items()
        if value is not None
    }
    features = {"image": hub.Image(), "label": hub.ClassLabel(names=["cat", "dog"])}
    known = hub.Features(
        {name: features[name] for name in values if name in features and name not in columns}
    )
    made = hub.Dataset.from_dict({name: values[name] for name in known}, features=known)
    for name, value in columns.items():
        made = made if value is None else made.add_column(name, value)
    return made


def on_disk(hub: Any, folder: Path, **tables: Any) -> str:
    hub.DatasetDict(tables).save_to_disk(str(folder / "set"))
    return f"hf:{folder / 'set'}"


def test_a_saved_data_set_is_read(hub, tmp_path):
    data = load_data(on_disk(hub, tmp_path, train=table(hub, 20), test=table(hub, 6)))
    assert [data.size(split) for split in SPLITS] == [18, 2, 6]
    assert data.class_names == ("cat", "dog")
    assert data.preprocess.size == (5, 7)
    for split in SPLITS:
        inputs, labels = split_of(data, split)
        assert torch.equal((inputs[:, 0, 0, 0] > 100).long(), labels)


def test_a_validation_table_serves_as_the_test_split_and_a_size_is_given(hub, tmp_path):
    data = load_data(
        on_disk(hub, tmp_path, train=table(hub, 20), validation=table(hub, 4)) + ":size=6"
    )
    assert data.size("test") == 4
    assert tuple(data.example().shape) == (1, 3, 6, 6)


def test_tables_that_are_left_out_are_said(hub, tmp_path, caplog):
    tables = {"train": table(hub, 20), "validation": table(hub, 4), "test": table(hub, 6)}
    data = load_data(on_disk(hub, tmp_path, **tables))
    assert [data.size(split) for split in SPLITS] == [18, 2, 6]
    assert "test is the test split; left out: validation" in caplog.text


def test_tables_have_the_usual_names_of_splits(hub, tmp_path, caplog):
    tables = {"Train": table(hub, 20), "dev": table(hub, 4), "extra": table(hub, 6)}
    assert load_data(on_disk(hub, tmp_path, **tables)).size("test") == 4
    assert "Train is the train split and dev is the test split; left out: extra" in caplog.text


def test_tables_beside_a_single_train_are_said_to_be_left_out(hub, tmp_path, caplog):
    load_data(on_disk(hub, tmp_path, train=table(hub, 20), unsupervised=table(hub, 6)))
    assert "train is the train split; left out: unsupervised" in caplog.text


def test_without_a_test_table_a_fifth_is_carved_out_whatever_the_seed(hub, tmp_path):
    spec = on_disk(hub, tmp_path, train=table(hub, 20))
    one = load_data(spec)
    other = load_data(spec, seed=1)
    assert one.size("test") == other.size("test") == 4
    assert torch.equal(split_of(one, "test")[1], split_of(other, "test")[1])
    assert one.fingerprint != other.fingerprint
    assert load_data(spec).fingerprint == one.fingerprint


def test_integer_labels_will_do(hub, tmp_path):
    def numbered(count: int) -> Any:
        return table(hub, count, label=None).add_column(
            "labels", [index % 3 for index in range(count)]
        )

    data = load_data(on_disk(hub, tmp_path, train=numbered(30), test=numbered(6)))
    assert data.class_names == ("0", "1", "2")


def test_tables_that_make_no_data_set_are_refused(hub, tmp_path):
    good = table(hub, 20)
    for index, (tables, complaint) in enumerate(
        [
            ({"test": good}, "train"),
            ({"train": good, "test": table(hub, 0)}, "no images for test|datasets cannot load"),
            (
                {"train": table(hub, 20, label=None), "test": good},
                "an image column and a class label",
            ),
            (
                {"train": table(hub, 20, image=None), "test": good},
                "an image column and a class label",
            ),
            ({"train": table(hub, 20, label=["cat", "dog"] * 10), "test": good}, "label"),
            (
                {"train": table(hub, 20, label=[0, 1] * 10), "test": table(hub, 2, label=[0, 2])},
                "labels go up to 2",
            ),
            (
                {"train": table(hub, 20, label=[0, 2] * 10), "test": table(hub, 2, label=[0, 1])},
                "not in the training split",
            ),
            (
                {"train": table(hub, 20, label=[0, -1] * 10), "test": table(hub, 2, label=[0, -1])},
                "label",
            ),
            ({"train": good, "test": table(hub, 2, label=[-1, -1])}, "label|training split"),
        ]
    ):
        with pytest.raises(DataError, match=complaint):
            load_data(on_disk(hub, tmp_path / str(index), **tables))


def test_a_damaged_picture_in_a_table_is_refused(hub, tmp_path):
    whole = (folder_of(tmp_path, {"train": 1}) / "train" / "cat" / "0.png").read_bytes()
    pictures = [{"bytes": whole, "path": None}] * 19 + [{"bytes": whole[:40], "path": None}]
    features = hub.Features({"image": hub.Image(), "label": hub.ClassLabel(names=["cat", "dog"])})
    broken = hub.Dataset.from_dict({"image": pictures, "label": [0, 1] * 10}, features=features)
    data = load_data(on_disk(hub, tmp_path, train=table(hub, 20), test=broken))
    with pytest.raises(DataError, match="picture 19 is damaged"):
        list(data.batches("test"))


@pytest.mark.parametrize(("place", "size"), [(3, ""), (15, ":size=8"), (60, "")])
def test_a_row_without_a_picture_is_refused_with_its_number(hub, tmp_path, place, size):
    whole = (folder_of(tmp_path, {"train": 1}) / "train" / "cat" / "0.png").read_bytes()
    pictures: list[Any] = [{"bytes": whole, "path": None}] * 70
    pictures[place] = None
    features = hub.Features({"image": hub.Image(), "label": hub.ClassLabel(names=["cat", "dog"])})
    rows = hub.Dataset.from_dict({"image": pictures, "label": [0, 1] * 35}, features=features)

    def read_all() -> None:
        data = load_data(on_disk(hub, tmp_path, train=rows, test=table(hub, 4)) + size)
        list(data.batches("train"))
        list(data.batches("validation"))

    with pytest.raises(DataError, match=f"row {place} has no picture"):
        read_all()


def test_a_name_that_cannot_be_loaded_is_refused(hub, tmp_path):
    with pytest.raises(DataError, match="datasets cannot load"):
        load_data(f"hf:{tmp_path / 'none'}")


def test_without_the_package_the_remedy_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(DataError, match=r"pip install datasets\."):
        load_data("hf:mnist")
