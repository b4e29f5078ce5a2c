"""The files of one run, and whether they are fresh.

network.json              model spec, cuts, heads, classes, preprocessing, data spec
weights.safetensors       of the network with exits
checkpoint.safetensors    to go on training from
metrics.csv               loss and accuracy per epoch, split and exit
profile.json              cost profile of this machine
recordings/SPLIT.safetensors
policies/NAME.json         a policy; NAME.safetensors if it holds tensors, as learned ones do
certificates/NAME.json     what is guaranteed of a policy, and with what probability
evaluation.json           every exit and policy, judged on the test split
report.html
exit_free/                weights and recordings of the same backbone trained without exits
engines/NAME/             the network in another engine (`impatient export`), with its own
profile.json, recordings and
                          evaluation.json
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from impatient.anytime import Network
from impatient.costs import CostProfile
from impatient.engines.export import WRITTEN, bundle_file, load_engine, to_engine
from impatient.engines.network import engine_and_precision
from impatient.ensembling import Rule
from impatient.errors import ModelSpecError, StaleInput, StorageError
from impatient.evaluation.recording import Recording
from impatient.files import read_tensors, write_tensors
from impatient.networks.cascade import Cascade
from impatient.networks.combined_exits import RunningEnsemble
from impatient.networks.ensemble import EANN
from impatient.networks.multi_exit import MultiExitNetwork, attach_exits
from impatient.networks.specs import load_model
from impatient.policies.policy import Policy
from impatient.policies.risk import Certificate
from impatient.provenance import Provenance, fingerprint_structure, fingerprint_tensors, provenance
from impatient.runtime.profile import check_machine
from impatient.store import Stored, holds_tensors
from impatient.training.data import Data, Preprocess, load_data

DEFAULT_EXITS = 4
# the engine that is torch, running the untouched model
EAGER = "eager"
# what stands for the heads of a model that has exits of its own
OWN_HEADS = "own"


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkSpec(Stored, kind="network", made_by="`impatient train`"):
    """What it takes to build the network of a run directory again, but for the weights.

    Attributes:
        after: names of the cuts; of a model that has exits of its own, of those exits.
        heads: as for `attach_exits`, or "own".
        ensembling: rule by which its exits answer together (`RunningEnsemble`); empty if each
            answers for itself.
        members: of an ensemble of growing depth (`EANN`), shallow to deep, or the networks of a
            cascade; empty for one network.
        cascade: whether the members are the networks of a cascade, each without its exits; `after`
            then names them all.
        validation_errors: of every member's exits, by which the ensemble chooses.
    """

    model: str
    after: tuple[str, ...]
    heads: str
    num_classes: int
    example_shape: tuple[int, ...]
    example_dtype: str
    class_names: tuple[str, ...]
    preprocess: Preprocess
    data: str
    data_fingerprint: str
    seed: int
    validation: float
    provenance: Provenance
    ensembling: str = ""
    members: tuple[NetworkSpec, ...] = ()
    cascade: bool = False
    validation_errors: tuple[tuple[float, ...], ...] = ()

    def example(self, batch_size: int = 1) -> torch.Tensor:
        """An input of the right shape and type: zeros."""
        return torch.zeros(
            (batch_size, *self.example_shape), dtype=getattr(torch, self.example_dtype)
        )

    def provenance_of(self, network: nn.Module) -> Provenance:
        """This provenance, but of another network."""
        structure = fingerprint_structure(network.state_dict())
        return dataclasses.replace(self.provenance, network=structure)

    def build(self) -> Network:
        """The network with fresh weights, drawn from the spec's seed."""
        if self.cascade:
            return Cascade(
                [member.build_exit_free().backbone for member in self.members], self.after
            )
        if self.members:
            return EANN([member.build() for member in self.members], self.validation_errors)
        model = self._model()
        network = (
            model
            if self.heads == OWN_HEADS
            else attach_exits(
                model,
                example=self.example(),
                after=list(self.after),
                heads=self.heads,
                num_classes=self.num_classes,
            )
        )
        return RunningEnsemble(network, Rule(name=self.ensembling)) if self.ensembling else network  # type: ignore[arg-type]

    def build_exit_free(self) -> MultiExitNetwork:
        """The same backbone without early exits, from the same seed; of several networks, that of
        the last.
        """
        if self.members:
            return self.members[-1].build_exit_free()
        model = self._model()
        backbone = model.exit_free if isinstance(model, Network) else model
        return MultiExitNetwork(backbone, [], [], [], self.num_classes)

    def _model(self) -> Any:
        return fresh_model(self.model, self.num_classes, self.preprocess, self.seed)


def fresh_model(model: str, num_classes: int, preprocess: Preprocess, seed: int) -> nn.Module:
    """A model for some data, its weights drawn from a seed: a backbone, or a network that has exits
    of its own.
    """
    torch.manual_seed(seed)
    return load_model(model, num_classes=num_classes, in_channels=preprocess.channels or None)


def spec_of(
    network: nn.Module, data: Data, *, model: str, seed: int, validation: float
) -> NetworkSpec:
    """Describe a network for some data, without exits of its own."""
    example = data.example()
    return NetworkSpec(
        model=model,
        after=(),
        heads="linear",
        num_classes=data.num_classes,
        example_shape=tuple(example.shape[1:]),
        example_dtype=str(example.dtype).removeprefix("torch."),
        class_names=data.class_names,
        preprocess=data.preprocess,
        data=data.name,
        data_fingerprint=data.fingerprint,
        seed=seed,
        validation=validation,
        provenance=provenance(
            network=fingerprint_structure(network.state_dict()), data=data.fingerprint, seed=seed
        ),
    )


class RunDirectory:
    """Paths, reading with checks, and writing of one run directory."""

    engine_name = EAGER
    # of a command that makes one of these files again
    arguments = ""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @property
    def here(self) -> Path:
        """Where what depends on the engine is."""
        return self.path

    def engine(self, name: str) -> RunDirectory:
        """The same run as another engine sees it; itself for "eager"."""
        return self if name == EAGER else EngineDirectory(self.path, name)

    def engine_names(self) -> list[str]:
        """Engines in which this run has been evaluated."""
        return sorted(file.parent.name for file in self.path.glob("engines/*/evaluation.json"))

    @property
    def spec_file(self) -> Path:
        return self.path / "network.json"

    @property
    def weights_file(self) -> Path:
        return self.path / "weights.safetensors"

    @property
    def profile_file(self) -> Path:
        return self.here / "profile.json"

    @property
    def evaluation_file(self) -> Path:
        return self.here / "evaluation.json"

    @property
    def report_file(self) -> Path:
        return self.path / "report.html"

    @property
    def exit_free(self) -> Path:
        return self.path / "exit_free"

    @property
    def exit_free_weights_file(self) -> Path:
        return self.exit_free / "weights.safetensors"

    def exit_free_recording_file(self, split: str) -> Path:
        return self.exit_free / "recordings" / f"{split}.safetensors"

    def recording_file(self, split: str) -> Path:
        return self.here / "recordings" / f"{split}.safetensors"

    def policy_file(self, name: str) -> Path:
        return self.path / "policies" / f"{name}.json"

    def learned_policy_file(self, name: str) -> Path:
        return self.path / "policies" / f"{name}.safetensors"

    def certificate_file(self, name: str) -> Path:
        return self.path / "certificates" / f"{name}.json"

    def policy_names(self) -> list[str]:
        files = (self.path / "policies").glob("*")
        return sorted({file.stem for file in files if file.suffix in (".json", ".safetensors")})

    def save_policy(
        self, name: str, policy: Policy, certificate: Certificate | None = None
    ) -> Path:
        """Write a policy in the place of any other of this name, and what is guaranteed of it."""
        plain = self.policy_file(name)
        learned = self.learned_policy_file(name)
        file, other = (learned, plain) if holds_tensors(policy) else (plain, learned)
        # first: it must never stand beside a policy it is not about
        self.certificate_file(name).unlink(missing_ok=True)
        policy.save(file)
        other.unlink(missing_ok=True)
        if certificate is not None:
            certificate.save(self.certificate_file(name))
        return file

    def spec(self) -> NetworkSpec:
        """The network's description.

        Raises:
            StorageError: if this is no run directory.
        """
        if not self.spec_file.is_file():
            raise StorageError(
                f"{self.path} is no run directory (no network.json); make one with `impatient "
                f"train {self.path}`."
            )
        return NetworkSpec.load(self.spec_file)

    def data(self) -> Data:
        """The data set of this run, checked to be the same as then.

        Raises:
            StaleInput: if the files have changed.
        """
        spec = self.spec()
        data = load_data(spec.data, seed=spec.seed, validation=spec.validation)
        self.check_data(data)
        return data

    def check_data(self, data: Data) -> None:
        """Raise StaleInput if this is not the data the run was begun with."""
        spec = self.spec()
        if data.fingerprint != spec.data_fingerprint:
            raise StaleInput(
                f"the data {spec.data!r} has changed since {self.spec_file} was written "
                f"(fingerprint {data.fingerprint}, then "
                f"{spec.data_fingerprint}). Put the old files back, or train into a new directory."
            )

    def network(self) -> tuple[Network, str]:
        """The trained network in eval mode, and the fingerprint of its weights.

        Raises:
            StorageError: if it has not been trained, or the file is damaged.
        """
        return load_weights(self.spec().build(), self.weights_file, self.path)

    def exit_free_network(self) -> tuple[MultiExitNetwork, str]:
        """The backbone that was trained without exits, and the fingerprint of its weights."""
        return load_weights(self.spec().build_exit_free(), self.exit_free_weights_file, self.path)

    def exit_free_recording(self, split: str) -> Recording | None:
        """Its recording of one split; None if it was not trained.

        Raises:
            StaleInput: if it was made by other weights or on other data.
        """
        if not self.exit_free_weights_file.is_file():
            return None
        what = "recording of the network without exits"
        return self._recording(
            what, self.exit_free_recording_file(split), self.exit_free_weights_file
        )

    def weights_fingerprint(self) -> str:
        """Fingerprint of the trained weights, without building the network."""
        return self._fingerprint(self.weights_file)

    def _fingerprint(self, weights: Path) -> str:
        if not weights.is_file():
            raise StorageError(
                f"{self.path} has no trained weights; run `impatient train {self.path}`."
            )
        return fingerprint_tensors(read_tensors(weights)[0])

    def profile(self, *, any_machine: bool = False) -> CostProfile:
        """The cost profile, checked to be of this network and, unless asked otherwise, of this
        machine.

        Raises:
            StaleInput: if it is of another network, machine, thread count or torch version.
        """
        spec = self.spec()
        if not self.profile_file.is_file():
            raise StorageError(
                f"{self.here} has no cost profile; run `impatient profile "
                f"{self.path}{self.arguments}`."
            )
        costs = CostProfile.load(self.profile_file)
        remedy = (
            f"run `impatient profile {self.path}{self.arguments}` again, with the --threads "
            f"that you use"
        )
        costs.provenance.require(
            "the cost profile", remedy, network=spec.provenance.network, engine=self.engine_name
        )
        if not any_machine:
            check_machine(costs, remedy + ", or pass --any-profile to use it all the same")
        return costs

    def recording(self, split: str) -> Recording:
        """The recording of one split, checked to be of these weights and this data.

        Raises:
            StaleInput: if it was made by other weights or on other data.
        """
        return self._recording(
            f"recording of split {split!r}", self.recording_file(split), self.weights_file
        )

    def _recording(
        self, what: str, file: Path, weights: Path, precision: str = "fp32"
    ) -> Recording:
        spec = self.spec()
        remedy = f"run `impatient record {self.path}{self.arguments}`"
        if not file.is_file():
            raise StorageError(f"{self.here} has no {what}; {remedy}.")
        recording = Recording.load(file)
        wanted = self._fingerprint(weights) + (f"-{precision}" if precision != "fp32" else "")
        recording.provenance.require(
            f"the {what}", f"{remedy} again", weights=wanted, data=spec.data_fingerprint
        )
        return recording

    def policy(self, name: str) -> Policy:
        """A fitted policy, checked to be of these weights.

        Raises:
            StaleInput: if it was fitted on recordings of other weights.
        """
        if name not in self.policy_names():
            known = ", ".join(self.policy_names()) or "none yet"
            raise StorageError(
                f"{self.path} has no policy {name!r} (there: {known}); run `impatient fit "
                f"{self.path}`."
            )
        return self._checked(name, self._load_policy(name), self.weights_fingerprint())

    def policies(self) -> dict[str, Policy]:
        """All fitted policies by name, checked as by `policy`."""
        names = self.policy_names()
        # once for all: it reads every weight
        weights = self.weights_fingerprint() if names else ""
        return {name: self._checked(name, self._load_policy(name), weights) for name in names}

    def _load_policy(self, name: str) -> Policy:
        plain = self.policy_file(name)
        return Policy.load(plain if plain.is_file() else self.learned_policy_file(name))

    def _checked(self, name: str, policy: Policy, weights: str) -> Policy:
        # None: set by hand
        if policy.provenance is not None:
            policy.provenance.require(
                f"the policy {name!r}", f"run `impatient fit {self.path}` again", weights=weights
            )
        return policy


class EngineDirectory(RunDirectory):
    """A run directory as one engine sees it: the same data and policies, but what that engine
    answered and took.

    Args:
        path: the run directory.
        name: of the engine, with the precision behind a hyphen if it is not fp32: a folder in
            `engines`, or "compile", which needs none.
    """

    def __init__(self, path: str | Path, name: str) -> None:
        super().__init__(path)
        self.engine_name = name
        self.arguments = f" --engine {name}"

    @property
    def here(self) -> Path:
        return self.path / "engines" / self.engine_name

    def network(self) -> tuple[Any, str]:
        """The network in this engine, with as many threads as torch has now.

        Raises:
            StorageError: if it has not been exported.
            StaleInput: if it was exported with other weights.
        """
        threads = torch.get_num_threads()
        remedy = self._export_again()
        if self.engine_name == "compile":
            network, weights = RunDirectory(self.path).network()
            return to_engine(
                network,  # type: ignore[arg-type]
                "compile",
                example=self.spec().example(),
                threads=threads,
            ), weights
        if not bundle_file(self.here).is_file():
            there = (
                ", ".join(
                    sorted(file.parent.name for file in self.path.glob("engines/*/bundle.json"))
                )
                or "none yet"
            )
            raise StorageError(
                f"{self.path} has no engine {self.engine_name!r} (there: {there}; eager and "
                f"compile need no export). To make "
                f"one, {remedy}; it knows {', '.join(WRITTEN)}."
            )
        made = load_engine(self.here, threads=threads)
        if made.facts.weights != self.weights_fingerprint():
            raise StaleInput(
                f"{self.here} was exported with other weights than those of {self.path}; {remedy} "
                f"with --force."
            )
        return made, made.weights_fingerprint

    def recording(self, split: str) -> Recording:
        """What the engine answered on one split, under the name of the weights that it was made
        from.

        So policies that were fitted on what torch answered may be judged on what the engine does.
        """
        _, precision = engine_and_precision(self.engine_name)
        recording = self._recording(
            f"recording of split {split!r}",
            self.recording_file(split),
            self.weights_file,
            precision,
        )
        made = dataclasses.replace(recording.provenance, weights=self.weights_fingerprint())
        return dataclasses.replace(recording, provenance=made)

    def _export_again(self) -> str:
        engine, precision = engine_and_precision(self.engine_name)
        return f"run `impatient export {self.path} --engine {engine}" + (
            f" --precision {precision}`" if precision != "fp32" else "`"
        )


AnyModule = TypeVar("AnyModule", bound=nn.Module)


def save_weights(network: nn.Module, path: Path) -> None:
    """Write weights.

    Raises:
        ModelSpecError: if one of them is NaN or infinite.
    """
    state = network.state_dict()
    check_finite(state, "the network to be saved")
    write_tensors(path, state, {"kind": "weights", "fingerprint": fingerprint_tensors(state)})


def load_weights(network: AnyModule, path: Path, directory: Path) -> tuple[AnyModule, str]:
    """Load weights into a network, in eval mode.

    Raises:
        StorageError: if the file is missing, damaged or of another network.
        ModelSpecError: if a weight is NaN or infinite.
    """
    if not path.is_file():
        raise StorageError(
            f"{directory} has no trained weights; run `impatient train {directory}`."
        )
    state, _ = read_tensors(path)
    check_finite(state, str(path))
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        raise StorageError(f"{path} does not fit {directory / 'network.json'}: {error}") from error
    return network.eval(), fingerprint_tensors(state)


def check_finite(state: Mapping[str, torch.Tensor], where: str) -> None:
    """Raise ModelSpecError if a weight is NaN or infinite, naming it."""
    for name, value in state.items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise ModelSpecError(
                f"{where} holds NaN or infinite weights in {name!r}; such a network answers "
                f"nothing. Train again with a "
                "lower learning rate, or load other weights."
            )
