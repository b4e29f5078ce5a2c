"""Samples of several arrays through every verb: a text classifier with its mask, and two arrays."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import texts
from command_line import run_command_line
from impatient import load_data
from impatient.evaluation import Evaluation, Recording
from impatient.verbs import serve
from impatient.verbs.run_directory import RunDirectory

RECIPE = ["--epochs", "5", "--batch-size", "16", "--lr", "0.01", "--optimizer", "adamw", "--quiet"]


@pytest.fixture(scope="module")
def texts_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text classifier, trained and measured from a table."""
    folder = tmp_path_factory.mktemp("texts")
    tokenizer = texts.save_tokenizer(folder / "tokenizer")
    texts.save_csv(folder / "all.csv", texts.rows(320))
    torch.set_num_threads(1)
    run = folder / "run"
    data = ["--data", f"text:{folder / 'all.csv'}:tokenizer={tokenizer}"]
    with pytest.MonkeyPatch.context() as patch:
        for verb in (
            ["train", run, *data, "--model", texts.MODEL, "--exits", "2", *RECIPE],
            ["profile", run, "--repeats", "20", "--quiet"],
            ["record", run, "--features", "--quiet"],
            ["fit", run, "--max-loss", "5"],
            ["evaluate", run, "--real", "5"],
            ["report", run],
            ["describe", run],
            ["show", run],
        ):
            assert run_command_line(patch, *verb) == 0, verb
    return run


@pytest.mark.slow
def test_a_text_classifier_passes_every_verb(texts_run: Path) -> None:
    evaluation = Evaluation.load(texts_run / "evaluation.json")
    assert evaluation["exit 1"].accuracy.value > 0.9
    assert evaluation["no exits, trained alone"].accuracy.value > 0.9
    assert (texts_run / "report.html").is_file()
    # the example is a text of usual length, without padding
    run = RunDirectory(texts_run)
    example = run.spec().example()
    assert example["attention_mask"].all()
    lengths = run.data().examples("train").lengths
    assert lengths is not None
    assert example["input_ids"].shape == (1, int(lengths.sort().values[int(0.9 * len(lengths))]))


@pytest.mark.slow
def test_a_recorded_text_is_answered_alike_alone(texts_run, call, tmp_path) -> None:
    run = RunDirectory(texts_run)
    recorded = Recording.load(texts_run / "recordings" / "test.safetensors")
    sample = next(iter(run.data().batches("test", 1)))[0]
    np.savez(tmp_path / "one.npz", **{name: part[0].numpy() for name, part in sample.items()})
    code, printed = call("run", texts_run, tmp_path / "one.npz", "--json")
    assert code == 0
    [answer] = json.loads(printed[printed.index("[") :])
    probabilities = recorded.logits()[-1, 0].softmax(-1)
    assert answer["answer"] == run.spec().class_names[int(probabilities.argmax())]
    assert answer["probability"] == pytest.approx(float(probabilities.max()), abs=1e-4)


@pytest.mark.slow
def test_texts_of_any_length_are_served_as_they_were_recorded(texts_run) -> None:
    run = RunDirectory(texts_run)
    served = serve.hosted(texts_run, serve.ServeOptions(directories=(texts_run,), max_batch=4))
    ids, mask = served.input.tensors
    assert (ids.name, ids.below, ids.filler, ids.shape) == ("input_ids", 32, 0, (-1,))
    assert (mask.name, mask.usual) == ("attention_mask", 1)
    assert served.input.longest == 512
    recorded = Recording.load(texts_run / "recordings" / "test.safetensors")
    examples = run.data().examples("test")
    raw = [{name: part.numpy() for name, part in examples.take([n]).items()} for n in range(8)]
    assert len({len(one["input_ids"][0]) for one in raw}) > 1
    with torch.inference_mode():
        outputs = served.network(served.prepared(raw))
    for k, output in enumerate(outputs):
        torch.testing.assert_close(output, recorded.logits()[k, :8], atol=1e-4, rtol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arrays", "complaint"),
    [
        (
            {"input_ids": np.ones(4, int)},
            "holds input_ids; expected a .npz file with input_ids, at",
        ),
        (
            {"input_ids": np.ones((1, 4), int), "attention_mask": np.ones(4, int)},
            "input_ids, has shape (1, 4); expected as many dimensions as",
        ),
        (
            {"input_ids": np.ones(4), "attention_mask": np.ones(4, int)},
            "holds float64; the network was trained on int64",
        ),
    ],
)
def test_other_arrays_are_refused(texts_run, call, tmp_path, arrays, complaint) -> None:
    np.savez(tmp_path / "one.npz", **arrays)
    code, printed = call("run", texts_run, tmp_path / "one.npz")
    assert code != 0
    assert complaint in printed


@pytest.mark.slow
def test_texts_that_have_changed_are_noticed(texts_run, call, tmp_path) -> None:
    spec = RunDirectory(texts_run).spec()
    table = Path(spec.data.split(":")[1])
    before = table.read_text()
    try:
        table.write_text(before.replace("word1 ", "word2 ", 1))
        code, printed = call("record", texts_run, "--force", "--quiet")
    finally:
        table.write_text(before)
    assert code != 0
    assert "has changed since" in printed


@pytest.mark.slow
@pytest.mark.parametrize(
    ("option", "complaint"),
    [
        ("vocab_size=9", "has tokens up to number 24, but BertForSequenceClassification knows 9"),
        ("max_position_embeddings=8", "takes 8; expected no longer ones. Say length=8"),
    ],
)
def test_texts_beyond_the_model_are_refused(texts_run, call, tmp_path, option, complaint) -> None:
    data = ["--data", RunDirectory(texts_run).spec().data]
    model = f"{texts.MODEL.replace('vocab_size=32,', '')},{option}"
    code, printed = call("train", tmp_path / "run", *data, "--model", model, *RECIPE)
    assert code != 0
    assert complaint in printed


@pytest.mark.slow
@pytest.mark.engine
def test_two_measured_arrays_are_trained_recorded_and_exported(tmp_path, call) -> None:
    random = np.random.default_rng(0)
    arrays = {}
    for split, count in (("train", 200), ("test", 40)):
        left, right = random.normal(size=(2, count, 4)).astype(np.float32)
        arrays |= {f"x_{split}.left": left, f"x_{split}.right": right}
        arrays[f"y_{split}"] = (left[:, 0] > right[:, 0]).astype(np.int64)
    np.savez(tmp_path / "two.npz", **arrays)
    run = tmp_path / "run"
    data = ["--data", f"npz:{tmp_path / 'two.npz'}", "--model", "toys:Compared"]
    more = ["--after", "blocks.0", "--epochs", "8", "--batch-size", "16", "--no-exit-free"]
    assert call("train", run, *data, *more, "--quiet")[0] == 0
    assert call("profile", run, "--repeats", "20", "--quiet", "--trust", "toys")[0] == 0
    assert call("record", run, "--quiet", "--trust", "toys")[0] == 0
    recorded = Recording.load(run / "recordings" / "test.safetensors")
    assert float(recorded.quality[-1].mean()) > 0.85
    labels = load_data(f"npz:{tmp_path / 'two.npz'}").examples("test").labels
    assert torch.equal(recorded.labels, labels)
    code, printed = call("export", run, "--repeats", "1", "--quiet", "--trust", "toys")
    assert code == 0, printed
    assert "python run.py INPUT.npz --deadline-ms" in printed
    assert call("record", run, "--engine", "onnxruntime", "--quiet", "--trust", "toys")[0] == 0
    made = RunDirectory(run, trust=("toys",)).engine("onnxruntime").recording("test")
    torch.testing.assert_close(made.logits(), recorded.logits(), atol=1e-4, rtol=1e-3)
