"""Networks of the zoo as run directories: `impatient run zoo:NAME ...`."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import impatient
from impatient.directories import working_on
from impatient.files import file_errors, is_file
from impatient.networks.zoo import PREFIX, load_zoo, zoo_folder
from impatient.verbs.network_spec import NetworkSpec, save_weights
from impatient.verbs.notes import log
from impatient.verbs.options import spare_a_core

# of the first profile: one or two seconds; `impatient profile` measures more
REPEATS = 100


def run_path(text: str) -> Path:
    """Find the run directory that a text names.

    One of the zoo is unpacked first.

    Raises:
        ModelSpecError: if the zoo has no such network.
    """
    return unpacked(text.removeprefix(PREFIX)) if text.startswith(PREFIX) else Path(text)


def cache_folder() -> Path:
    """Return where unpacked networks lie: impatient/zoo in $XDG_CACHE_HOME, or in ~/.cache."""
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "impatient" / "zoo"


def name_of(path: Path) -> str:
    """Name a run directory for people: its folder, or zoo:NAME of one that is unpacked."""
    place = path.resolve()
    if place.parent == cache_folder().resolve():
        return PREFIX + place.name.rpartition("-")[0]
    return place.name


def unpacked(name: str) -> Path:
    """Make a run directory of a network of the zoo, once, with a cost profile of this machine.

    What other steps write into it stays there. The weights' fingerprint is in the path, so that a
    new version of the library has a new directory.

    Raises:
        ModelSpecError: if there is none of this name.
        StorageError: if its files are damaged, or the directory cannot be written.
    """
    source = zoo_folder(name)
    spec = NetworkSpec.load(source / "network.json")
    network = load_zoo(name)
    version = impatient.provenance.fingerprint_tensors(network.state_dict())[:8]
    place = cache_folder() / f"{name}-{version}"
    with working_on(place, make=True):
        # the profile comes last: with it, all is there
        if not is_file(place / "profile.json"):
            with file_errors(f"write {place}"):
                shutil.copytree(source, place, dirs_exist_ok=True)
            save_weights(network, place / "weights.safetensors")
            log.info("zoo: %s unpacked into %s, measuring it on this machine", name, place)
            # This happens while options are read: the verbs will have as many threads as this.
            spare_a_core()
            costs = impatient.profile(network, spec.example(), repeats=REPEATS, progress=False)
            costs.save(place / "profile.json")
    return place
