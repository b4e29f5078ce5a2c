"""A ROS 2 node that classifies camera pictures, each before the next one comes.

python examples/4_ros2_node.py RUN_DIRECTORY

It subscribes to `image` (sensor_msgs/Image, rgb8, of the size the network was trained on) and
publishes `class` (std_msgs/String). The executor's thread only hands pictures over; the newest one
wins, and the answer of each is ready within a period.

ROS 2 is not part of this project's tests. They run this node against a stub of the calls it makes
(rclpy: init, ok, shutdown, spin_once; Node: create_publisher, create_subscription, get_logger).
"""

import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import rclpy
import torch
from rclpy.node import Node
from sensor_msgs.msg import Image
from std_msgs.msg import String

import impatient
from impatient.runtime import every, latest

RATE = 30.0


class Pictures(Node):
    """Hands over the pictures that come, one at a time."""

    def __init__(self) -> None:
        super().__init__("impatient")
        self.classes = self.create_publisher(String, "class", 1)
        # A queue of one: a picture that waits is replaced by the next.
        self.create_subscription(Image, "image", self.received, 1)
        self._picture: Any = None

    def received(self, picture: Any) -> None:
        self._picture = picture

    def pictures(self) -> Iterator[Any]:
        """Give pictures as they come, until ROS is shut down."""
        while rclpy.ok():
            rclpy.spin_once(self, timeout_sec=0.1)
            picture, self._picture = self._picture, None
            if picture is not None:
                yield picture


def pixels(picture: Any) -> torch.Tensor:
    """Turn an rgb8 picture into a tensor [1, 3, H, W] from 0 to 1."""
    rows = np.frombuffer(bytes(picture.data), np.uint8).reshape(picture.height, picture.step)
    image = rows[:, : picture.width * 3].reshape(picture.height, picture.width, 3)
    return torch.from_numpy(image.copy()).permute(2, 0, 1)[None] / 255


def run(runner: impatient.Runner, rate: float = RATE) -> int:
    """Answer for pictures until ROS is shut down, and return how many periods were overrun."""
    rclpy.init()
    node = Pictures()
    loop = every(1.0 / rate, latest(node.pictures()))
    for picture in loop:
        answer = runner.run(pixels(picture), deadline=loop.deadline)
        node.classes.publish(String(data=str(int(answer.output.argmax()))))
    node.get_logger().info(runner.report().advice())
    return loop.overruns


def main(directory: str) -> None:
    from impatient.verbs.run_directory import RunDirectory

    run_directory = RunDirectory(directory)
    network, _ = run_directory.network()
    run(impatient.Runner(network, run_directory.profile(), miss_rate=0.01))
    rclpy.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
