"""A backbone with exits: the network this library is about."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from impatient import checks
from impatient.anytime import Exit, Network
from impatient.errors import (
    ONE_COLUMN,
    ClassCountMismatch,
    ExitNotFound,
    ExitNotReached,
    HeadError,
    ImpatientError,
    LogitsWarning,
    NetworkError,
)
from impatient.inputs import (
    MaskName,
    OutputName,
    batch_size_of,
    call_model,
    evaluating,
    mask_of,
    output_tensor,
)
from impatient.networks import placement, shrinking
from impatient.networks.gradients import PLAIN, GradientFlow
from impatient.networks.heads import (
    FeatureShape,
    HeadFactory,
    Layout,
    channel_dim,
    check_head,
    guess_layout,
    head_for,
    pooled,
    with_mask,
)
from impatient.networks.stages import Cut, StagedRun, Stages, install, tapped
from impatient.tasks import Task, named
from impatient.tasks.classification import sum_of_shares
from impatient.trees import named_leaves

log = logging.getLogger(__name__)
# as transformers call it; an input may do without
USUAL_MASK = "attention_mask"


class MultiExitNetwork(Network):
    """A backbone and K - 1 heads, which make K exits.

    `attach_exits` makes one.

    Attributes:
        backbone: the user's own model, untouched: same object, parameters, names and state_dict.
        heads: one head per early exit; the last exit is the backbone's own output.
        cuts: places of the early exits.
        layouts: meaning of the dimensions of each early exit's features.
        num_classes: width of every output.
        mask: where an input has its padding mask.
        output: which part of what the backbone returns is its answer.
        task: what the outputs mean.
    """

    num_classes: int

    def __init__(
        self,
        backbone: nn.Module,
        heads: Sequence[nn.Module],
        cuts: Sequence[Cut],
        layouts: Sequence[Layout],
        num_classes: int,
        *,
        mask: MaskName = USUAL_MASK,
        output: OutputName = None,
        task: str | Task = "classification",
    ) -> None:
        super().__init__()
        if not len(heads) == len(cuts) == len(layouts):
            raise HeadError(
                f"{len(heads)} heads and {len(layouts)} layouts for {len(cuts)} cuts; expected one "
                "head and one layout per early exit."
            )
        self.backbone = backbone
        self.heads = nn.ModuleList(heads)
        self.cuts = tuple(cuts)
        self.layouts = tuple(layouts)
        self.num_classes = num_classes
        self.mask = mask
        self.task = named(task)
        self.output = self.task.reads if output is None else output
        # By kind of input, as found by `shrinks`.
        self._shrinks: dict[Hashable, bool] = {}
        self._prepare()

    @property
    def num_exits(self) -> int:
        return len(self.cuts) + 1

    @property
    def exit_names(self) -> tuple[str, ...]:
        """Name each exit by the module before it, and the last one "output"."""
        return (*(str(cut) for cut in self.cuts), "output")

    @property
    def mechanism(self) -> str:
        return f"greenlet, pausing the untouched forward in a hook after {len(self.cuts)} modules"

    @property
    def exit_free(self) -> nn.Module:
        return self.backbone

    def early_heads(self) -> Sequence[nn.Module]:
        return tuple(self.heads)

    def forward(self, x: Any, *, gradients: GradientFlow = PLAIN) -> tuple[Tensor, ...]:
        """Compute the outputs of all exits, for training.

        Args:
            x: input of the backbone; a mapping is passed as keywords, a tuple or list as positions.
            gradients: how gradients flow at the exits; it changes no value.
        Returns:
            K outputs of shape [B, num_classes], shallow to deep.
        Raises:
            ExitNotReached: if this input never came to an exit.
        """
        early: dict[int, Tensor] = {}
        mask = self.mask_of(x)

        def visit(index: int, features: Tensor) -> Tensor:
            # Not after the backbone, because an in-place operation may overwrite the features.
            head = with_mask(self.heads[index], mask)
            early[index] = head(gradients.into_head(features, index, self.num_exits))
            return gradients.onward(
                features, index, self.num_exits, channel_dim(self.layouts[index])
            )

        last = output_tensor(tapped(self.backbone, x, self._plan().cuts, visit), self.output)
        missing = [name for index, name in enumerate(self.exit_names[:-1]) if index not in early]
        if missing:
            raise ExitNotReached(
                f"this input never came to {', '.join(missing)}; cut at modules that every input "
                "calls."
            )
        return (*(early[index] for index in range(len(early))), last)

    def exits(self, x: Any, *, keep: bool = False) -> StagedRun:
        """Run stage by stage, with `for exit in network.exits(x)`.

        Leaving the loop early computes nothing more.

        Args:
            x: input of the backbone, as for `forward`.
            keep: copy the features of each exit, so that `output()` may be asked for later.
        Returns:
            An iterator of `Exit`; close it, or use it in a `with` block, to stop early.

        Thread:
            A run belongs to the thread that advances it. Several threads may each run the same
            network.
        """
        return self._run(x, keep, self.shrinks)

    def shrinks(self, x: Any) -> bool:
        """Tell whether a run may go on with some of its samples (`StagedRun.keep`).

        This is tried out on made-up samples, once per kind of input (two forward passes of K + 1
        samples), and remembered. It is False if more than the features crosses a cut, such as an
        attention mask, if samples depend on each other, and in training mode. It is also False if
        all outputs are equal, because the trial then shows nothing; the next call tries again.

        Args:
            x: an input of the kind in question, of any batch size.
        """
        if self.training:
            return False
        kind = shrinking.kind_of(x)
        if kind not in self._shrinks:
            verdict = shrinking.judge(self._run, self.num_exits, x)
            if not verdict.shrinks:
                log.info("batches of this network do not shrink: %s", verdict.reason)
            if verdict.shrinks is None:
                return False
            self._shrinks[kind] = verdict.shrinks
        return self._shrinks[kind]

    def mask_of(self, x: Any) -> Tensor | None:
        """Return the padding mask of an input, shape [B, T], or None if it has none."""
        return mask_of(x, self.mask)

    def pooled(self, exit: Exit) -> Tensor:
        """Average an exit's features over space or tokens, to shape [B, D]."""
        if exit.index == len(self.cuts):
            return torch.as_tensor(exit.features)
        return pooled(exit.features, self.layouts[exit.index], exit.mask)

    def _run(
        self, x: Any, keep: bool = False, shrinks: Callable[[Any], bool] = lambda _: True
    ) -> StagedRun:
        # Past the look-up of modules by torch, which takes longer than all else here.
        backbone: Any = self._modules["backbone"]
        mask = None if isinstance(x, Tensor) else mask_of(x, self.mask)
        return StagedRun(backbone, x, self._plan(), self.output, shrinks, keep, mask)

    def _plan(self) -> Stages:
        """Return how the backbone is cut, with the modules that it has now."""
        holders, names, members = self._watched
        # All in C, because every run asks.
        if (*map(dict.get, holders, names),) != members:
            # Replaced after exits were attached, such as by LoRA.
            self._prepare()
        return self._stages

    def _prepare(self) -> None:
        """Find the modules at the cuts by their names, and put the hook on them."""
        found: dict[tuple[int, str], tuple[dict[str, Any], str, Any]] = {}

        def member(parent: nn.Module, name: str) -> Any:
            child = parent._modules.get(name)
            found[id(parent), name] = parent._modules, name, child
            return child

        member(self, "backbone")
        member(self, "heads")
        heads = [member(self.heads, str(index)) for index in range(len(self.cuts))]
        modules = []
        for cut in self.cuts:
            module = self.backbone
            for name in cut.module.split("."):
                module = member(module, name)
                if module is None:
                    raise NetworkError(
                        f"the backbone has no module {cut.module!r} any more, after which there "
                        "was an exit. Attach exits after modules have been replaced."
                    )
            modules.append(module)
        # The heads and every module on the way to a cut: whose members they are, by which name.
        self._watched = tuple(zip(*found.values(), strict=True))
        places = zip(modules, self.cuts, strict=True)
        cuts = {(module, cut.call): index for index, (module, cut) in enumerate(places)}
        self._stages = Stages(cuts, (*heads, None))
        install(modules)


def attach_exits(
    backbone: nn.Module,
    *,
    example: Any,
    after: Sequence[str | Cut] | str = "auto",
    count: int = 4,
    heads: str | HeadFactory | Sequence[str | HeadFactory] = "linear",
    num_classes: int | None = None,
    task: str | Task = "classification",
    layout: Layout | None = None,
    mask: MaskName = USUAL_MASK,
    output: OutputName = None,
    engine: str = "eager",
) -> MultiExitNetwork:
    """Give a model exits without changing it.

    Args:
        backbone: any `nn.Module` whose output is a tensor, or holds one that is unmistakable
            (`logits`, or the only [B, C]). For classes it is [B, num_classes]; other tasks take
            [B], [B, D] and dense maps [B, C, H, W] as well; "detection" logits and boxes.
        example: an input of the kind the model will see; batch size 1 is enough. A mapping is
            passed as keywords.
        after: modules after which to exit, in running order. "block@2" is after the third call of a
            module called several times. "auto" places the exits at even shares of measured time and
            logs where. "every:2" exits after every second block, counted back from the last, whose
            exit is the output (the prediction period of ANN). "calls:step" exits after every call
            of one module but the last, such as the steps of a loop.
        count: number K of exits with "auto", the backbone's own output included.
        heads: "linear" (pool, linear) or another of `impatient.networks.heads.HEADS`, or a callable
            (FeatureShape, num_classes) -> nn.Module; or a sequence of these, one per early exit.
            "identity" takes what the module returns for the answer.
        num_classes: width of the output; the default is what the backbone gives on the example.
        task: what the outputs mean: the name of a ready-made task, such as "regression", or a
            `Task` of your own. It decides what `fit`, `record` and runners do with them.
        layout: meaning of the dimensions of features with as many dimensions, such as "NHWC" or
            "NCT", for models where the guess is wrong.
        mask: where an input has its padding mask [B, T], 0 where there is padding, so that heads
            and gates leave padding out: a key of a mapping, a place in a tuple, or a function of
            the input. None lets heads read padding.
        output: which part of what the backbone returns is its answer, where it is not unmistakable:
            a key or attribute, a place, or a function of what it returns.
        engine: engine of `to_engine` that the network is for. With one that is cut into stages,
            "auto" prefers places where few bytes cross.
    Returns:
        A network whose last output equals the untouched backbone's bit for bit.
    Raises:
        ExitNotFound, AmbiguousCut, CutOrderError: if `after` cannot be followed.
        ClassCountMismatch: if the backbone's output does not have `num_classes` columns.
        TaskError: if its shape does not fit the task.
        HeadError: if no head can be built for the features at a cut.
        NetworkError: if the backbone has exits already, or there is no such engine.
    Example:
        >>> blocks = [nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(4)]
        >>> backbone = nn.Sequential(*blocks, nn.Linear(8, 3))
        >>> network = attach_exits(backbone, after=["0", "2"], example=torch.zeros(1, 8))
        >>> [tuple(output.shape) for output in network(torch.zeros(5, 8))]
        [(5, 3), (5, 3), (5, 3)]
    """
    if not isinstance(backbone, nn.Module):
        raise HeadError(f"backbone is a {type(backbone).__name__}; expected a torch.nn.Module.")
    if isinstance(backbone, Network):
        raise NetworkError(
            f"a {type(backbone).__name__} has exits already; expected a model without, such as the "
            "backbone of a network: attach_exits(network.backbone, ...)."
        )
    _refuse_compiled(backbone)
    _check_mask(example, mask)
    meaning = named(task)
    output = meaning.reads if output is None else output
    answer = _answer(backbone, example, output)
    classes = _check_answer(answer, num_classes, meaning)
    cuts = _place(backbone, example, after, count, output, engine)
    built, layouts = _build_heads(
        backbone, example, cuts, heads, answer, meaning, layout, mask_of(example, mask)
    )
    return MultiExitNetwork(
        backbone, built, cuts, layouts, classes, mask=mask, output=output, task=meaning
    )


def _check_mask(example: Any, mask: MaskName) -> None:
    """Refuse a mask that is named but not in the example."""
    named = mask != USUAL_MASK and isinstance(mask, (str, int))
    if named and not isinstance(example, Tensor) and mask_of(example, mask) is None:
        kind = type(example).__name__
        there = ", ".join(map(str, example)) if isinstance(example, Mapping) else f"a {kind}"
        raise NetworkError(
            f"mask={mask!r} is not in the example ({there}); expected a key of a mapping, a place "
            "in a tuple, or a function of the input."
        )


def _place(
    backbone: nn.Module,
    example: Any,
    after: Sequence[str | Cut] | str,
    count: int,
    output: OutputName,
    engine: str,
) -> list[Cut]:
    checks.one_of(NetworkError, placement.ENGINES, engine=engine)
    if not isinstance(after, str):
        return placement.resolve(backbone, example, after)
    rule, _, period = after.partition(":")
    if after == "auto":
        cuts = placement.choose(backbone, example, count, output=output, engine=engine)
    elif rule == "every" and period.isdecimal():
        cuts = placement.every(backbone, example, int(period))
    elif rule == "calls" and period:
        cuts = placement.every_call(backbone, example, period)
    else:
        raise ExitNotFound(
            f"after={after!r} is one string; expected 'auto', 'every:2', 'calls:MODULE' or a list "
            f"of module names: after=[{after!r}]."
        )
    log.info(
        "exits placed after %s, and at the output",
        ", ".join(str(cut) for cut in cuts) or "no module",
    )
    return cuts


def _answer(backbone: nn.Module, example: Any, name: OutputName) -> Tensor:
    """Return the backbone's output on the example."""
    try:
        with evaluating(backbone), torch.no_grad():
            answer = call_model(backbone, example)
    except ImpatientError:
        raise
    except Exception as error:
        raise NetworkError(
            f"the backbone fails on the example, {_described(example)}: {error}. Expected an input "
            "as the model takes it: a mapping is passed as keywords, a tuple or list as positions."
        ) from error
    return output_tensor(answer, name)


def _described(example: Any) -> str:
    """Say what an example holds: the type and shape of each tensor."""
    kind = f"a {type(example).__name__}"
    found = [
        f"{place} {tuple(tensor.shape)} of {tensor.dtype}".strip()
        for place, tensor in named_leaves(example)
    ]
    return f"{kind} ({', '.join(found) or 'without tensors'})"


def _check_answer(output: Tensor, num_classes: int | None, task: Task) -> int:
    """Check the backbone's output, and return its width."""
    if task.is_logits and output.dim() != 2:
        raise ClassCountMismatch(
            f"the backbone gives an output of shape {tuple(output.shape)}; expected "
            "[B, num_classes]. Wrap it in a module that pools or picks what you classify, or name "
            "the task, such as attach_exits(..., task='regression')."
        )
    if not task.is_logits:
        # what an output alone can show wrong of a task
        for score in task.scores.values():
            score(output)
        return int(output.shape[1]) if output.dim() > 1 else 1
    if num_classes is not None and output.shape[1] != num_classes:
        raise ClassCountMismatch(
            f"the backbone gives {output.shape[1]} classes; expected num_classes={num_classes}. "
            f"Build the backbone with {num_classes} classes, or replace its last layer; its "
            f"weights for {output.shape[1]} classes do not fit."
        )
    _warn_of_no_logits(output)
    return int(output.shape[1])


def _warn_of_no_logits(output: Tensor) -> None:
    """Warn if an output [B, C] does not look like logits, to which a softmax is applied."""
    if output.shape[1] == 1:
        warnings.warn(
            f"the backbone gives one output column; expected the logits of two or more classes. "
            f"{ONE_COLUMN}",
            LogitsWarning,
            stacklevel=3,
        )
    elif (whole := sum_of_shares(output)) is not None:
        warnings.warn(
            "the backbone's outputs on the example look like probabilities (not negative, rows "
            f"that sum to {whole:g}); expected logits. A softmax is applied on top, so that its "
            "sure answers look unsure. Let the model return logits: leave out its last softmax.",
            LogitsWarning,
            stacklevel=3,
        )


def _refuse_compiled(backbone: nn.Module) -> None:
    """Refuse a graph that never calls its inner modules, so that nothing can pause there."""
    # "_guards_fn" only checks inputs; torch.export adds it.
    graph = isinstance(backbone, fx.GraphModule) and all(
        node.target == "_guards_fn" for node in backbone.graph.nodes if node.op == "call_module"
    )
    if graph or isinstance(backbone, torch.jit.ScriptModule):
        raise NetworkError(
            f"a {type(backbone).__name__} is a model that was scripted, traced or exported; "
            "expected the Python model it was made of, whose inner modules are called. Attach "
            "exits to that, then export the network with to_engine or `impatient export`."
        )


def _build_heads(
    backbone: nn.Module,
    example: Any,
    cuts: Sequence[Cut],
    heads: str | HeadFactory | Sequence[str | HeadFactory],
    answer: Tensor,
    task: Task,
    layout: Layout | None,
    mask: Tensor | None,
) -> tuple[list[nn.Module], list[Layout]]:
    kinds: list[Any] = (
        [heads] * len(cuts) if isinstance(heads, str) or callable(heads) else list(heads)
    )
    if len(kinds) != len(cuts):
        raise HeadError(
            f"{len(kinds)} heads for {len(cuts)} early exits ({[str(cut) for cut in cuts]}); "
            "expected one per exit."
        )
    names = sorted({cut.module for cut in cuts})
    traced = placement.trace(backbone, example, names)
    resized_shapes = placement.shapes_with_one_more(backbone, example, names)
    built = []
    layouts = []
    for cut, kind in zip(cuts, kinds, strict=True):
        features = traced.features.get((cut.module, cut.call))
        if features is None:
            raise HeadError(f"module {str(cut)!r} gives no tensor; cut at a module that does.")
        module = backbone.get_submodule(cut.module)
        obstacle = placement.obstacle(
            features, module, batch_size_of(example), resized_shapes.get((cut.module, cut.call))
        )
        if obstacle:
            raise HeadError(f"no head can read module {str(cut)!r}: {obstacle}")
        guessed = guess_layout(features, module)
        shape = FeatureShape(
            tuple(features.shape), layout if layout and features.dim() == len(layout) else guessed
        )
        if task.head is not None and kind == "linear":
            made = task.head(features, answer)
        else:
            made = head_for(kind, shape, answer)
        head = made.to(device=features.device, dtype=features.dtype)
        own_mask = None if shape.layout == "ND" else mask
        check_head(head, features, tuple(answer.shape), str(cut), own_mask)
        built.append(head)
        layouts.append(shape.layout)
    return built, layouts
