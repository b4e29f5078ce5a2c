"""The examples run as they are written; what they print is not looked at, what they return is."""

import runpy
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def main_of(name: str) -> Any:
    return runpy.run_path(str(EXAMPLES / name))["main"]


@pytest.mark.filterwarnings("ignore::impatient.errors.NoEffectWarning")
def test_the_quickstart_answers_by_one_deadline_per_exit() -> None:
    answers = main_of("1_quickstart.py")(epochs=1)
    assert len(answers) == 4
    assert all(0 <= answer.exit <= 3 for answer in answers)


def test_a_loop_of_ones_own_learns() -> None:
    accuracy = main_of("2_own_training_loop.py")(epochs=2)
    assert len(accuracy) == 3
    assert accuracy[-1] > 0.3


def test_ensembles_are_networks_with_exits() -> None:
    accuracy = main_of("3_ensembles.py")(epochs=1)
    assert [len(values) for values in accuracy.values()] == [6, 6, 9]
    # the first exit is alone either way
    assert accuracy["its exits together"][0] == accuracy["one network"][0]


def test_a_run_is_interrupted() -> None:
    reached = main_of("2_interrupt.py")(runs=2)
    assert all(0 <= exit <= 5 for exit in reached)


def test_an_answer_is_refined() -> None:
    right = main_of("2_refine.py")(epochs=2, pictures=100)
    assert right["crude"] < right["refined"]
    assert right["refined"] > 0.5


@pytest.mark.filterwarnings("ignore::impatient.errors.NoEffectWarning")
def test_a_loop_cleans_pictures_until_they_hardly_change() -> None:
    found = main_of("2_loop.py")(epochs=3)
    assert found["last"] < 0.45
    assert 1.0 <= found["turns"] < 6.0


def test_a_late_answer_of_the_sensor_loop_is_a_wrong_one(tmp_path: Path) -> None:
    figure = tmp_path / "loop.png"
    made = main_of("3_sensor_loop.py")(
        seconds=0.03, rate=1e3, blocks=(2, 1, 1), epochs=1, repeats=5, figure=str(figure)
    )
    growing = made["AnytimeNet"]
    whole = made["static"]
    assert len(growing) == len(whole) == 30
    # the same deadlines for both
    assert [frame.left_s for frame in growing] == [frame.left_s for frame in whole]
    assert all(frame.on_time for frame in (*growing, *whole) if frame.right > 0.0)
    assert all(0 <= frame.iteration <= 1 for frame in growing)
    # it has one
    assert all(frame.iteration == 0 for frame in whole)
    assert figure.read_bytes().startswith(b"\x89PNG")


def test_the_sensor_loop_leaves_two_thirds_of_the_frames_enough_time() -> None:
    time_left = runpy.run_path(str(EXAMPLES / "3_sensor_loop.py"))["time_left"]
    left = time_left(0.004, 600, 30.0)
    assert (left >= 0.004).mean() == pytest.approx(2 / 3, abs=0.01)
    assert 0.001 < left.min() < left.max() < 0.008
