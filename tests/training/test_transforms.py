"""Pictures reach pretrained networks as they were trained: the libraries' own transforms decide."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import impatient
from impatient.errors import DataError
from impatient.networks import Resizing, Transform, transform_of
from impatient.networks.specs import import_torchvision
from pretrained import cached_torchvision, pictures, timm_folder, transformers_folder

CONVNEXT = {"size": {"shortest_edge": 48}, "crop_pct": 0.75}
VIT = {"size": {"height": 40, "width": 40}}
CLIP = {
    "size": {"shortest_edge": 50},
    "do_center_crop": True,
    "crop_size": {"height": 44, "width": 44},
}
PROCESSOR = {
    "do_resize": True,
    "resample": 3,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.4, 0.5, 0.6],
    "image_std": [0.2, 0.25, 0.3],
}
TIMM = {"mean": [0.3, 0.4, 0.5], "std": [0.3, 0.2, 0.1], "interpolation": "bicubic"}


Theirs = Callable[[Image.Image], Tensor]


def of_torchvision(folder: Path, patch: pytest.MonkeyPatch) -> tuple[str, nn.Module, Theirs]:
    model = cached_torchvision(folder, patch)
    weights = import_torchvision().models.get_model_weights("shufflenet_v2_x0_5")["DEFAULT"]
    return "torchvision:shufflenet_v2_x0_5:weights=DEFAULT", model, weights.transforms()


def of_timm(folder: Path, **about: Any) -> tuple[str, nn.Module, Theirs]:
    import timm

    model = timm_folder(folder / "model", **{**TIMM, **about})
    theirs = timm.create_model(f"local-dir:{folder}/model", pretrained=True)
    config = timm.data.resolve_model_data_config(theirs)
    return f"timm:{folder}/model:pretrained=true", model, timm.data.create_transform(**config)


def of_transformers(folder: Path, kind: str, **about: Any) -> tuple[str, nn.Module, Theirs]:
    import transformers

    said = {**PROCESSOR, **about, "image_processor_type": kind}
    model = transformers_folder(folder / "model", **said)
    processor = transformers.AutoImageProcessor.from_pretrained(folder / "model")

    def theirs(picture: Image.Image) -> Tensor:
        return torch.as_tensor(processor(images=picture, return_tensors="pt")["pixel_values"][0])

    return f"transformers:{folder}/model", model, theirs


WAYS: dict[str, Callable[[Path, pytest.MonkeyPatch], tuple[str, nn.Module, Theirs]]] = {
    "torchvision": of_torchvision,
    "timm, centre": lambda folder, _: of_timm(folder, crop_pct=0.8),
    "timm, squash": lambda folder, _: of_timm(folder, crop_mode="squash", crop_pct=0.9),
    "ConvNeXt": lambda folder, _: of_transformers(folder, "ConvNextImageProcessor", **CONVNEXT),
    "ViT": lambda folder, _: of_transformers(folder, "ViTImageProcessor", **VIT),
    "CLIP": lambda folder, _: of_transformers(folder, "CLIPImageProcessor", **CLIP),
}


@pytest.mark.parametrize("way", WAYS)
def test_pictures_reach_the_network_as_outside(
    way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, _, theirs = WAYS[way](tmp_path, monkeypatch)
    files = pictures(tmp_path / "pictures")
    transform = transform_of(spec)
    assert transform is not None
    data = impatient.load_data(f"imagefolder:{tmp_path}/pictures", transform=transform)
    tests = sorted(file for file in files if "/test/" in str(file))
    outside = torch.stack([torch.as_tensor(theirs(Image.open(file))) for file in tests])
    inside = next(data.batches("test", 100))[0]
    # filters round differently
    rounding = 0.01 / min(transform.std)
    torch.testing.assert_close(inside, outside, atol=rounding, rtol=0.0)
    assert (inside - outside).abs().mean() < rounding / 10
    # and so does one picture by itself, as for `impatient run`
    alone = data.preprocess(data.preprocess.image(tests[0]))
    torch.testing.assert_close(alone, inside[:1])
    # another way differs by far more
    other = impatient.load_data(f"imagefolder:{tmp_path}/pictures:size={transform.size[0]}")
    assert (next(other.batches("test", 100))[0] - outside).abs().mean() > 5 * rounding


def test_what_the_user_says_goes_before_what_the_weights_expect(tmp_path: Path) -> None:
    pictures(tmp_path)
    expected = Transform(
        mean=(0.1, 0.2, 0.3),
        std=(0.5, 0.6, 0.7),
        size=(32, 32),
        resizing=Resizing(how="shorter", before=(40, 40), interpolation="bicubic"),
    )

    def preprocess(options: str = "") -> impatient.training.Preprocess:
        name = f"imagefolder:{tmp_path}{options}"
        return impatient.load_data(name, transform=expected).preprocess

    usual = preprocess()
    assert (usual.mean, usual.std, usual.size) == (expected.mean, expected.std, (32, 32))
    assert "the shorter side becomes 40 pixels, and the centre is cut out (bicubic)" in str(usual)
    larger = preprocess(":size=64")
    assert (larger.size, larger.resizing.before) == ((64, 64), (80, 80))
    assert preprocess(":mean=0.5,std=0.25").mean == (0.5, 0.5, 0.5)
    assert preprocess(":normalise=none").mean == ()
    fitted = preprocess(":normalise=fit")
    assert fitted.mean not in ((), usual.mean)
    # what is done to inputs is part of what the data are
    data = [
        impatient.load_data(f"imagefolder:{tmp_path}", transform=one)
        for one in (None, expected, expected.at((40, 40)))
    ]
    assert len({one.fingerprint for one in data}) == 3


def arrays(file: Path, x: np.ndarray) -> str:
    y = np.arange(len(x)) % 2
    np.savez(file, x_train=x, y_train=y, x_test=x, y_test=y)
    return f"npz:{file}"


def test_arrays_keep_their_size_and_are_refused_where_the_numbers_are_others(
    tmp_path: Path,
) -> None:
    expected = Transform(
        mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), size=(32, 32), resizing=Resizing()
    )
    x = np.random.default_rng(0).random((20, 8, 8, 3), dtype=np.float32)
    data = impatient.load_data(arrays(tmp_path / "unit.npz", x), transform=expected)
    assert (data.preprocess.mean, data.preprocess.size) == (expected.mean, (8, 8))
    # one grey channel has the mean of the three
    grey = impatient.load_data(arrays(tmp_path / "grey.npz", x[..., :1]), transform=expected)
    assert grey.preprocess.mean == pytest.approx((0.2,))
    large = arrays(tmp_path / "large.npz", 3 * x)
    with pytest.raises(DataError, match=r"but the weights of the model expect 0 to 1.*normalise="):
        impatient.load_data(large, transform=expected)
    assert impatient.load_data(f"{large}:normalise=none", transform=expected).preprocess.mean == ()
    four = arrays(tmp_path / "four.npz", np.concatenate([x, x[..., :1]], -1))
    with pytest.raises(DataError, match="expect pictures of 3 channels, and these have 4"):
        impatient.load_data(four, transform=expected)


def test_weights_that_say_nothing_of_pictures_have_no_transform(tmp_path: Path) -> None:
    timm_folder(tmp_path / "timm")
    transformers_folder(tmp_path / "silent")
    for spec in (
        "impatient:resnet",
        "torchvision:resnet18",
        f"timm:{tmp_path}/timm:pretrained=false",
        f"transformers:{tmp_path}/silent",
        "some.module:factory",
    ):
        assert transform_of(spec) is None


def test_a_way_that_is_not_known_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    timm_folder(tmp_path / "model", crop_mode="border", crop_pct=0.9)
    assert transform_of(f"timm:{tmp_path}/model:pretrained=true") is None
    assert "none of the ways known here" in caplog.text
