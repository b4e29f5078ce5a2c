"""Networks in other engines: exported directories, and what they answer beside torch."""

import json
import math
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import impatient
from impatient import (
    NEVER,
    Runner,
    ThresholdPolicy,
    attach_exits,
    export,
    load_engine,
    profile,
    to_engine,
)
from impatient.engines.comparison import check_agreement, differences, tolerance_of, varied
from impatient.engines.export import add_costs, samples_of
from impatient.errors import ExportFailed, NetworkError, NoEffectWarning, RunError, StorageError
from impatient.files import read_json, write_json
from impatient.networks.multi_exit import MultiExitNetwork
from impatient.networks.transforms import Resizing
from impatient.portable import Bundle, BundleError
from impatient.runtime import EngineNetwork
from impatient.training import Preprocess
from toys import ToyBackbone

# of the largest output; that samples differ by less than 1 % of it would make agreement say little
EXACT = 1e-5
Written = Callable[[Path], None]


class Tokens(nn.Module):
    """Two blocks of attention over whole numbers, and a mask that every block needs."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 16)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0) for _ in range(2)
        )
        self.classifier = nn.Linear(16, 5)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x) * mask[..., None]
        return self.classifier(x.mean(1))


def pictures_network() -> MultiExitNetwork:
    """A residual network as if trained: its norms have seen data."""
    torch.manual_seed(1)
    backbone = impatient.load_model("impatient:resnet:n=1,c=8", num_classes=10, in_channels=3)
    for module in backbone.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.uniform_(-0.3, 0.3)
            module.running_var.uniform_(0.5, 2.0)
    return attach_exits(
        backbone, example=torch.zeros(1, 3, 32, 32), after=["blocks.0", "blocks.1"]
    ).eval()


def toy_network() -> MultiExitNetwork:
    torch.manual_seed(2)
    backbone = ToyBackbone()
    with torch.no_grad():
        for parameter in backbone.parameters():
            # or its answers would hardly depend on the input
            parameter.mul_(2.0)
    return attach_exits(backbone, example=torch.zeros(1, 8), after=["blocks.1"]).eval()


def pictures(count: int) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(count))


@pytest.fixture(scope="module")
def network() -> MultiExitNetwork:
    return pictures_network()


@pytest.fixture(scope="module")
def directory(network: MultiExitNetwork, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pictures' network, exported to ONNX Runtime with a policy."""
    torch.set_num_threads(1)
    policy = ThresholdPolicy(score="max_probability", thresholds=(0.5, math.inf, -math.inf))
    place = tmp_path_factory.mktemp("exported") / "pictures"
    return export(network, place, engine="onnxruntime", example=pictures(4), policy=policy)


@pytest.fixture(scope="module")
def toy_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    place = tmp_path_factory.mktemp("exported") / "toy"
    return export(toy_network(), place, engine="openvino", example=torch.randn(3, 8), lean=True)


@pytest.fixture(params=["onnxruntime", "openvino"])
def made(request: pytest.FixtureRequest, directory: Path, tmp_path: Path) -> EngineNetwork:
    """The pictures' network in either engine: the files are the same."""
    if request.param == "openvino":
        directory = Path(shutil.copytree(directory, tmp_path / "copy"))
        write_json(
            directory / "bundle.json",
            {**read_json(directory / "bundle.json"), "engine": "openvino"},
        )
    return load_engine(directory)


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> Written:
    """Take the ONNX files from an exported directory; writing them anew is tested elsewhere."""

    def take(source: Path) -> None:
        def copy(_: Any, folder: Path, *__: Any, **___: Any) -> None:
            for file in source.glob("*.onnx"):
                shutil.copy(file, folder)

        # by its name: the package has a function of the name of this module
        monkeypatch.setattr(sys.modules["impatient.engines.export"], "write_parts", copy)

    return take


def outputs_of(network: Any, x: Any) -> list[Tensor]:
    with torch.inference_mode(), network.exits(x) as run:
        return [exit.output().clone() for exit in run]


def assert_close(found: list[Tensor], wanted: list[Tensor]) -> None:
    for here, there in zip(found, wanted, strict=True):
        assert (
            float((there - there[:1]).abs().max()) > 1e3 * EXACT * float(there.abs().max())
            or len(there) == 1
        )
        assert float((here - there).abs().max()) <= EXACT * float(there.abs().max())


@pytest.mark.parametrize("size", [1, 3, 5])
def test_engines_answer_as_torch_does_whatever_the_batch(
    made: EngineNetwork, network: MultiExitNetwork, size: int
) -> None:
    x = pictures(size)

    assert_close(outputs_of(made, x), outputs_of(network, x))
    assert_close([made.backbone(x)], [network.backbone(x).detach()])


def test_a_network_says_what_runs_it_and_what_it_was_made_from(
    made: EngineNetwork, network: MultiExitNetwork
) -> None:
    x = pictures(1)

    assert made.engine in ("onnxruntime", "openvino")
    assert made.precision == "fp32"
    assert made.exit_names == network.exit_names
    assert made.stage_facts(x) == network.stage_facts(x)


def test_a_batch_shrinks(made: EngineNetwork, network: MultiExitNetwork) -> None:
    x = pictures(5)
    kept = torch.tensor([3, 0])
    with made.exits(x) as run:
        next(run)
        run.keep(kept)
        rest = [exit.output() for exit in run]

    assert_close(rest, [output[kept] for output in outputs_of(network, x)[1:]])


def test_a_runner_answers_by_deadline_and_policy_as_with_torch(
    made: EngineNetwork, network: MultiExitNetwork
) -> None:
    x = pictures(3)
    middle = float(outputs_of(network, x)[0].softmax(-1).amax(-1).median())
    policy = ThresholdPolicy(
        score="max_probability", thresholds=(middle - 1e-4, math.inf, -math.inf)
    )
    costs = profile(made, x, batch_sizes=[3], repeats=6, warm_up=1)
    with (
        Runner(made, costs, policy) as runner,
        Runner(network, costs, policy, any_profile=True) as eager,
    ):
        answer = runner.run(x, deadline=NEVER)
        wanted = eager.run(x, deadline=NEVER)

    assert costs.provenance.engine == made.engine
    assert len(set(answer.exits)) > 1
    assert answer.exits == wanted.exits
    assert_close([answer.output], [wanted.output])


def test_the_description_says_how_far_it_agrees_and_holds_the_policy(
    directory: Path, network: MultiExitNetwork
) -> None:
    bundle = read_json(directory / "bundle.json")

    assert len(bundle["agreement"]) == network.num_exits
    assert 0.0 < max(bundle["agreement"]) <= bundle["tolerance"]
    assert bundle["policy"] == {
        "score": "max_probability",
        "thresholds": [0.5, math.inf, -math.inf],
        "compares": False,
        "compare": None,
    }
    assert bundle["task"] == "classification"
    assert bundle["outputs"] == [{"name": "output", "dtype": "float32", "shape": [None, 10]}]
    assert bundle["inputs"] == [{"name": "x", "dtype": "float32", "shape": [None, 3, 32, 32]}]
    assert {file.name for file in directory.iterdir()} == {
        "bundle.json",
        "run.py",
        "standalone",
        "README.txt",
        "whole.onnx",
        "stage0.onnx",
        "stage1.onnx",
        "stage2.onnx",
        "head0.onnx",
        "head1.onnx",
    }


def test_names_in_the_files_are_those_of_the_wiring(directory: Path) -> None:
    wiring = read_json(directory / "bundle.json")["wiring"]
    for index, (takes, gives) in enumerate(zip(wiring["takes"], wiring["gives"], strict=True)):
        graph = onnx.load(directory / f"stage{index}.onnx").graph
        assert [value.name for value in graph.input] == takes
        assert [value.name for value in graph.output] == gives
        given = [name for node in graph.node for name in node.output]
        assert len(given) == len(set(given))


def answer_without_torch(place: Path, file: Path, folder: Path) -> dict[str, Any]:
    """Run a directory on a file where neither torch nor this library can be imported."""
    for name in ("torch", "impatient"):
        (folder / f"{name}.py").write_text("raise ImportError('not here')\n")
    done = subprocess.run(
        [sys.executable, str(place / "run.py"), str(file), "--json", "--no-policy"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(folder)},
    )
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def test_an_exported_directory_runs_without_torch(
    directory: Path, network: MultiExitNetwork, tmp_path: Path
) -> None:
    x = 3.0 * pictures(2)
    np.save(tmp_path / "x.npy", x.numpy())
    answer = answer_without_torch(directory, tmp_path / "x.npy", tmp_path)

    assert answer["exit"] == 2
    assert_close(
        [torch.tensor(answer["probabilities"])], [network.backbone(x).softmax(-1).detach()]
    )


def test_costs_go_with_it(directory: Path, tmp_path: Path) -> None:
    place = Path(shutil.copytree(directory, tmp_path / "copy"))
    made = load_engine(place)
    costs = profile(made, pictures(1), batch_sizes=[1, 2], repeats=6, warm_up=1)
    add_costs(place, costs)
    written = read_json(place / "bundle.json")["costs"]

    assert set(written) == {"1", "2"}
    assert [part["p99"] for part in written["2"]["stages"]] == [
        part.p99 for part in costs.at(2).stages
    ]


def test_without_the_whole_network_its_stages_stand_for_it(toy_directory: Path) -> None:
    made = load_engine(toy_directory)
    x = torch.randn(3, 8)

    assert not (toy_directory / "whole.onnx").exists()
    assert_close([made.backbone(x)], [toy_network().backbone(x).detach()])


@pytest.mark.parametrize(
    ("engine", "precision"),
    [("onnxruntime", "int8-dynamic"), ("onnxruntime", "int8-static"), ("openvino", "int8-static")],
)
def test_eight_bits_are_near_and_smaller(
    network: MultiExitNetwork,
    directory: Path,
    tmp_path: Path,
    written: Written,
    engine: str,
    precision: str,
) -> None:
    written(directory)
    place = export(
        network,
        tmp_path / "made",
        engine=engine,
        example=pictures(4),
        precision=precision,
        # as data sets give them
        calibration=((pictures(count), torch.zeros(count).long()) for count in (8, 4)),
    )
    bundle = read_json(place / "bundle.json")
    x = pictures(5)

    assert bundle["tolerance"] is None
    assert all(1e-4 < difference < 0.2 for difference in bundle["agreement"])
    for here, there in zip(outputs_of(load_engine(place), x), outputs_of(network, x), strict=True):
        assert 1e-4 < float((here - there).abs().max() / there.abs().max()) < 0.3
    assert load_engine(place).weights_fingerprint.endswith(f"-{precision}")
    assert (place / "whole.onnx").stat().st_size < (directory / "whole.onnx").stat().st_size
    kinds = {node.op_type for node in onnx.load(place / "stage1.onnx").graph.node}
    assert kinds & {"ConvInteger", "QuantizeLinear"}


def test_ranges_of_8_bits_need_samples(network: MultiExitNetwork, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="without calibration; expected batches of inputs"):
        export(
            network,
            tmp_path / "made",
            engine="onnxruntime",
            example=pictures(1),
            precision="int8-static",
        )

    assert list(tmp_path.iterdir()) == []


def test_calibration_is_taken_with_or_without_targets() -> None:
    x, mask = torch.randn(4, 6), torch.ones(4, 6)
    labels = torch.zeros(4).long()
    for batch in (x, (x, labels), [x, {"boxes": labels}], {"x": x, "labels": labels}):
        ((found,),) = samples_of([batch], ["x"])
        assert found is x
    for batch in ((x, mask), ((x, mask), labels), [[x, mask], labels]):
        ((first, second),) = samples_of([batch], ["x0", "x1"])
        assert (first is x, second is mask) == (True, True)
    for batch in ({"ids": x, "mask": mask, "labels": labels}, ({"mask": mask, "ids": x}, labels)):
        ((first, second),) = samples_of([batch], ["ids", "mask"])
        assert (first is x, second is mask) == (True, True)
    with pytest.raises(NetworkError, match="expected ids, mask"):
        samples_of([{"ids": x, "labels": labels}], ["ids", "mask"])


def test_calibration_ends_after_some_hundred_samples() -> None:
    taken = []

    def batches() -> Iterator[Tensor]:
        while True:
            taken.append(None)
            yield torch.zeros(200, 3)

    assert len(samples_of(batches(), ["x"])) == len(taken) == 3


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino", "onnxruntime-session"])
def test_numbers_that_numpy_lacks_are_refused_at_once(
    engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["impatient.engines.export"], "partition", pytest.fail)
    x = torch.randn(2, 8).bfloat16()
    made = attach_exits(ToyBackbone().bfloat16(), example=x, after=["blocks.1"]).eval()

    with pytest.raises(ExportFailed, match=r"is in bfloat16, which numpy does not have.*float\(\)"):
        export(made, tmp_path / "made", engine=engine, example=x)
    with pytest.raises(ExportFailed, match="bfloat16"):
        to_engine(made, engine, example=x)
    assert list(tmp_path.iterdir()) == []


def test_fewer_bits_may_differ_by_more() -> None:
    kinds = (torch.float64, torch.float32, torch.float16)
    found = [tolerance_of(nn.Linear(2, 2).to(dtype)) for dtype in kinds]

    assert found == [1e-4, 1e-4, pytest.approx(0.02, rel=0.05)]
    assert tolerance_of(nn.ReLU()) == 1e-4


@pytest.mark.slow
def test_half_precision_runs(tmp_path: Path) -> None:
    x = torch.randn(3, 8).half()
    made = attach_exits(toy_network().backbone.half(), example=x, after=["blocks.1"]).eval()
    place = export(made, tmp_path / "made", engine="onnxruntime", example=x)

    assert all(output.dtype == torch.float16 for output in outputs_of(load_engine(place), x))


def test_tokens_and_a_mask(tmp_path: Path) -> None:
    x = {"ids": torch.randint(0, 50, (2, 7)), "mask": torch.ones(2, 7)}
    x["mask"][1, 4:] = 0.0
    network = attach_exits(Tokens(), example=x, after=["blocks.0"]).eval()
    made = load_engine(
        export(network, tmp_path / "tokens", engine="onnxruntime", example=x, lean=True)
    )
    bundle = read_json(tmp_path / "tokens" / "bundle.json")

    assert [spec["dtype"] for spec in bundle["inputs"]] == ["int64", "float32"]
    assert [spec["shape"] for spec in bundle["inputs"]] == [[None, None]] * 2
    for size in (1, 3, 5):
        given = varied(x, size)
        assert not torch.equal(given["ids"][0], x["ids"][0])
        assert_close(outputs_of(made, given), outputs_of(network, given))
    for length in (1, 4, 20):
        given = {"ids": torch.randint(0, 50, (3, length)), "mask": torch.ones(3, length)}
        assert_close(outputs_of(made, given), outputs_of(network, given))
    with pytest.raises(BundleError, match="inputs of different lengths"):
        Bundle(tmp_path / "tokens").run(
            {"ids": np.zeros((1, 3), np.int64), "mask": np.ones((1, 4), np.float32)}
        )


@pytest.mark.slow
def test_a_model_of_one_length_keeps_it(tmp_path: Path) -> None:
    class OneLength(Tokens):
        def __init__(self) -> None:
            super().__init__()
            self.places = nn.Parameter(torch.randn(7, 16))

        def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
            x = self.embedding(ids) + self.places
            for block in self.blocks:
                x = block(x) * mask[..., None]
            return self.classifier(x.mean(1))

    x = {"ids": torch.randint(0, 50, (2, 7)), "mask": torch.ones(2, 7)}
    network = attach_exits(OneLength(), example=x, after=["blocks.0"]).eval()
    place = export(network, tmp_path / "one", engine="onnxruntime", example=x, lean=True)
    bundle = read_json(place / "bundle.json")

    assert [spec["shape"] for spec in bundle["inputs"]] == [[None, 7]] * 2
    assert_close(outputs_of(load_engine(place), x), outputs_of(network, x))


def test_eager_is_the_network_itself(network: MultiExitNetwork) -> None:
    assert to_engine(network, "eager", example=pictures(1)) is network


def test_files_of_an_engine_in_one_call_go_when_it_goes(
    monkeypatch: pytest.MonkeyPatch, toy_directory: Path, tmp_path: Path, written: Written
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    written(toy_directory)
    made = to_engine(toy_network(), "onnxruntime", example=torch.randn(2, 8))
    x = torch.randn(4, 8)
    assert_close(outputs_of(made, x), outputs_of(toy_network(), x))
    assert list(tmp_path.iterdir()) != []
    del made

    assert list(tmp_path.iterdir()) == []


def test_a_network_that_differs_is_refused_and_nothing_is_left(
    toy_directory: Path, tmp_path: Path, written: Written
) -> None:
    other = toy_network()
    with torch.no_grad():
        other.heads[0].get_parameter("1.bias").add_(0.01)
    written(toy_directory)
    with pytest.raises(ExportFailed, match=r"exit 0 \(blocks.1\) differs from the network by"):
        export(other, tmp_path / "made", engine="onnxruntime", example=torch.randn(3, 8), lean=True)
    with pytest.raises(ExportFailed, match="differs"):
        to_engine(other, "openvino", example=torch.randn(3, 8), directory=tmp_path / "made")

    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("wrong", ["exits", "whole"])
def test_an_engine_that_gives_no_numbers_is_refused(wrong: str) -> None:
    network = toy_network()
    broken = toy_network()
    nn.init.constant_(broken.backbone.classifier.weight, math.nan)

    class Engine:
        engine = "broken"
        backbone = (broken if wrong == "whole" else network).backbone
        exits = staticmethod((broken if wrong == "exits" else network).exits)

    with pytest.raises(ExportFailed, match=r"exit 1 \(output\) differs from the network by nan"):
        check_agreement(network, Engine(), torch.randn(3, 8))  # type: ignore[arg-type]


def test_answers_that_are_always_the_same_show_no_agreement() -> None:
    network = toy_network()
    nn.init.zeros_(network.backbone.classifier.weight)

    class Itself:
        backbone = network.backbone
        exits = staticmethod(network.exits)

    with pytest.warns(
        NoEffectWarning, match=r"exit 1 \(output\) gives the same output for every input"
    ):
        assert differences(network, Itself(), torch.randn(3, 8)) == [0.0, 0.0]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"engine": "tensorrt"},
            "expected one of onnxruntime, openvino, onnxruntime-session, openvino-session, aoti",
        ),
        (
            {"engine": "eager"},
            "expected one of onnxruntime, openvino, onnxruntime-session, openvino-session, aoti",
        ),
        ({"precision": "int4"}, "expected one of fp32"),
        ({"engine": "aoti", "precision": "int8-dynamic"}, "runs in fp32 only"),
        ({"threads": 0}, "expected 1 or more"),
    ],
)
def test_what_no_engine_offers_is_refused(
    tmp_path: Path, options: dict[str, Any], said: str
) -> None:
    with pytest.raises(RunError, match=said):
        export(
            toy_network(),
            tmp_path / "made",
            **{"engine": "onnxruntime", "example": torch.zeros(1, 8), **options},
        )


def test_a_network_without_a_graph_is_refused(tmp_path: Path) -> None:
    net: Any = impatient.networks.AnytimeNet(num_classes=3)
    with pytest.raises(NetworkError, match="cannot be cut into parts"):
        export(net, tmp_path / "made", engine="onnxruntime", example=torch.zeros(1, 3, 32, 32))


def test_a_place_that_is_taken_is_refused_and_only_our_own_is_replaced(
    toy_directory: Path, tmp_path: Path, written: Written
) -> None:
    written(toy_directory)
    place = Path(shutil.copytree(toy_directory, tmp_path / "copy"))
    (place / "stale").touch()
    options: dict[str, Any] = {"engine": "onnxruntime", "example": torch.randn(2, 8), "lean": True}
    with pytest.raises(StorageError, match="is already an exported network"):
        export(toy_network(), place, **options)
    export(toy_network(), place, force=True, **options)
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "letter.txt").touch()
    with pytest.raises(StorageError, match="is not an exported network"):
        export(toy_network(), foreign, force=True, **options)

    assert read_json(place / "bundle.json")["engine"] == "onnxruntime"
    assert not (place / "stale").exists()
    assert {entry.name for entry in tmp_path.iterdir()} == {"copy", "foreign"}


def test_damaged_directories_are_refused(toy_directory: Path, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="is not an exported network"):
        load_engine(tmp_path)
    bundle = read_json(toy_directory / "bundle.json")
    for number, (spoilt, said) in enumerate(
        [
            ({**bundle, "kind": "letter"}, "another kind"),
            ({**bundle, "schema": 9}, "another kind"),
            ({**bundle, "engine": "abacus"}, "another kind"),
            ({**bundle, "stages": ["stage0.onnx"]}, "1 stages for 2 exits"),
            ({name: value for name, value in bundle.items() if name != "facts"}, "lacks 'facts'"),
            ({**bundle, "facts": [1]}, "no NetworkFacts that can be read"),
            ({**bundle, "layouts": []}, "0 early exits; expected 2 and 1"),
            ({**bundle, "precision": "fp3"}, "engine or precision"),
            ({**bundle, "stages": ["stage0.onnx", "stage7.onnx"]}, "no file stage7.onnx"),
        ]
    ):
        place = Path(shutil.copytree(toy_directory, tmp_path / str(number)))
        write_json(place / "bundle.json", spoilt)
        with pytest.raises(StorageError, match=said):
            load_engine(place)


def test_a_damaged_file_is_refused(toy_directory: Path, tmp_path: Path) -> None:
    place = Path(shutil.copytree(toy_directory, tmp_path / "copy"))
    (place / "head0.onnx").write_bytes(b"nothing")
    with pytest.raises(StorageError, match=r"head0.onnx does not fit its checksum"):
        load_engine(place)


def test_one_flipped_bit_in_any_file_is_noticed(toy_directory: Path, tmp_path: Path) -> None:
    place = Path(shutil.copytree(toy_directory, tmp_path / "copy"))
    draw = np.random.default_rng(0)
    files = sorted(file for file in place.rglob("*") if file.is_file())
    assert len(files) > 15
    for file in files:
        whole = file.read_bytes()
        for _ in range(40 if file.suffix == ".json" else 3):
            spoilt = bytearray(whole)
            spoilt[draw.integers(len(spoilt))] ^= 1 << int(draw.integers(8))
            file.write_bytes(spoilt)
            with pytest.raises(BundleError):
                Bundle(place)
            with pytest.raises(StorageError):
                load_engine(place)
        file.write_bytes(whole)
    assert Bundle(place).num_exits == 2


def test_pictures_are_read_without_torch_as_with_it(
    network: MultiExitNetwork, directory: Path, tmp_path: Path, written: Written
) -> None:
    preprocess = Preprocess(
        mean=(0.4, 0.5, 0.6),
        std=(0.2, 0.3, 0.4),
        size=(32, 32),
        channels=3,
        dtype="uint8",
        resizing=Resizing(how="shorter", before=(36, 36), interpolation="bicubic"),
    )
    draw = np.random.default_rng(1)
    picture = Image.fromarray(draw.integers(0, 256, (50, 41, 4), dtype=np.uint8), "RGBA")
    turned = Image.Exif()
    turned[0x0112] = 6
    picture.save(tmp_path / "cat.png", exif=turned)
    written(directory)
    names = [f"kind \u00e9{index}" for index in range(10)]
    place = export(
        network,
        tmp_path / "made",
        engine="onnxruntime",
        example=pictures(2),
        class_names=names,
        preprocess=preprocess,
    )
    bundle = Bundle(place)
    wanted = preprocess(preprocess.image(tmp_path / "cat.png"))
    np.testing.assert_allclose(bundle.read(tmp_path / "cat.png"), wanted.numpy(), atol=1e-6)
    with torch.inference_mode():
        best = int(network(wanted)[-1].argmax())
    said = answer_without_torch(place, tmp_path / "cat.png", tmp_path)
    assert said["class_name"] == [names[best]]
    np.save(tmp_path / "raw.npy", preprocess.image(tmp_path / "cat.png").numpy())
    assert answer_without_torch(place, tmp_path / "raw.npy", tmp_path)["class"] == [best]
    (tmp_path / "letter.png").write_text("no picture")
    with pytest.raises(BundleError, match="cannot be read as a picture"):
        bundle.read(tmp_path / "letter.png")
    with pytest.raises(BundleError, match="how to prepare such a file is not in"):
        Bundle(directory).read(tmp_path / "cat.png")


def test_samples_are_varied_but_stay_of_their_kind() -> None:
    x = {
        "ids": torch.arange(14).view(2, 7),
        "flags": torch.tensor([True, False]),
        "scale": torch.ones(2, 3),
        "depth": 3,
    }
    more = varied(x, 5)

    assert sorted(more["ids"][0].tolist()) == x["ids"][0].tolist()
    assert more["ids"].shape == (5, 7)
    assert more["flags"].tolist() == [True, False, True, False, True]
    assert len({float(value) for value in more["scale"].flatten()}) == 15
    assert more["depth"] == 3
    assert torch.equal(varied(x, 5, noise=False)["scale"], torch.ones(5, 3))


def test_compiled_stages_in_one_call() -> None:
    network = toy_network()
    with warnings.catch_warnings():
        # torch's compiler, about itself
        warnings.simplefilter("ignore")
        made: Any = to_engine(network, "compile", example=torch.randn(2, 8))
        x = torch.randn(5, 8)
        assert_close(outputs_of(made, x), outputs_of(network, x))

    assert made.engine == "compile"
