"""Networks of the zoo: what is shipped, by which names it is reached, and what is refused."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

import impatient
from command_line import Call
from impatient.errors import ModelSpecError, StorageError
from impatient.files import read_tensors
from impatient.networks import zoo
from impatient.provenance import fingerprint_tensors
from impatient.verbs.zoo import name_of

NAMES = zoo.zoo_names()
MOST_BYTES = 8 * 2**20


def test_the_zoo_is_small_and_every_network_has_a_card() -> None:
    files = [file for file in zoo.SHIPPED.rglob("*") if file.is_file()]
    assert "anytimenet-cifar10" in NAMES
    assert sum(file.stat().st_size for file in files) <= MOST_BYTES
    assert {file.parent.name for file in files if file.name == "card.md"} == {*NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_card_and_recordings_are_of_the_shipped_weights(name: str) -> None:
    folder = zoo.zoo_folder(name)
    kept, _ = read_tensors(folder / "weights.safetensors")
    assert {value.dtype for value in kept.values()} == {torch.float16, torch.int64}
    network = impatient.load_zoo(name)
    state = network.state_dict()
    assert not network.training
    assert all(torch.equal(state[key], value.to(state[key].dtype)) for key, value in kept.items())
    card = (folder / "card.md").read_text()
    assert "**Licence of the data**" in card
    test = impatient.Recording.load(folder / "recordings" / "test.safetensors")
    assert test.provenance.weights == fingerprint_tensors(state)
    for exit, quality in zip(test.exits, test.quality.double().mean(1).tolist(), strict=True):
        assert f"| {exit} | {100 * quality:.2f} |" in card


def test_the_command_line_takes_a_network_of_the_zoo_for_a_run_directory(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from PIL import Image

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    Image.new("RGB", (64, 48), (90, 130, 220)).save(tmp_path / "sky.png")
    arguments = ("run", "zoo:anytimenet-cifar10", tmp_path / "sky.png", "--deadline-ms", "1000")
    code, text = call(*arguments, "--json")
    assert code == 0, text
    # what was said of the unpacking, on the error stream, comes behind it
    (answer,), _ = json.JSONDecoder().raw_decode(text[text.index("[") :])
    network = impatient.load_zoo("anytimenet-cifar10")
    assert (answer["exit"], answer["deadline_met"]) == (network.num_exits - 1, True)
    (place,) = (tmp_path / "impatient" / "zoo").iterdir()
    measured = (place / "profile.json").stat().st_mtime_ns
    assert call(*arguments)[0] == 0
    # unpacked and measured once; what is fitted on it stays in it
    assert (place / "profile.json").stat().st_mtime_ns == measured
    assert call("fit", "zoo:anytimenet-cifar10", "--max-loss", "1")[0] == 0
    assert [file.suffix for file in (place / "policies").iterdir()] == [".json"]
    # people read its name, and not the folder of this version
    assert name_of(place) == "zoo:anytimenet-cifar10"
    assert name_of(tmp_path / "runs" / "mine-1") == "mine-1"
    code, text = call("show", "zoo:no-such")
    assert code != 0
    assert "anytimenet-cifar10" in text


def test_a_spec_of_the_zoo_is_that_network_and_no_other() -> None:
    network = impatient.load_model("zoo:anytimenet-cifar10", num_classes=10)
    weights = fingerprint_tensors(impatient.load_zoo("anytimenet-cifar10").state_dict())
    assert fingerprint_tensors(network.state_dict()) == weights
    with pytest.raises(ModelSpecError, match="10 classes apart, not 7"):
        impatient.load_model("zoo:anytimenet-cifar10", num_classes=7)
    with pytest.raises(ModelSpecError, match="expected no options, not width"):
        impatient.load_model("zoo:anytimenet-cifar10:width=4")
    with pytest.raises(ModelSpecError, match="no network 'cat' in the zoo; expected one of any"):
        impatient.load_zoo("cat")


def test_a_network_of_the_zoo_is_measured_with_the_threads_that_verbs_use(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    # as a new user has it: torch takes all cores, and the command line leaves one
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    before = torch.get_num_threads()
    cores = max(2, len(os.sched_getaffinity(0)))
    torch.set_num_threads(cores)
    try:
        code, text = call("fit", "zoo:anytimenet-cifar10", "--max-loss", "1")
        assert torch.get_num_threads() < cores
    finally:
        torch.set_num_threads(before)
    assert code == 0, text
    assert "measuring it on this machine" in text


def test_a_damaged_network_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(zoo.SHIPPED, tmp_path, dirs_exist_ok=True)
    monkeypatch.setattr(zoo, "SHIPPED", tmp_path)
    file = tmp_path / "anytimenet-cifar10" / "network.json"
    facts = json.loads(file.read_text())
    facts["model"] = facts["model"].replace("width=16", "width=4")
    file.write_text(json.dumps(facts))
    with pytest.raises(StorageError, match="does not fit its checksum"):
        impatient.load_zoo("anytimenet-cifar10")
    del facts["checksum"]
    file.write_text(json.dumps(facts))
    with pytest.raises(StorageError, match="install the library again"):
        impatient.load_zoo("anytimenet-cifar10")
