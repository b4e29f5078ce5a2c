"""A network of three exits as ONNX files, written by hand, and what numpy computes for it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

CLASSES = 5
RANDOM = np.random.default_rng(0)
W = {
    name: (RANDOM.normal(size=shape) * 0.7).astype(np.float32)
    for name, shape in {
        "a": (6, 8),
        "b": (6, 8),
        "c": (8, 8),
        "d": (8, CLASSES),
        "p": (8, CLASSES),
        "q": (8, CLASSES),
    }.items()
}
X = RANDOM.normal(size=(4, 6)).astype(np.float32)
WIDE = (RANDOM.normal(size=(512, 512)) / 12.0).astype(np.float32)


def truth(x: Any) -> list[Any]:
    """The outputs of the three exits, of which the last uses the first stage's skip value."""
    h = np.tanh(x @ W["a"])
    skip = x @ W["b"]
    u = np.tanh(h @ W["c"])
    return [h @ W["p"], u @ W["q"], (u + skip) @ W["d"]]


def write_onnx(
    path: Path,
    nodes: Sequence[Any],
    takes: dict[str, list[Any]],
    gives: dict[str, list[Any]],
    weights: Any = W,
):
    def values(shapes: dict[str, list[Any]]) -> list[Any]:
        return [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
            for name, shape in shapes.items()
        ]

    used = {name for node in nodes for name in node.input}
    constants = [
        numpy_helper.from_array(value, name) for name, value in weights.items() if name in used
    ]
    graph = helper.make_graph(list(nodes), "part", values(takes), values(gives), constants)
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10), path
    )


def node(kind: str, takes: str, gives: str, **options: Any) -> Any:
    return helper.make_node(kind, takes.split(), gives.split(), **options)


def write_wide(path: Path, layers: int = 1) -> None:
    """A part that takes a while (layers times 256 x 512 x 512 at 256 rows), with large outputs:
    tanh of x times w, repeated.
    """
    nodes = []
    for layer in range(layers):
        nodes += [
            node("MatMul", f"t{layer} w", f"m{layer}"),
            node("Tanh", f"m{layer}", f"t{layer + 1}"),
        ]
    write_onnx(path, nodes, {"t0": ["b", 512]}, {f"t{layers}": ["b", 512]}, {"w": WIDE})


def wide(count: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).normal(size=(count, 512)).astype(np.float32)


FIRST = [node("MatMul", "x a", "xa"), node("Tanh", "xa", "h"), node("MatMul", "x b", "xb")]
SECOND = [node("MatMul", "h c", "hc"), node("Tanh", "hc", "u")]
LAST = [node("Add", "u xb", "sum"), node("MatMul", "sum d", "y")]


def write_parts(directory: Path) -> None:
    """The skip value crosses two cuts, with its batch in the second dimension."""
    over = node("Transpose", "xb", "skip", perm=[1, 0])
    back = node("Transpose", "skip", "xb", perm=[1, 0])
    eight = ["b", 8]
    out = ["b", CLASSES]
    write_onnx(
        directory / "stage0.onnx", [*FIRST, over], {"x": ["b", 6]}, {"h": eight, "skip": [8, "b"]}
    )
    write_onnx(directory / "stage1.onnx", SECOND, {"h": eight}, {"u": eight})
    write_onnx(directory / "stage2.onnx", [back, *LAST], {"u": eight, "skip": [8, "b"]}, {"y": out})
    # as heads that say how sure they are: the largest probability
    score = [
        node("Softmax", "z", "shares", axis=-1),
        node("ReduceMax", "shares", "score", axes=[-1], keepdims=0),
    ]
    given = {"z": out, "score": ["b"]}
    for index, (takes, weights) in enumerate((("h", "p"), ("u", "q"))):
        head = node("MatMul", f"{takes} {weights}", "z")
        write_onnx(directory / f"head{index}.onnx", [head, *score], {takes: eight}, given)
    write_onnx(directory / "whole.onnx", [*FIRST, *SECOND, *LAST], {"x": ["b", 6]}, {"y": out})


def description(engine: str) -> dict[str, Any]:
    wiring = {
        "inputs": ["x"],
        "takes": [["x"], ["h"], ["u", "skip"]],
        "gives": [["h", "skip"], ["u"], ["y"]],
        "features": ["h", "u", "y"],
        "batch_dims": {"x": 0, "h": 0, "skip": 1, "u": 0, "y": 0},
    }
    return {
        "kind": "impatient_bundle",
        "schema": 1,
        "engine": engine,
        "precision": "fp32",
        "exits": ["one", "two", "three"],
        "num_classes": CLASSES,
        "inputs": [{"name": "x", "dtype": "float32", "shape": [None, 6]}],
        "wiring": wiring,
        "stages": ["stage0.onnx", "stage1.onnx", "stage2.onnx"],
        "heads": ["head0.onnx", "head1.onnx", None],
        "whole": "whole.onnx",
        "threads": 1,
        "agreement": [0.0, 0.0, 0.0],
        "tolerance": 1e-4,
        "costs": None,
        "policy": None,
        "facts": [],
        "provenance": {},
    }
