"""Compute the batch-norm statistics of a run's network anew."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from impatient.errors import RunError
from impatient.files import is_file, read_tensors, write_tensors
from impatient.table import Table, percent
from impatient.verbs.network_spec import save_weights
from impatient.verbs.notes import log
from impatient.verbs.options import Directory, Positive, Quiet, Trust, VerbOptions
from impatient.verbs.processes import alone
from impatient.verbs.run_directory import RunDirectory

if TYPE_CHECKING:
    from impatient.training.batch_norm import Recalibrated


@dataclass(frozen=True, slots=True, kw_only=True)
class RecalibrateOptions(VerbOptions):
    """Compute batch-norm statistics anew from the training split.

    Attributes:
        batch_size: Samples per batch; best as many as in training.
    """

    directory: Directory
    batch_size: Positive = 128
    quiet: Quiet = False
    trust: Trust = ()


@alone()
def recalibrate(options: RecalibrateOptions) -> dict[str, Recalibrated]:
    """Pass the training split through the network and its backbone without exits.

    Recordings, policies and exported engines are of the old weights then, and are out of date.

    Returns:
        What changed, by network.
    Raises:
        RunError: if there is no batch norm, or the run is made of the networks of others.
    """
    from impatient.networks.recalibration import batch_norms
    from impatient.training.batch_norm import recalibrate_on

    run = RunDirectory(options.directory, trust=options.trust)
    spec = run.spec()
    if spec.members:
        raise RunError(
            f"{run.path} is made of trained members; recalibrate those, and make it again with "
            "`impatient ensemble` or `select`."
        )
    data = run.data()
    parts = {"with exits": run}
    if run.exit_free.is_trained:
        parts["without exits"] = run.exit_free
    networks = {name: part.network()[0] for name, part in parts.items()}
    if not any(map(batch_norms, networks.values())):
        raise RunError(
            f"the network in {run.path} has no batch norm that keeps statistics; expected one. "
            "There is nothing to recalibrate."
        )
    changed = {}
    for name, network in networks.items():
        changed[name] = recalibrate_on(
            network,
            data,
            batch_size=options.batch_size,
            seed=spec.seed,
            progress=not options.quiet,
        )
        part = parts[name]
        # The checkpoint first: from it `train` would write the old weights again.
        _update_checkpoint(part, network)
        save_weights(network, part.weights_file)
        log.info("recalibrated: %s", part.weights_file)
    log.info("out of date now: recordings, policies and what follows; see `impatient show`")
    return changed


def _update_checkpoint(run: RunDirectory, network: Any) -> None:
    """Write the statistics into the checkpoint as well, if there is one."""
    file = run.here / "checkpoint.safetensors"
    if not is_file(file):
        return
    from impatient.networks.recalibration import batch_norms

    norms = set(batch_norms(network))
    names = {name for name, module in network.named_modules() if module in norms}
    tensors, header = read_tensors(file)
    own = {
        f"model/{name}": value
        for name, value in network.state_dict().items()
        if name.rpartition(".")[0] in names
    }
    write_tensors(file, {**tensors, **own}, header)


def shown(_: RecalibrateOptions, changed: dict[str, Recalibrated]) -> Iterator[Table]:
    """Give a row per exit and network."""
    first = next(iter(changed.values()))
    yield Table(
        title=f"{first.quality_name} on the validation split",
        columns=("network", "exit", "before", "after"),
        left=1,
        rows=[
            (name, str(exit), percent(before), percent(after))
            for name, one in changed.items()
            for exit, (before, after) in enumerate(zip(one.before, one.after, strict=True))
        ],
    )
