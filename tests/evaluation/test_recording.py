"""Recordings: what the network gave, with features and labels, checked and kept."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from impatient.errors import (
    ClassCountMismatch,
    LogitsWarning,
    RecordingError,
    StorageError,
    TaskError,
)
from impatient.evaluation import Recording, batch_tables, record
from impatient.evaluation.batch_tables import BatchTable
from impatient.files import read_tensors, write_tensors
from impatient.networks import MultiExitNetwork, attach_exits
from recordings import Samples, drawn, recording_of


class ConvNet(nn.Module):
    """Two convolutions and a classifier on [B, 1, 6, 6]; batch norm, so that eval mode matters."""

    def __init__(self) -> None:
        super().__init__()
        self.low = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.high = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1), nn.ReLU())
        self.classifier = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.high(self.low(x)).mean((2, 3)))


@pytest.fixture
def samples() -> Samples:
    return Samples(torch.randn(23, 8), torch.randint(3, (23,)))


@pytest.fixture
def network(toy: nn.Module, toy_input: Tensor) -> MultiExitNetwork:
    return attach_exits(toy, after=["blocks.0", "blocks.2"], example=toy_input)


@pytest.fixture
def images() -> Samples:
    return Samples(torch.randn(11, 1, 6, 6), torch.randint(3, (11,)))


@pytest.fixture
def convolutional(images: Samples) -> MultiExitNetwork:
    return attach_exits(ConvNet(), after=["low", "high"], example=images.inputs)


# --- recording ------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [5, 23, 100])
def test_a_recording_is_what_forward_gives(network, samples, batch_size):
    recording = record(network, samples, split="test", batch_size=batch_size)
    with torch.no_grad():
        expected = torch.stack(network(samples.inputs))
    assert recording.outputs.shape == (3, 23, 3)
    torch.testing.assert_close(recording.outputs, expected)
    assert recording.labels.equal(samples.labels)
    assert (recording.split, recording.exits, recording.features) == (
        "test",
        network.exit_names,
        (),
    )


def test_recording_puts_the_network_in_eval_mode(convolutional, images):
    convolutional.train()
    recording = record(convolutional, images, batch_size=4)
    assert not convolutional.training
    torch.testing.assert_close(
        recording.outputs, torch.stack(convolutional(images.inputs)).detach()
    )


def test_features_are_pooled_over_space(convolutional, images):
    recording = record(convolutional, images, features=True, batch_size=4)
    low = convolutional.backbone.low(images.inputs)
    high = convolutional.backbone.high(low)
    assert [tuple(entry.shape) for entry in recording.features] == [(11, 4), (11, 6), (11, 3)]
    torch.testing.assert_close(recording.features[0], low.mean((2, 3)).detach())
    torch.testing.assert_close(recording.features[1], high.mean((2, 3)).detach())
    # nothing is deeper than the output
    torch.testing.assert_close(recording.features[2], recording.outputs[2])


def test_outputs_are_kept_in_single_precision_and_without_history(network, samples):
    network.double()
    recording = record(network, Samples(samples.inputs.double(), samples.labels))
    assert recording.outputs.dtype == torch.float32
    assert not recording.outputs.requires_grad
    # else nobody could fit anything to it by gradient
    assert not recording.outputs.is_inference()


def test_hits_are_where_the_largest_output_is_the_label(network, samples):
    recording = record(network, samples)
    by_hand = [
        [float(row.argmax() == label) for row, label in zip(exit, samples.labels, strict=True)]
        for exit in recording.outputs
    ]
    assert recording.quality.tolist() == by_hand


def test_provenance_changes_with_the_weights_and_names_the_data(network, samples):
    before = record(network, samples).provenance
    with torch.no_grad():
        network.backbone.classifier.bias += 1.0
    after = record(network, samples).provenance
    assert before.data == after.data == "random"
    assert before.network == after.network
    assert before.weights != after.weights


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_outputs_that_are_no_numbers_name_their_exit(network, samples, value):
    with torch.no_grad():
        network.backbone.blocks[2][0].bias.fill_(value)
    with pytest.raises(RecordingError, match=r"exit 1 \(blocks\.2\) gives NaN or infinite"):
        record(network, samples)


@pytest.mark.parametrize("label", [-1, 3])
def test_labels_without_an_output_are_refused(network, samples, label):
    samples.labels[7] = label
    with pytest.raises((RecordingError, ClassCountMismatch), match=f"{label}.* for 3 outputs"):
        record(network, samples)


@pytest.mark.parametrize("shape", [(3, 4, 2), (2, 5, 2), (2, 0, 2)])
def test_shapes_that_do_not_fit_are_refused(shape):
    good = recording_of(torch.zeros(2, 4, 2), torch.zeros(4, dtype=torch.long))
    labels = good.labels[: min(4, shape[1])]
    # jaxtyping may see it first
    with pytest.raises((RecordingError, TypeError), match=r"do not fit 2 exits|no samples"):
        good.of(torch.zeros(shape), labels, split="test", exits=good.exits)


class Hasty(nn.Module):
    """Skips its second block when no input of the batch is positive."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(2, 2)
        self.second = nn.Linear(2, 2)
        self.classifier = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        if bool((x > 0).any()):
            hidden = self.second(hidden)
        return self.classifier(hidden)


def test_an_exit_that_some_inputs_never_reach_is_refused():
    network = attach_exits(Hasty(), after=["first", "second"], example=torch.ones(1, 2))
    inputs = torch.tensor([[1.0, 1.0]] * 4 + [[-1.0, -1.0]] * 4)
    with pytest.raises(RecordingError, match=r"8 samples.*\[8, 4, 8\]"):
        record(network, Samples(inputs, torch.zeros(8, dtype=torch.long)), batch_size=4)


# --- files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("features", [False, True])
def test_a_saved_recording_comes_back(tmp_path, network, samples, features):
    recording = record(network, samples, split="test", features=features)
    recording.save(tmp_path / "test.safetensors")
    back = Recording.load(tmp_path / "test.safetensors")
    assert back.outputs.equal(recording.outputs)
    assert back.labels.equal(recording.labels)
    assert [entry.tolist() for entry in back.features] == [
        entry.tolist() for entry in recording.features
    ]
    assert (back.split, back.exits, back.provenance) == (
        recording.split,
        recording.exits,
        recording.provenance,
    )


@pytest.mark.parametrize("keep", [0, 10, 500, -1])
def test_a_damaged_file_is_a_storage_error(tmp_path, keep):
    file = tmp_path / "validation.safetensors"
    drawn(50, seed=1).save(file)
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(StorageError, match=r"validation\.safetensors"):
        Recording.load(file)


def test_a_missing_file_is_a_storage_error(tmp_path):
    with pytest.raises(StorageError, match="No such file"):
        Recording.load(tmp_path / "validation.safetensors")


def test_other_tensors_are_no_recording(tmp_path, network):
    write_tensors(tmp_path / "weights.safetensors", network.state_dict(), {"kind": "weights"})
    with pytest.raises(StorageError, match=r"is no recording.*impatient record"):
        Recording.load(tmp_path / "weights.safetensors")


def test_a_file_whose_numbers_were_spoilt_is_refused(tmp_path):
    recording = drawn(5, seed=1)
    recording.save(tmp_path / "test.safetensors")
    tensors, header = read_tensors(tmp_path / "test.safetensors")
    tensors["outputs"] *= float("nan")
    write_tensors(tmp_path / "test.safetensors", tensors, header)
    with pytest.raises(StorageError, match="exit block0 gives NaN"):
        Recording.load(tmp_path / "test.safetensors")


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int64])
def test_tables_that_hold_no_real_numbers_are_refused(tmp_path, dtype):
    drawn(5, seed=1).save(tmp_path / "test.safetensors")
    tensors, header = read_tensors(tmp_path / "test.safetensors")
    tables = [name for name in tensors if name.startswith(("quality", "scores", "outputs"))]
    assert len(tables) >= 3
    for name in tables:
        wrong = {**tensors, name: tensors[name].to(dtype)}
        write_tensors(tmp_path / "wrong.safetensors", wrong, header)
        with pytest.raises(StorageError, match=r"expected real numbers|expected Float"):
            Recording.load(tmp_path / "wrong.safetensors")


def test_a_recording_in_which_every_answer_counts_as_right_is_refused():
    labels = torch.arange(5) % 3
    with pytest.raises(TaskError, match="there are 3 classes; expected fewer than 3"):
        Recording.of(torch.zeros(2, 5, 3), labels, split="test", task="classification:top=3")


# --- memory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [2, 10, 1000])
def test_exits_judged_at_once_get_the_numbers_of_one_by_one(classes: int, monkeypatch) -> None:
    made = torch.Generator().manual_seed(classes)
    outputs = 4.0 * torch.randn(3, 37, classes, generator=made)
    targets = torch.randint(classes, (37,), generator=made)
    at_once = Recording.of(outputs, targets, split="test")
    monkeypatch.setattr(batch_tables, "FEW", 0)
    one_by_one = Recording.of(outputs, targets, split="test")
    assert torch.equal(at_once.quality, one_by_one.quality)
    for name, table in at_once.scores.items():
        assert torch.equal(table, one_by_one.scores[name])


def test_memory_of_a_recording_is_taken_once() -> None:
    """Tensors that live while a table of 40 batches is filled are the table and one batch."""
    table = BatchTable(400)
    first = torch.randn(10, 50)
    table.add([first, first])
    held = table._table
    for batch in range(1, 40):
        table.add([first + batch, first - batch])
    assert held is not None
    assert table.whole().data_ptr() == held.data_ptr()
    assert table.whole()[1, 390:].equal(first - 39)


@pytest.mark.parametrize("rows", [torch.zeros(5, 1), torch.zeros(5, 3, 2), torch.zeros(6, 3)])
def test_a_batch_of_another_shape_or_too_many_samples_are_refused(rows: Tensor) -> None:
    table = BatchTable(10)
    table.add([torch.zeros(5, 3)] * 2)
    with pytest.raises(RecordingError, match=r"after 5 of 10 samples; expected \(5, 3\)"):
        table.add([rows[:5] if len(rows) == 5 else rows] * 2)


def test_fewer_samples_than_announced_are_those_that_came() -> None:
    table = BatchTable(10)
    table.add([torch.ones(4, 2)])
    assert table.whole().shape == (1, 4, 2)
    with pytest.raises(RecordingError, match="no samples"):
        BatchTable(10).whole()


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
def test_outputs_that_are_no_numbers_are_refused_wherever_they_are(wrong: float) -> None:
    outputs = torch.zeros(2, 5, 3)
    outputs[1, 4, 2] = wrong
    with pytest.raises(RecordingError, match="NaN or infinite"):
        Recording.of(outputs, torch.zeros(5, dtype=torch.long), split="test")


@pytest.mark.parametrize("dtype", ["int64", "uint8", "float16", "float64"])
def test_logits_of_any_real_type_are_taken_in(dtype: str) -> None:
    outputs = np.array([[[1, 0, 3]], [[0, 9, 2]]], dtype)
    made = Recording.of(outputs, torch.tensor([2]), split="test")
    assert torch.equal(made.logits(), torch.from_numpy(outputs).float())


def test_probabilities_in_place_of_logits_are_noticed() -> None:
    outputs = torch.randn(2, 5, 3).softmax(-1)
    labels = torch.zeros(5, dtype=torch.long)
    with pytest.warns(LogitsWarning, match="probabilities, all of which sum to 1"):
        Recording.of(outputs, labels, split="test")
    with pytest.warns(LogitsWarning, match="probabilities, all of which sum to 100"):
        Recording.of(100 * outputs, labels, split="test")
    Recording.of(outputs.log(), labels, split="test")
    Recording.of(2.0 * outputs, labels, split="test")


@pytest.mark.parametrize(
    ("outputs", "task"), [(torch.zeros(0, 5, 3), "classification"), ([], "regression")]
)
def test_outputs_of_no_exits_are_refused(outputs: Tensor | list[Tensor], task: str) -> None:
    with pytest.raises(RecordingError, match="outputs of no exits"):
        Recording.of(outputs, torch.zeros(5, dtype=torch.long), split="test", task=task)
