"""Early prediction layers (heads), from the features at a cut to an output."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from impatient.errors import HeadError, TaskError
from impatient.inputs import evaluating

# N batch, C or D channels, T tokens or time, H and W space
Layout = Literal["ND", "NTD", "NCT", "NCHW", "NHWC", "NCTHW", "NTHWC"]
_BY_DIMENSIONS: dict[int, tuple[Layout, Layout]] = {
    3: ("NCT", "NTD"),
    4: ("NCHW", "NHWC"),
    5: ("NCTHW", "NTHWC"),
}
_NESTED = (
    "the features are a nested tensor, which nn.TransformerEncoder makes of padded inputs in eval "
    "mode; expected a plain tensor. Build it with enable_nested_tensor=False."
)
HeadFactory = Callable[["FeatureShape", int], nn.Module]


class FeatureShape:
    """Shape and layout of the features at a cut, for any batch size.

    Attributes:
        shape: shape of the features on the example, batch first.
        layout: meaning of each dimension: N batch, C or D channels, H and W space, T tokens or
            time.
        channels: number of channels, that is, features per position.
    """

    __slots__ = ("channels", "layout", "shape")

    def __init__(self, shape: tuple[int, ...], layout: Layout) -> None:
        if len(layout) != len(shape):
            raise HeadError(
                f"layout {layout} needs {len(layout)} dimensions, but the features have shape "
                f"{shape}."
            )
        self.shape = shape
        self.layout = layout
        self.channels = shape[channel_dim(layout)]

    def __repr__(self) -> str:
        return f"{'x'.join(str(size) for size in self.shape[1:])} {self.layout}"


def channel_dim(layout: Layout) -> int:
    """Return which dimension holds the channels, 1 or -1."""
    return 1 if layout[1] in "CD" else -1


def guess_layout(features: Tensor, module: nn.Module) -> Layout:
    """Guess what the dimensions of a module's output mean.

    The width of the module's last normalisation, linear layer or convolution is the number of
    channels, and shows whether they come first or last. If it does not, three dimensions are taken
    as channels-last (tokens), four and five as channels-first (maps, video).

    Raises:
        HeadError: if the features have fewer than 2 or more than 5 dimensions, or are not floating
            point.
    """
    if features.is_nested:
        raise HeadError(_NESTED)
    shape = tuple(features.shape)
    if not features.is_floating_point():
        raise HeadError(
            f"features of type {features.dtype} and shape {shape}; expected floating point. Attach "
            "the exit elsewhere."
        )
    if len(shape) == 2:
        return "ND"
    if len(shape) not in _BY_DIMENSIONS:
        raise HeadError(
            f"features of shape {shape} have {len(shape)} dimensions; expected [B,D], [B,T,D], "
            "[B,C,T], [B,C,H,W], [B,H,W,C], [B,C,T,H,W] or [B,T,H,W,C]. Attach the exit elsewhere, "
            "or give your own head as a callable (FeatureShape, num_classes) -> nn.Module."
        )
    first, last = _BY_DIMENSIONS[len(shape)]
    width, channels_last = _last_width(module)
    if width == shape[1] != shape[-1]:
        return first
    if width == shape[-1] != shape[1]:
        return last
    if len(shape) == 3 and width not in shape[1:]:
        return last
    return last if channels_last else first


def _last_width(module: nn.Module) -> tuple[int | None, bool]:
    """Return the output width of the last layer with parameters.

    The second value tells whether the layer works on the last dimension.
    """
    for layer in reversed(list(module.modules())):
        if isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            return layer.out_channels, False
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            return layer.num_features, False
        if isinstance(layer, nn.Linear):
            return layer.out_features, True
        if isinstance(layer, nn.LayerNorm) and len(layer.normalized_shape) == 1:
            return layer.normalized_shape[0], True
    return None, False


class Pool(nn.Module):
    """Mean over space, time or tokens, to features [B,C].

    Features [B,D] are not changed. With a mask [B,T], the mean is over tokens that are not padding.
    """

    def __init__(self, layout: Layout) -> None:
        super().__init__()
        self.layout = layout

    def forward(self, features: Tensor, mask: Tensor | None = None) -> Tensor:
        return pooled(features, self.layout, mask)

    def extra_repr(self) -> str:
        return self.layout


def pooled(features: Tensor, layout: Layout, mask: Tensor | None = None) -> Tensor:
    """Average features over space, time or tokens, as `Pool` does."""
    if layout == "ND":
        return features
    if features.is_nested:
        raise HeadError(_NESTED)
    positions = [dim for dim, letter in enumerate(layout) if letter in "THW"]
    return features.mean(positions) if mask is None else _mean(features, positions, mask)


def _mean(features: Tensor, positions: list[int], mask: Tensor) -> Tensor:
    """Average over the tokens that a mask [B,T] does not leave out."""
    sizes = [features.shape[dim] for dim in positions]
    real = _coarser(mask, sizes[0]) if mask.dim() == 2 else None
    if real is None or any(size != 1 for size in sizes[1:]):
        raise HeadError(
            f"the padding mask has shape {tuple(mask.shape)}, but the features have {sizes} "
            "positions; expected a mask [B,T] with one entry per position, 0 where there is "
            "padding. Name another with attach_exits(..., mask=...), or let heads read all with "
            "mask=None."
        )
    shape = [1] * features.dim()
    shape[0] = real.shape[0]
    shape[positions[0]] = real.shape[1]
    real = real.reshape(shape)
    # Not a product, because padding may hold infinities.
    kept = torch.where(real, features, 0.0)
    return kept.sum(positions) / real.sum(positions).clamp(min=1)


def _coarser(mask: Tensor, count: int) -> Tensor | None:
    """Return a mask of fewer positions, or None if there is none.

    Each position stands for the same number of tokens. A position is real if one of its tokens is.
    """
    tokens = mask.shape[1]
    span = -(-tokens // max(count, 1))
    missing = span * count - tokens
    if not 0 <= missing < span:
        return None
    real = mask != 0
    if span == 1:
        return real
    padded: Tensor = functional.pad(real, (0, missing))
    windows: Tensor = padded.unflatten(1, (count, span))
    return windows.any(-1)


class Layers(nn.Sequential):
    """Layers of a head, one after another.

    A padding mask reaches the pool among them.
    """

    def forward(self, features: Tensor, mask: Tensor | None = None) -> Tensor:
        for layer in self:
            pools = mask is not None and isinstance(layer, Pool)
            features = layer(features, mask) if pools else layer(features)
        return features


def takes_mask(head: nn.Module) -> bool:
    """Tell whether a head can leave padding out: its forward has an argument `mask`."""
    return _has_mask(type(head).forward)


# Remembered, because every exit of every run asks.
@functools.lru_cache(maxsize=64)
def _has_mask(forward: Callable[..., Any]) -> bool:
    return "mask" in inspect.signature(forward).parameters


def with_mask(head: Any, mask: Tensor | None) -> Callable[[Tensor], Tensor]:
    """Bind a padding mask to a head that takes one."""
    return head if mask is None or not takes_mask(head) else functools.partial(head, mask=mask)


def linear(features: FeatureShape, num_classes: int) -> nn.Module:
    """Build a pool and a linear layer, the least expensive head.

    It takes C x num_classes MACs.
    """
    return Layers(Pool(features.layout), nn.Linear(features.channels, num_classes))


def relu_linear(features: FeatureShape, num_classes: int) -> nn.Module:
    """Build ReLU, pool and a linear layer, for pre-activation backbones.

    Source:
        Anytime Neural Networks (Hu et al.), the head of every experiment.
    """
    return Layers(nn.ReLU(), *linear(features, num_classes).children())


def mlp(
    features: FeatureShape, num_classes: int, hidden: int = 128, dropout: float = 0.0
) -> nn.Module:
    """Build a pool and a multilayer perceptron.

    It has a hidden layer of `hidden` units with ReLU, dropout if that is not 0, and a linear layer.
    """
    return Layers(
        Pool(features.layout),
        nn.Linear(features.channels, hidden),
        nn.ReLU(),
        *([nn.Dropout(dropout)] if dropout else []),
        nn.Linear(hidden, num_classes),
    )


def mlp_dropout(features: FeatureShape, num_classes: int) -> nn.Module:
    """Build the mlp head with half of its hidden units dropped in training."""
    return mlp(features, num_classes, dropout=0.5)


def flatten(features: FeatureShape, num_classes: int) -> nn.Module:
    """Build a linear layer on all features.

    It takes C x H x W x num_classes MACs and as many weights. It accepts only features of the
    example's size; torch refuses others ("shapes cannot be multiplied").

    Source:
        Impatient DNNs (Amthor et al.), whose figure of the layers is lost: fully connected on the
        feature map.
    """
    return nn.Sequential(nn.Flatten(), nn.Linear(math.prod(features.shape[1:]), num_classes))


def adaptive(features: FeatureShape, num_classes: int, size: int = 2) -> nn.Module:
    """Build average pooling to size x size positions and a linear layer.

    If the map is smaller than that, its own size is kept. The linear layer takes all positions.
    """
    _check_map("adaptive", features)
    sizes = features.shape[2:] if features.layout == "NCHW" else features.shape[1:3]
    height, width = (min(size, own) for own in sizes)
    return nn.Sequential(
        *_channels_first(features),
        nn.AdaptiveAvgPool2d((height, width)),
        nn.Flatten(),
        nn.Linear(features.channels * height * width, num_classes),
    )


def conv1x1(features: FeatureShape, num_classes: int, widen: int = 2) -> nn.Module:
    """Build a 1x1 convolution, a pool and a linear layer.

    The convolution gives widen x C channels and is followed by batch norm and ReLU. It works on
    tokens, too, which count as positions.

    Source:
        Anytime Neural Networks' code, `prediction_feature=1x1`; the width is ours.
    """
    return Layers(*_channels_first(features), *_conv1x1_head(features.channels, widen, num_classes))


def rescale(features: FeatureShape, num_classes: int, size: int = 7, widen: int = 2) -> nn.Module:
    """Build a bilinear resize to size x size positions and the conv1x1 head.

    It takes the same time at every resolution.

    Source:
        Anytime Neural Networks' code, `prediction_feature=rescale`: bilinear to 7x7 and a 1x1
        convolution; the rest is ours.
    """
    _check_map("rescale", features)
    resize = nn.Upsample((size, size), mode="bilinear", align_corners=False)
    return nn.Sequential(
        *_channels_first(features), resize, *_conv1x1_head(features.channels, widen, num_classes)
    )


def _conv1x1_head(channels: int, widen: int, num_classes: int) -> tuple[nn.Module, ...]:
    width = widen * channels
    return (
        nn.Conv2d(channels, width, 1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        Pool("NCHW"),
        nn.Linear(width, num_classes),
    )


class ChannelsFirst(nn.Module):
    """Any features as maps [B,C,H,W].

    Tokens [B,T,D] become [B,D,T,1], vectors [B,D,1,1], and video [B,C,T,HW].
    """

    def __init__(self, layout: Layout) -> None:
        super().__init__()
        self.layout = layout

    def forward(self, features: Tensor) -> Tensor:
        channels_first = features if channel_dim(self.layout) == 1 else features.movedim(-1, 1)
        if channels_first.dim() == 5:
            return channels_first.flatten(3)
        return channels_first.reshape(*channels_first.shape, *(1,) * (4 - channels_first.dim()))

    def extra_repr(self) -> str:
        return self.layout


def _channels_first(features: FeatureShape) -> tuple[nn.Module, ...]:
    return () if features.layout == "NCHW" else (ChannelsFirst(features.layout),)


def _check_map(head: str, features: FeatureShape) -> None:
    if len(features.layout) != 4:
        raise HeadError(
            f"the {head} head got features {features!r}; expected maps [B,C,H,W] or [B,H,W,C]. Use "
            "heads='linear' or heads='mlp'."
        )


class MSDNetHead(nn.Module):
    """Two 3x3 convolutions of stride 2, average pooling and a linear layer.

    Each convolution gives 128 channels and is followed by batch norm and ReLU.

    Source:
        Huang et al. 2018 (MSDNet). We differ: the pooling is global, so that any resolution fits.
    """

    def __init__(self, features: FeatureShape, num_classes: int, width: int = 128) -> None:
        super().__init__()
        _check_map("msdnet", features)
        self.to_channels_first = features.layout == "NHWC"
        self.convolutions = nn.Sequential(
            *_conv_bn_relu(features.channels, width), *_conv_bn_relu(width, width)
        )
        self.pool = Pool("NCHW")
        self.classifier = nn.Linear(width, num_classes)

    def forward(self, features: Tensor) -> Tensor:
        if self.to_channels_first:
            features = features.permute(0, 3, 1, 2)
        return torch.as_tensor(self.classifier(self.pool(self.convolutions(features))))


def _conv_bn_relu(inputs: int, outputs: int) -> tuple[nn.Module, ...]:
    return (
        nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )


def identity(features: FeatureShape, num_classes: int) -> nn.Module:  # noqa: ARG001  a factory
    """Build no layer: what comes out of the module is the answer, such as that of a loop's step."""
    return nn.Identity()


HEADS: dict[str, HeadFactory] = {
    "identity": identity,
    "linear": linear,
    "relu_linear": relu_linear,
    "mlp": mlp,
    "mlp_dropout": mlp_dropout,
    "flatten": flatten,
    "adaptive": adaptive,
    "conv1x1": conv1x1,
    "rescale": rescale,
    "msdnet": MSDNetHead,
}


def build_head(head: str | HeadFactory, features: FeatureShape, num_classes: int) -> nn.Module:
    """Build one head, by name or by a callable (FeatureShape, num_classes) -> nn.Module.

    Raises:
        HeadError: if the name is unknown, the features do not fit the head, or a callable does not
            return a module.
    """
    if isinstance(head, nn.Module):
        raise HeadError(
            f"a head is a {type(head).__name__}, a module that is made already; expected a name or "
            "a function that makes one for each exit: attach_exits(..., heads=lambda features, "
            "outputs: MODULE)."
        )
    if callable(head):
        built = head(features, num_classes)
        if not isinstance(built, nn.Module):
            raise HeadError(
                f"the factory of a head returned a {type(built).__name__}; expected a "
                "torch.nn.Module."
            )
        return built
    if head not in HEADS:
        raise HeadError(
            f"unknown head {head!r}; expected one of {', '.join(HEADS)}, or a callable."
        )
    return HEADS[head](features, num_classes)


def head_for(head: str | HeadFactory, features: FeatureShape, output: Tensor) -> nn.Module:
    """Build a head whose outputs have the shape of the network's own.

    For [B, D] it is the head that is named, for [B] one of a single column. Dense maps
    [B, C, H, W] get `Dense`; "linear" stands for it. "identity" fits where features are answers.

    Raises:
        HeadError: if the features do not fit.
    """
    if output.dim() == 2:
        return build_head(head, features, output.shape[1])
    if output.dim() == 1 and head != "identity":
        return Column(build_head(head, features, 1))
    if head != "linear":
        return build_head(head, features, output.shape[1])
    if output.dim() != 4:
        raise TaskError(
            f"the backbone gives an output of shape {tuple(output.shape)}; expected [B], [B, D] or "
            "[B, C, H, W]. Give the task a `head` that makes outputs of this shape, or heads of "
            "your own: attach_exits(..., heads=lambda features, outputs: MODULE)."
        )
    return Dense(features, output)


class Column(nn.Module):
    """A head of one column, whose outputs are [B]."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, features: Tensor, mask: Tensor | None = None) -> Tensor:
        return torch.as_tensor(with_mask(self.head, mask)(features)).squeeze(1)


class Dense(nn.Module):
    """A 1x1 convolution and a bilinear resize to maps of the network's output.

    The convolution runs on the small map, and the resize keeps the ratio of output to feature map
    of the example, so that inputs of other sizes fit.
    """

    def __init__(self, features: FeatureShape, output: Tensor) -> None:
        super().__init__()
        if features.layout not in ("NCHW", "NHWC"):
            raise HeadError(
                f"features {features!r} for maps of shape {tuple(output.shape)}; expected features "
                "[B,C,H,W] or [B,H,W,C]. Attach the exit where there are maps."
            )
        self.to_channels_first = nn.Sequential(*_channels_first(features))
        sizes = features.shape[1:3] if features.layout == "NHWC" else features.shape[2:]
        self.ratio = tuple(
            whole / part for whole, part in zip(output.shape[2:], sizes, strict=True)
        )
        self.classifier = nn.Conv2d(features.channels, output.shape[1], 1)

    def forward(self, features: Tensor) -> Tensor:
        maps = self.classifier(self.to_channels_first(features))
        size = [
            round(ratio * length) for ratio, length in zip(self.ratio, maps.shape[2:], strict=True)
        ]
        resized: Tensor = functional.interpolate(
            maps, size=size, mode="bilinear", align_corners=False
        )
        return resized


def check_head(
    head: nn.Module,
    features: Tensor,
    expected: tuple[int, ...],
    where: str,
    mask: Tensor | None = None,
) -> None:
    """Check that a head gives outputs of the network's own shape on example features.

    Raises:
        HeadError: if the head fails or gives something else.
    """
    if mask is not None and not takes_mask(head):
        raise HeadError(
            f"the head at {where}, a {type(head).__name__}, would read padding, which the input's "
            "mask leaves out; expected a head whose forward has an argument `mask`, such as "
            "'linear' or 'mlp'. Or let heads read all with attach_exits(..., mask=None)."
        )
    try:
        with evaluating(head), torch.no_grad():
            output = with_mask(head, mask)(features)
    except HeadError:
        raise
    except Exception as error:
        raise HeadError(
            f"the head at {where} fails on features of shape {tuple(features.shape)}: {error}"
        ) from error
    wanted = (features.shape[0], *expected[1:])
    if not isinstance(output, Tensor) or tuple(output.shape) != wanted:
        got = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise HeadError(f"the head at {where} gives {got}; expected shape {wanted}.")
