"""AnytimeNet, a network of sections that grows in iterations.

Each iteration is an exit. The first iteration runs a few blocks of every section. Each later one
adds blocks above those that have run: it continues from the tensor cached there, and runs only the
later sections again, because their input has changed. `growth` computes in which order to grow, and
what that costs.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import statistics
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from impatient import checks
from impatient.anytime import Exit, Network, Run
from impatient.clock import SYSTEM_CLOCK, Clock, interleaved
from impatient.counting import StageFacts, count_macs, module_name
from impatient.errors import ModelSpecError, NetworkError, NoEffectWarning
from impatient.inputs import call_model, evaluating, synchronise
from impatient.networks import growth
from impatient.networks.building import check_sizes, initialise_convolutions
from impatient.networks.gradients import PLAIN, GradientFlow
from impatient.networks.growth import PAPER, BlockCosts, Schedule
from impatient.networks.heads import Layout, Pool, _last_width, channel_dim, pooled
from impatient.networks.stages import Position, StagedExit
from impatient.progress import tracked

Sharing = Literal["shared", "own"]

# Epsilon of every batch norm, as in the paper.
EPSILON = 0.001


# --- the complete network -------------------------------------------------------------------------


class SectionedNetwork(nn.Module):
    """A plain network of IN, sections of blocks, and OUT.

    Attributes:
        stem: IN, from the input to the features of the first section.
        sections: lists of blocks; only the first block of a section may change the shape of the
            features.
        out: OUT, from the last section's features to the output.
    """

    def __init__(
        self, stem: nn.Module, sections: Sequence[Iterable[nn.Module]], out: nn.Module
    ) -> None:
        super().__init__()
        self.stem = stem
        self.sections = nn.ModuleList(nn.ModuleList(blocks) for blocks in sections)
        self.out = out

    @property
    def counts(self) -> growth.Counts:
        """Return the number of blocks of each section."""
        return tuple(len(blocks) for blocks in self._sections())

    def parts(self) -> dict[str, nn.Module]:
        """Return all parts in running order, by their names in `growth.trace`."""
        blocks = {
            f"S{section}.{position}": block
            for section, blocks in enumerate(self._sections(), start=1)
            for position, block in enumerate(blocks, start=1)
        }
        return {"IN": self.stem, **blocks, "OUT": self.out}

    def forward(self, x: Any) -> Tensor:
        x = call_model(self.stem, x)
        for block in itertools.chain.from_iterable(self._sections()):
            x = block(x)
        return torch.as_tensor(self.out(x))

    def _sections(self) -> tuple[Any, ...]:
        return tuple(self.sections)


class BaseBlock(nn.Module):
    """A block of BN-ReLU-conv3x3-BN-ReLU-conv3x3 plus the input.

    Where the block halves the resolution and widens, every second pixel of the input is added, with
    channels of zeros after the old ones.

    Source:
        AnytimeNet, figure 1; He et al. 2016 (full pre-activation). The paper says zero-padded and
        no more; every second pixel, and the zeros behind, are as in He et al. 2015 (option A).
    """

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.stride = stride
        self.bn1 = nn.BatchNorm2d(inputs, eps=EPSILON)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs, eps=EPSILON)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(F.relu(self.bn1(x)))
        out = self.conv2(F.relu(self.bn2(out)))
        if self.stride > 1:
            x = x[:, :, :: self.stride, :: self.stride]
        missing = out.shape[1] - x.shape[1]
        return torch.as_tensor(out + (F.pad(x, (0, 0, 0, 0, 0, missing)) if missing else x))


class BaseResNet(SectionedNetwork):
    """The paper's BaseResNet as a plain network, its BASELINE.

    Args:
        num_classes: width of the output.
        blocks: number of blocks of each section; each section after the first halves the resolution
            and doubles the channels.
        width: channels of the first section; with 16, sections have the paper's 16, 32 and 64.
        in_channels: channels of the image.
    Raises:
        ModelSpecError: if a size is not a whole number of at least 1.
    Source:
        AnytimeNet (Kim et al. 2020), section II.A: three sections, 64 filters at the end, full
        pre-activation, epsilon of batch norm 0.001. Not in the paper, and as in He et al. 2016: IN
        is a 3x3 convolution, OUT is batch norm, ReLU, mean over space, and a linear layer.
    Example:
        >>> BaseResNet(blocks=(1, 1, 1), width=4)(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        num_classes: int = 10,
        blocks: Sequence[int] = (8, 8, 8),
        width: int = 16,
        in_channels: int = 3,
    ) -> None:
        check_sizes(
            "BaseResNet",
            ("blocks", blocks),
            num_classes=num_classes,
            width=width,
            in_channels=in_channels,
        )
        widths = [width * 2**section for section in range(len(blocks))]
        sections = []
        for section, count in enumerate(blocks):
            first = BaseBlock(widths[max(section - 1, 0)], widths[section], 2 if section else 1)
            sections.append(
                [first, *(BaseBlock(widths[section], widths[section]) for _ in range(count - 1))]
            )
        out = nn.Sequential(
            nn.BatchNorm2d(widths[-1], eps=EPSILON),
            nn.ReLU(),
            Pool("NCHW"),
            nn.Linear(widths[-1], num_classes),
        )
        super().__init__(nn.Conv2d(in_channels, width, 3, padding=1, bias=False), sections, out)
        initialise_convolutions(self)


# --- costs of its parts ---------------------------------------------------------------------------


def block_macs(network: SectionedNetwork, x: Any) -> BlockCosts:
    """Count the multiply-accumulates of each part, per sample of an example.

    They are counted as in `Network.stage_facts`.
    """
    macs = {}
    with evaluating(network), torch.no_grad():
        for name, part in network.parts().items():
            macs[name] = float(count_macs(part, x))
            x = call_model(part, x)
    return _by_section(macs.values(), network.counts)


def block_times(
    network: SectionedNetwork,
    x: Any,
    *,
    repeats: int = 50,
    warm_up: int = 5,
    progress: bool = False,
    clock: Clock = SYSTEM_CLOCK,
) -> BlockCosts:
    """Measure the median seconds of each part, in eval and inference mode.

    Args:
        network: network with these blocks, such as the backbone of a `GrowingNetwork`, on the
            device to measure.
        x: an input of the batch size to measure.
        repeats: number of measured runs through all parts.
        warm_up: number of runs before them, which do not count.
        progress: whether to show a progress bar.
        clock: clock to measure with.

    Sync:
        Waits for the device after every part.
    """

    def one_run() -> list[float]:
        features = x
        times = []
        for part in network.parts().values():
            begin = clock.now()
            features = call_model(part, features)
            synchronise(features.device)
            times.append(clock.now() - begin)
        return times

    with evaluating(network), torch.inference_mode():
        rounds = interleaved([one_run], repeats=repeats, warm_up=warm_up)
        shown = tracked(
            rounds, "timing blocks", total=repeats, unit="rounds", wanted=progress, between=True
        )
        runs = [run for (run,) in shown]
    return _by_section(
        [statistics.median(times) for times in zip(*runs, strict=True)], network.counts
    )


def _by_section(costs: Iterable[float], counts: growth.Counts) -> BlockCosts:
    stem, *inner, out = costs
    blocks = iter(inner)
    return BlockCosts(
        stem=stem,
        sections=tuple(tuple(itertools.islice(blocks, count)) for count in counts),
        out=out,
    )


# --- batch norm with statistics per iteration -----------------------------------------------------

# The iteration that is running, or None. A context variable, because threads may share a network.
_iteration: ContextVar[int | None] = ContextVar("iteration", default=None)


@contextlib.contextmanager
def _in_iteration(index: int) -> Iterator[None]:
    token = _iteration.set(index)
    try:
        yield
    finally:
        _iteration.reset(token)


_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


class IterationBatchNorm(_BatchNorm):
    """Batch norm with separate running statistics for each iteration.

    All iterations share one weight and one bias. Outside an iteration, in a plain run of the
    backbone, it uses the statistics of the last iteration.

    Args:
        norm: batch norm that is replaced. Its weight and bias are kept, and its statistics are the
            initial ones of each iteration. The state_dict of a plain batch norm may be loaded, too.
        iterations: iterations that run this module, in order.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(self, norm: _BatchNorm, iterations: Sequence[int]) -> None:
        super().__init__(norm.num_features, norm.eps, norm.momentum, norm.affine)
        self.weight = norm.weight
        self.bias = norm.bias
        self.training = norm.training
        for name in _STATISTICS:
            self.register_buffer(name, _per_row(getattr(norm, name), len(iterations)))
        self._row = {iteration: row for row, iteration in enumerate(iterations)}

    def forward(self, x: Tensor) -> Tensor:
        iteration = _iteration.get()
        row = -1 if iteration is None else self._row[iteration]
        momentum = self.momentum
        if self.training:
            self.num_batches_tracked[row] += 1
            # As in torch, a momentum of None means the mean of all batches.
            momentum = 1.0 / float(self.num_batches_tracked[row]) if momentum is None else momentum
        return F.batch_norm(
            x,
            self.running_mean[row],
            self.running_var[row],
            self.weight,
            self.bias,
            training=self.training,
            momentum=momentum or 0.0,
            eps=self.eps,
        )

    def extra_repr(self) -> str:
        plain = super().extra_repr()  # type: ignore[no-untyped-call]
        return f"{plain}, iterations={list(self._row)}"

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        for name in _STATISTICS:
            given = state_dict.get(prefix + name)
            own = getattr(self, name)
            if given is not None and given.dim() == own.dim() - 1:
                state_dict[prefix + name] = _per_row(given, len(own))
        super()._load_from_state_dict(state_dict, prefix, *rest)


def _per_row(statistic: Tensor, rows: int) -> Tensor:
    return torch.stack([statistic.detach()] * rows)


def _with_own_norms(module: nn.Module, iterations: Sequence[int]) -> nn.Module:
    """Replace every batch norm that keeps statistics by an `IterationBatchNorm`."""
    if (
        isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d))
        and module.track_running_stats
    ):
        return IterationBatchNorm(module, iterations)
    for name, child in module.named_children():
        setattr(module, name, _with_own_norms(child, iterations))
    return module


# --- the network in iterations --------------------------------------------------------------------


class GrowthRun(Run):
    """A run that computes each iteration only when it is asked for.

    To free the cached tensors, call `close()`, leave the `with` block or delete the run.

    Thread:
        May be advanced from any thread, but only by one at a time. It runs with the gradient,
        inference and autocast modes in which it was created.
    """

    def __init__(self, network: GrowingNetwork, x: Any, *, keep: bool = False) -> None:
        self._position = Position()
        self._iterations = iter(range(network.num_exits))
        self._network = network
        self._x = x
        self._keep = keep
        self._cached: dict[int, Tensor] = {}

    def __next__(self) -> Exit:
        index = next(self._iterations)
        last = index == self._network.num_exits - 1
        position = self._position
        try:
            features = position.within(self._network._grow, index, self._cached, self._x)
            if self._keep and not last:
                features = position.call(torch.clone, features)
            position.exit = index
            head = partial(self._network._answer, index)
            exit = StagedExit(index, features, head, position, self._keep)
            if last:
                # Computed now, because the output of a last exit is always ready in this library.
                exit.output()
                self.close()
        except BaseException:
            self.close()
            # The failed iteration may have overwritten the features of the exit before.
            position.exit = None
            raise
        return exit

    def close(self) -> None:
        self._iterations = iter(range(0))
        self._cached.clear()
        self._x = None


class GrowingNetwork(Network):
    """A network of sections that runs in iterations, each of which adds blocks.

    It is an iterator of exits, with the protocol of all networks. Growing a section does not change
    the input of its new blocks, so they continue from the tensor cached there. All blocks of later
    sections run again. Each block has the same weights in every iteration. A tensor is cached only
    if a later iteration continues from it, and it is copied before another module reads it, because
    that may write in place. The outputs, and in training the gradients, are those of separate runs
    of the sub-networks.

    **Batch norm.** In train mode, batch norm normalises each batch by itself, so iterations give
    the same outputs as the sub-networks. Eval mode uses running statistics, which differ. If one
    iteration runs a block, the block gets one kind of input and one update per step. (The
    sub-networks would each update it with the same values, which only converges faster.) If several
    iterations run a block, it gets inputs of several depths. With `norms="shared"`, which is how we
    read the paper, its statistics mix these inputs in nearly equal parts and fit none of them: in
    the short trainings of papers/anytimenet that costs 11 to 30 points of accuracy. With
    `norms="own"`, the default, each iteration has separate statistics. Weights trained with shared
    statistics may be loaded into a network with separate ones, and `recalibrate` computes these
    again.

    Args:
        backbone: plain network of the same modules. Each block takes the output of the block before
            it, one tensor, batch first. OUT gives [B, num_classes].
        schedule: block counts of each section per iteration; the last iteration has all blocks.
        outs: "shared" for one OUT, or "own" for a separate copy of OUT in each iteration.
        norms: "own" (the default) for separate batch-norm statistics in each iteration, for blocks
            that several iterations run; the batch norms (`nn.BatchNorm1d` to `3d`) of the backbone
            are then replaced. "shared" keeps one set of statistics.
        layout: meaning of the dimensions of the last features.
        num_classes: width of the output; the default is that of the last layer of `out`.
    Attributes:
        backbone: as given; its output is that of the last exit.
        schedule: block counts of each section per iteration.
        heads: the separate OUTs of all iterations except the last; empty with one shared OUT.
        default_weights: scheme of the exits' loss weights that `fit` uses by default, the paper's
            (eq. 3).
    Raises:
        ModelSpecError: if the schedule is malformed, or does not end with all blocks.
        NetworkError: if an option is unknown, or the number of classes cannot be found.
    Source:
        AnytimeNet (Kim et al. 2020), section II.B; own OUTs are mentioned there. Own statistics:
        switchable batch norm, Yu et al. 2019 (slimmable networks), with weight and bias shared
        here.
    Example:
        >>> sections = [[nn.Linear(4, 4) for _ in range(2)] for _ in range(2)]
        >>> backbone = SectionedNetwork(nn.Identity(), sections, nn.Linear(4, 3))
        >>> network = GrowingNetwork(backbone, [(1, 1), (2, 1), (2, 2)], layout="ND")
        >>> with network.exits(torch.zeros(5, 4)) as run:
        ...     [(exit.index, tuple(exit.output().shape)) for exit in run]
        [(0, (5, 3)), (1, (5, 3)), (2, (5, 3))]
    """

    default_weights = "inverse_square"
    num_classes: int

    def __init__(
        self,
        backbone: SectionedNetwork,
        schedule: Schedule | Sequence[Sequence[int]] | str,
        *,
        outs: Sharing = "shared",
        norms: Sharing | None = None,
        layout: Layout = "NCHW",
        num_classes: int | None = None,
    ) -> None:
        super().__init__()
        checks.one_of(NetworkError, Sharing, outs=outs, norms=norms or "own")
        self.backbone = backbone
        self.schedule = Schedule.of(schedule)
        if backbone.counts != self.schedule.final:
            raise ModelSpecError(
                f"sections of {backbone.counts} blocks, but the schedule ends with "
                f"{self.schedule.final}; expected every block in the last iteration."
            )
        self.num_classes = num_classes or _classes(backbone.out)
        self.layout = layout
        self._starts = self.schedule.starts
        self._kept = self.schedule.kept
        early = self.num_exits - 1 if outs == "own" else 0
        self.heads = nn.ModuleList(copy.deepcopy(backbone.out) for _ in range(early))
        if norms != "shared":
            self._own_norms()
            if norms and not any(isinstance(part, IterationBatchNorm) for part in self.modules()):
                warnings.warn(
                    "norms='own' changed nothing: no batch norm with running statistics runs in "
                    "several iterations.",
                    NoEffectWarning,
                    stacklevel=2,
                )

    @property
    def num_exits(self) -> int:
        return len(self.schedule.counts)

    @property
    def exit_names(self) -> tuple[str, ...]:
        """Return the names of the exits, block counts such as "5-1-1"."""
        return self.schedule.names

    @property
    def mechanism(self) -> str:
        """Describe in words how the network is divided into stages."""
        return (
            f"{self.num_exits} iterations over {len(self.schedule.final)} sections, each going on "
            "from cached tensors"
        )

    @property
    def exit_free(self) -> nn.Module:
        return self.backbone

    def early_heads(self) -> Sequence[nn.Module]:
        return tuple(self.heads)

    def forward(self, x: Any, *, gradients: GradientFlow = PLAIN) -> tuple[Tensor, ...]:
        """Compute the outputs of all iterations, for training.

        Gradients pass through the cached tensors.

        Args:
            x: input of the stem.
            gradients: how gradients flow at the exits, where the cached tensors lead to the deeper
                layers; it changes no value.
        Returns:
            K outputs of shape [B, num_classes], first iteration to last.
        """
        cached: dict[int, Tensor] = {}
        outputs = []
        channels = channel_dim(self.layout)
        for index in range(self.num_exits):
            features = self._grow(index, cached, x)
            if index < self.num_exits - 1:
                features = gradients.into_head(features, index, self.num_exits)
            outputs.append(self._answer(index, features))
            for section, tensor in cached.items():
                cached[section] = gradients.onward(tensor, index, self.num_exits, channels)
        return tuple(outputs)

    def exits(self, x: Any, *, keep: bool = False) -> GrowthRun:
        """Run iteration by iteration, with `for exit in network.exits(x)`.

        Leaving the loop early computes nothing more. OUT runs when an exit is asked for its output;
        in the last iteration it always runs.

        Args:
            x: input of the stem.
            keep: copy the features of each exit, so that `output()` may be called later.
        """
        return GrowthRun(self, x, keep=keep)

    def pooled(self, exit: Exit) -> Tensor:
        """Average an exit's features over space or tokens, to shape [B, D]."""
        return pooled(exit.features, self.layout)

    def stage_facts(self, x: Any) -> list[StageFacts]:
        """Return shape, MACs and parameters of each iteration and its OUT.

        The last iteration contains its OUT.
        """
        *early, last = super().stage_facts(x)
        outs = (module_name(self._out(index)) for index in range(len(early)))
        return [
            *(replace(fact, head=out) for fact, out in zip(early, outs, strict=True)),
            last,
        ]

    def describe(self, x: Any) -> str:
        """Describe the iterations, their MACs and their parameters in a table.

        The costs of all iterations are compared with those of a plain run.

        Args:
            x: an example input; MACs are per sample.
        """
        *table, _, mechanism = super().describe(x).splitlines()
        counted = growth.costs(self.schedule, block_macs(self.backbone, x))
        compared = (
            f"all iterations: {round(counted.cumulative[-1]):,} MACs per sample, "
            f"{counted.overhead:.3f} times the {round(counted.plain):,} of a plain "
            f"{type(self.backbone).__name__}; "
            f"{sum(parameter.numel() for parameter in self.parameters()):,} parameters."
        )
        return "\n".join([*table, compared, mechanism])

    def _grow(self, index: int, cached: dict[int, Tensor], x: Any) -> Tensor:
        """Run one iteration up to its OUT.

        It starts from the cached tensor of the section that grows, and the first iteration from
        `x`.
        """
        first, old = self._starts[index]
        with _in_iteration(index):
            features = cached.pop(first) if index else call_model(self.backbone.stem, x)
            for section, count in enumerate(self.schedule.counts[index][first:], start=first):
                blocks: Iterable[Any] = self.backbone.sections[section]  # type: ignore[assignment]  # a ModuleList
                for block in itertools.islice(blocks, old if section == first else 0, count):
                    features = block(features)
                if section in self._kept[index]:
                    cached[section] = features
                    if section < len(self.backbone.sections) - 1:
                        # The next section may write to its input in place.
                        features = features.clone()
        return torch.as_tensor(features)

    def _answer(self, index: int, features: Tensor) -> Tensor:
        """Run the OUT of an iteration."""
        if len(self.backbone.sections) - 1 in self._kept[index]:
            # OUT may write to its input in place, which is cached.
            features = features.clone()
        with _in_iteration(index):
            return torch.as_tensor(self._out(index)(features))

    def _out(self, index: int) -> nn.Module:
        return self.heads[index] if index < len(self.heads) else self.backbone.out

    def _own_norms(self) -> None:
        iterations: dict[str, list[int]] = {}
        for index, names in enumerate(growth.trace(self.schedule)):
            for name in names:
                iterations.setdefault(name, []).append(index)
        for section, blocks in enumerate(self.backbone._sections(), start=1):
            for position, block in enumerate(blocks, start=1):
                running = iterations[f"S{section}.{position}"]
                if len(running) > 1:
                    blocks[position - 1] = _with_own_norms(block, running)
        if not self.heads and self.num_exits > 1:
            self.backbone.out = _with_own_norms(self.backbone.out, iterations["OUT"])


def _classes(out: nn.Module) -> int:
    width, _ = _last_width(out)
    if width is None:
        raise NetworkError(
            f"cannot find the number of classes: {type(out).__name__} as OUT has no linear layer, "
            "convolution or norm; give num_classes."
        )
    return width


class AnytimeNet(GrowingNetwork):
    """The paper's AnytimeNet, a `BaseResNet` that grows in seven iterations.

    Args:
        num_classes: width of the output.
        schedule: block counts of each section per iteration, which also determine the number of
            blocks; as text "1-1-1/5-1-1/8-1-1/...". See `growth.in_turn` for smaller ones like the
            paper's, and `growth.plan` and `growth.place` for better ones.
        width: channels of the first section.
        in_channels: channels of the image.
        outs: "shared" or "own" OUTs, as for `GrowingNetwork`.
        norms: "shared" or "own" batch-norm statistics, as for `GrowingNetwork`.
    Raises:
        ModelSpecError: if the schedule or a size is malformed.
    Source:
        AnytimeNet (Kim et al. 2020), sections II.B and III.A.
    Example:
        >>> network = AnytimeNet(num_classes=10)
        >>> network.exit_names
        ('1-1-1', '5-1-1', '8-1-1', '8-5-1', '8-8-1', '8-8-5', '8-8-8')
        >>> # executions of blocks; the plain network has 26
        >>> sum(len(names) for names in growth.trace(network.schedule))
        38
    """

    backbone: BaseResNet

    def __init__(
        self,
        num_classes: int = 10,
        schedule: Schedule | Sequence[Sequence[int]] | str = PAPER,
        *,
        width: int = 16,
        in_channels: int = 3,
        outs: Sharing = "shared",
        norms: Sharing | None = None,
    ) -> None:
        schedule = Schedule.of(schedule)
        backbone = BaseResNet(num_classes, schedule.final, width, in_channels)
        super().__init__(backbone, schedule, outs=outs, norms=norms, num_classes=num_classes)
