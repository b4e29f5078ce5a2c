"""What people say about their arrays and pictures, and what is refused rather than guessed."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from impatient.errors import DataError
from impatient.training import Data, Preprocess, load_data

RANDOM = np.random.default_rng(0)


def saved(folder: Path, x: np.ndarray, options: str = "", **others: Any) -> str:
    """Sixty inputs of three classes; the first thirty are the test split."""
    labels = np.arange(60) % 3
    arrays = {"x_train": x, "y_train": labels, "x_test": x[:30], "y_test": labels[:30]}
    np.savez(folder / "own.npz", **{**arrays, **others})
    return f"npz:{folder / 'own.npz'}{options and ':'}{options}"


def whole_test(data: Data) -> torch.Tensor:
    return next(iter(data.batches("test", 100)))[0]


def floats(*shape: int) -> np.ndarray:
    return RANDOM.normal(5.0, 3.0, (60, *shape)).astype(np.float32)


# --- layouts --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "options", "wanted"),
    [
        ((9, 32), "", (9, 32)),
        ((9, 32), "layout=NCT", (9, 32)),
        ((32, 9), "layout=NTC", (32, 9)),
        ((9, 32), "layout=NHW", (1, 9, 32)),
        ((8, 8), "layout=NHW", (1, 8, 8)),
        ((8, 8, 13), "layout=NHWC", (13, 8, 8)),
        ((8, 8, 13), "", (13, 8, 8)),
        ((13, 8, 8), "", (13, 8, 8)),
        ((3, 3, 4), "layout=NCHW", (3, 3, 4)),
        ((7,), "layout=ND", (7,)),
    ],
)
def test_a_layout_that_is_said_or_unmistakable_decides(tmp_path, shape, options, wanted):
    data = load_data(saved(tmp_path, floats(*shape), options))
    assert tuple(data.example().shape) == (1, *wanted)


@pytest.mark.parametrize(
    ("x", "complaint"),
    [
        (floats(8, 8), "grey pictures or series.*layout=NHW for pictures, NCT or NTC"),
        (floats(5, 6, 7), "channels first or last.*layout=NCHW for the first, NHWC the last"),
        (floats(3, 7, 3), "channels first or last"),
        (floats(5).astype(np.int16) - 9, "token ids, which are not negative.*layout=ND"),
        (floats(2, 5).astype(np.int16), "series or token ids.*layout=NCT or layout=NTC"),
        (floats(8, 8, 3).astype(np.uint16), "pictures or token ids.*layout=NHWC or layout=NCHW"),
    ],
)
def test_an_array_of_two_readings_is_refused_and_both_are_named(tmp_path, x, complaint):
    with pytest.raises(DataError, match=complaint):
        load_data(saved(tmp_path, x))


def test_sound_in_integers_is_read_as_numbers_when_that_is_said(tmp_path):
    sound = RANDOM.integers(-30000, 30000, (60, 50)).astype(np.int16)
    data = load_data(saved(tmp_path, sound, "layout=ND,normalise=none"))
    assert torch.equal(whole_test(data), torch.from_numpy(sound[:30].astype(np.float32)))


def test_wide_integers_are_pictures_when_that_is_said(tmp_path):
    deep = RANDOM.integers(0, 65536, (60, 6, 5, 3)).astype(np.uint16)
    data = load_data(saved(tmp_path, deep, "layout=NHWC,mean=0,std=1"))
    wanted = torch.from_numpy(np.moveaxis(deep[:30] / 65535.0, 3, 1)).float()
    torch.testing.assert_close(whole_test(data), wanted)
    bytes_of_64_bits = deep.astype(np.int64) // 257
    data = load_data(saved(tmp_path, bytes_of_64_bits, "layout=NHWC"))
    assert data.preprocess.dtype == "uint8"
    with pytest.raises(DataError, match="expected 0 to 255, or 0 to 65535"):
        load_data(saved(tmp_path, deep.astype(np.int64) * 9, "layout=NHWC"))
    with pytest.raises(DataError, match="Save 16 bits as uint16"):
        load_data(saved(tmp_path, deep.astype(np.int64), "layout=NHWC"))


def test_a_layout_that_does_not_fit_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"layout=NHWC has 4 dimensions.*a letter per dimension"):
        load_data(saved(tmp_path, floats(8, 8), "layout=NHWC"))
    with pytest.raises(DataError, match="layout=NT is for token ids"):
        load_data(saved(tmp_path, floats(8), "layout=NT"))
    with pytest.raises(DataError, match="layout='HWC'; expected one of NHW"):
        load_data(saved(tmp_path, floats(8, 8), "layout=HWC"))


@pytest.mark.parametrize(("layout", "axes"), [("NCT", (0, 2)), ("NTC", (0, 1))])
def test_series_are_standardised_per_channel_wherever_it_stands(tmp_path, layout, axes):
    scale = np.array([1.0, 100.0, 0.01], np.float32)
    x = floats(3, 40) * scale[:, None]
    x = x if layout == "NCT" else np.moveaxis(x, 1, 2)
    data = load_data(saved(tmp_path, x, f"layout={layout}"))
    prepared = data.preprocess(data.examples("train").take(range(data.size("train"))))
    torch.testing.assert_close(prepared.mean(axes), torch.zeros(3), atol=1e-3, rtol=0)
    torch.testing.assert_close(prepared.std(axes), torch.ones(3), atol=1e-3, rtol=0)


# --- normalisation --------------------------------------------------------------------------------


@pytest.mark.parametrize("options", ["normalise=none", "mean=0,std=1"])
def test_floats_reach_the_network_as_they_are_when_that_is_said(tmp_path, options):
    x = floats(1, 8, 8)
    assert torch.equal(whole_test(load_data(saved(tmp_path, x, options))), torch.from_numpy(x[:30]))


def test_bytes_without_normalising_are_floats_from_0_to_255(tmp_path):
    x = RANDOM.integers(0, 256, (60, 3, 8, 8)).astype(np.uint8)
    data = load_data(saved(tmp_path, x, "normalise=none"))
    assert torch.equal(whole_test(data), torch.from_numpy(x[:30]).float())
    assert (data.preprocess.size, data.preprocess.channels) == ((8, 8), 3)


def test_the_mean_and_deviation_of_another_place_are_used(tmp_path):
    """The figures of ImageNet, as every pretrained network of torchvision expects them."""
    x = RANDOM.integers(0, 256, (60, 8, 8, 3)).astype(np.uint8)
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    data = load_data(saved(tmp_path, x, f"mean={mean},std={std}".replace(" ", "")))
    pixels = torch.from_numpy(x[:30]).permute(0, 3, 1, 2) / 255.0
    wanted = (pixels - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    torch.testing.assert_close(whole_test(data), wanted)
    one = load_data(saved(tmp_path, x, "mean=0.5,std=0.25"))
    assert (one.preprocess.mean, one.preprocess.std) == ((0.5,) * 3, (0.25,) * 3)
    mixed = load_data(saved(tmp_path, x, "mean=[1,2,3],std=1"))
    assert (mixed.preprocess.mean, mixed.preprocess.std) == ((1.0, 2.0, 3.0), (1.0,) * 3)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ("mean=0.5", "expected both or none of them"),
        ("mean=[1,2],std=[1,1]", r"for 3 channels; expected one number of each"),
        ("mean=0.5,std=0", "std"),
        ("mean=nan,std=1", "cannot read the option 'mean=nan'"),
        ("mean=0,std=1,normalise=none", "contradict each other"),
        ("normalise=imagenet", "expected one of fit, none"),
        ("size=8", "cannot read the option 'size=8'; expected layout="),
        ("mean=0,mean=1,std=1", "cannot read the option 'mean=1'"),
    ],
)
def test_options_that_make_no_sense_are_refused(tmp_path, options, complaint):
    x = RANDOM.integers(0, 256, (60, 8, 8, 3)).astype(np.uint8)
    with pytest.raises(DataError, match=complaint):
        load_data(saved(tmp_path, x, options))


def test_what_is_said_is_in_the_fingerprint(tmp_path):
    x = floats(1, 8, 8)
    said = ["", "normalise=none", "mean=0,std=1", "mean=1,std=1"]
    prints = [load_data(saved(tmp_path, x, options)).fingerprint for options in said]
    assert len(set(prints)) == len(prints)


def test_preprocessing_says_what_it_does():
    shown = str(Preprocess(mean=(0.5,) * 3, std=(0.25,) * 3, size=(8, 8), channels=3))
    assert "scaled to [0, 1]" in shown
    assert "0.5, 0.5, 0.5" in shown
    assert str(Preprocess(mean=(), std=())) == "numbers reach the network as they are"
    assert "from 0 to 255" in str(Preprocess(mean=(), std=(), dtype="uint8"))


# --- labels ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "said"),
    [(lambda y: y + 1, "labels are from 1 to 3, but 0 is not"), (lambda y: y * 2, "1, 3 are not")],
)
def test_labels_with_gaps_are_refused_with_both_readings_and_renumbered_when_that_is_said(
    tmp_path, change, said
):
    labels = np.arange(60) % 3
    changed = {"y_train": change(labels), "y_test": change(labels[:30])}
    spec = saved(tmp_path, floats(5), **changed)
    with pytest.raises(DataError, match=f"{said}.*labels=renumber.*class_names"):
        load_data(spec)
    data = load_data(f"{spec}:labels=renumber")
    assert data.examples("test").labels.tolist() == labels[:30].tolist()
    assert data.class_names == tuple(str(change(label)) for label in range(3))
    names = np.array([f"class {number}" for number in range(int(change(labels).max()) + 1)])
    assert load_data(saved(tmp_path, floats(5), **changed, class_names=names)).num_classes == len(
        names
    )


def test_a_single_class_is_refused(tmp_path):
    zeros = np.zeros(60, int)
    with pytest.raises(DataError, match="all training examples have the class 0"):
        load_data(saved(tmp_path, floats(5), y_train=zeros, y_test=zeros[:30]))


def test_names_in_bytes_are_text(tmp_path):
    names = np.array(["chat", "chien", "émeu"])
    stored = np.array([name.encode() for name in names])
    data = load_data(saved(tmp_path, floats(5), class_names=stored))
    assert data.class_names == tuple(names)


# --- budgets --------------------------------------------------------------------------------------


def test_budgets_follow_their_samples_and_count_in_the_fingerprint(tmp_path):
    x = floats(5)
    seconds = RANDOM.random(60)
    seconds[3] = np.inf
    budgets = {"limit_train": seconds, "limit_test": seconds[:30]}
    data = load_data(saved(tmp_path, x, "budget=limit,normalise=none", **budgets))
    for split in ("train", "validation", "test"):
        for row, budget in zip(
            data.examples(split).take(range(data.size(split))), data.budgets(split), strict=True
        ):
            assert budget == seconds[(x == row.numpy()).all(1).argmax()]
    plain = load_data(saved(tmp_path, x, "normalise=none", **budgets))
    assert plain.budgets("train") is None
    other = budgets | {"limit_train": seconds + 1}
    changed = load_data(saved(tmp_path, x, "budget=limit,normalise=none", **other))
    assert len({each.fingerprint for each in (data, plain, changed)}) == 3


@pytest.mark.parametrize(
    ("budgets", "complaint"),
    [
        (None, "asks for limit_train, seconds per sample"),
        (np.full(60, -1.0), "the budget of sample 0 is -1.0"),
        (np.full(60, np.nan), "the budget of sample 0 is nan"),
        (np.ones((60, 2)), r"shape \(60, 2\); expected seconds, one per sample"),
        (np.array(["1"] * 60), "budgets are <U1"),
    ],
)
def test_budgets_that_are_no_times_are_refused(tmp_path, budgets, complaint):
    others = {} if budgets is None else {"limit_train": budgets}
    with pytest.raises(DataError, match=complaint):
        load_data(saved(tmp_path, floats(5), "budget=limit", **others))


def test_groups_stay_on_one_side_where_targets_are_measured_too(tmp_path):
    groups = np.arange(60) // 6
    x = np.stack([groups, np.arange(60)], 1).astype(np.float32)
    spec = saved(
        tmp_path, x, "normalise=none", y_train=x[:, 1], y_test=x[:30, 1], groups_train=groups
    )
    data = load_data(spec)
    sides = [
        set(data.examples(split).take(range(data.size(split)))[:, 0].tolist())
        for split in ("train", "validation")
    ]
    assert not sides[0] & sides[1]


# --- contents -------------------------------------------------------------------------------------


def pictures(root: Path) -> Path:
    for split, count in (("train", 8), ("test", 2)):
        for shade, label in ((40, "dark"), (200, "light")):
            for index in range(count):
                path = root / split / label / f"{index}.bmp"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (6, 5), (shade + index,) * 3).save(path)
    return root


def test_contents_count_and_neither_the_place_nor_the_date_does(tmp_path):
    root = pictures(tmp_path / "here")

    def fingerprint(folder: Path) -> str:
        return load_data(f"imagefolder:{folder}").fingerprint

    before = fingerprint(root)
    moved = root.rename(tmp_path / "there")
    (moved / "train" / "dark" / "0.bmp").touch()
    assert fingerprint(moved) == before
    Image.new("RGB", (6, 5), (9, 9, 9)).save(moved / "train" / "dark" / "0.bmp")
    assert fingerprint(moved) != before


def test_the_contents_of_a_table_count(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()

    def fingerprint(folder: str, shade: int) -> str:
        shades = [shade if index == 3 else 40 + index for index in range(20)]
        shown = [Image.new("RGB", (6, 5), (each,) * 3) for each in shades]
        features = datasets.Features(
            {"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])}
        )
        table = datasets.Dataset.from_dict(
            {"image": shown, "label": [0, 1] * 10}, features=features
        )
        datasets.DatasetDict({"train": table, "test": table}).save_to_disk(str(tmp_path / folder))
        return load_data(f"hf:{tmp_path / folder}").fingerprint

    assert fingerprint("one", 7) == fingerprint("again", 7) != fingerprint("other", 8)


def test_pictures_are_normalised_as_said(tmp_path):
    root = pictures(tmp_path)
    data = load_data(f"imagefolder:{root}:size=4x6,mean=0.5,std=0.5")
    assert tuple(data.example().shape) == (1, 3, 4, 6)
    first = whole_test(data)[0]
    assert torch.allclose(first, torch.full((3, 4, 6), (40 / 255.0 - 0.5) / 0.5))


# --- new inputs -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "raw", "right"),
    [
        ("uint8", torch.tensor([[0, 255]]), True),
        ("uint8", torch.tensor([[0, 256]]), False),
        ("uint8", torch.tensor([[0.0, 255.0]]), False),
        ("uint8", torch.tensor([[True, False]]), False),
        ("float32", torch.tensor([[1, 2]]), True),
        ("float32", torch.tensor([[1e300]], dtype=torch.float64), False),
        ("int64", torch.tensor([[1.0]]), False),
        ("", torch.tensor([[torch.nan]]), False),
    ],
)
def test_new_inputs_get_the_type_that_the_network_was_trained_on(dtype, raw, right):
    preprocess = Preprocess(mean=(), std=(), dtype=dtype)
    if not right:
        with pytest.raises(DataError, match=r"new\.npy holds"):
            preprocess.checked(raw, "new.npy")
        return
    checked = preprocess.checked(raw, "new.npy")
    assert str(checked.dtype) == f"torch.{dtype}"
    assert checked.tolist() == raw.tolist()


@pytest.mark.parametrize(
    "raw",
    [
        Image.new("RGB", (8, 8)),
        np.zeros((1, 3, 8, 8), np.uint8),
        torch.zeros(3, 8, 8),
        torch.zeros(1, 8, 8, 3),
        torch.tensor(1.0),
    ],
)
def test_what_is_no_batch_of_frames_is_refused_with_what_to_do(raw):
    preprocess = Preprocess(mean=(0.5,) * 3, std=(0.25,) * 3, size=(8, 8), channels=3)
    with pytest.raises(DataError, match=r"expected a tensor \[N, C, H, W\]\. A frame"):
        preprocess(raw)
    assert preprocess(torch.zeros(2, 3, 8, 8)).shape == (2, 3, 8, 8)


def test_vectors_of_another_length_are_refused():
    preprocess = Preprocess(mean=(0.0,) * 5, std=(1.0,) * 5)
    with pytest.raises(DataError, match=r"shape \(2, 4\); expected a tensor with 5 channels"):
        preprocess(torch.zeros(2, 4))


# --- labels as people have them -------------------------------------------------------------------


def test_names_in_place_of_numbers_are_numbered_in_their_order(tmp_path):
    names = np.array(["cat", "ant", "bee"])[np.arange(60) % 3]
    spec = saved(tmp_path, floats(5), y_train=names, y_test=names[:30])
    data = load_data(spec)
    assert data.class_names == ("ant", "bee", "cat")
    assert data.examples("test").labels[:3].tolist() == [2, 0, 1]
    spec = saved(
        tmp_path,
        floats(5),
        y_train=names.astype("S"),
        y_test=names[:30],
        class_names=["cat", "ant", "bee"],
    )
    assert load_data(spec).examples("test").labels[:3].tolist() == [0, 1, 2]
    spec = saved(tmp_path, floats(5), y_train=names, y_test=names[:30], class_names=["cat", "ant"])
    with pytest.raises(DataError, match="the label 'bee' is none of cat, ant"):
        load_data(spec)


def test_rows_with_a_single_one_are_classes_when_that_is_said(tmp_path):
    rows = np.eye(4)[np.arange(60) % 3]
    spec = saved(tmp_path, floats(5), "labels=onehot", y_train=rows, y_test=rows[:30])
    with pytest.raises(DataError, match="labels are from 0 to 2, but 3 is not among them"):
        load_data(spec)
    rows = np.eye(3)[np.arange(60) % 3]
    spec = saved(tmp_path, floats(5), "labels=onehot", y_train=rows, y_test=rows[:30])
    data = load_data(spec)
    assert data.task_hint == "classification"
    assert data.examples("test").labels[:4].tolist() == [0, 1, 2, 0]
    for odd in (rows * 2, np.ones((60, 3)), np.arange(60) % 3):
        spec = saved(tmp_path, floats(5), "labels=onehot", y_train=odd, y_test=odd[:30])
        with pytest.raises(DataError, match="labels=onehot is for rows of zeros with a single 1"):
            load_data(spec)


def test_a_column_of_classes_is_classes(tmp_path):
    column = (np.arange(60) % 3)[:, None]
    data = load_data(saved(tmp_path, floats(5), y_train=column, y_test=column[:30]))
    assert data.examples("test").labels[:4].tolist() == [0, 1, 2, 0]


def test_arrays_that_are_left_out_are_said(tmp_path, caplog):
    with caplog.at_level("WARNING"):
        load_data(saved(tmp_path, floats(5), x_val=floats(5), y_val=np.arange(60)))
    assert "arrays that are left out: x_val, y_val" in caplog.text


def test_true_and_false_are_features_of_numbers(tmp_path):
    data = load_data(saved(tmp_path, floats(5) > 5, "normalise=none"))
    assert data.example().dtype == torch.float32
    assert set(data.example(8).unique().tolist()) == {0.0, 1.0}


def test_inputs_without_numbers_are_refused(tmp_path):
    for shape in ((0,), (0, 8, 3)):
        with pytest.raises(DataError, match=r"hold no numbers; expected some per sample"):
            load_data(saved(tmp_path, floats(*shape)))
