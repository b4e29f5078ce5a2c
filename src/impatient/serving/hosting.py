"""Load networks from run directories to serve them."""

from __future__ import annotations

from collections.abc import Sequence

from impatient.anytime import Network
from impatient.costs import CostProfile
from impatient.errors import ServingError
from impatient.evaluation.recording import Recording
from impatient.runtime.profile import profile
from impatient.serving.model import GainTable, ServedModel
from impatient.serving.service import Hosted
from impatient.serving.tensors import InputSpec
from impatient.training.preprocess import Preprocess

BATCH_SIZES = (1, 2, 4, 8)


def hosted_network(
    name: str,
    network: Network,
    recording: Recording,
    *,
    preprocess: Preprocess,
    classes: Sequence[str],
    input: InputSpec,
    costs: CostProfile | None = None,
    max_batch: int = 8,
    repeats: int = 50,
) -> Hosted:
    """Make a network ready to be served.

    Args:
        name: the name by which callers ask for it.
        network: the network, in eval mode.
        recording: its recording of the validation split, for what its exits are worth.
        preprocess: how raw samples become its input.
        classes: names of the classes.
        input: what it takes: the names, number types and shapes of raw samples. Where lengths
            differ, costs are those of the usual length.
        costs: its cost profile; by default it is measured now, with one thread.
        max_batch: most samples in one batch.
        repeats: measurements of each stage if it is measured now.
    Raises:
        ServingError: if the recording has another number of exits than the network, or its outputs
            are no tensors [B, C].
    """
    import torch

    quality = recording.quality.double().numpy()
    if len(quality) != network.num_exits:
        raise ServingError(
            f"the recording of {name!r} has {len(quality)} exits, the network {network.num_exits}; "
            "record it again."
        )
    x = preprocess(input.batch([input.example(1)]))
    with torch.inference_mode():
        output = network(x)[-1]
    if not isinstance(output, torch.Tensor) or output.dim() != 2:
        raise ServingError(
            f"the outputs of {name!r} are no tensors [B, C]; only such outputs can be served."
        )
    if costs is None:
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            sizes = [size for size in BATCH_SIZES if size <= max_batch]
            costs = profile(network, x, batch_sizes=sizes, repeats=repeats, max_seconds=5.0)
        finally:
            torch.set_num_threads(before)
    gains = GainTable.of(quality, recording.scores[network.task.default_score].double().numpy())
    return Hosted(
        network=network,
        model=ServedModel.of(name, costs, quality.mean(1), gains=gains, max_batch=max_batch),
        input=input,
        preprocess=preprocess,
        classes=tuple(classes),
    )
