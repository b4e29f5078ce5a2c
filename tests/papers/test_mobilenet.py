"""MobileNet as ImageNet's weights have it: its padding, its order, and what a run takes of it."""

import dataclasses
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression

from impatient.files import read_tensors
from papers import data
from papers.impatient_dnn import long, recipe
from papers.impatient_dnn.long import LONG
from papers.impatient_dnn.mobilenet import MobileNet, imagenet_weights

NAME = "mnv1_025_128"
SMALL = {"width": 1 / 16, "size": 32}


@pytest.fixture
def stored(tmp_path):
    """A file like that of the shared data, of a thinner network with random weights in 8 bits."""
    random = np.random.default_rng(0)
    arrays, operations = {}, []
    for index, layer in enumerate(MobileNet(**SMALL).convolutions()):
        depthwise = layer.groups > 1
        out, inside, high, wide = layer.weight.shape
        shape = (1, high, wide, out) if depthwise else (out, high, wide, inside)
        key = f"{NAME}.{index}"
        arrays |= {
            f"{key}.w": random.integers(0, 256, shape, dtype=np.uint8),
            f"{key}.w_zero": np.uint8(120),
            f"{key}.w_scale": np.float32(0.02 / (inside * high * wide) ** 0.5),
            f"{key}.b": random.normal(0, 0.1, out).astype(np.float32),
        }
        name = "DEPTHWISE_CONV_2D" if depthwise else "CONV_2D"
        operations.append({"op": name, "key": key, "stride": layer.stride[0]})
    operations.append({"op": "AVERAGE_POOL_2D"})
    # the classifier of other classes, which is left
    operations.append({"op": "CONV_2D", "key": "unread", "stride": 1})
    arrays[f"{NAME}.json"] = np.frombuffer(json.dumps({"ops": operations}).encode(), np.uint8)
    file = tmp_path / "mobilenets_imagenet_u8.npz"
    np.savez(file, **arrays)
    return file, operations, arrays


def as_tensorflow(x, operations, arrays):
    """Run the stored operations one by one, padded as TensorFlow's SAME."""
    for operation in operations[:-2]:
        key, stride = operation["key"], operation["stride"]
        whole = arrays[f"{key}.w"].astype(np.float32) - np.float32(arrays[f"{key}.w_zero"])
        weight = torch.from_numpy(whole * arrays[f"{key}.w_scale"])
        depthwise = operation["op"].startswith("D")
        weight = weight.permute(3, 0, 1, 2) if depthwise else weight.permute(0, 3, 1, 2)
        high, kernel = x.shape[-1], weight.shape[-1]
        pad = max((-(-high // stride) - 1) * stride + kernel - high, 0)
        x = F.pad(x, (pad // 2, pad - pad // 2) * 2)
        bias = torch.from_numpy(arrays[f"{key}.b"])
        x = F.conv2d(x, weight, bias, stride, groups=len(weight) if depthwise else 1).clamp(0, 6)
    return x


def test_the_stored_weights_compute_what_tensorflow_computes(stored):
    file, operations, arrays = stored
    network = MobileNet(**SMALL)
    imagenet_weights(network, file)
    network.classifier = torch.nn.Identity()
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    expected = as_tensorflow(images, operations, arrays).mean((2, 3))
    assert expected.std() > 0.01
    assert torch.allclose(network(images), expected, atol=1e-5)
    # an exit after every block
    assert len(network.blocks) == LONG.pairs[0].blocks


def test_a_run_begins_with_imagenets_weights_and_its_kind_of_images(stored, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "shared_folder", lambda: tmp_path)
    options = ",".join(f"{name}={value}" for name, value in SMALL.items())
    spec = f"{LONG.pairs[0].network}:{options}"
    pair = dataclasses.replace(LONG.pairs[0], target="digits", network=spec)
    source = tmp_path / recipe._source_name(pair, 0)
    source.mkdir()
    assert recipe.pretrain(pair=pair, settings=LONG.settings, seed=0, folder=source) == {
        "validation": []
    }
    target = recipe.target_of(pair, dataclasses.replace(LONG.settings, train=100), seed=0)
    low, high = (
        target.preprocess(torch.tensor([[[[value]]]], dtype=torch.uint8)) for value in (0, 255)
    )
    assert (low.item(), high.item()) == (-1.0, 1.0)
    kept, _ = read_tensors(source / "weights.safetensors")
    expected = MobileNet(**SMALL)
    imagenet_weights(expected, stored[0])
    for name, value in expected.blocks.state_dict(prefix="blocks.").items():
        assert torch.equal(kept[name], value), name


def test_early_heads_may_begin_as_logistic_regressions() -> None:
    pair = recipe.SCALES["smoke"].pairs[1]
    settings = dataclasses.replace(recipe.SCALES["smoke"].settings, train=400)
    target = recipe.target_of(pair, settings, 0)
    network = recipe.with_exits(
        recipe._backbone(pair, target, 0), pair, target, recipe.standardised_linear
    ).eval()
    seen = recipe._features(network.backbone, pair, target, "train")
    before = recipe._judged(network, target)["test"]
    recipe.fit_heads(network, seen)
    after = recipe._judged(network, target)["test"]
    # the backbone and its own classifier stay as they are
    assert after[-1] == before[-1]
    assert all(fitted > random for fitted, random in zip(after[:-1], before, strict=False))
    own = seen.features[0]
    scaled = (own - own.mean(0)) / own.std(0)
    known = LogisticRegression(C=0.1, max_iter=1000).fit(scaled, seen.labels)
    with torch.inference_mode():
        (inputs, _) = next(target.batches("train", 64))
        output = network(inputs)[0]
    assert np.abs(output.numpy() - known.decision_function(scaled[:64])).max() < 0.1


def test_signs_are_not_mirrored_and_their_table_needs_a_place(capsys) -> None:
    signs = long._of_signs(LONG)
    assert [pair.target for pair in signs.pairs] == ["gtsrb"]
    assert signs.settings.training.augment == "crop"
    assert LONG.settings.training.augment == "crop-flip"
    with pytest.raises(SystemExit):
        long.main(["--case", "gtsrb"])
    assert "give its folder with --out" in capsys.readouterr().err
