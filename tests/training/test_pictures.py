"""Pictures are read as a viewer shows them, from folders as people have them."""

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from impatient.errors import DataError
from impatient.training import load_data
from impatient.training.pictures import class_files, image_tensor, read_image, size_of


@pytest.mark.parametrize(
    ("orientation", "back"),
    [
        (3, Image.Transpose.ROTATE_180),
        (6, Image.Transpose.ROTATE_90),
        (8, Image.Transpose.ROTATE_270),
    ],
)
def test_a_turned_photo_is_put_upright(tmp_path: Path, orientation: int, back: int) -> None:
    pixels = np.zeros((8, 12, 3), np.uint8)
    pixels[:4] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(pixels).transpose(Image.Transpose(back))
    stored.save(tmp_path / "a.png", exif=exif)
    assert size_of(tmp_path / "a.png") == (8, 12)
    wanted = torch.from_numpy(pixels).permute(2, 0, 1)
    assert torch.equal(read_image(tmp_path / "a.png", (8, 12), 3), wanted)


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bits_become_eight(tmp_path: Path, suffix: str) -> None:
    grey = np.arange(256, dtype=np.uint16).reshape(16, 16)
    Image.fromarray(grey * 257).save(tmp_path / f"a.{suffix}")
    seen = read_image(tmp_path / f"a.{suffix}", (16, 16), 1)[0]
    assert torch.equal(seen, torch.from_numpy(grey.astype(np.uint8)))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_is_white(mode: str) -> None:
    image = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    image.paste((0, 0, 0, 255), (0, 0, 2, 4))
    shown = image.convert(mode)
    if mode == "P":
        shown = Image.new("P", (4, 4), 1)
        shown.putpalette([0] * 6)
        shown.paste(0, (0, 0, 2, 4))
        shown.info["transparency"] = 1
    seen = image_tensor(shown, (4, 4), 3, "a")
    assert seen[:, :, :2].max() == 0
    assert seen[:, :, 2:].min() == 255


def test_the_colors_of_print_become_those_of_a_screen(tmp_path: Path) -> None:
    Image.new("CMYK", (4, 4), (0, 255, 255, 0)).save(tmp_path / "a.jpg")
    red, green, blue = read_image(tmp_path / "a.jpg", (4, 4), 3).float().mean((1, 2)).tolist()
    assert red > 200 > 60 > max(green, blue)


def test_pictures_without_a_range_are_refused_by_name(tmp_path: Path) -> None:
    Image.fromarray(np.ones((4, 4), np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(DataError, match=r"a\.tif holds floating-point"):
        read_image(tmp_path / "a.tif", (4, 4), 3)
    Image.fromarray(np.full((4, 4), 70_000, np.int32)).save(tmp_path / "b.tif")
    with pytest.raises(DataError, match=r"b\.tif holds numbers from 70000"):
        read_image(tmp_path / "b.tif", (4, 4), 3)


def test_a_picture_that_is_too_large_is_refused_by_name(tmp_path: Path) -> None:
    Image.new("1", (20_000, 10_000)).save(tmp_path / "large.png")
    with pytest.raises(DataError, match=r"large\.png"):
        read_image(tmp_path / "large.png", (4, 4), 3)


@pytest.mark.parametrize("share", [0.01, 0.1, 0.3, 0.6])
@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp", "tif", "webp"])
def test_a_picture_cut_short_is_refused_by_name(tmp_path: Path, suffix: str, share: float) -> None:
    file = tmp_path / f"a.{suffix}"
    noise = np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(noise).save(file)
    file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])
    with pytest.raises(DataError, match=f"a.{suffix}"):
        read_image(file, (32, 32), 3)


def folder(root: Path, train: str, test: str, suffix: str = "png") -> Path:
    for split, count in ((train, 6), (test, 2)):
        for kind in ("ant", "bee"):
            (root / split / kind).mkdir(parents=True)
            for index in range(count):
                with (root / split / kind / f"{index}.{suffix}").open("wb") as file:
                    Image.new("RGB", (4, 4)).save(file, "JPEG")
    return root


@pytest.mark.parametrize("train", ["train", "Train", "Training", "TRAINING"])
@pytest.mark.parametrize("test", ["test", "Test", "Testing", "VAL", "valid", "Validation"])
def test_splits_are_found_under_their_usual_names(tmp_path: Path, train: str, test: str) -> None:
    data = load_data(f"imagefolder:{folder(tmp_path, train, test)}")
    assert (data.class_names, data.size("test")) == (("ant", "bee"), 4)


def test_two_folders_that_could_be_one_split_are_refused(tmp_path: Path) -> None:
    (folder(tmp_path, "train", "test") / "Training").mkdir()
    with pytest.raises(DataError, match="Training and train"):
        load_data(f"imagefolder:{tmp_path}")


def test_hidden_files_are_passed_over_and_others_are_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    place = folder(tmp_path, "train", "test", "JFIF") / "train"
    wanted = class_files(place)
    assert len(wanted) == 12
    for hidden in (".ipynb_checkpoints", "__MACOSX", "ant/.cache"):
        (place / hidden).mkdir()
        (place / hidden / "0.png").write_bytes(b"")
    (place / "ant" / "._0.png").write_bytes(b"")
    (place / "ant" / "0.heic").write_bytes(b"")
    (place / "labels.csv").write_bytes(b"")
    with caplog.at_level(logging.WARNING):
        assert class_files(place) == wanted
    assert "left out: 1 .heic, 1 .csv" in caplog.text


def test_linked_folders_are_followed_once(tmp_path: Path) -> None:
    place = folder(tmp_path / "own", "train", "test") / "train"
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "ant").symlink_to(place / "ant")
    (place / "ant" / "again").symlink_to(place / "ant")
    assert len(class_files(tmp_path / "linked")) == 6


@pytest.mark.parametrize(
    ("x", "label", "complaint"),
    [
        (np.zeros((40, 8), np.float32), 10**12, "no plausible class"),
        (np.zeros((40, 8, 8, 3), np.uint16), 0, "pictures or token ids"),
        (np.zeros((40, 3, 8, 8), np.int32), 0, "pictures or token ids"),
    ],
)
def test_arrays_that_cannot_be_meant_are_refused(
    tmp_path: Path, x: np.ndarray, label: int, complaint: str
) -> None:
    y = np.arange(40) % 4
    y[0] = label
    np.savez(tmp_path / "a.npz", x_train=x, y_train=y, x_test=x[4:8], y_test=y[4:8])
    with pytest.raises(DataError, match=complaint):
        load_data(f"npz:{tmp_path / 'a.npz'}")


# --- what is a split, and what is left out --------------------------------------------------------


@pytest.mark.parametrize(
    ("train", "test"),
    [("seg_train", "seg_test"), ("train2017", "val2017"), ("train-set", "Test Set")],
)
def test_splits_are_found_where_the_usual_name_is_a_word_of_theirs(
    tmp_path: Path, train: str, test: str, caplog: pytest.LogCaptureFixture
) -> None:
    root = folder(tmp_path, train, test)
    (root / "unlabelled").mkdir()
    with caplog.at_level(logging.WARNING):
        data = load_data(f"imagefolder:{root}")
    assert (data.class_names, data.size("test")) == (("ant", "bee"), 4)
    assert f"{train} is the train split and {test} is the test split" in caplog.text
    assert "left out: unlabelled" in caplog.text


def test_classes_may_be_called_like_splits(tmp_path: Path) -> None:
    for kind in ("steam train", "test tube", "ant"):
        (tmp_path / kind).mkdir()
        for index in range(10):
            Image.new("RGB", (4, 4)).save(tmp_path / kind / f"{index}.png")
    assert load_data(f"imagefolder:{tmp_path}").class_names == ("ant", "steam train", "test tube")


def test_folders_that_are_left_out_are_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = folder(tmp_path, "train", "test")
    (root / "train" / "wasp").mkdir()
    (root / "extra" / "ant").mkdir(parents=True)
    with caplog.at_level(logging.WARNING):
        load_data(f"imagefolder:{root}")
    assert caplog.text.count("left out: extra") == 1
    assert "folders without pictures are no classes: wasp" in caplog.text


def test_a_link_to_a_folder_above_brings_no_pictures_of_other_classes(tmp_path: Path) -> None:
    place = folder(tmp_path, "train", "test") / "train"
    wanted = class_files(place)
    (place / "ant" / "all").symlink_to(place)
    (place / "ant" / "everything").symlink_to(tmp_path)
    assert class_files(place) == wanted
