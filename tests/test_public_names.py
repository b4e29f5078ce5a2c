"""The names others count on."""

import importlib
import inspect

import pytest

import impatient

FACES = [
    "impatient",
    "impatient.networks",
    "impatient.training",
    "impatient.policies",
    "impatient.evaluation",
    "impatient.runtime",
    "impatient.engines",
]


@pytest.mark.parametrize("face", FACES)
def test_what_a_face_exports_is_there_sorted_and_nothing_else(face: str) -> None:
    module = importlib.import_module(face)
    public = {
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and not (inspect.ismodule(value) and name not in module.__all__)
    }

    assert public - set(module.__all__) <= {"own_version"}
    assert all(hasattr(module, name) for name in module.__all__)


def test_the_calls_of_the_design_exist() -> None:
    for name in (
        "attach_exits",
        "profile",
        "fit",
        "record",
        "fit_thresholds",
        "evaluate",
        "Runner",
        "Deadline",
        "Budget",
    ):
        assert hasattr(impatient, name)
    assert len(impatient.training.weights.sieve(16)) == 16
    assert impatient.budgets.uniform(0.0, 0.010).high == 0.010


def test_every_error_is_in_the_tree_of_the_docstring() -> None:
    from impatient import errors

    defined = [
        name
        for name, value in vars(errors).items()
        if inspect.isclass(value) and issubclass(value, Exception)
    ]

    assert [
        name for name in defined if name not in errors.__doc__ and name != "NoEffectWarning"
    ] == []
