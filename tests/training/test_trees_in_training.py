"""Samples of several arrays: token ids with their padding mask."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import impatient
from impatient.errors import TrainingError

WORDS = 30
LONGEST = 12


class Reader(nn.Module):
    """A small text model that takes ids and a mask by name."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, 16)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True) for _ in range(2)
        )
        self.classifier = nn.Linear(16, 2)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.embedding(input_ids)
        for block in self.blocks:
            x = block(x, src_key_padding_mask=attention_mask == 0)
        kept = attention_mask[..., None].float()
        return self.classifier((x * kept).sum(1) / kept.sum(1))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> impatient.Data:
    """Texts that hold word 7 or do not, of different lengths."""
    rng = np.random.default_rng(0)
    arrays: dict[str, Any] = {}
    for split, count in (("train", 400), ("test", 100)):
        ids = rng.integers(8, WORDS, (count, LONGEST))
        mask = np.arange(LONGEST) < rng.integers(3, LONGEST + 1, count)[:, None]
        labels = rng.integers(0, 2, count)
        ids[labels == 1, 1] = 7
        arrays[f"x_{split}.input_ids"] = np.where(mask, ids, 0)
        arrays[f"x_{split}.attention_mask"] = mask.astype(np.int64)
        arrays[f"y_{split}"] = labels
    file = Path(tmp_path_factory.mktemp("texts")) / "texts.npz"
    np.savez(file, **arrays)
    return impatient.load_data(f"npz:{file}")


def attached(data: impatient.Data) -> impatient.MultiExitNetwork:
    torch.manual_seed(0)
    return impatient.attach_exits(Reader(), example=data.example(2), after=["blocks.0"])


def test_a_text_model_with_its_mask_is_trained_recorded_and_judged(data: impatient.Data) -> None:
    network = attached(data)
    recipe = impatient.Recipe(epochs=12, batch_size=32, lr=0.05)
    history = impatient.fit(network, data, recipe=recipe, progress=False)
    recording = impatient.record(network, data, split="test", batch_size=32)
    assert float(recording.quality[-1].mean()) > 0.9
    assert len(history.epochs) == 12
    # the exits of a sample do not depend on its batch or on more padding
    x = data.preprocess(data.examples("test").take(range(8)))
    longer = {name: torch.nn.functional.pad(value, (0, 5)) for name, value in x.items()}
    for one, other in zip(network(x), network(longer), strict=True):
        assert torch.allclose(one, other, atol=1e-5)


def test_texts_are_not_cropped(data: impatient.Data) -> None:
    with pytest.raises(TrainingError, match=r"is for images .* several arrays"):
        impatient.fit(
            attached(data), data, recipe=impatient.Recipe(epochs=1, augment="crop"), progress=False
        )


def test_images_are_not_moved_away_from_their_masks(tmp_path: Path) -> None:
    masks = np.zeros((40, 8, 8), np.int64)
    pictures = np.zeros((40, 8, 8, 3), np.uint8)
    np.savez(tmp_path / "maps.npz", x_train=pictures, y_train=masks, x_test=pictures, y_test=masks)
    maps = impatient.load_data(f"npz:{tmp_path / 'maps.npz'}")
    network = impatient.attach_exits(
        nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)),
        example=maps.example(2),
        after=["0"],
        task="segmentation",
    )
    with pytest.raises(TrainingError, match="moves the images but not their targets"):
        impatient.fit(
            network, maps, recipe=impatient.Recipe(epochs=1, augment="crop"), progress=False
        )
