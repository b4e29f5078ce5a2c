"""Fingerprints notice every change that matters, and stale files say what to do."""

import json
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from impatient.errors import StaleInput
from impatient.provenance import (
    Provenance,
    fingerprint_bytes,
    fingerprint_structure,
    fingerprint_tensors,
    machine,
    own_version,
    provenance,
    versions,
)
from impatient.store import from_plain, to_plain

Fingerprint = Callable[[dict[str, Tensor]], str]
both = pytest.mark.parametrize("fingerprint", [fingerprint_structure, fingerprint_tensors])


def tensors() -> dict[str, Tensor]:
    return {
        "a.weight": torch.arange(6.0).reshape(2, 3),
        "a.bias": torch.ones(2),
        "count": torch.tensor(3),
    }


# --- fingerprints ---------------------------------------------------------------------------------


@both
def test_the_same_tensors_have_the_same_fingerprint(fingerprint: Fingerprint):
    assert fingerprint(tensors()) == fingerprint(tensors())
    assert len(fingerprint(tensors())) == 16


def test_a_fingerprint_of_tensors_does_not_depend_on_the_order():
    assert fingerprint_tensors(dict(reversed(tensors().items()))) == fingerprint_tensors(tensors())


@both
@pytest.mark.parametrize(
    "change",
    [
        {"a.weight": torch.arange(6.0).reshape(3, 2)},
        {"a.weight": torch.arange(6.0)},
        {"a.bias": torch.ones(2, dtype=torch.float64)},
        {"a.bias": torch.ones(2, dtype=torch.int32)},
        {"a.bias": torch.ones(3)},
        {"count": torch.tensor([3])},
        {"extra": torch.zeros(0)},
    ],
)
def test_a_fingerprint_changes_with_shape_type_and_number(fingerprint: Fingerprint, change):
    assert fingerprint({**tensors(), **change}) != fingerprint(tensors())


@both
def test_a_fingerprint_changes_with_a_name_and_with_swapped_names(fingerprint: Fingerprint):
    renamed = {("b.bias" if name == "a.bias" else name): value for name, value in tensors().items()}
    assert fingerprint(renamed) != fingerprint(tensors())
    swapped = {**tensors(), "a.weight": tensors()["a.bias"], "a.bias": tensors()["a.weight"]}
    assert fingerprint(swapped) != fingerprint(tensors())


@pytest.mark.parametrize("value", [[1.0, 1.0000001], [1.0, -1.0], [float("nan"), 1.0], [1.0, 0.0]])
def test_values_change_the_fingerprint_of_tensors_but_not_of_the_structure(value):
    changed = {**tensors(), "a.bias": torch.tensor(value)}
    assert fingerprint_tensors(changed) != fingerprint_tensors(tensors())
    assert fingerprint_structure(changed) == fingerprint_structure(tensors())


def test_the_sign_of_a_zero_is_a_change():
    plus, minus = ({"a": torch.tensor([zero])} for zero in (0.0, -0.0))
    assert fingerprint_tensors(plus) != fingerprint_tensors(minus)


def test_memory_layout_and_gradients_are_no_change():
    laid_out = {
        **tensors(),
        "a.weight": torch.arange(6.0).reshape(2, 3).T.contiguous().T.requires_grad_(),
    }
    assert not laid_out["a.weight"].is_contiguous()
    assert fingerprint_tensors(laid_out) == fingerprint_tensors(tensors())


def test_every_type_of_tensor_has_a_fingerprint():
    kinds = [torch.bfloat16, torch.float16, torch.bool, torch.uint8, torch.int64, torch.complex64]
    prints = {fingerprint_tensors({"a": torch.ones(2, dtype=kind)}) for kind in kinds}
    assert len(prints) == len(kinds)
    assert fingerprint_tensors({}) != fingerprint_tensors({"a": torch.zeros(0)})


def test_bytes_have_a_short_fingerprint():
    # the first half of the half of SHA-256 of abc
    assert fingerprint_bytes(b"ab", b"c") == "ba7816bf8f01cfea"
    assert fingerprint_bytes(b"abd") != fingerprint_bytes(b"abc")


# --- what made a file -----------------------------------------------------------------------------


def test_provenance_says_what_is_known_and_when_and_with_what():
    here = provenance(network="n", seed=3, device="cpu")
    assert (here.network, here.weights, here.seed, here.engine) == ("n", None, 3, "eager")
    assert here.versions == versions()
    assert set(versions()) == {"python", "torch", "impatient"}
    assert versions()["torch"] == torch.__version__
    assert here.created.endswith("+00:00")


def test_the_machine_is_named_with_its_thread_count():
    assert machine("cpu") == {
        "device": "cpu",
        "processor": machine("cpu")["processor"],
        "threads": torch.get_num_threads(),
    }
    assert machine("cpu")["processor"]


def test_a_package_that_was_never_installed_has_an_unknown_version(monkeypatch):
    def missing(name: str) -> str:
        from importlib.metadata import PackageNotFoundError

        raise PackageNotFoundError(name)

    assert own_version() != "unknown"
    monkeypatch.setattr("importlib.metadata.version", missing)
    assert own_version() == "unknown"


def test_provenance_survives_json():
    here = provenance(network="n", data="d", seed=1, threads=2)
    assert from_plain(json.loads(json.dumps(to_plain(here))), Provenance) == here


# --- stale files ----------------------------------------------------------------------------------


def test_what_agrees_passes():
    provenance(network="n", seed=1).require(
        "the recording", "record again", network="n", seed=1, weights=None
    )


@pytest.mark.parametrize(
    ("name", "spoken"),
    [
        ("weights", "set of weights"),
        ("data", "data set"),
        ("network", "network structure"),
        ("seed", "seed"),
    ],
)
def test_a_stale_file_says_what_differs_and_what_to_do(name, spoken):
    message = (
        f"the recording was made with another {spoken}: 'old', but here it is 'new'. To fix this, "
        "run `impatient record D`."
    )
    with pytest.raises(StaleInput) as caught:
        provenance(**{name: "old"}).require(
            "the recording", "run `impatient record D`", **{name: "new"}
        )
    assert str(caught.value) == message


def test_an_unknown_origin_is_stale():
    with pytest.raises(StaleInput, match="another data set: None, but here it is 'd'"):
        provenance().require("the recording", "record again", data="d")
