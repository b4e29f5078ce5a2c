"""The steps of the command line as functions on a run directory; each does nothing if its result is up to date."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from impatient.budgets import exit_weights, parse_budget
from impatient.errors import StaleInput, TrainingError
from impatient.files import write_json
from impatient.run_directory import NetworkSpec, RunDirectory, new_spec, save_weights
from impatient.training.data import load_data
from impatient.training.loop import Recipe, fit
from impatient.training.weights import STATIC

Say = Callable[[Any], None]


def train(
    directory: str | Path,
    *,
    model: str,
    data_spec: str,
    exits: int,
    after: Sequence[str],
    heads: str,
    weights: str,
    mode: str,
    recipe: Recipe,
    exit_free: bool,
    validation: float,
    restart: bool,
    progress: bool,
    fabric_options: dict[str, Any],
    say: Say,
) -> None:
    """Train a network with exits into a run directory, and beside it the same backbone without exits."""
    run = RunDirectory(directory)
    if restart and run.spec_file.is_file():
        shutil.rmtree(run.path)
    data = load_data(data_spec, seed=recipe.seed, validation=validation)
    if run.spec_file.is_file():
        spec = run.spec()
        _check_same(spec, run, model=model, data=data_spec, heads=heads, seed=recipe.seed, validation=validation)
        if (after and tuple(after) != spec.after) or (not after and exits != len(spec.after) + 1):
            raise StaleInput(f"{run.path} was begun with exits after {', '.join(spec.after)}; say so again, or use --restart.")
    else:
        spec = new_spec(model, data, after=list(after) or None, count=exits, heads=heads, seed=recipe.seed, validation=validation)
        write_json(run.spec_file, spec.to_json())
    network = spec.build()
    say(network.describe(spec.example()))
    numbers = _exit_weights(weights, mode, run, network, say)
    options: dict[str, Any] = {"recipe": recipe, "progress": progress}
    fit(
        network, data, weights=numbers, fabric=_fabric(fabric_options), checkpoint=run.path / "checkpoint.safetensors",
        metrics_csv=run.path / "metrics.csv", **options,
    )  # fmt: skip
    save_weights(network, run.weights_file)
    if exit_free:
        say("the same backbone without exits, to compare with:")
        alone = spec.build_exit_free()
        plain = Recipe(**{**_fields(recipe), "regime": "joint"})
        fit(
            alone, data, fabric=_fabric(fabric_options), checkpoint=run.exit_free / "checkpoint.safetensors",
            metrics_csv=run.exit_free / "metrics.csv", recipe=plain, progress=progress,
        )  # fmt: skip
        save_weights(alone, run.exit_free / "weights.safetensors")
    say(f"trained: {run.weights_file}")


def _fields(recipe: Recipe) -> dict[str, Any]:
    import dataclasses

    return dataclasses.asdict(recipe)


def _fabric(options: dict[str, Any]) -> Any:
    from lightning_fabric import Fabric

    fabric = Fabric(**options)
    fabric.launch()
    return fabric


def _check_same(spec: NetworkSpec, run: RunDirectory, **wanted: Any) -> None:
    for name, value in wanted.items():
        if getattr(spec, name) != value:
            raise StaleInput(
                f"{run.path} was begun with --{name.replace('_', '-')} {getattr(spec, name)}, not {value}. Use the old value, "
                "another directory, or --restart to throw the old run away."
            )


def _exit_weights(weights: str, mode: str, run: RunDirectory, network: Any, say: Say) -> str | tuple[float, ...]:
    if weights in STATIC:
        return weights
    raise TrainingError(weights)
