"""Two runs are compared on the same data, or it is said what differs."""

import dataclasses
import shutil
from pathlib import Path

import pytest

from impatient.errors import StaleInput
from impatient.verbs.evaluate import check_same_data
from impatient.verbs.run_directory import RunDirectory


def test_what_differs_between_the_data_of_two_runs_is_said(run_dir: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(run_dir, tmp_path / "other"))
    sides = RunDirectory(run_dir), RunDirectory(other)
    check_same_data(*sides)
    spec = sides[1].spec()
    changes = {
        "--seed: 0 and 5": {"seed": 5},
        "--data: 'digits' and 'npz:x.npz'": {"data": "npz:x.npz"},
        "what is done to inputs: .*the mean 0.25": {
            "preprocess": dataclasses.replace(spec.preprocess, mean=(0.25,))
        },
        "the samples themselves changed": {},
    }
    for said, change in changes.items():
        changed = dataclasses.replace(spec, data_fingerprint="another", **change)
        changed.save(other / "network.json")
        with pytest.raises(StaleInput, match=said):
            check_same_data(*sides)
