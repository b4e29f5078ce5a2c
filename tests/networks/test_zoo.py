"""A dozen of the architectures of benchmarks/coverage.py, compared as there.

Their exits are placed automatically.
"""

import csv
import io
import warnings

import pytest
import torch
from torch import Tensor, nn

from benchmarks import coverage
from benchmarks.coverage import COLUMNS, EXACT, findings, page, works
from benchmarks.zoo import ARCHITECTURES, Architecture, make_informative
from impatient.inputs import call_model
from impatient.networks import attach_exits

pytestmark = pytest.mark.slow

BY_NAME = {
    f"{architecture.library}:{architecture.name}": architecture for architecture in ARCHITECTURES
}
DOZEN = [
    "torchvision:regnet_y_400mf",
    "timm:hrnet_w18_small",
    "timm:mobilenetv4_conv_small",
    "timm:edgenext_xx_small",
    "timm:xcit_nano_12_p16_224",
    "timm:deit_tiny_distilled_patch16_224",
    "timm:efficientvit_b0",
    "transformers:AlbertConfig",
    "transformers:FunnelConfig",
    "transformers:T5Config",
    "transformers:DeiTConfig",
    "transformers:CvtConfig",
    "transformers:Wav2Vec2Config",
    "transformers:VideoMAEConfig",
    "transformers:SqueezeBertConfig",
    "torchvision:r3d_18",
]
LAYOUTS = {
    "timm:hrnet_w18_small": {"NCHW"},
    "timm:xcit_nano_12_p16_224": {"NTD"},
    "transformers:Wav2Vec2Config": {"NCT", "NTD"},
    "transformers:SqueezeBertConfig": {"NCT"},
    "torchvision:r3d_18": {"NCTHW"},
    "transformers:AlbertConfig": {"NTD"},
    "timm:deit_tiny_distilled_patch16_224": {"NTD"},
}


@pytest.fixture(autouse=True)
def _others_deprecations() -> None:
    for module in ("torchvision", "timm", "transformers"):
        warnings.filterwarnings("ignore", module=module)


@pytest.mark.parametrize("name", DOZEN)
def test_last_exit_gradients_and_early_exits_are_exact(name: str) -> None:
    row: dict[str, str] = {}
    for found in findings(BY_NAME[name], ["exactness"]):
        row |= found
    assert "reason" not in row
    assert len(row["exits after"].split()) == coverage.COUNT - 1
    assert [row[column] for column in ("output", "forward()", "exits()", "gradients")] == [
        "informative",
        EXACT,
        EXACT,
        EXACT,
    ]
    assert works(row)
    layouts = {features.split(":")[1] for features in row["features"].split()}
    assert layouts <= LAYOUTS.get(name, layouts)


def test_time_first_features_are_named_as_the_reason() -> None:
    (row,) = findings(BY_NAME["transformers:XLNetConfig"], ["exactness"])
    assert "in dimension 1; expected them in the first" in row["reason"]
    assert "batch_first=True" in row["reason"]
    assert not works(row)


# --- the script sees what is wrong ----------------------------------------------------------------


class Backbone(nn.Module):
    """Four blocks and, if asked for, a fault that the script must see.

    Outputs are zero, blocks are ignored, or the output changes once there are hooks.
    """

    def __init__(self, fault: str = "") -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(4))
        self.classifier = nn.Linear(8, 10)
        self.fault = fault
        if fault == "zero head":
            nn.init.zeros_(self.classifier.weight)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            y = block(x)
            x = x if self.fault == "ignores its blocks" else y
        if self.fault == "changes" and self.blocks[1]._forward_hooks:
            x = x + 1e-3
        return self.classifier(x)


@pytest.mark.parametrize(
    ("fault", "column", "says"),
    [
        ("", "output", "informative"),
        ("ignores its blocks", "output", "does not hang on blocks"),
        ("zero head", "output", "the same for every input"),
        ("changes", "forward()", "0.00"),
        ("changes", "exits()", "0.00"),
    ],
)
def test_what_is_wrong_is_seen(
    monkeypatch: pytest.MonkeyPatch, fault: str, column: str, says: str
) -> None:
    monkeypatch.setattr(coverage, "build", lambda architecture: Backbone(fault).eval())
    monkeypatch.setattr(
        coverage,
        "attach_exits",
        lambda model, **more: attach_exits(model, **{**more, "after": ["blocks.1"]}),
    )
    row: dict[str, str] = {}
    for found in findings(
        Architecture("mine:Backbone", lambda batch: torch.randn(batch, 8)), ["exactness"]
    ):
        row |= found
    assert says in row[column]
    assert works(row) == (fault == "")


def test_weights_are_made_informative() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8 * 4, 5))
    nn.init.zeros_(model[3].weight)
    nn.init.zeros_(model[1].weight)
    model.scale = nn.Parameter(torch.full((4,), 1e-6))
    make_informative(model, lambda batch: 100 + torch.randn(batch, 3, 4, 4))
    assert model.scale.min() > 0.1
    assert model[1].weight.min() > 0.1
    with torch.no_grad():
        output = call_model(model.eval(), 100 + torch.randn(6, 3, 4, 4))
    assert output.std(0).min() > 0.01


# --- rows and page --------------------------------------------------------------------------------


def test_page_counts_what_works_and_gives_reasons() -> None:
    resnet = BY_NAME["torchvision:resnet18"]
    xlnet = BY_NAME["transformers:XLNetConfig"]
    good = {
        "output": "informative",
        "forward()": EXACT,
        "exits()": EXACT,
        "gradients": EXACT,
        "exported parts": "no: ExportFailed: y",
    }
    rows = {
        resnet.spec: {
            "library": "torchvision",
            "architecture": "resnet18",
            "spec": resnet.spec,
            **good,
        },
        xlnet.spec: {
            "library": "transformers",
            "architecture": "XLNet",
            "spec": xlnet.spec,
            "reason": "HeadError: x",
        },
    }
    text = page(rows)
    assert "**1 of 2 architectures work**" in text
    assert "**0 of 1** can be exported" in text
    assert "* XLNet: HeadError: x" in text
    assert "* resnet18: no export: ExportFailed: y" in text


def test_committed_table_has_every_architecture() -> None:
    rows = list(csv.DictReader(io.StringIO(coverage.CSV.read_text())))
    assert tuple(rows[0]) == COLUMNS
    assert {row["spec"] for row in rows} == {architecture.spec for architecture in ARCHITECTURES}
    assert len(rows) >= 60
    assert all(works(row) or row["reason"] or "uninformative" in row["output"] for row in rows)
