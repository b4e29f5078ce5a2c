"""The files of one run, and whether they are fresh.

network.json               model spec, cuts, heads, classes, preprocessing, data spec
weights.safetensors        of the network with exits
checkpoint.safetensors     to go on training from
metrics.csv                loss and accuracy per epoch, split and exit
profile.json               cost profile of this machine
recordings/SPLIT.safetensors
policies/NAME.json         a policy; NAME.safetensors if it holds tensors, as learned ones do
targets/NAME.json          what that policy was fitted to
certificates/NAME.json     what is guaranteed of a policy, and with what probability
evaluation.json            every exit and policy, judged on the test split
report.html
imported.json              in place of network.json and weights: where outputs came from that
                           `impatient import` took in
exit_free/                 the same backbone trained without exits: weights, recordings, ...
engines/NAME/              the network in another engine (`impatient export`), with its own
                           profile.json, recordings and evaluation.json
replaced/                  the run that `train --restart` replaces, until the new one is trained

A network is built from what network.json says. In a directory of somebody else's this could call
any function of any module. So only this library's models and those of torchvision, timm and
transformers are built, and modules that the caller trusts by name.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import impatient
from impatient.errors import ModelSpecError, StaleInput, StorageError
from impatient.files import is_file, plain_name, remove, written_whole
from impatient.store import holds_tensors
from impatient.verbs.network_spec import NetworkSpec, load_weights, read_weights
from impatient.verbs.options import with_top

# the engine that is torch, running the untouched model
EAGER = "eager"


class RunDirectory:
    """Paths, checked reading, and writing of one run directory.

    Args:
        path: The run directory.
        part: The folder in it that holds what is recorded and measured; by default itself.
        trust: Modules, or MODULE:NAME, that may be called to build its network.
    """

    engine_name = EAGER
    # whether its network can be built: not where outputs alone were imported
    has_network = True
    # what the fingerprint of recordings' weights has behind the run's
    weights_suffix = ""
    # arguments of a command that makes one of these files again
    arguments = ""

    def __init__(self, path: str | Path, part: str = "", *, trust: Sequence[str] = ()) -> None:
        self.path = Path(path)
        self.trust = tuple(trust)
        self.here = self.path / part
        self.spec_file = self.path / "network.json"
        self.imported_file = self.path / "imported.json"
        self.weights_file = self.path / "weights.safetensors"
        self.report_file = self.path / "report.html"
        self.profile_file = self.here / "profile.json"
        self.evaluation_file = self.here / "evaluation.json"

    def recording_file(self, split: str) -> Path:
        return self.here / "recordings" / f"{plain_name(split, 'split')}.safetensors"

    def certificate_file(self, name: str) -> Path:
        return self.path / "certificates" / f"{plain_name(name, 'policy')}.json"

    def target_file(self, name: str) -> Path:
        return self.path / "targets" / f"{plain_name(name, 'policy')}.json"

    # --- the same run, seen otherwise -------------------------------------------------------------

    def engine(self, name: str) -> RunDirectory:
        """Look at the run as another engine, or torch ("eager"), sees it."""
        return self if name == EAGER else EngineDirectory(self.path, name, trust=self.trust)

    def engine_names(self) -> list[str]:
        """List the engines in which this run has been evaluated."""
        return sorted(file.parent.name for file in self.path.glob("engines/*/evaluation.json"))

    @property
    def exit_free(self) -> ExitFreeDirectory:
        """The same backbone, trained without exits."""
        return ExitFreeDirectory(self.path, trust=self.trust)

    # --- network and data -------------------------------------------------------------------------

    def spec(self) -> NetworkSpec:
        """Read the network's description.

        Raises:
            StorageError: if this is no run directory.
        """
        if not is_file(self.spec_file):
            if is_file(self.imported_file):
                raise StorageError(
                    f"{self.path} holds outputs that were imported, without their network, which "
                    "this step needs; expected one of fit, evaluate, report, show and compare. To "
                    "run a network, make a run directory with `impatient train`."
                )
            raise StorageError(
                f"{self.path} is no run directory (no network.json); make one with `impatient "
                f"train {self.path}`."
            )
        return NetworkSpec.load(self.spec_file)

    def data(self) -> impatient.Data:
        """Load the data set of this run.

        Raises:
            StaleInput: if the files have changed.
        """
        spec = self.spec()
        data = impatient.load_data(
            spec.data, seed=spec.seed, validation=spec.validation, transform=spec.transform
        )
        self.check_data(data)
        return data

    def check_data(self, data: impatient.Data) -> None:
        """Raise StaleInput if this is not the data the run was begun with."""
        spec = self.spec()
        if data.fingerprint != spec.data_fingerprint:
            raise StaleInput(
                f"the data {spec.data!r} has changed since {self.spec_file} was written "
                f"(fingerprint {data.fingerprint}, then {spec.data_fingerprint}). Put the old "
                "files back, train into a new directory, or replace this run with "
                "`impatient train --restart`."
            )

    def network(self) -> tuple[Any, str]:
        """Load the trained network in eval mode, and fingerprint its weights.

        Raises:
            StorageError: if it has not been trained, or the file is damaged.
        """
        return load_weights(self.spec().build(self.trust), self.weights_file, self.path)

    def data_fingerprint(self) -> str | None:
        """Return the fingerprint of the data that recordings must be of."""
        return self.spec().data_fingerprint

    def network_fingerprint(self) -> str | None:
        """Return the fingerprint of the network that the profile must be of."""
        return self.spec().provenance.network

    def class_names(self) -> tuple[str, ...]:
        """Return the names of the classes, if the outputs are of classes."""
        return self.spec().class_names

    def facts(self) -> dict[str, str]:
        """Say in words what made the answers, for the report."""
        spec = self.spec()
        facts = {
            "model": spec.model,
            "members": ", ".join(member.model for member in spec.members),
            "exits after": ", ".join(spec.after),
            "heads": spec.heads,
            "exits answer together": spec.ensembling,
            "data": spec.data,
            "classes": str(spec.num_classes),
            "seed": str(spec.seed),
        }
        optional = ("members", "exits answer together")
        return {name: fact for name, fact in facts.items() if fact or name not in optional}

    def weights_fingerprint(self) -> str:
        """Take the fingerprint of the trained weights, without building the network."""
        return read_weights(self.weights_file, self.path)[1]

    # --- what was measured and recorded -----------------------------------------------------------

    def profile(self, *, any_machine: bool = False) -> impatient.CostProfile:
        """Read the cost profile.

        Raises:
            StaleInput: if it is of another network or, unless `any_machine`, of another machine,
                thread count or torch version.
        """
        from impatient.runtime.profile import check_machine

        network = self.network_fingerprint()
        command = f"`impatient profile {self.path}{self.arguments}`"
        if not is_file(self.profile_file):
            raise StorageError(f"{self.here} has no cost profile; run {command}.")
        costs = impatient.CostProfile.load(self.profile_file)
        remedy = f"run {command} again, with the --threads that you use"
        costs.provenance.require(
            "the cost profile", remedy, network=network, engine=self.engine_name
        )
        if not any_machine:
            check_machine(costs, f"{remedy}, or pass --any-profile to use it all the same")
        return costs

    def recording(self, split: str, *, top: int | None = None) -> impatient.Recording:
        """Read the recording of one split, judged by its `top` likeliest classes if that is given.

        One made in 8 bits comes under the name of the weights that were exported, so that policies
        that were fitted on torch's answers may be judged on the engine's.

        Raises:
            StaleInput: if it was made by other weights or on other data.
            TaskError: if `top` does not fit the task, or names all classes.
        """
        data = self.data_fingerprint()
        what = f"recording of split {split!r}"
        remedy = f"run `impatient record {self.path}{self.arguments}`"
        file = self.recording_file(split)
        if not is_file(file):
            raise StorageError(f"{self.here} has no {what}; {remedy}.")
        recording = impatient.Recording.load(file)
        weights = self.weights_fingerprint()
        recording.provenance.require(
            f"the {what}",
            f"{remedy} again",
            weights=weights + self.weights_suffix,
            data=data,
        )
        made = dataclasses.replace(recording.provenance, weights=weights)
        recording = dataclasses.replace(recording, provenance=made)
        task = with_top(recording.task, top)
        return recording if task == recording.task else recording.as_task(task)

    # --- policies ---------------------------------------------------------------------------------

    def policy_files(self) -> dict[str, Path]:
        """Find the files of all fitted policies, by name."""
        folder = self.path / "policies"
        files = [*folder.glob("[!.]*.safetensors"), *folder.glob("[!.]*.json")]
        return {file.stem: file for file in sorted(files, key=lambda file: file.stem)}

    def save_policy(
        self,
        name: str,
        policy: impatient.Policy,
        certificate: impatient.policies.Certificate | None = None,
        target: impatient.policies.FittedTo | None = None,
    ) -> Path:
        """Write a policy, its certificate and its target, replacing any of this name."""
        about = self.certificate_file(name)
        wanted = self.target_file(name)
        plain = self.path / "policies" / f"{name}.json"
        learned = self.path / "policies" / f"{name}.safetensors"
        file, other = (learned, plain) if holds_tensors(policy) else (plain, learned)
        with contextlib.ExitStack() as both:
            if certificate is not None:
                certificate.save(both.enter_context(written_whole(about)))
            if target is not None:
                target.save(both.enter_context(written_whole(wanted)))
            with written_whole(file) as new:
                policy.save(new)
                # All is written. The old certificate goes before its policy does: it must never
                # stand beside a policy that it is not about; nor must a target.
                remove(about)
                remove(wanted)
            remove(other)
        return file

    def targets(self) -> dict[str, impatient.policies.FittedTo]:
        """Read what policies were fitted to, by name.

        Old ones do not say.
        """
        files = {name: self.target_file(name) for name in self.policy_files()}
        load = impatient.policies.FittedTo.load
        return {name: load(file) for name, file in files.items() if is_file(file)}

    def policy(self, name: str) -> impatient.Policy:
        """Read a fitted policy.

        Raises:
            StaleInput: if it was fitted on recordings of other weights.
        """
        files = self.policy_files()
        if name not in files:
            raise StorageError(
                f"{self.path} has no policy {name!r} (there: {', '.join(files) or 'none yet'}); "
                f"run `impatient fit {self.path}`."
            )
        return self._policy(files[name], self.weights_fingerprint())

    def policies(self) -> dict[str, impatient.Policy]:
        """Read all fitted policies, by name."""
        files = self.policy_files()
        # once for all: it reads every weight
        weights = self.weights_fingerprint() if files else ""
        return {name: self._policy(file, weights) for name, file in files.items()}

    def _policy(self, file: Path, weights: str) -> impatient.Policy:
        policy = impatient.Policy.load(file)
        # None: set by hand
        if policy.provenance is not None:
            remedy = f"run `impatient fit {self.path}` again"
            policy.provenance.require(f"the policy {file.stem!r}", remedy, weights=weights)
        return policy


class ExitFreeDirectory(RunDirectory):
    """A run directory as the backbone that was trained without exits sees it."""

    def __init__(self, path: str | Path, *, trust: Sequence[str] = ()) -> None:
        super().__init__(path, "exit_free", trust=trust)
        self.weights_file = self.here / "weights.safetensors"

    @property
    def is_trained(self) -> bool:
        """Whether there is such a backbone."""
        return is_file(self.weights_file)

    def network(self) -> tuple[Any, str]:
        """Load the backbone in eval mode, and fingerprint its weights."""
        return load_weights(self.spec().build_exit_free(self.trust), self.weights_file, self.path)


class EngineDirectory(RunDirectory):
    """A run directory as one engine sees it: its own answers and times.

    Args:
        path: The run directory.
        name: The engine, with the precision behind a hyphen if it is not fp32: a folder in
            `engines`, or "compile", which needs none.
        trust: As of a run directory; "aoti" for that engine's programs.
    """

    def __init__(self, path: str | Path, name: str, *, trust: Sequence[str] = ()) -> None:
        super().__init__(path, f"engines/{plain_name(name, 'engine')}", trust=trust)
        self.engine_name = name
        self.arguments = f" --engine {name}"
        engine, precision = impatient.engines.network.engine_and_precision(name)
        self.weights_suffix = "" if precision == "fp32" else f"-{precision}"
        flag = f" --precision {precision}" if self.weights_suffix else ""
        self.remedy = f"run `impatient export {self.path} --engine {engine}{flag}`"

    def network(self) -> tuple[Any, str]:
        """Load the network in this engine, with torch's number of threads.

        Raises:
            StorageError: if it has not been exported.
            StaleInput: if it was exported with other weights.
        """
        import torch

        from impatient.engines.export import bundle_file
        from impatient.networks.placement import WRITTEN

        threads = torch.get_num_threads()
        if self.engine_name == "compile":
            network, weights = super().network()
            example = self.spec().example()
            made = impatient.to_engine(network, "compile", example=example, threads=threads)
            return made, weights
        if not is_file(bundle_file(self.here)):
            there = sorted(file.parent.name for file in self.path.glob("engines/*/bundle.json"))
            raise StorageError(
                f"{self.path} has no engine {self.engine_name!r} (there: "
                f"{', '.join(there) or 'none yet'}; eager and compile need no export). To make "
                f"one, {self.remedy}; it knows {', '.join(WRITTEN)}."
            )
        if self.engine_name == "aoti" and "aoti" not in self.trust:
            raise ModelSpecError(
                "files of the engine aoti are compiled programs, which could do anything. If you "
                "made them, or trust whoever did, say --trust aoti."
            )
        engine = impatient.load_engine(self.here, threads=threads)
        if engine.facts.weights != self.weights_fingerprint():
            raise StaleInput(
                f"{self.here} was exported with other weights than those of {self.path}; "
                f"{self.remedy} with --force."
            )
        return engine, engine.weights_fingerprint
