"""Print values computed at a fixed seed, or compare two checkouts.

    python benchmarks/identical.py                      # print the values of this checkout
    python benchmarks/identical.py OLD_CHECKOUT         # run both and list every difference

Trains, records, fits and evaluates small networks on the digits. Times are invented, so that
nothing depends on the clock. Every value is printed as a hash of its bytes or an exact number.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import os
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


# The provenance names the commit and the machine; the next four have come with tasks; the last two
# are looked up in other values, and are functions.
NOT_COMPARED = {
    "provenance",
    "task",
    "own_task",
    "metrics",
    "quality_name",
    "plain_score",
    "for_one",
}


def digest(*tensors: Any) -> str:
    """Hash the shapes, types and bytes of tensors."""
    found = hashlib.sha256()
    for tensor in tensors:
        array = tensor.detach().contiguous().numpy()
        found.update(f"{array.dtype}{array.shape}".encode())
        found.update(array.tobytes())
    return found.hexdigest()[:16]


def plain(value: Any) -> Any:
    """Flatten a value for JSON, with tensors as hashes.

    Of a dataclass, the values of its fields count and not their names, which versions may change.
    """
    import numpy as np
    import torch

    if isinstance(value, torch.Tensor):
        return digest(value)
    if isinstance(value, np.ndarray):
        return digest(torch.from_numpy(np.ascontiguousarray(value)))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = {field.name for field in dataclasses.fields(value)} - NOT_COMPARED
        # sorted, since fields move to base classes and change their names
        return sorted((plain(getattr(value, name)) for name in names), key=repr)
    if isinstance(value, dict):
        return {str(name): plain(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    return value if isinstance(value, str | bool | type(None)) else repr(value)


def invented_costs(network: Any, example: Any) -> Any:
    """Profile a network, and replace every measured time by one that is the same everywhere."""
    import impatient

    costs = impatient.profile(network, example, batch_sizes=[1, 4], repeats=20)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "profile.json"
        costs.save(file)
        content = json.loads(file.read_text())
        # of the numbers as they were measured
        content.pop("checksum", None)
        numbers = itertools.count(1)

        def invent(entry: Any, name: str = "") -> Any:
            if isinstance(entry, dict) and "p50" in entry:
                base = (1e-4 if name == "heads" else 3e-3) + 1e-5 * next(numbers)
                order = ("mean", "p50", "p90", "p99", "p999", "max")
                steps = {name: base * (1 + 0.1 * place) for place, name in enumerate(order)}
                return {name: steps.get(name, value) for name, value in entry.items()}
            if isinstance(entry, dict):
                return {key: invent(part, key) for key, part in entry.items()}
            return [invent(part, name) for part in entry] if isinstance(entry, list) else entry

        content = invent(content)
        for batch in content.get("batches", {}).values():
            if isinstance(batch, dict):
                batch.pop("staged", None)
                batch["noise"] = None
        file.write_text(json.dumps(content))
        return impatient.CostProfile.load(file)


def values() -> dict[str, Any]:
    """Compute everything that must not change."""
    import torch

    import impatient
    from impatient import networks, policies, training

    torch.set_num_threads(1)
    data = impatient.load_data("digits")
    found: dict[str, Any] = {"data": data.fingerprint}
    made = {}
    for name, weights, sampler in (
        ("uniform", "uniform", "none"),
        ("sieve", "sieve", "none"),
        ("alternating", "uniform", "alternating"),
    ):
        torch.manual_seed(0)
        backbone = impatient.load_model("impatient:resnet:n=1,c=8", num_classes=10, in_channels=1)
        network = impatient.attach_exits(
            backbone, example=data.example(), after="every:1", num_classes=10
        )
        recipe = impatient.Recipe(epochs=2, batch_size=64, sampler=sampler, seed=0)
        impatient.fit(network, data, weights=weights, recipe=recipe)
        made[name] = network.eval()
        found[f"weights {name}"] = digest(*network.state_dict().values())
    network = made["uniform"]
    costs = invented_costs(network, data.example())
    recordings = {
        split: impatient.record(network, data, split=split, features=True)
        for split in ("validation", "test")
    }
    for split, recording in recordings.items():
        found[f"recording {split}"] = digest(recording.outputs, recording.labels)
        found[f"features {split}"] = digest(*recording.features)
    validation = recordings["validation"]
    test = recordings["test"]
    fitted: dict[str, Any] = {}
    for score in ("max_probability", "margin", "entropy"):
        for target in ({"max_accuracy_loss": 0.02}, {"mean_time_s": 0.012}):
            fitted[f"{score} {target}"] = impatient.fit_thresholds(
                validation, costs, score=score, **target
            )
    for inputs in ("confidences", "features", "both"):
        fitted[f"gates {inputs}"] = policies.fit_gates(
            validation, costs, inputs=inputs, max_accuracy_loss=0.02
        )
    points = policies.sweep_gates(validation, costs, inputs="confidences")
    found["sweep"] = [[repr(point.mean_time_s), repr(point.accuracy)] for point in points]
    times = [point.mean_time_s for point in points]
    fitted["mixed"] = policies.mix(points, mean_time_s=(min(times) + max(times)) / 2)
    for name, policy in fitted.items():
        found[f"policy {name}"] = plain(policy)
        found[f"evaluation {name}"] = plain(impatient.evaluate(test, costs, policy))
    found["temperatures"] = plain(policies.fit_temperatures(validation))
    cascade = networks.Cascade([other.backbone for other in made.values()], list(made))
    torch.manual_seed(0)
    record = impatient.record(cascade.eval(), data, split="validation")
    found["cascade"] = digest(record.outputs)
    topology = policies.Topology.full(tuple(made))
    for price in (1.0, 30.0):
        selection = policies.fit_selection(
            record, (0.001, 0.002, 0.004), topology, time_price=price
        )
        found[f"selection {price}"] = plain(selection)
    torch.manual_seed(0)
    anytime = networks.AnytimeNet(num_classes=10, in_channels=1, width=4).eval()
    with torch.no_grad():
        found["anytimenet"] = [digest(out) for out in anytime(data.example(2))]
        eann = networks.EANN([made["uniform"], made["sieve"]], [[0.3] * 3, [0.2] * 3])
        found["eann"] = [digest(out) for out in eann.eval()(data.example(2))]
    interruptible_s = costs.cumulative("time", "interruptible")
    budgets = (
        impatient.budgets.uniform(0.0, 0.02),
        impatient.budgets.small_likely(0.0, 0.02),
        impatient.budgets.normal(0.003, 0.02),
        impatient.budgets.log_uniform(0.001, 0.02),
    )
    found["budget weights"] = [
        plain(training.weights.sieve(16)),
        *(plain(impatient.exit_weights(budget, interruptible_s)) for budget in budgets),
    ]
    return found


def run(checkout: Path) -> dict[str, Any]:
    """Compute the values with the code of a checkout."""
    environment = {**os.environ, "PYTHONPATH": str(checkout / "src"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, __file__, "--values"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{checkout}: {done.stderr}")
    return json.loads(done.stdout[done.stdout.index("{") :])


def main(arguments: list[str]) -> int:
    if arguments == ["--values"]:
        warnings.simplefilter("ignore")
        print(json.dumps(values()))
        return 0
    here = run(ROOT)
    if not arguments:
        print(json.dumps(here, indent=1))
        return 0
    there = run(Path(arguments[0]).resolve())
    differing = [name for name in {**here, **there} if here.get(name) != there.get(name)]
    for name in differing:
        print(f"DIFFERS: {name}\n  there: {there.get(name)}\n  here:  {here.get(name)}")
    print(f"{len(here)} values, {len(differing)} differ")
    return bool(differing)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
