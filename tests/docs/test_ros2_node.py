"""The ROS 2 node, against a stub of the calls that it makes.

ROS 2 itself is not installed.
"""

import runpy
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from impatient.networks import attach_exits
from impatient.runtime import Runner, profile

EXAMPLE = Path(__file__).parents[2] / "examples" / "4_ros2_node.py"


class Stub:
    """What the node sees of ROS: three pictures, then a shutdown."""

    def __init__(self) -> None:
        self.subscribed: Any = None
        self.published: list[str] = []
        self.said: list[str] = []
        self.shades = [0, 127, 255]

    def modules(self) -> dict[str, types.ModuleType]:
        stub = self

        class Node:
            def __init__(self, name: str) -> None:
                self.name = name

            def create_publisher(self, kind: type, topic: str, depth: int) -> Any:
                assert (kind.__name__, topic, depth) == ("String", "class", 1)
                return types.SimpleNamespace(publish=lambda it: stub.published.append(it.data))

            def create_subscription(self, kind: type, topic: str, call: Any, depth: int) -> None:
                assert (kind.__name__, topic, depth) == ("Image", "image", 1)
                stub.subscribed = call

            def get_logger(self) -> Any:
                return types.SimpleNamespace(info=stub.said.append)

        def spin_once(node: Node, timeout_sec: float) -> None:
            shade = stub.shades.pop(0)
            # Rows are padded to 16 bytes, as ROS allows.
            row = bytes([shade] * 12 + [9] * 4)
            picture = types.SimpleNamespace(height=4, width=4, step=16, data=row * 4)
            stub.subscribed(picture)

        def module(name: str, **names: Any) -> types.ModuleType:
            made = types.ModuleType(name)
            vars(made).update(names)
            return made

        message = type("Image", (), {})
        text = type("String", (), {"__init__": lambda self, data: setattr(self, "data", data)})
        return {
            "rclpy": module(
                "rclpy", init=lambda: None, ok=lambda: bool(stub.shades), spin_once=spin_once
            ),
            "rclpy.node": module("rclpy.node", Node=Node),
            "sensor_msgs": module("sensor_msgs"),
            "sensor_msgs.msg": module("sensor_msgs.msg", Image=message),
            "std_msgs": module("std_msgs"),
            "std_msgs.msg": module("std_msgs.msg", String=text),
        }


def test_the_node_publishes_a_class_for_the_newest_pictures(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stub = Stub()
    for name, module in stub.modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    node = runpy.run_path(str(EXAMPLE))
    # Four times brightness, or its opposite. So black is class 1, and white is class 0.
    last = nn.Linear(48, 2)
    with torch.no_grad():
        last.weight.copy_(torch.stack([torch.ones(48), -torch.ones(48)]) / 12)
        last.bias.copy_(torch.tensor([0.0, 4.0]))
    example = torch.zeros(1, 3, 4, 4)
    network = attach_exits(nn.Sequential(nn.Flatten(), last), after=["0"], example=example).eval()
    runner = Runner(network, profile(network, example, repeats=3), any_profile=True)
    node["run"](runner, rate=20.0)
    # At a tick only the newest is there; the last one always is.
    assert 1 <= len(stub.published) <= 3
    assert stub.published[-1] == "0"
    assert len(stub.said) == 1
