"""Models whose control flow depends on the data, and cuts by call number."""

import pytest
import torch
from torch import Tensor, nn

from impatient.errors import ExitNotReached
from impatient.networks import MultiExitNetwork
from impatient.networks.stages import Cut
from staging import CLASSES, WIDTH, assert_same, attach, by_break, linear, staged, x_of


class Halting(nn.Module):
    """A model that repeats a block until its input has shrunk."""

    def __init__(self) -> None:
        super().__init__()
        self.block = linear()
        self.late = linear()
        self.classifier = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        times = int(x[0, 0])
        while times > 0:
            x = torch.tanh(self.block(x))
            times = times - 1
        if x.shape[0] > 2:
            x = self.late(x)
        return self.classifier(x)


def halting_input(times: int, batch: int = 4) -> Tensor:
    x = x_of(batch)
    x[0, 0] = times
    return x


@pytest.fixture
def halting() -> MultiExitNetwork:
    return attach(Halting(), "block@0", "block@1", "block@3", "late", example=halting_input(4))


@pytest.mark.parametrize(
    ("times", "batch", "reached"),
    [
        (4, 4, [0, 1, 2, 3, 4]),
        (9, 4, [0, 1, 2, 3, 4]),
        (3, 4, [0, 1, 3, 4]),
        (1, 4, [0, 3, 4]),
        (0, 4, [3, 4]),
        (4, 2, [0, 1, 2, 4]),
        (0, 1, [4]),
    ],
)
def test_exits_an_input_never_comes_to_are_left_out(
    halting: MultiExitNetwork, times: int, batch: int, reached: list[int]
) -> None:
    x = halting_input(times, batch)
    exits = [(exit.index, exit.output()) for exit in halting.exits(x)]
    assert [index for index, _ in exits] == reached
    assert_same([exits[-1][1]], [halting.backbone(x)])


def test_exit_after_the_second_call_sees_the_second_calls_output(halting: MultiExitNetwork) -> None:
    x = halting_input(4)
    block = halting.backbone.block
    first = block(x)
    features = [exit.features.clone() for exit in halting.exits(x)]
    assert_same(features[:2], [first, block(first.tanh())])


def test_forward_names_the_exits_that_were_not_reached(halting: MultiExitNetwork) -> None:
    with pytest.raises(ExitNotReached, match="never came to block@1, block@3;"):
        halting(halting_input(1))
    assert len(halting(halting_input(5))) == 5


def test_call_numbers_begin_anew_with_each_run(halting: MultiExitNetwork) -> None:
    x = halting_input(4)
    by_break(halting, x)
    halting(x)
    halting.backbone(x)
    assert_same(staged(halting, x), halting(x))


@pytest.mark.parametrize(
    ("text", "cut"),
    [
        ("layer1", ("layer1", None)),
        ("a.b@2", ("a.b", 2)),
        ("a@0", ("a", 0)),
        ("odd@name", ("odd@name", None)),
        ("@1", ("", 1)),
    ],
)
def test_cut_is_read_from_text(text: str, cut: tuple[str, int | None]) -> None:
    assert Cut.parse(text) == cut


def test_cut_shows_the_call_where_there_are_several() -> None:
    assert [str(Cut("a")), str(Cut("a", numbered=True)), str(Cut("a", 2))] == ["a", "a@0", "a@2"]
