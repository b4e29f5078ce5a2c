"""A run directory is never destroyed, mixed or damaged without a word, and runs nobody's code."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from command_line import TINY, Call
from impatient import files
from impatient.directories import remove_stale, replaced_whole, working_on
from impatient.errors import ModelSpecError, StorageError
from impatient.files import plain_name, read_json, read_tensors, write_json, write_tensors
from impatient.networks.specs import check_trusted
from impatient.training.checkpoint import load_checkpoint
from impatient.verbs.replacing import discard_old, replaced
from impatient.verbs.run_directory import RunDirectory


def content(folder: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def changed(file: Path, **entries: Any) -> None:
    """Change entries of a JSON file as somebody would who means it: the checksum fits."""
    write_json(file, read_json(file) | entries)


# --- names ----------------------------------------------------------------------------------------

BAD_NAMES = [
    "",
    ".",
    "..",
    "../weights",
    "a/b",
    "/abs",
    "a\\b",
    ".hidden",
    "a\0b",
    "\x1b[2J",
    "x\n",
]


@pytest.mark.parametrize("name", [*BAD_NAMES, "a" * 300])
def test_a_name_that_is_no_plain_file_name_is_refused_everywhere(tmp_path: Path, name: str) -> None:
    run = RunDirectory(tmp_path)
    places = (run.certificate_file, run.recording_file, run.exit_free.recording_file, run.engine)
    for place in places:
        with pytest.raises(StorageError, match="cannot be a file name"):
            place(name)


@pytest.mark.parametrize("name", ["fast-1", "loss-0.5-macs", "schnell und gut", "\u00e9"])
def test_a_plain_name_is_taken(name: str) -> None:
    assert plain_name(name, "policy") == name


def test_fitting_under_a_name_that_is_a_path_changes_nothing(call: Call, run_dir: Path) -> None:
    before = content(run_dir)
    code, printed = call("fit", run_dir, "--name", "../weights")
    assert code == 1
    assert "cannot be a file name" in printed
    assert content(run_dir) == before


# --- nothing is destroyed before its successor exists ---------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [
        ["--model", "impatient:rsnet"],
        ["--data", "digitz"],
        ["--weights", "sieve:x=1"],
        ["--after", "nowhere"],
    ],
)
def test_restart_with_a_mistake_leaves_the_old_run(
    call: Call, run_dir: Path, wrong: list[str]
) -> None:
    before = content(run_dir)
    options = TINY[:2] + TINY[4:] if "--after" in wrong else TINY
    code, _ = call("train", run_dir, *options, "--restart", *wrong)
    assert code == 1
    assert content(run_dir) == before


def test_restart_leaves_files_alone_that_are_not_of_a_run(call: Call, run_dir: Path) -> None:
    mine = {run_dir / "notes.txt", run_dir / "policies" / "why.md", run_dir / "sub" / "data.npz"}
    for file in mine:
        file.parent.mkdir(exist_ok=True)
        file.write_text("mine")
    arguments = [*TINY[:4], "--epochs", 1, "--quiet", "--no-exit-free"]
    code, _ = call("train", run_dir, *arguments, "--restart")
    assert code == 0
    new = {"network.json", "training.json", "weights.safetensors", "checkpoint.safetensors"}
    assert set(content(run_dir)) == mine | {run_dir / name for name in (*new, "metrics.csv")}


def test_a_replaced_run_is_kept_until_it_is_discarded(run_dir: Path) -> None:
    before = {file.relative_to(run_dir): data for file, data in content(run_dir).items()}
    with replaced(run_dir) as new:
        (new / "network.json").write_text("{}")
    kept = content(run_dir / "replaced")
    assert {file.relative_to(run_dir / "replaced"): data for file, data in kept.items()} == before
    # the new run was never trained: it does not push out the old one
    with replaced(run_dir) as new:
        (new / "network.json").write_text("{ }")
    assert content(run_dir / "replaced") == kept
    discard_old(run_dir)
    assert content(run_dir) == {run_dir / "network.json": b"{ }"}


def test_an_exported_network_is_set_aside_with_all_it_holds(call: Call, run_dir: Path) -> None:
    assert call("export", run_dir, "--repeats", 5, "--quiet")[0] == 0
    # what `python run.py --profile` writes there
    (run_dir / "engines" / "onnxruntime" / "costs.json").write_text("{}")
    with replaced(run_dir) as new:
        (new / "network.json").write_text("{}")
    assert not (run_dir / "engines").exists()


def test_a_directory_that_is_no_run_keeps_its_files(tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text("mine")
    with replaced(tmp_path) as new:
        (new / "network.json").write_text("{}")
    discard_old(tmp_path)
    assert (tmp_path / "report.html").read_text() == "mine"


def test_on_a_full_disk_a_policy_and_its_certificate_stay(
    call: Call, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert call("fit", run_dir, "--max-loss", 30, "--delta", 0.1)[0] == 0
    before = content(run_dir)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.tempfile, "mkstemp", full)
    code, printed = call("fit", run_dir, "--max-loss", 30, "--delta", 0.1)
    assert code == 1
    assert "Nothing was changed" in printed
    assert content(run_dir) == before


@pytest.mark.parametrize(
    ("method", "place"), [("unlink", "certificates"), ("is_file", "recording")]
)
def test_an_error_of_the_file_system_is_ours(
    run_dir: Path, call: Call, monkeypatch: pytest.MonkeyPatch, method: str, place: str
) -> None:
    kept = getattr(Path, method)

    def denied(self: Path, *arguments: Any, **options: Any) -> Any:
        if place in str(self):
            raise PermissionError(errno.EACCES, "Permission denied", str(self))
        return kept(self, *arguments, **options)

    monkeypatch.setattr(Path, method, denied)
    code, printed = call("fit", run_dir)
    assert code == 1
    assert "StorageError" in printed
    assert "Permission denied" in printed


# --- one at a time --------------------------------------------------------------------------------

_HOLD = """
import sys, pathlib
from impatient.directories import working_on
with working_on(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_verb_is_refused_while_another_process_works_on_the_directory(
    call: Call, run_dir: Path
) -> None:
    before = content(run_dir)
    with subprocess.Popen(
        [sys.executable, "-c", _HOLD, run_dir], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        code, printed = call("fit", run_dir)
        assert code == 1
        assert "another process works on" in printed
        assert content(run_dir) == before
        other.communicate()
    assert call("fit", run_dir)[0] == 0


def test_one_thread_may_work_within_its_own_work_and_nothing_is_left_behind(tmp_path: Path) -> None:
    place = tmp_path / "a" / "b"
    with working_on(place, make=True), working_on(place):
        assert place.is_dir()
    assert list(tmp_path.iterdir()) == []
    with working_on(place):
        assert not place.exists()


def test_what_a_killed_process_left_behind_is_swept_and_nothing_else(
    call: Call, run_dir: Path
) -> None:
    engine = run_dir / "engines" / "onnxruntime"
    engine.mkdir(parents=True)
    before = content(run_dir)
    (run_dir / "policies" / ".loss-2.json.ab_cd3f9.tmp").write_text("half")
    (engine / ".costs.json.4711.tmp").write_text("half")
    (run_dir / ".new.abcdefgh.tmp" / "recordings").mkdir(parents=True)
    mine = [run_dir / ".notes.tmp", run_dir / "mine" / ".a.abcdefgh.tmp"]
    for file in mine:
        file.parent.mkdir(exist_ok=True)
        file.write_text("mine")
    assert call("fit", run_dir, "--max-loss", 2)[0] == 0
    found = content(run_dir)
    assert found.keys() - before.keys() == {*mine}
    assert not list(run_dir.glob(".new.*"))


def test_a_directory_that_was_on_its_way_out_without_a_successor_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "engine"
    place.mkdir()
    (place / "file").write_text("old")
    # the process is killed between the two renames
    left = tmp_path / ".engine.abcdefgh.tmp"
    (left / "new").mkdir(parents=True)
    place.rename(left / "old")
    remove_stale(tmp_path, ["."])
    assert content(tmp_path) == {place / "file": b"old"}
    # the disk fails at the second rename
    kept = Path.rename

    def denied(self: Path, target: Path) -> Path:
        if self.name == "new":
            raise PermissionError(errno.EACCES, "Permission denied")
        return kept(self, target)

    monkeypatch.setattr(Path, "rename", denied)
    with pytest.raises(StorageError, match="Permission denied"), replaced_whole(place) as new:
        (new / "file").write_text("new")
    assert content(tmp_path) == {place / "file": b"old"}


# --- damage ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("entry", ["mean", "std"])
def test_a_plausible_number_that_was_damaged_is_noticed(run_dir: Path, entry: str) -> None:
    file = run_dir / "network.json"
    spec = json.loads(file.read_text())
    spec["preprocess"][entry] = [0.9]
    file.write_text(json.dumps(spec, indent=1))
    with pytest.raises(StorageError, match=r'fit its checksum.*remove the entry "checksum"'):
        RunDirectory(run_dir).spec()
    del spec["checksum"]
    file.write_text(json.dumps(spec))
    assert getattr(RunDirectory(run_dir).spec().preprocess, entry) == (0.9,)


@pytest.mark.parametrize("file", ["profile.json", "policies/loss-2.json", "training.json"])
def test_a_damaged_file_is_made_again_by_its_verb_or_named(
    call: Call, run_dir: Path, file: str
) -> None:
    path = run_dir / file
    path.write_text(path.read_text().replace("1", "2", 1))
    commands = {
        "profile.json": ("profile", run_dir, "--repeats", 5, "--quiet"),
        "policies/loss-2.json": ("fit", run_dir, "--max-loss", 2),
        "training.json": ("train", run_dir, *TINY),
    }
    code, printed = call(*commands[file])
    assert code == (1 if file == "training.json" else 0)
    assert ("does not fit its checksum" in printed) == (file != "policies/loss-2.json")


@pytest.mark.parametrize("file", ["weights", "checkpoint", "recordings/test"])
def test_one_flipped_bit_anywhere_in_a_payload_is_noticed(run_dir: Path, file: str) -> None:
    path = run_dir / f"{file}.safetensors"
    good = path.read_bytes()
    for place in np.random.default_rng(0).integers(8, len(good), 40):
        damaged = bytearray(good)
        damaged[place] ^= 1 << int(place) % 8
        path.write_bytes(damaged)
        with pytest.raises(StorageError):
            read_tensors(path)
    path.write_bytes(good)
    read_tensors(path)


def test_a_file_without_a_checksum_is_read_as_before(run_dir: Path) -> None:
    path = run_dir / "weights.safetensors"
    tensors, header = read_tensors(path)
    save_file(tensors, path, metadata={"header": json.dumps(header)})
    read = read_tensors(path)[0]
    assert all(torch.equal(read[name], tensors[name]) for name in tensors)
    RunDirectory(run_dir).network()
    with safe_open(str(path), framework="pt") as opened:
        assert set(opened.metadata()) == {"header"}


def test_weights_that_do_not_fit_their_own_fingerprint_are_refused(run_dir: Path) -> None:
    path = run_dir / "weights.safetensors"
    tensors, header = read_tensors(path)
    name = next(name for name, value in tensors.items() if value.is_floating_point())
    save_file({**tensors, name: tensors[name] + 1}, path, metadata={"header": json.dumps(header)})
    with pytest.raises(StorageError, match="do not fit the fingerprint"):
        RunDirectory(run_dir).network()


def test_a_checkpoint_that_lacks_tensors_or_has_others_is_refused(run_dir: Path) -> None:
    path = run_dir / "checkpoint.safetensors"
    tensors, header = read_tensors(path)
    network = RunDirectory(run_dir).spec().build()
    gone = next(name for name in tensors if name.startswith("optimizer/"))
    write_tensors(path, {k: v for k, v in tensors.items() if k != gone}, header)
    with pytest.raises(StorageError, match="tensors of the optimizer"):
        load_checkpoint(path, network)
    name = next(k for k, v in tensors.items() if k.startswith("model/") and v.is_floating_point())
    write_tensors(path, {**tensors, name: tensors[name].long()}, header)
    with pytest.raises(StorageError, match=r"expected torch\.float32"):
        load_checkpoint(path, network)


# --- trust ----------------------------------------------------------------------------------------

STRANGE = ["subprocess:check_call:args=['touch','MARK']", "os:system:command='touch MARK'"]


@pytest.mark.parametrize("model", STRANGE)
@pytest.mark.parametrize("verb", ["run", "profile", "record", "export", "evaluate", "ensemble"])
def test_a_directory_of_somebody_else_runs_nothing(
    call: Call, run_dir: Path, tmp_path: Path, model: str, verb: str
) -> None:
    mark = tmp_path / "mark"
    changed(run_dir / "network.json", model=model.replace("MARK", str(mark)))
    np.save(tmp_path / "x.npy", np.zeros((1, 8, 8), np.uint8))
    arguments: dict[str, list[Any]] = {
        "run": [run_dir, tmp_path / "x.npy"],
        "ensemble": [tmp_path / "new", run_dir],
        "record": [run_dir, "--force"],
        "profile": [run_dir, "--force"],
        "evaluate": [run_dir, "--real", 3],
    }
    code, printed = call(verb, *arguments.get(verb, [run_dir]))
    assert code == 1
    assert "--trust" in printed
    assert not mark.exists()


def test_a_module_is_built_when_it_is_trusted_by_name_and_no_other(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own_for_trust.py").write_text(
        "from impatient.networks import PreActResNet\n"
        "def build(num_classes, in_channels):\n"
        "    return PreActResNet(n=1, c=8, num_classes=num_classes, in_channels=in_channels)\n"
    )
    changed(run_dir / "network.json", model="own_for_trust:build")
    for trust in ((), ("own_for_trust:other",), ("own",)):
        with pytest.raises(ModelSpecError, match="--trust own_for_trust:build"):
            RunDirectory(run_dir, trust=trust).network()
    assert "own_for_trust" not in sys.modules
    for trust in (("own_for_trust",), ("other", "own_for_trust:build")):
        assert RunDirectory(run_dir, trust=trust).network()[0].num_exits == 3


@pytest.mark.parametrize(
    "option", ["trust_remote_code=True", "checkpoint_path=x.pth", "pretrained_cfg_overlay={}"]
)
def test_options_of_known_sources_that_run_code_are_refused(option: str) -> None:
    check_trusted("timm:test_resnet:drop_rate=0.5", ())
    with pytest.raises(ModelSpecError, match=option.partition("=")[0]):
        check_trusted(f"timm:test_resnet:{option}", ())


def test_compiled_programs_are_not_loaded_unless_trusted(run_dir: Path) -> None:
    place = run_dir / "engines" / "aoti"
    place.mkdir(parents=True)
    (place / "bundle.json").write_text("{}")
    with pytest.raises(ModelSpecError, match="--trust aoti"):
        RunDirectory(run_dir).engine("aoti").network()
    with pytest.raises(StorageError):
        RunDirectory(run_dir, trust=["aoti"]).engine("aoti").network()


def test_the_tests_run_as_the_first_process() -> None:
    # the lock is the first process's; without this the tests of it would show nothing
    assert os.environ.get("LOCAL_RANK", "0") == "0"


@pytest.mark.parametrize("what", ["complex", "text", "damaged header"])
def test_an_array_that_is_no_input_is_refused(
    call: Call, run_dir: Path, tmp_path: Path, what: str
) -> None:
    file = tmp_path / "x.npy"
    kind = {"complex": "complex64", "text": "U1"}.get(what, "uint8")
    np.save(file, np.zeros((1, 8, 8), kind))
    if what == "damaged header":
        damaged = bytearray(file.read_bytes())
        damaged[22] = 0
        file.write_bytes(damaged)
    code, printed = call("run", run_dir, file)
    assert code == 1
    assert "cannot be read as a plain array" in printed


@pytest.mark.parametrize(
    ("entry", "value"),
    [
        ("class_names", ["a", "b"]),
        ("class_names", [[]] * 10),
        ("mean", []),
        ("mean", [float("nan")]),
        ("std", [0.0]),
        ("std", {}),
        ("std", [1.0, 1.0]),
    ],
)
def test_a_description_with_numbers_that_do_not_fit_is_refused(
    run_dir: Path, entry: str, value: Any
) -> None:
    file = run_dir / "network.json"
    spec = read_json(file)
    (spec if entry in spec else spec["preprocess"])[entry] = value
    write_json(file, spec)
    with pytest.raises(StorageError, match=r"network\.json"):
        RunDirectory(run_dir).spec()


@pytest.mark.parametrize("name", ["nn", "no_such", "Tensor"])
def test_a_description_with_a_dtype_that_torch_lacks_is_refused(run_dir: Path, name: str) -> None:
    file = run_dir / "network.json"
    changed(file, example_dtype=name)
    with pytest.raises(StorageError, match=f"example_dtype is '{name}'; expected"):
        RunDirectory(run_dir).spec().example()


def test_an_export_that_was_stopped_before_it_was_measured_goes_on(
    call: Call, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    command = ["export", run_dir, "--repeats", 5, "--quiet"]
    with monkeypatch.context() as patch:
        patch.setattr("impatient.load_engine", stopped)
        assert call(*command)[0] == 130
    assert call(*command)[0] == 0
    assert "already an exported network" in call(*command)[1]
