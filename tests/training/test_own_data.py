"""Data sets, loaders and samples of any form, as people have them."""

import random
from collections import UserDict, namedtuple
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    Subset,
    TensorDataset,
    WeightedRandomSampler,
)

import impatient
from impatient.errors import DataError, TrainingError
from impatient.training import Data, DataOptions, Samples, loop
from impatient.trees import Ragged, leaves
from toys import Compared

X = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))
Y = torch.arange(60) % 3
Pair = namedtuple("Pair", "x y")


@dataclass
class Sample:
    x: Tensor
    label: int


class Own(Dataset[Any]):
    """Samples as a function of their place makes them."""

    def __init__(self, make: Callable[[int], Any], count: int = 60) -> None:
        self.make = make
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, place: int) -> Any:
        return self.make(place)


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return zip(X, Y, strict=True)


def pair(place: int) -> tuple[Tensor, int]:
    return X[place], int(Y[place])


FORMS: dict[str, Callable[[], Any]] = {
    "TensorDataset": lambda: TensorDataset(X, Y),
    "Subset": lambda: Subset(TensorDataset(X.repeat(2, 1), Y.repeat(2)), range(60)),
    "own class": lambda: Own(pair),
    "list": lambda: [pair(place) for place in range(60)],
    "generator": lambda: (pair(place) for place in range(60)),
    "IterableDataset": Stream,
    "numpy": lambda: Own(lambda place: (X[place].double().numpy(), np.int16(Y[place]))),
    "big-endian": lambda: Own(lambda place: (X[place].numpy().astype(">f4"), int(Y[place]))),
    "named tuple": lambda: Own(lambda place: Pair(*pair(place))),
    "list of numbers": lambda: Own(lambda place: (X[place].tolist(), int(Y[place]))),
    "loader": lambda: DataLoader(TensorDataset(X, Y), batch_size=7, shuffle=True),
    "loader of a stream": lambda: DataLoader(Stream(), batch_size=7),
}


@pytest.mark.parametrize("form", FORMS)
def test_pairs_come_back_whatever_holds_them(form: str) -> None:
    data = Data.of(FORMS[form](), test=TensorDataset(X[:9], Y[:9]))
    assert torch.equal(data.examples("test").take([2, 0]), X[[2, 0]])
    seen = [data.examples(split) for split in ("train", "validation")]
    assert [len(part.labels) for part in seen] == [54, 6]
    inputs = torch.cat([part.take(range(len(part.labels))) for part in seen])
    labels = torch.cat([part.labels for part in seen])
    places = (inputs[:, None] == X).all(2).int().argmax(1)
    assert sorted(places.tolist()) == list(range(60))
    assert torch.equal(labels, Y[places])
    assert data.num_classes == 3
    # nothing is done to what somebody has prepared
    assert torch.equal(data.example(), seen[0].take([0]))


@pytest.mark.parametrize(
    ("make", "samples", "wanted"),
    [
        (lambda i: {"x": X[i], "label": int(Y[i])}, Samples(), {"x"}),
        (lambda i: UserDict(x=X[i], y=int(Y[i]), id=i), Samples(inputs=["x"]), {"x"}),
        (lambda i: Sample(X[i], int(Y[i])), Samples(), {"x"}),
        (lambda i: {"x": X[i], "stars": int(Y[i])}, Samples(target="stars"), {"x"}),
        (lambda i: {"x": X[i], "label": int(Y[i]), "id": "a"}, Samples(inputs="x"), None),
        (lambda i: (int(Y[i]), X[i]), Samples(target=0), None),
        (lambda i: (X[i], X[i], int(Y[i])), Samples(target=-1), 2),
        (lambda i: {"both": pair(i)}, Samples(target=lambda sample: sample["both"]), None),
    ],
)
def test_it_is_said_or_unmistakable_which_entry_is_the_target(make, samples, wanted) -> None:
    data = Data.of(Own(make), samples=samples)
    found = data.examples("train").take([0, 1])
    if isinstance(wanted, set):
        assert found.keys() == wanted
    elif wanted:
        assert len(found) == wanted
    else:
        assert isinstance(found, Tensor)
    assert all(leaf.shape == (2, 4) for leaf in leaves(found))
    assert data.examples("train").labels.unique().tolist() == [0, 1, 2]


def lengths_of(place: int) -> dict[str, Any]:
    count = 2 + place % 5
    return {"ids": list(range(1, count + 1)), "mask": [1] * count, "label": place % 2}


def test_entries_of_different_lengths_are_filled_up_and_trained_together() -> None:
    data = Data.of(Own(lengths_of), samples=Samples(pad={"ids": 9, "mask": 0}))
    batch = data.examples("test").take(range(5))
    lengths = data.examples("test").lengths
    assert lengths is not None
    assert batch["mask"].sum(1).tolist() == lengths[:5].tolist()
    assert batch["ids"][batch["mask"] == 0].unique().tolist() == [9]
    assert batch["ids"].shape[1] == int(lengths[:5].max())


class Words(nn.Module):
    """A small network that reads token ids and their mask."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 8)
        self.block = nn.Sequential(nn.Linear(8, 8), nn.Tanh())
        self.classifier = nn.Linear(8, 2)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        x = self.block(self.embedding(ids)) * mask[..., None]
        return self.classifier(x.sum(1) / mask.sum(1, keepdim=True))


def test_recording_in_batches_of_similar_lengths_gives_every_sample_its_own_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = Data.of(Own(lengths_of), samples=Samples(pad={"ids": 9, "mask": 0}))
    network = impatient.attach_exits(
        Words(), example=data.example(2), after=["block"], mask="mask"
    ).eval()
    read: list[Tensor] = []
    batches = Data.batches

    def watched(*asked: Any) -> Iterator[tuple[Any, Any]]:
        for inputs, targets in batches(*asked):
            read.append(inputs["mask"])
            yield inputs, targets

    monkeypatch.setattr(Data, "batches", watched)
    recording = impatient.record(network, data, split="train", batch_size=8)
    train = data.examples("train")
    singly = [network(train.take([place])) for place in range(data.size("train"))]

    assert recording.labels.equal(train.labels)
    torch.testing.assert_close(
        recording.logits(),
        torch.stack([torch.cat([one[exit] for one in singly]) for exit in range(2)]).detach(),
    )
    # at most one batch in each step of length holds padding
    assert sum(bool((mask == 0).any()) for mask in read) <= 4


def test_training_in_batches_of_similar_lengths_goes_on_after_a_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = Data.of(Own(lengths_of), samples=Samples(pad={"ids": 9, "mask": 0}))

    def trained(checkpoint: Path | None) -> list[Tensor]:
        torch.manual_seed(0)
        network = impatient.attach_exits(
            Words(), example=data.example(2), after=["block"], mask="mask"
        )
        recipe = impatient.Recipe(epochs=3, batch_size=8)
        impatient.fit(network, data, recipe=recipe, checkpoint=checkpoint, progress=False)
        return [value.clone() for value in network.state_dict().values()]

    whole = trained(None)
    update = loop._Training._update
    steps = iter(range(100))

    def cut_off(*arguments: Any) -> Tensor:
        if next(steps) == 8:
            raise RuntimeError("power cut")
        return update(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(loop._Training, "_update", cut_off)
        with pytest.raises(RuntimeError, match="power cut"):
            trained(tmp_path / "checkpoint")
    for one, other in zip(trained(tmp_path / "checkpoint"), whole, strict=True):
        assert torch.equal(one, other)


def test_a_loaders_own_way_to_a_batch_is_kept() -> None:
    def join(samples: list[Any]) -> tuple[Tensor, Tensor]:
        x, y = zip(*samples, strict=True)
        return torch.stack(x) * 2, torch.tensor(y)

    data = Data.of(DataLoader(Own(pair), batch_size=8, collate_fn=join))
    assert torch.equal(data.examples("test").labels.unique(), torch.arange(3))
    found = data.examples("train").take([3, 1])
    assert all(bool((row == X * 2).all(1).any()) for row in found)


def boxes_of(place: int) -> tuple[Tensor, dict[str, Any]]:
    count = place % 3
    return X[place], {"boxes": torch.full((count, 4), place / 60), "labels": [1] * count}


def test_targets_of_different_shapes_stay_a_list() -> None:
    data = Data.of(Own(boxes_of))
    labels = data.examples("train").labels
    assert isinstance(labels, Ragged)
    assert data.task_hint == "detection"
    for inputs, targets in data.batches("train", 7):
        assert isinstance(targets, Ragged)
        assert len(targets) == len(inputs)
        for x, target in zip(inputs, targets, strict=True):
            place = int((x == X).all(1).int().argmax())
            assert target["boxes"].shape == (place % 3, 4)
            assert torch.equal(target["boxes"], torch.full((place % 3, 4), place / 60))
    # as many boxes everywhere
    assert isinstance(
        Data.of(Own(lambda i: boxes_of(3 * (i // 3) + 1))).examples("test").labels, Ragged
    )


def test_pictures_and_maps_of_classes_become_tensors() -> None:
    def sample(place: int) -> tuple[Image.Image, Image.Image]:
        drawn = Image.new("P", (5, 4), place % 3)
        drawn.putpalette([9, 9, 9, 200, 0, 0, 0, 200, 0])
        return Image.new("RGB", (5, 4), (place, 0, 0)), drawn

    data = Data.of(Own(sample))
    assert data.task_hint == "segmentation"
    [(inputs, maps)] = data.batches("test", 60)
    assert inputs.shape == (12, 3, 4, 5)
    assert torch.equal(maps[:, 0, 0], inputs[:, 0, 0, 0].to(torch.uint8) % 3)


def test_splits_that_are_given_are_taken_and_others_do_not_change_with_the_seed() -> None:
    parts = [TensorDataset(X[place : place + 20], Y[place : place + 20]) for place in (0, 20, 40)]
    data = Data.of(*parts)
    for split, place in (("train", 0), ("validation", 20), ("test", 40)):
        assert torch.equal(data.examples(split).take(range(20)), X[place : place + 20])
    tests = [
        Data.of(TensorDataset(X, Y), seed=seed).examples("test").take(range(12)) for seed in (0, 1)
    ]
    assert torch.equal(*tests)


def test_contents_are_in_the_fingerprint_and_it_is_said_where_they_cannot_be(caplog) -> None:
    def fingerprint(shift: float) -> str:
        return Data.of(TensorDataset(X + shift, Y)).fingerprint

    assert fingerprint(0.0) == fingerprint(0.0) != fingerprint(0.5)
    assert Data.of(TensorDataset(X, Y.flip(0))).fingerprint != fingerprint(0.0)
    assert not caplog.records

    def jittered(place: int) -> tuple[Tensor, int]:
        return X[place] + random.random(), int(Y[place])

    assert Data.of(Own(jittered)).fingerprint == Data.of(Own(jittered)).fingerprint
    assert "only targets are in the fingerprint" in caplog.text


def test_trees_of_the_users_own_are_trained_recorded_and_refuse_augmentation() -> None:
    label = (X[:, 0] > 0).long()

    def sample(place: int) -> dict[str, Any]:
        return {"left": X[place], "right": X[place] * 0, "label": int(label[place])}

    data = Data.of(Own(sample), test=Own(sample))
    network = impatient.attach_exits(Compared(), example=data.example(2), after=["blocks.0"])
    recipe = impatient.Recipe(epochs=20, batch_size=16, lr=0.1)
    impatient.fit(network, data, recipe=recipe, progress=False)
    recording = impatient.record(network, data, split="test", batch_size=7)
    assert torch.equal(recording.labels, label)
    assert float(recording.quality[-1].mean()) > 0.9
    boxes = Data.of(Own(boxes_of))
    augmented = impatient.Recipe(epochs=1, augment="crop")
    plain = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 3))
    other = impatient.attach_exits(plain, after=["0"], example=boxes.example(2), task="regression")
    with pytest.raises(TrainingError, match="targets in a Ragged; expected 'none' for maps and"):
        impatient.fit(other, boxes, recipe=augmented, progress=False)


def test_inputs_are_normalised_when_that_is_said() -> None:
    data = Data.of(TensorDataset(X * 3 + 1, Y), options=DataOptions())
    prepared = data.preprocess(data.examples("train").take(range(data.size("train"))))
    assert abs(float(prepared.mean())) < 1e-4
    with pytest.raises(DataError, match="labels cannot be said here"):
        Data.of(TensorDataset(X, Y), options=DataOptions(labels="renumber"))


def broken(place: int) -> Any:
    if place == 7:
        raise RuntimeError("disk on fire")
    return pair(place)


@pytest.mark.parametrize(
    ("given", "samples", "complaint"),
    [
        ("digits", None, "str is no data set.*load_data"),
        ({"train": X}, None, "dict is no data set"),
        ((X, Y), None, r"tuple is no data set.*TensorDataset\(x, y\)"),
        (X, None, "Tensor is no data set"),
        ([], None, "no samples"),
        (3, None, "a int has no length"),
        (Own(broken), None, "sample 7: it cannot be read: RuntimeError.'disk on fire'"),
        (Own(lambda i: X[i]), None, "a sample is a Tensor; expected a pair"),
        (Own(lambda i: (X[i], X[i], 1)), None, "a sample is a tuple of 0, 1, 2; expected a pair"),
        (Own(lambda i: {"x": X[i]}), None, "a dict of x; expected a pair"),
        (Own(lambda i: {"x": 1, "y": 1, "label": 1}), None, "Say which is the target"),
        (Own(lambda i: {"x": 1, "y": 1}), Samples(target="z"), "target='z' is not there"),
        (Own(lambda i: {"x": 1, "y": 1}), Samples(inputs="z"), "without z"),
        (Own(lambda i: ("a text", 1)), None, "sample 0 holds text.*token ids"),
        (Own(lambda i: (X[i], "cat")), None, "its target holds text.*class numbers"),
        (Own(lambda i: (X[i], None)), None, "holds a NoneType"),
        (Own(lambda i: (X[i].to(torch.complex64), 1)), None, "expected real numbers"),
        (Own(lambda i: (X[i, : 2 + i % 2], i % 2)), None, r"sample 1 is \(3,\).*Samples\(pad="),
        (Own(lambda i: (X[i], -1)), None, "labels must be integers from 0"),
        (Own(lambda i: (X[i], 2**40)), None, "no plausible class"),
        (Own(lambda i: (X[i], 1)), None, "expected two classes or more"),
        (
            DataLoader(TensorDataset(X, Y), sampler=WeightedRandomSampler([1.0] * 60, 60)),
            None,
            "WeightedRandomSampler.*Give loader.dataset",
        ),
    ],
)
def test_what_cannot_be_told_is_refused(
    given: Any, samples: Samples | None, complaint: str
) -> None:
    with pytest.raises(DataError, match=complaint):
        Data.of(given, samples=samples)


def test_tables_of_hugging_face_are_data_sets(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {
            "ids": datasets.Sequence(datasets.Value("int64")),
            "mask": datasets.Sequence(datasets.Value("int64")),
            "label": datasets.ClassLabel(names=["no", "yes"]),
        }
    )
    rows = [lengths_of(place) for place in range(60)]
    table = datasets.Dataset.from_list(rows, features=features)
    data = Data.of(table, samples=Samples(pad={"ids": 0, "mask": 0}))
    assert data.class_names == ("no", "yes")
    assert data.examples("test").take([0, 1])["ids"].dtype == torch.int64
