"""Trained networks that come with the library, by name.

Each is a folder of `impatient/zoo` like a run directory: network.json, weights in half precision,
recordings, and card.md, which says what it was trained on, how, how good it is, and what the
licence of its data is.
"""

from __future__ import annotations

from pathlib import Path

from impatient.anytime import Network
from impatient.errors import ModelSpecError, StorageError
from impatient.files import read_json, read_tensors

# what a zoo's network is called where a model or a run directory is named
PREFIX = "zoo:"
SHIPPED = Path(__file__).parent.parent / "zoo"


def zoo_names() -> tuple[str, ...]:
    """List the networks that come with the library."""
    return tuple(sorted(file.parent.name for file in SHIPPED.glob("*/network.json")))


def zoo_folder(name: str) -> Path:
    """Find the files of a network.

    Raises:
        ModelSpecError: if there is none of this name.
    """
    names = zoo_names()
    if name not in names:
        raise ModelSpecError(
            f"no network {name!r} in the zoo; expected one of {', '.join(names) or 'none'}."
        )
    return SHIPPED / name


def load_zoo(name: str) -> Network:
    """Load a trained network with exits, in eval mode and in single precision.

    Args:
        name: name of the network, such as "anytimenet-cifar10".
    Raises:
        ModelSpecError: if there is none of this name.
        StorageError: if its files are damaged.
    Example:
        >>> load_zoo("anytimenet-cifar10").exit_names[-1]
        '8-8-8'
    """
    from impatient.networks.specs import load_model

    folder = zoo_folder(name)
    facts = read_json(folder / "network.json")
    try:
        network = load_model(
            facts["model"],
            num_classes=facts["num_classes"],
            in_channels=facts["preprocess"]["channels"] or None,
        )
        weights, _ = read_tensors(folder / "weights.safetensors")
        network.load_state_dict(weights)
    except (KeyError, TypeError, RuntimeError) as error:
        raise StorageError(f"{folder} is damaged ({error}); install the library again.") from error
    assert isinstance(network, Network)
    return network.eval()
