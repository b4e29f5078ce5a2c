"""Run directories without a network, that hold outputs computed elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import impatient
from impatient.errors import RunError, StorageError
from impatient.files import is_file
from impatient.provenance import Provenance
from impatient.store import Stored
from impatient.verbs.run_directory import EAGER, RunDirectory


@dataclass(frozen=True, slots=True, kw_only=True)
class Imported(Stored, kind="imported", made_by="`impatient import`"):
    """Where outputs came from that another program computed.

    Attributes:
        source: Name of their file.
        exits: Names of the exits.
        class_names: Names of the classes, if the outputs are of classes.
        task: Name of the task of the outputs.
        provenance: Fingerprints of the outputs, in place of weights, and of the targets.
    """

    source: str
    exits: tuple[str, ...]
    class_names: tuple[str, ...]
    task: str
    provenance: Provenance


class ImportedDirectory(RunDirectory):
    """A run directory whose recordings and times somebody brought."""

    has_network = False

    def about(self) -> Imported:
        """Read where the outputs came from."""
        return Imported.load(self.imported_file)

    def engine(self, name: str) -> RunDirectory:
        """Refuse other engines, since there is no network that they could run."""
        if name != EAGER:
            raise RunError(
                f"{self.path} holds imported outputs, which no engine computes; leave --engine "
                f"{name} away."
            )
        return self

    def data_fingerprint(self) -> str | None:
        """Return the fingerprint of the targets."""
        return self.about().provenance.data

    def network_fingerprint(self) -> str | None:
        """Return the fingerprint that was given to the network that is not here."""
        return self.about().provenance.network

    def weights_fingerprint(self) -> str:
        """Return the fingerprint of the outputs, which stand for the weights."""
        return str(self.about().provenance.weights)

    def class_names(self) -> tuple[str, ...]:
        """Return the names of the classes, if the outputs are of classes."""
        return self.about().class_names

    def facts(self) -> dict[str, str]:
        """Say in words what made the answers, for the report."""
        about = self.about()
        return {
            "outputs": about.source,
            "exits": ", ".join(about.exits),
            "classes": str(len(about.class_names)),
            "task": about.task,
        }

    def profile(
        self,
        *,
        any_machine: bool = False,  # noqa: ARG002  as given
    ) -> impatient.CostProfile:
        """Read the cost profile that was given, of whichever machine."""
        if not is_file(self.profile_file):
            raise StorageError(
                f"{self.path} has no cost profile; run `impatient import FILE --into {self.path} "
                "--force` again with --costs-ms or --profile."
            )
        costs = impatient.CostProfile.load(self.profile_file)
        costs.provenance.require(
            "the cost profile",
            f"run `impatient import FILE --into {self.path} --force` again",
            network=self.network_fingerprint(),
        )
        return costs


def opened(path: str | Path, *, trust: Sequence[str] = ()) -> RunDirectory:
    """Open a run directory of either kind: of a network, or of imported outputs."""
    run = RunDirectory(path, trust=trust)
    if is_file(run.imported_file) and not is_file(run.spec_file):
        return ImportedDirectory(path, trust=trust)
    return run
