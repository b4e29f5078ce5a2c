"""The picture of a network: shares that add up, well-formed SVG, names that are only text."""

import io
from xml.etree import ElementTree

import pytest
import torch
from rich.console import Console

import impatient
from impatient.counting import StageFacts
from impatient.evaluation.picture import network_svg, network_table, parts_of
from impatient.networks import EANN, Cascade
from impatient.terminal import rich_table
from recordings import costs_of
from toys import Refiner

HOSTILE = (
    "</text></svg><script>alert(1)</script>",
    """' onload="alert(1)" {{7*7}} ${7*7}""",
    "exit\u202etxt.exe\u2066\x1b[2J\x9b",
    # half a character, and numbers that are none
    "half\ud800 none\ufffe",
    "[red]no markup[/red] :warning:",
)
COSTS = costs_of([3e-3, 1e-3], [5e-4, 0.0], exit_free_s=4e-3)
SVG = "{http://www.w3.org/2000/svg}"


def facts(name: str) -> list[StageFacts]:
    return [
        StageFacts(
            exit=name,
            features=(1, 8, 4, 4),
            head=head,
            stage_macs=1000,
            head_macs=10,
            stage_parameters=100,
            head_parameters=10,
        )
        for head in (name, "")
    ]


def drawn(name: str) -> ElementTree.Element:
    svg = network_svg(parts_of(facts(name), COSTS), timed=True, alone=True)
    return ElementTree.fromstring(svg.encode("utf-8"))


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_are_text_in_the_svg(name: str) -> None:
    tree = drawn(name)
    kinds = {element.tag.removeprefix(SVG) for element in tree.iter()}
    assert kinds == {"svg", "style", "text", "title", "line", "rect", "circle"}
    assert not any(key.startswith("on") for element in tree.iter() for key in element.attrib)
    words = "".join(tree.itertext())
    assert not set("\u202e\u2066\x1b\x9b\ud800\ufffe") & set(words)
    if name.startswith("</text>"):
        # whole where one points at it
        assert tree.find(f".//{SVG}title").text == name  # type: ignore[union-attr]


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_are_text_in_the_terminal(name: str) -> None:
    stream = io.StringIO()
    table = network_table(parts_of(facts(name), COSTS), timed=True)
    Console(width=80, file=stream, emoji=False).print(rich_table(table, 80))
    text = stream.getvalue()
    assert max(map(len, text.splitlines())) <= 80
    assert not set("\u202e\u2066\x1b\x9b\ud800") & set(text)
    if name.startswith("["):
        assert "[red]" in text
        assert ":warning:" in text


def test_shares_are_of_measured_time_or_of_operations() -> None:
    timed = parts_of(facts("a"), COSTS)
    assert [part.stage_share for part in timed] == pytest.approx([3 / 4.5, 1 / 4.5])
    counted = parts_of(facts("a"))
    assert sum(part.stage_share + part.head_share for part in counted) == pytest.approx(1.0)
    assert "share of MACs" in network_table(counted, timed=False).columns


def test_alone_it_brings_its_colours_light_and_dark() -> None:
    assert "prefers-color-scheme: dark" in "".join(drawn("a").itertext())
    assert "<style>" not in network_svg(parts_of(facts("a"), COSTS), timed=True)


# --- every kind of network ------------------------------------------------------------------------

PICTURE = torch.zeros(1, 3, 16, 16)


def resnet(depth: int = 1) -> impatient.Network:
    return impatient.attach_exits(
        impatient.load_model(f"impatient:resnet:n={depth},c=4", num_classes=10),
        count=3,
        num_classes=10,
        example=PICTURE,
    )


def transformer() -> impatient.Network:
    layer = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    return impatient.attach_exits(
        torch.nn.TransformerEncoder(layer, 3, enable_nested_tensor=False),
        after=["layers.0", "layers.1"],
        example=torch.zeros(1, 5, 8),
        heads="identity",
        task="regression",
    )


def loop() -> impatient.Network:
    x = torch.zeros(1, 1, 6, 6)
    return impatient.attach_exits(
        Refiner(4), example=x, after="calls:step", heads="identity", task="regression"
    )


NETWORKS = {
    "resnet": (resnet, PICTURE),
    "transformer": (transformer, torch.zeros(1, 5, 8)),
    "loop": (loop, torch.zeros(1, 1, 6, 6)),
    "AnytimeNet": (lambda: impatient.load_zoo("anytimenet-cifar10"), torch.zeros(1, 3, 32, 32)),
    "ensemble": (lambda: EANN([resnet(1), resnet(2)], [[0.5, 0.4, 0.3]] * 2), PICTURE),
    "cascade": (lambda: Cascade([resnet(1).exit_free, resnet(2).exit_free]), PICTURE),
}


@pytest.mark.parametrize("kind", NETWORKS)
def test_every_kind_of_network_is_drawn(kind: str) -> None:
    build, x = NETWORKS[kind]
    network = build().eval()
    parts = parts_of(network.stage_facts(x))
    svg = ElementTree.fromstring(network_svg(parts, timed=False, alone=True))
    numbers = [text.text for text in svg.iter(f"{SVG}text") if text.get("class") == "number"]
    assert numbers == [str(exit) for exit in range(network.num_exits)]
    assert sum(part.stage_share + part.head_share for part in parts) == pytest.approx(1.0)
    stream = io.StringIO()
    Console(width=80, file=stream).print(rich_table(network_table(parts, timed=False), 80))
    lines = stream.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    assert len(lines) > network.num_exits
