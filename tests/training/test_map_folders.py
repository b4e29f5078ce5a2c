"""Folders of pictures and of maps that hold a class for every pixel."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from impatient.errors import DataError
from impatient.training import Data, load_data

COUNT = 12
RANDOM = np.random.default_rng(0)
MAPS = RANDOM.integers(0, 3, (COUNT, 6, 8)).astype(np.uint8)
MAPS[:, 0, 0] = 255


def palette(numbers: np.ndarray) -> Image.Image:
    """A picture of colours whose places in the palette are the classes."""
    drawn = Image.fromarray(numbers, mode="P")
    drawn.putpalette([(7 * each) % 256 for each in range(768)])
    return drawn


def drawn(root: Path, layout: str, kind: Any = palette, ending: str = "", **names: str) -> Path:
    """Write pictures whose brightness tells their map: ten times its mean class."""
    images, masks = names.get("images", "images"), names.get("masks", "masks")
    for place, numbers in enumerate(MAPS):
        split = ("val" if place >= 9 else "train") if "SPLIT" in layout else ""
        for name, picture, more in (
            (images, Image.new("RGB", (8, 6), (place,) * 3), ""),
            (masks, kind(numbers), ending),
        ):
            folder = root / layout.replace("SPLIT", split).replace("KIND", name)
            folder.mkdir(parents=True, exist_ok=True)
            suffix = "bmp" if name == images else "png"
            picture.save(folder / f"{place:02}{more}.{suffix}")
    return root


def pairs(data: Data) -> dict[int, torch.Tensor]:
    """Maps by the number that their picture shows."""
    found = {}
    for split in ("train", "validation", "test"):
        examples = data.examples(split)
        raw = examples.take(range(data.size(split)))
        assert raw.shape[1:] == (3, *examples.labels.shape[1:])
        found |= dict(zip(raw[:, 0, 0, 0].tolist(), examples.labels, strict=True))
    return found


@pytest.mark.parametrize("layout", ["SPLIT/KIND", "KIND/SPLIT", "KIND"])
def test_every_picture_has_its_own_map(tmp_path: Path, layout: str) -> None:
    root = drawn(tmp_path, layout)
    data = load_data(f"imagefolder:{root}:masks=masks")
    assert data.task_hint == "segmentation"
    with pytest.raises(DataError, match="labels=onehot is for npz files"):
        load_data(f"imagefolder:{root}:masks=masks,labels=onehot")
    found = pairs(data)
    assert sorted(found) == list(range(COUNT))
    for place, numbers in enumerate(MAPS):
        assert torch.equal(found[place], torch.from_numpy(numbers))
    if "SPLIT" in layout:
        assert data.size("test") == 3


def test_maps_may_be_grey_and_end_in_mask_and_folders_have_other_names(tmp_path: Path) -> None:
    names = {"images": "photos", "masks": "labels"}
    root = drawn(tmp_path, "SPLIT/KIND", Image.fromarray, "_mask", **names)
    data = load_data(f"imagefolder:{root}:images=photos,masks=labels")
    assert torch.equal(pairs(data)[3], torch.from_numpy(MAPS[3]))


def test_maps_are_cut_and_resized_like_their_pictures_and_classes_never_mixed(tmp_path) -> None:
    root = drawn(tmp_path, "KIND")
    # the middle square of 6 x 8 pixels, twice as large
    data = load_data(f"imagefolder:{root}:masks=masks,size=12")
    wanted = torch.from_numpy(MAPS[5][:, 1:7]).repeat_interleave(2, 0).repeat_interleave(2, 1)
    assert torch.equal(pairs(data)[5], wanted)


def test_drawings_of_one_thing_in_white_are_refused_until_their_meaning_is_said(tmp_path) -> None:
    def white(numbers: np.ndarray) -> Image.Image:
        return Image.fromarray(np.where(numbers == 1, 255, 0).astype(np.uint8))

    root = drawn(tmp_path, "SPLIT/KIND", white)
    with pytest.raises(DataError, match=r"0 and 255 alone.*say labels=renumber"):
        load_data(f"imagefolder:{root}:masks=masks")
    data = load_data(f"imagefolder:{root}:masks=masks,labels=renumber")
    assert torch.equal(pairs(data)[2], torch.from_numpy((MAPS[2] == 1).astype(np.uint8)))


def test_contents_of_maps_count_in_the_fingerprint(tmp_path: Path) -> None:
    root = drawn(tmp_path, "SPLIT/KIND")
    spec = f"imagefolder:{root}:masks=masks"
    before = load_data(spec).fingerprint
    assert load_data(spec).fingerprint == before
    palette(MAPS[1]).save(root / "train" / "masks" / "00.png")
    assert load_data(spec).fingerprint != before


def spoiled(root: Path, how: str) -> None:
    masks = root / "train" / "masks"
    if how == "missing":
        (masks / "03.png").unlink()
    elif how == "alone":
        (root / "train" / "images" / "03.bmp").unlink()
    elif how == "size":
        palette(MAPS[3][:4]).save(masks / "03.png")
    elif how == "colours":
        RANDOM_COLOURS.save(masks / "03.png")
    elif how == "damaged":
        (masks / "03.png").write_bytes((masks / "03.png").read_bytes()[:60])
    elif how == "deep":
        Image.fromarray(MAPS[3].astype(np.uint16) * 300).save(masks / "03.png")
    else:
        masks.rename(root / "train" / "other")


RANDOM_COLOURS = Image.fromarray(RANDOM.integers(0, 255, (6, 8, 3)).astype(np.uint8))


@pytest.mark.parametrize(
    ("how", "complaint"),
    [
        ("missing", r"1 files have no partner in .*masks, the first is .*03\.bmp"),
        ("alone", r"1 files have no partner in .*images, the first is .*03\.png"),
        ("size", r"03\.png has 4 x 8 pixels, its picture .*03\.bmp 6 x 8"),
        ("colours", "mode RGB, whose pixels are no class numbers"),
        ("damaged", r"03\.png is damaged|03\.png cannot be read"),
        ("deep", "expected classes from 0 to 254"),
        ("folder", "no folder .*masks; expected SPLIT/images and SPLIT/masks"),
    ],
)
def test_pairs_that_are_none_are_refused_by_name(tmp_path, how, complaint) -> None:
    root = drawn(tmp_path, "SPLIT/KIND")
    spoiled(root, how)
    with pytest.raises(DataError, match=complaint):
        load_data(f"imagefolder:{root}:masks=masks")


def test_options_of_maps_are_refused_without_maps(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="labels cannot be said here"):
        load_data(f"imagefolder:{drawn(tmp_path, 'SPLIT/KIND')}:labels=renumber")
