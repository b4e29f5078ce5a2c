"""The protocol of networks with exits, their runs and exits, with its defaults.

Derive from `Network` to write a network of your own; docs/how-to/own-network.md shows one.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any, Self

from torch import Tensor, nn

from impatient.counting import (
    MacCounter,
    ParameterUse,
    StageFacts,
    TrafficCounter,
    counting,
    facts_table,
    module_name,
)
from impatient.errors import ExitNotReached, NetworkError
from impatient.inputs import batch_size_of
from impatient.provenance import fingerprint_structure, fingerprint_tensors
from impatient.tasks import Task, classification


class Exit:
    """One exit of a run, whose stage has just been computed.

    Its head has not been computed yet.

    Args:
        index: number of the exit, 0-based, shallow to deep.
        features: input of the head, which a gate may see before the head runs.
        output: the output itself, or the head that computes it from the features.
        mask: padding mask of the samples, shape [B, T], 0 where there is padding; None without.
    Attributes:
        index: number of the exit.
        features: input of the head; at the last exit usually the output.
        mask: padding mask of the samples; None without.
        whole: whether the stage ran the whole batch and nothing else.
    """

    __slots__ = ("_output", "features", "index", "mask")
    whole: bool = True

    def __init__(
        self,
        index: int,
        features: Any,
        output: Tensor | Callable[[Any], Tensor],
        *,
        mask: Tensor | None = None,
    ) -> None:
        self.index = index
        self.features = features
        self.mask = mask
        self._output: Any = output

    def output(self) -> Tensor:
        """Compute the output, once: shape [B, num_classes], before softmax.

        Call this before the run goes on, because a later stage may overwrite the features.
        """
        if not isinstance(self._output, Tensor):
            self._output = self._output(self.features)
        return self._output

    @property
    def upcoming(self) -> int | None:
        """Return the next exit, or None if every sample has its answer."""
        return self.index + 1

    @property
    def exits(self) -> tuple[int, ...]:
        """Return for each sample the exit whose output is its answer."""
        return (self.index,) * self.output().shape[0]

    @property
    def row_bytes(self) -> float:
        """Return the bytes of one sample's features, or 0 if there are none."""
        if not isinstance(self.features, Tensor):
            return 0.0
        return float(self.features.nbytes / self.features.shape[0])

    def __repr__(self) -> str:
        shape = tuple(self.features.shape) if isinstance(self.features, Tensor) else None
        state = "computed" if isinstance(self._output, Tensor) else "not computed"
        return f"{type(self).__name__}(index={self.index}, features={shape}, output={state})"


class Run(Iterator[Exit]):
    """An iterator of exits, which computes a stage for each.

    To throw the rest away, call `close()` or leave the `with` block.

    Args:
        exits: generator of exits, shallow to deep, which computes each stage before its exit.
    """

    def __init__(self, exits: Generator[Exit]) -> None:
        self._exits = exits

    def __next__(self) -> Exit:
        return next(self._exits)

    def walk(self, visit: Callable[[Exit], bool]) -> None:
        """Run on to the first exit where `visit` returns True, and close there.

        Runs that need not be able to pause for that may be faster than a loop over the exits.

        Args:
            visit: function of each exit, which may call `keep`; it returns whether to stop.
        """
        with self:
            for exit in self:
                if visit(exit):
                    return

    def keep(self, rows: Tensor) -> None:  # noqa: ARG002  runs that shrink use it
        """Go on with these samples only.

        It is called only if the network's `shrinks` is true.

        Args:
            rows: places in the present batch, int64, shape [B'].
        """
        raise NetworkError(
            f"a {type(self).__name__} cannot go on with some samples of its batch; expected a run "
            "with a method keep(rows). Go on with the whole batch (compaction='never')."
        )

    def cancel(self) -> None:
        """End the present stage early, from any thread.

        By default this does nothing.
        """

    def close(self) -> None:
        """Throw away the rest of the run, if there is any."""
        self._exits.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Network(nn.Module):
    """The base class of all networks with exits.

    A network of your own defines `num_exits` and `exits`; everything else has a default. The
    library uses only the names that are written here, and you may override each.

    Attributes:
        num_classes: width of every output; None if it is not known.
        task: what the outputs mean; one of several classes unless said otherwise.
        default_weights: scheme of the exits' loss weights that `fit` uses by default.
        engine: name of the engine that computes the stages.
        threads: intra-op threads of the engine; None for those of torch.
        buckets: numbers of rows that the network can run; empty for all numbers.
    Example:
        >>> import torch
        >>> class Two(Network):
        ...     num_exits = 2
        ...
        ...     def __init__(self) -> None:
        ...         super().__init__()
        ...         self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 3)
        ...         self.head = nn.Linear(4, 3)
        ...
        ...     def exits(self, x, *, keep=False):
        ...         return Run(self._exits(x))
        ...
        ...     def _exits(self, x):
        ...         features = self.first(x)
        ...         yield Exit(0, features, self.head)
        ...         yield Exit(1, features, self.second(features.relu()))
        >>> [tuple(output.shape) for output in Two()(torch.zeros(5, 4))]
        [(5, 3), (5, 3)]
    """

    num_classes: int | None = None
    task: Task = classification()
    default_weights: str = "uniform"
    engine: str = "eager"
    threads: int | None = None
    buckets: tuple[int, ...] = ()

    @property
    def num_exits(self) -> int:
        """Return the number of exits, the last one included. Required."""
        raise NetworkError(f"{type(self).__name__} does not say num_exits; give it one.")

    def exits(self, x: Any, *, keep: bool = False) -> Run:  # noqa: ARG002  networks use them
        """Make a run, for `for exit in network.exits(x)`. Required.

        Nothing is computed before the first exit is asked for. The last exit must always come, and
        its output belongs to its stage.

        Args:
            x: a tensor with the samples first, or a tuple, list or mapping of such tensors.
            keep: copy the features of each exit, so that `output()` may be called later.
        """
        raise NetworkError(f"{type(self).__name__} has no exits(x); give it one.")

    def routed_exits(self, x: Any, router: Any) -> Run:  # noqa: ARG002  cascades use them
        """Make a run in which a router chooses each sample's next network."""
        raise NetworkError(
            f"a {type(self).__name__} has nothing to route between; expected a Cascade of networks."
        )

    def forward(self, x: Any) -> tuple[Tensor, ...]:
        """Compute the outputs of all exits, for training.

        For training with `equilibrium` it must also take `gradients`, a `GradientFlow`.
        """
        with begin(self, x) as run:
            return tuple(exit.output() for exit in run)

    @property
    def exit_names(self) -> tuple[str, ...]:
        """Return the names of the exits, all different."""
        return tuple(f"exit {index}" for index in range(self.num_exits))

    @property
    def mechanism(self) -> str:
        """Describe in words how the network is divided into stages."""
        return f"{self.num_exits} exits of its own"

    @property
    def exit_free(self) -> nn.Module:
        """Return a model without exits, by default this network without its heads."""
        return ToTheLastExit(self)

    def early_heads(self) -> Sequence[nn.Module]:
        """Return the heads of the early exits, which have separate training rules."""
        return ()

    def pooled(self, exit: Exit) -> Tensor:
        """Average an exit's features over space or tokens, to shape [B, D]."""
        features = exit.features
        if not isinstance(features, Tensor) or features.dim() != 2:
            shape = tuple(features.shape) if isinstance(features, Tensor) else None
            raise NetworkError(
                f"the features of exit {exit.index} of {type(self).__name__} have shape {shape}; "
                "expected [B, D]. Give the network a method pooled(exit) that averages them."
            )
        return features

    def shrinks(self, x: Any) -> bool:  # noqa: ARG002  for networks where it depends on the input
        """Tell whether a run may go on with some of its samples (`Run.keep`)."""
        return False

    @property
    def structure_fingerprint(self) -> str:
        """Return the fingerprint in cost profiles: names, shapes and types of the state."""
        return fingerprint_structure(self.state_dict())

    @property
    def weights_fingerprint(self) -> str:
        """Return the fingerprint in recordings: the whole state."""
        return fingerprint_tensors(self.state_dict())

    def stage_facts(self, x: Any) -> list[StageFacts]:
        """Count MACs and parameters of each stage and head in one run.

        The run is in eval mode.

        Args:
            x: an example input; MACs are per sample.
        """
        heads = self.early_heads()
        used = ParameterUse(self)
        macs = MacCounter()

        def take() -> int:
            used.next_part()
            return macs.take()

        with macs, used:
            found = _by_part(self, x, take)
        used.assign_unused(heads)
        batch = batch_size_of(x)
        return [
            StageFacts(
                exit=name,
                features=shape,
                head=_head_name(index, heads, self.num_exits),
                stage_macs=stage // batch,
                head_macs=head // batch,
                stage_parameters=used.counts[2 * index],
                head_parameters=used.counts[2 * index + 1],
            )
            for index, (name, (shape, stage, head)) in enumerate(
                zip(self.exit_names, found, strict=True)
            )
        ]

    def describe(self, x: Any) -> str:
        """Return a table of stages, heads, shapes, MACs and parameters, and the mechanism.

        Args:
            x: an example input; MACs are per sample.
        """
        return facts_table(self.stage_facts(x), type(self.exit_free).__name__, self.mechanism)

    def __setattr__(self, name: str, value: Any) -> None:
        # torch stores modules and parameters separately, and an attribute of the class hides them.
        known = inspect.getattr_static(type(self), name, None)
        hidden = known is not None and isinstance(value, (nn.Module, nn.Parameter))
        if hidden or (isinstance(known, property) and known.fset is None):
            raise NetworkError(
                f"{name!r} means something for every network, so {type(self).__name__} cannot set "
                f"it to a {type(value).__name__}; expected another name, or, to override it, an "
                "attribute of the class, a property or a method."
            )
        super().__setattr__(name, value)


class ToTheLastExit(nn.Module):
    """A network with exits as a model with one output, without early heads."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        # In a list, so that it is not a submodule.
        self._network = [network]

    def forward(self, *positions: Any, **named: Any) -> Tensor:
        x: Any = named or (positions[0] if len(positions) == 1 else positions)
        network = self._network[0]
        with network.exits(x) as run:
            for exit in run:
                if exit.index == network.num_exits - 1:
                    return exit.output()
        raise ExitNotReached(f"this input never came to exit {network.num_exits - 1}, the last.")


def begin(network: Network, x: Any) -> Run:
    """Begin a run of a network, and check that it is one.

    Raises:
        NetworkError: if the network's `exits` returns anything but a `Run`.
    """
    run: Any = network.exits(x)
    # As isinstance, which for an abstract class takes as long as all else here.
    if Run not in type(run).__mro__:
        raise NetworkError(
            f"{type(network).__name__}.exits(x) returned a {type(run).__name__}; expected an "
            "impatient.Run. Return impatient.Run(generator), where the generator yields an Exit "
            "after each stage."
        )
    found: Run = run
    return found


def check_network(network: object) -> None:
    """Check that an object is a complete network with exits.

    Raises:
        NetworkError: if it does not derive from `Network`, lacks a required name, or has a public
            name that looks like a misspelt one.
    """
    kind: Any = type(network)
    if not isinstance(network, Network):
        raise NetworkError(
            f"a {kind.__name__} is no network with exits; expected an impatient.Network. Give a "
            "model exits with attach_exits(model, example=x), or derive your own class from "
            "impatient.Network."
        )
    own = [
        name
        for part in kind.__mro__[: kind.__mro__.index(Network)]
        for name in vars(part)
        if not name.startswith("_") and not hasattr(Network, name)
    ]
    for required in ("num_exits", "exits"):
        if getattr(kind, required) is getattr(Network, required):
            near = difflib.get_close_matches(required, own, cutoff=0.5)
            raise NetworkError(
                f"{kind.__name__} lacks {required!r}; it has {', '.join(own) or 'nothing public'}"
                + (f" (did you mean {near[0]!r} to be it?)" if near else "")
                + ". A network gives num_exits and exits(x); see impatient.Network."
            )
    if inspect.isgeneratorfunction(kind.exits):
        raise NetworkError(
            f"{kind.__name__}.exits is a generator function; expected a function that returns a "
            "Run. Rename it, and return impatient.Run(generator) from exits."
        )
    asked = [name for name in vars(Network) if not name.startswith("_")]
    for name in own:
        # High enough that `heads` is not taken for `threads`.
        near = difflib.get_close_matches(name, asked, n=1, cutoff=0.85)
        if near:
            raise NetworkError(
                f"{kind.__name__} has {name!r}, which nobody asks for; did you mean {near[0]!r}? "
                "Rename it, or begin it with an underscore if it is your own."
            )


def stage_traffic(network: Network, x: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Count the bytes that stages and heads read and write in one run.

    The run is in eval mode, and bytes are counted as in `count_traffic`. Weights are read once per
    run, so a sample's share is smaller in a larger batch.

    Returns:
        Bytes of each stage and of each head, for the whole of `x`; use one sample.
    Raises:
        ExitNotReached: if the example does not come to every exit.
    """
    with TrafficCounter() as counter:
        found = _by_part(network, x, counter.take)
    return tuple(stage for _, stage, _ in found), tuple(head for _, _, head in found)


def _by_part(
    network: Network, x: Any, take: Callable[[], int]
) -> list[tuple[tuple[int, ...], int, int]]:
    """Run a network once in eval mode, and count by stage and head.

    Args:
        network: network to run.
        x: an example input.
        take: returns what was counted since the last call.
    Returns:
        For each exit the shape of its features, and the counts of its stage and of its head.
    Raises:
        ExitNotReached: if the example does not come to every exit.
    """
    found = []
    with counting(network), begin(network, x) as run:
        for exit in run:
            if exit.index == network.num_exits - 1:
                # The last output belongs to its stage, also where it is computed only when asked.
                exit.output()
            stage = take()
            exit.output()
            shape = tuple(exit.features.shape) if exit.features is not None else ()
            found.append((shape, stage, take()))
    if len(found) != network.num_exits:
        raise ExitNotReached(
            f"the example came to {len(found)} of {network.num_exits} exits; expected all."
        )
    return found


def _head_name(index: int, heads: Sequence[nn.Module], num_exits: int) -> str:
    if index == num_exits - 1:
        return "(the backbone's own)"
    return module_name(heads[index]) if index < len(heads) else "(its own)"
