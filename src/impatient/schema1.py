"""Rewrite files of version 0.1.0 in memory as this version writes them.

Old files name tensors differently, differ in a few entries, and have the schema inside of the
provenance. Delete this module when nobody has such files any more.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from impatient.files import entries_under

if TYPE_CHECKING:
    from torch import Tensor

Tree = dict[str, Any]
Tensors = dict[str, "Tensor"]


def upgraded(tree: Tree, tensors: Tensors) -> tuple[Tree, Tensors]:
    """Convert the JSON and the tensors of an old file.

    Where tensors are named differently, they are put into the JSON and left out of the result.
    """
    tree = _without_schema(tree)
    upgrade = _UPGRADES.get(tree.get("kind", ""))
    return (upgrade(tree, tensors), {}) if upgrade else (tree, tensors)


def _without_schema(entry: Any) -> Any:
    """Remove the version from each provenance."""
    if isinstance(entry, dict):
        parts = {key: _without_schema(part) for key, part in entry.items()}
        if {"versions", "created", "schema"} <= parts.keys() and parts["schema"] == 1:
            del parts["schema"]
        return parts
    return [_without_schema(part) for part in entry] if isinstance(entry, list) else entry


def _recording(tree: Tree, tensors: Tensors) -> Tree:
    features = entries_under("features/", tensors)
    ordered = [features[name] for name in sorted(features, key=int)]
    own = {name: value for name, value in tensors.items() if not name.startswith("features/")}
    return tree | _tables(own) | {"features": ordered}


def _tables(tensors: Tensors) -> Tree:
    """Judge the outputs of an old recording, in which there were no tables."""
    import torch

    from impatient.tasks import classification

    if not {"outputs", "labels"} <= tensors.keys():
        # another file, which is refused for what it lacks
        return {}
    outputs, labels = tensors["outputs"], tensors["labels"]
    rows = [classification().tables(output, labels) for output in outputs]
    return {
        "task": "classification",
        "quality": torch.stack([quality for quality, _, _ in rows]),
        "scores": {
            name: torch.stack([scores[name] for _, scores, _ in rows]) for name in rows[0][1]
        },
        "statistics": None,
        "outputs": outputs,
        "targets": labels,
    }


def _thresholds(tree: Tree, _: Tensors) -> Tree:
    return {"cost": "macs" if "mean_macs" in (tree.get("target") or ()) else "time"} | tree


def _cost_profile(tree: Tree, _: Tensors) -> Tree:
    # -1 meant "not known".
    return {
        name: None if name.startswith("exit_free_") and entry == -1 else entry
        for name, entry in tree.items()
    }


def _certificate(tree: Tree, _: Tensors) -> Tree:
    return {name: entry for name, entry in tree.items() if name != "statement"}


def _gates(tree: Tree, tensors: Tensors) -> Tree:
    gates = [
        _decision(tensors, f"{exit}/") if is_open else None
        for exit, is_open in enumerate(tree["open"])
    ]
    return {name: entry for name, entry in tree.items() if name != "open"} | {"gates": gates}


def _selection(tree: Tree, tensors: Tensors) -> Tree:
    decisions = {
        str(node): _decision(tensors, f"{node}/")
        for node, moves in enumerate(tree["moves"])
        if len(moves) > 1
    }
    return tree | {"decisions": decisions}


def _decision(tensors: Tensors, prefix: str) -> Tree:
    own: Tree = entries_under(prefix, tensors)
    shape = own.pop("shape", None)
    plain = {name: value for name, value in own.items() if not name.startswith("machines/")}
    plain["machines"] = entries_under("machines/", own)
    if shape is not None:
        plain["num_actions"], plain["root"] = shape.tolist()
    return plain


def _mixed(tree: Tree, tensors: Tensors) -> Tree:
    rest = {name: entry for name, entry in tree.items() if name not in _NAMES}
    parts = {
        _NAMES[name]: _UPGRADES[tree[name]["kind"]](tree[name], entries_under(f"{name}/", tensors))
        for name in _NAMES
        if name in tree
    }
    return rest | parts | {"kind": "mixed_policy"}


_NAMES = {"cheap": "fast", "dear": "slow", "fast": "fast", "slow": "slow"}

_UPGRADES = {
    "recording": _recording,
    "threshold_policy": _thresholds,
    "cost_profile": _cost_profile,
    "certificate": _certificate,
    "gate_policy": _gates,
    "selection_policy": _selection,
    "mixed_policy": _mixed,
    "mixed_selection": _mixed,
}
