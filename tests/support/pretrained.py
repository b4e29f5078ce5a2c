"""Small models as their libraries keep trained ones: in a cache or a folder, nothing downloaded."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_model
from torch import nn

from impatient.networks.specs import import_torchvision


def cached_torchvision(
    folder: Path, monkeypatch: pytest.MonkeyPatch, name: str = "shufflenet_v2_x0_5"
) -> nn.Module:
    """Put random weights where torchvision looks for downloaded ones.

    Returns the model.
    """
    models = import_torchvision().models
    torch.manual_seed(7)
    model = settled(models.get_model(name))
    weights = models.get_model_weights(name)["DEFAULT"]
    file = folder / "hub" / "checkpoints" / weights.url.rpartition("/")[2]
    file.parent.mkdir(parents=True)
    torch.save(model.state_dict(), file)
    monkeypatch.setenv("TORCH_HOME", str(folder))
    return model


def timm_folder(folder: Path, classes: int = 5, **about: Any) -> nn.Module:
    """Write a folder as timm writes it for the Hub.

    Returns the model.
    """
    import_torchvision()
    import timm

    torch.manual_seed(7)
    model = settled(timm.create_model("test_resnet", num_classes=classes))
    usual = {"num_classes": classes, "input_size": [3, 32, 32], "classifier": "fc"}
    config = {
        "architecture": "test_resnet",
        "num_classes": classes,
        "pretrained_cfg": {**usual, "first_conv": "conv1.0", **about},
    }
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_model(model, str(folder / "model.safetensors"))
    return model


def transformers_folder(folder: Path, classes: int = 5, **about: Any) -> nn.Module:
    """Write a small image classifier as transformers does.

    Returns the model.
    """
    import_torchvision()
    import transformers

    torch.manual_seed(7)
    config = transformers.ResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 16],
        depths=[1, 1],
        layer_type="basic",
        num_labels=classes,
    )
    model = settled(transformers.ResNetForImageClassification(config))
    model.save_pretrained(folder)
    if about:
        (folder / "preprocessor_config.json").write_text(json.dumps(about))
    return model


def pictures(folder: Path, count: int = 8) -> list[Path]:
    """Write pictures of two classes, of different sizes and colours, half of them for testing."""
    generator = np.random.default_rng(5)
    files = []
    for split in ("train", "test"):
        for index in range(count):
            rows, columns = generator.integers(60, 140, 2)
            small = generator.integers(0, 256, (4, 5, 3), dtype=np.uint8)
            file = folder / split / f"class{index % 2}" / f"{index}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(small).resize((int(columns), int(rows))).save(file)
            files.append(file)
    return files


def settled(model: nn.Module) -> nn.Module:
    """Give batch norms statistics that are not the initial ones."""
    generator = torch.Generator().manual_seed(8)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.1, 0.1, generator=generator)
            module.running_var.uniform_(0.5, 1.5, generator=generator)
    return model.eval()
