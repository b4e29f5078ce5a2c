"""Rewrite files of version 0.1.0 in memory as this version writes them.

They differ in where tensors are named, in a few entries, and in saying their schema inside of the
provenance. To be deleted when nobody has such files any more.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from impatient.files import entries_under

if TYPE_CHECKING:
    from torch import Tensor

Tree = dict[str, Any]
Tensors = dict[str, "Tensor"]


def upgraded(tree: Tree, tensors: Tensors) -> tuple[Tree, Tensors]:
    """The JSON and the tensors of a file, with the tensors put into the JSON where it is a policy.

    Tensors that have found their place are left out of those returned.
    """
    upgrade = _UPGRADES.get(tree.get("kind", ""))
    if upgrade is None:
        return _without_schema(tree), tensors
    return _without_schema(upgrade(tree, tensors)), {}


def _without_schema(entry: Any) -> Any:
    """Without the version that stood in each provenance."""
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
    return tree | own | {"features": ordered}


def _thresholds(tree: Tree, _: Tensors) -> Tree:
    target = tree.get("target")
    saved = "macs" if isinstance(target, dict) and "mean_macs" in target else "time"
    return {"cost": saved} | tree


def _cost_profile(tree: Tree, _: Tensors) -> Tree:
    # which stood for "not known"
    return {
        name: None if name.startswith("exit_free_") and entry == -1 else entry
        for name, entry in tree.items()
    }


def _certificate(tree: Tree, _: Tensors) -> Tree:
    return {name: entry for name, entry in tree.items() if name != "statement"}


def _gates(tree: Tree, tensors: Tensors) -> Tree:
    rest = dict(tree)
    are_open = rest.pop("open", None)
    if not isinstance(are_open, list):
        return tree
    gates = [
        _decision(tensors, f"{exit}/") if is_open else None for exit, is_open in enumerate(are_open)
    ]
    return rest | {"gates": gates}


def _selection(tree: Tree, tensors: Tensors) -> Tree:
    moves = tree.get("moves")
    several = [
        str(node)
        for node, left in enumerate(moves if isinstance(moves, list) else [])
        if isinstance(left, list) and len(left) > 1
    ]
    return tree | {"decisions": {node: _decision(tensors, f"{node}/") for node in several}}


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
