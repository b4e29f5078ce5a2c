"""What it takes to build a run's network again, and its weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import impatient
from impatient.errors import DataError, ImpatientError, ModelSpecError, StorageError
from impatient.files import is_file, read_tensors, write_tensors
from impatient.provenance import Provenance, fingerprint_structure, fingerprint_tensors, provenance
from impatient.store import Stored

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

DEFAULT_EXITS = 4
# what stands for the heads of a model that has exits of its own
OWN_HEADS = "own"

AnyModule = TypeVar("AnyModule", bound="nn.Module")


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleArray:
    """One of the arrays that make a sample.

    Attributes:
        shape: Its shape, without a batch dimension; padded ones may also be longer or shorter.
        dtype: Its type, such as "int64".
        fill: A number that occurs in it, of which examples are made: a token id, 1 for a mask.
    """

    shape: tuple[int, ...]
    dtype: str
    fill: int = 0

    def example(self, batch_size: int) -> Tensor:
        """Make an array of that shape and type.

        Raises:
            StorageError: if the type is none of torch's, or there is no array of that shape.
        """
        import torch

        dtype = self.torch_dtype()
        try:
            return torch.full((batch_size, *self.shape), self.fill, dtype=dtype)
        except (OverflowError, RuntimeError, TypeError, ValueError) as error:
            raise StorageError(
                f"no example of shape {self.shape} can be made ({error}); network.json was "
                "damaged: train again."
            ) from error

    def torch_dtype(self) -> torch.dtype:
        """Return the type as torch's.

        Raises:
            StorageError: if it is none of them.
        """
        import torch

        dtype = vars(torch).get(self.dtype)
        if not isinstance(dtype, torch.dtype):
            raise StorageError(
                f"example_dtype is {self.dtype!r}; expected the name of a dtype of torch. "
                "network.json was damaged: train again."
            )
        return dtype


def _array_of(batch: Tensor) -> SampleArray:
    whole = not batch.is_floating_point() and batch.numel() > 0
    return SampleArray(
        shape=tuple(batch.shape[1:]),
        dtype=str(batch.dtype).removeprefix("torch."),
        fill=int(batch.max()) if whole else 0,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkSpec(Stored, kind="network", made_by="`impatient train`"):
    """What it takes to build a run's network again, but for the weights.

    Attributes:
        after: Names of the cuts, or of the exits that a model has of its own.
        heads: Kind of heads as for `attach_exits`, or "own".
        ensembling: Rule by which the exits answer together (`RunningEnsemble`); empty if each
            answers for itself.
        members: Members of an ensemble of growing depth (`EANN`), shallow to deep, or the networks
            of a cascade; empty for one network.
        cascade: Whether the members are the networks of a cascade, each without its exits; `after`
            then names them all.
        task: Name of the task of its outputs.
        example_parts: Arrays of a sample by their names, where it is several; else none, and
            `example_shape` and `example_dtype` say what it is.
        transform: What the model's trained weights expect to be done to pictures, if that is known.
        validation_errors: Errors of every member's exits, by which the ensemble chooses.
    """

    model: str
    after: tuple[str, ...]
    heads: str
    num_classes: int
    example_shape: tuple[int, ...]
    example_dtype: str
    class_names: tuple[str, ...]
    preprocess: impatient.training.Preprocess
    data: str
    data_fingerprint: str
    seed: int
    validation: float
    provenance: Provenance
    ensembling: str = ""
    members: tuple[NetworkSpec, ...] = ()
    cascade: bool = False
    validation_errors: tuple[tuple[float, ...], ...] = ()
    task: str = "classification"
    transform: impatient.networks.Transform | None = None
    example_parts: Mapping[str, SampleArray] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.means.is_logits and len(self.class_names) != self.num_classes:
            raise StorageError(
                f"{len(self.class_names)} class names for {self.num_classes} classes; expected one "
                "per class."
            )

    @property
    def means(self) -> impatient.tasks.Task:
        """What the outputs mean."""
        return impatient.tasks.named(self.task)

    def example(self, batch_size: int = 1) -> Any:
        """Make an input of the right shapes and types.

        It is a tensor, or several by their names.

        Raises:
            StorageError: if a type is none of torch's.
        """
        if self.example_parts:
            return {name: part.example(batch_size) for name, part in self.example_parts.items()}
        return SampleArray(shape=self.example_shape, dtype=self.example_dtype).example(batch_size)

    def provenance_of(self, network: nn.Module) -> Provenance:
        """Give this provenance to another network."""
        structure = fingerprint_structure(network.state_dict())
        return dataclasses.replace(self.provenance, network=structure)

    def build(self, trust: Sequence[str] = ()) -> impatient.Network:
        """Build the network with fresh weights, drawn from the spec's seed.

        Args:
            trust: Modules, or MODULE:NAME, that may be called to build the model.
        Raises:
            ModelSpecError: if the model is none of the known sources', and not trusted.
        """
        if self.cascade:
            backbones = [member.build_exit_free(trust).backbone for member in self.members]
            return impatient.networks.Cascade(backbones, self.after)
        if self.members:
            members = [member.build(trust) for member in self.members]
            return impatient.networks.EANN(members, self.validation_errors)
        return self.with_exits(self.load_model(trust).model)

    def with_exits(self, model: nn.Module) -> impatient.Network:
        """Give a model of this spec its exits."""
        from impatient.networks.stages import Cut

        network: Any = model
        if self.heads != OWN_HEADS:
            try:
                network = impatient.attach_exits(
                    network,
                    example=self.example(),
                    # cuts, for the name alone does not say which call of a module is meant
                    after=[Cut.named(name) for name in self.after],
                    heads=self.heads,
                    num_classes=self.num_classes,
                    task=self.task,
                )
            except ImpatientError:
                raise
            except (RuntimeError, TypeError, ValueError) as error:
                # What a model raises for inputs that are not for it.
                raise ModelSpecError(
                    f"{self.model} cannot be run on an input of shape {self.example_shape} "
                    f"({error}); expected the model and the inputs that network.json was written "
                    "with. Train again, or take the file from a backup."
                ) from error
        if self.ensembling:
            network = impatient.networks.RunningEnsemble(network, self.ensembling)  # type: ignore[arg-type]
        built: impatient.Network = network
        return built

    def build_exit_free(self, trust: Sequence[str] = ()) -> impatient.MultiExitNetwork:
        """Build the same backbone without early exits, from the same seed.

        Of several networks it is that of the last.
        """
        if self.members:
            return self.members[-1].build_exit_free(trust)
        return self.without_exits(self.load_model(trust).model)

    def without_exits(self, model: nn.Module) -> impatient.MultiExitNetwork:
        """Give a model of this spec one exit, its output."""
        backbone = model.exit_free if isinstance(model, impatient.Network) else model
        return impatient.MultiExitNetwork(backbone, [], [], [], self.num_classes, task=self.task)

    def load_model(self, trust: Sequence[str] = ()) -> impatient.networks.Loaded:
        """Load the model, without the exits that it is to be given.

        Raises:
            ModelSpecError: if the model is none of the known sources', and not trusted.
        """
        from impatient.networks.specs import check_trusted

        check_trusted(self.model, trust)
        return load_fresh(self.model, self.num_classes, self.preprocess, self.seed)


def load_fresh(
    model: str, num_classes: int, preprocess: impatient.training.Preprocess, seed: int
) -> impatient.networks.Loaded:
    """Load a model for some data, with its library's weights or some drawn from a seed.

    It is a backbone, or a network that has exits of its own.
    """
    import torch

    torch.manual_seed(seed)
    return impatient.networks.load_with_weights(
        model, num_classes=num_classes, in_channels=preprocess.channels or None
    )


def spec_of(
    network: nn.Module,
    data: impatient.Data,
    *,
    model: str,
    seed: int,
    validation: float,
    task: str = "classification",
) -> NetworkSpec:
    """Describe a network for some data, without exits of its own.

    Raises:
        DataError: if samples are neither one array nor arrays by name.
    """
    from torch import Tensor

    example = data.example()
    several = isinstance(example, Mapping)
    arrays = example if several else {"": example}
    if not all(isinstance(array, Tensor) for array in arrays.values()):
        raise DataError(
            f"the samples of {data.name} are a {type(example).__name__}; a run directory holds one "
            "array per sample, or several by their names. Train in Python: impatient.fit, record "
            "and Runner take such samples."
        )
    parts = {name: _array_of(array) for name, array in arrays.items()}
    return NetworkSpec(
        model=model,
        after=(),
        heads="linear",
        num_classes=outputs_for(data, task),
        example_shape=() if several else parts[""].shape,
        example_dtype="" if several else parts[""].dtype,
        example_parts=parts if several else {},
        class_names=data.class_names,
        preprocess=data.preprocess,
        data=data.name,
        data_fingerprint=data.fingerprint,
        seed=seed,
        validation=validation,
        task=task,
        provenance=provenance(
            network=fingerprint_structure(network.state_dict()), data=data.fingerprint, seed=seed
        ),
    )


def outputs_for(data: impatient.Data, task: str) -> int:
    """Return how many outputs a network needs for some data and task."""
    meaning = impatient.tasks.named(task)
    if meaning.is_logits:
        return data.num_classes
    targets = data.examples("train").labels
    if meaning.outputs_for is not None:
        return meaning.outputs_for(targets)
    return int(targets.shape[1]) if targets.dim() == 2 else 1


def save_weights(network: nn.Module, path: Path) -> None:
    """Write weights.

    Raises:
        ModelSpecError: if one of them is NaN or infinite.
    """
    state = network.state_dict()
    _check_finite(state, "the network to be saved")
    write_tensors(path, state, {"kind": "weights", "fingerprint": fingerprint_tensors(state)})


def load_weights(network: AnyModule, path: Path, directory: Path) -> tuple[AnyModule, str]:
    """Load weights into a network in eval mode, and give their fingerprint.

    Raises:
        StorageError: if the file is missing, damaged or of another network.
        ModelSpecError: if a weight is NaN or infinite.
    """
    state, fingerprint = read_weights(path, directory)
    _check_finite(state, str(path))
    from impatient.training.checkpoint import check_types

    try:
        check_types(state, network)
        network.load_state_dict(state)
    except (RuntimeError, StorageError) as error:
        raise StorageError(f"{path} does not fit {directory / 'network.json'}: {error}") from error
    return network.eval(), fingerprint


def read_weights(path: Path, directory: Path) -> tuple[dict[str, Tensor], str]:
    """Read the weights of a run directory, and take their fingerprint.

    Raises:
        StorageError: if the file is missing or damaged.
    """
    if not is_file(path):
        raise StorageError(
            f"{directory} has no trained weights; run `impatient train {directory}`."
        )
    state, header = read_tensors(path)
    fingerprint = fingerprint_tensors(state)
    if header.get("fingerprint", "") not in ("", fingerprint):
        raise StorageError(
            f"{path} is damaged: its weights do not fit the fingerprint written with them. Train "
            "again, or take the file from a backup."
        )
    return state, fingerprint


def _check_finite(state: Mapping[str, Tensor], where: str) -> None:
    for name, value in state.items():
        if value.is_floating_point() and not value.isfinite().all():
            raise ModelSpecError(
                f"{where} holds NaN or infinite weights in {name!r}; such a network answers "
                "nothing. Train again with a lower learning rate, or load other weights."
            )
