"""The networks that are selected among, and a head for exits.

There are CIFAR ResNets that fit the pretrained weights, and two networks for text.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from impatient.errors import DataError, ModelSpecError
from impatient.networks.heads import FeatureShape, Pool

# what the pretrained ResNets were trained with; those trained here take the same, so that all read
# one input
CIFAR_MEAN = (0.485, 0.456, 0.406)
CIFAR_STD = (0.229, 0.224, 0.225)


class BasicBlock(nn.Module):
    """A block of conv3x3-BN-ReLU-conv3x3-BN plus the input.

    Where it down-samples, every second pixel of the input is added, with zeros for new channels.

    Source:
        He et al. 2015, shortcut of option A.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride = stride
        self.padding = outputs - inputs

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.stride > 1 or self.padding:
            half = self.padding // 2
            x = F.pad(
                x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, half, self.padding - half)
            )
        return F.relu(out + x)


class CifarResNet(nn.Module):
    """A ResNet of three stages of basic blocks, with 6n + 2 layers.

    The stages work on maps of 1, 1/2 and 1/4 of the resolution.

    Args:
        num_classes: width of the output.
        depth: 6n + 2: 8, 14, 20, 32, 44, 56.
        width: channels of the first stage; those after it have two and four times as many.
        in_channels: of the image.
    Source:
        He et al. 2015, section 4.2; names of modules as in akamaster/pytorch_resnet_cifar10.
    """

    def __init__(
        self, num_classes: int = 10, depth: int = 20, width: int = 16, in_channels: int = 3
    ) -> None:
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise ModelSpecError(
                f"depth={depth}; expected 6n + 2, such as 8, 14, 20, 32, 44 or 56."
            )
        count = (depth - 2) // 6
        self.conv1 = nn.Conv2d(in_channels, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = _stage(width, width, count, 1)
        self.layer2 = _stage(width, 2 * width, count, 2)
        self.layer3 = _stage(2 * width, 4 * width, count, 2)
        self.linear = nn.Linear(4 * width, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return torch.as_tensor(self.linear(x.mean((2, 3))))


def _stage(inputs: int, outputs: int, count: int, stride: int) -> nn.Sequential:
    rest = (BasicBlock(outputs, outputs, 1) for _ in range(count - 1))
    return nn.Sequential(BasicBlock(inputs, outputs, stride), *rest)


def load_pretrained(network: nn.Module, name: str, path: Path) -> None:
    """Load weights from an npz file with keys "NAME.<name in the state dict>".

    Args:
        network: built to fit.
        name: such as "resnet20".
        path: the shared data's cifar10_resnets.npz, say. Never committed.
    Raises:
        DataError: if the file is missing or holds no, other or differently shaped weights.
    """
    if not path.is_file():
        raise DataError(
            f"no weights at {path}; set IMPATIENT_DATA to the folder of the shared data that has "
            "them."
        )
    prefix = f"{name}."
    with np.load(path, allow_pickle=False) as archive:
        found = {
            key.removeprefix(prefix): torch.from_numpy(archive[key])
            for key in archive.files
            if key.startswith(prefix)
        }
    # how often batch norm was updated is not stored, and used by nothing
    wanted = {
        key: value
        for key, value in network.state_dict().items()
        if not key.endswith("num_batches_tracked")
    }
    odd = sorted(
        key for key in wanted.keys() ^ found.keys() if not key.endswith("num_batches_tracked")
    )
    odd += [key for key in wanted.keys() & found.keys() if wanted[key].shape != found[key].shape]
    if odd:
        raise DataError(
            f"{path} has {len(found)} arrays of {name!r}, which do not fit "
            f"{type(network).__name__}: {odd[:5]}."
        )
    network.load_state_dict(found, strict=False)


# --- text -----------------------------------------------------------------------------------------


class BagOfWords(nn.Module):
    """The mean of the words' embeddings, and a linear layer.

    Args:
        num_classes: width of the output.
        words: how many ids it knows, frequent words first; id 0 is padding, and from `words` on all
            are left out.
        width: of an embedding.
    """

    def __init__(self, num_classes: int = 4, words: int = 20_002, width: int = 16) -> None:
        super().__init__()
        self.words = words
        self.embedding = _embedding(words, width)
        self.linear = nn.Linear(width, num_classes)

    def forward(self, ids: Tensor) -> Tensor:
        ids = ids * (ids < self.words)
        # padding is embedded as zeros
        total = self.embedding(ids).sum(1)
        return torch.as_tensor(self.linear(total / (ids > 0).sum(1, keepdim=True).clamp(min=1)))


def _embedding(words: int, width: int) -> nn.Embedding:
    """Small at first: what rare words are left with is noise."""
    embedding = nn.Embedding(words, width, padding_idx=0)
    with torch.no_grad():
        embedding.weight.mul_(0.1)
    return embedding


class TextBlock(nn.Module):
    """conv3-BN-ReLU-conv3-BN along the text, plus the input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv1d(width, width, 3, 1, 1, bias=False),
            nn.BatchNorm1d(width),
            nn.ReLU(),
            nn.Conv1d(width, width, 3, 1, 1, bias=False),
            nn.BatchNorm1d(width),
        )
        nn.init.zeros_(self.body[-1].weight)  # type: ignore[arg-type]  # nothing is added at first, which trains better

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.body(x))


class TextResNet(nn.Module):
    """A ResNet for text, of residual blocks of convolutions along the text.

    The classifier takes the largest value of each channel, and the mean embedding.

    Args:
        num_classes: width of the output.
        words: how many ids there are; id 0 is padding.
        width: of embeddings and blocks.
        blocks: how many.
    """

    def __init__(
        self, num_classes: int = 4, words: int = 20_002, width: int = 64, blocks: int = 4
    ) -> None:
        super().__init__()
        self.embedding = _embedding(words, width)
        self.blocks = nn.Sequential(*(TextBlock(width) for _ in range(blocks)))
        self.linear = nn.Linear(2 * width, num_classes)

    def forward(self, ids: Tensor) -> Tensor:
        embedded = self.embedding(ids)
        mean = embedded.sum(1) / (ids > 0).sum(1, keepdim=True).clamp(min=1)
        features = self.blocks(embedded.transpose(1, 2)).amax(2)
        return torch.as_tensor(self.linear(torch.cat([features, mean], 1)))


# --- heads ----------------------------------------------------------------------------------------


def strided_head(features: FeatureShape, num_classes: int, width: int = 64) -> nn.Module:
    """Build a head of a strided convolution, a mean and a linear layer.

    The 3x3 convolution has stride 2 and 64 channels, and is followed by BN and ReLU.
    The backbone is frozen, and its early channels were made for later blocks, not for a linear
    layer; this costs one or two per cent of a ResNet-56.
    """
    convolution = nn.Conv2d(features.channels, width, 3, stride=2, padding=1, bias=False)
    return nn.Sequential(
        convolution, nn.BatchNorm2d(width), nn.ReLU(), Pool("NCHW"), nn.Linear(width, num_classes)
    )
