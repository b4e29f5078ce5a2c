"""The order of training: every sample once, the same again, texts of similar lengths together."""

import pytest
import torch

from impatient.training.ordering import batches_of_epoch

LENGTHS = torch.randint(3, 60, (1000,), generator=torch.Generator().manual_seed(0))


def padding(batches: list[torch.Tensor]) -> float:
    """Share of padding where batches are padded to their longest sample."""
    padded = sum(len(batch) * int(LENGTHS[batch].max()) for batch in batches)
    return 1.0 - int(sum(LENGTHS[batch].sum() for batch in batches)) / padded


@pytest.mark.parametrize("lengths", [None, LENGTHS])
def test_every_sample_comes_once_and_the_order_is_the_same_again(lengths) -> None:
    batches = batches_of_epoch(1000, 16, seed=3, lengths=lengths)
    again = batches_of_epoch(1000, 16, seed=3, lengths=lengths)
    other = batches_of_epoch(1000, 16, seed=4, lengths=lengths)
    assert torch.cat(batches).sort().values.tolist() == list(range(1000))
    assert [batch.tolist() for batch in batches] == [batch.tolist() for batch in again]
    assert torch.cat(batches).tolist() != torch.cat(other).tolist()
    assert sorted(map(len, batches)) == [8] + [16] * 62


def test_without_lengths_the_order_is_a_plain_permutation() -> None:
    wanted = torch.randperm(1000, generator=torch.Generator().manual_seed(3))
    assert torch.equal(torch.cat(batches_of_epoch(1000, 16, seed=3)), wanted)


def test_texts_of_similar_lengths_share_a_batch_and_short_ones_do_not_come_first() -> None:
    plain = batches_of_epoch(1000, 16, seed=0)
    batches = batches_of_epoch(1000, 16, seed=0, lengths=LENGTHS)
    assert padding(plain) > 0.4
    assert padding(batches) < 0.1
    means = torch.stack([LENGTHS[batch].float().mean() for batch in batches])
    place = torch.arange(len(means)).float()
    assert abs(float(torch.corrcoef(torch.stack([means, place]))[0, 1])) < 0.3


def test_processes_share_the_samples_and_take_as_many_batches() -> None:
    parts = [
        batches_of_epoch(1001, 16, seed=0, lengths=LENGTHS[:1].repeat(1001), process=(rank, 4))
        for rank in range(4)
    ]
    assert len({len(part) for part in parts}) == 1
    drawn = torch.cat([batch for part in parts for batch in part])
    assert len(drawn) == len(drawn.unique()) == 1000


def test_a_batch_of_one_is_left_out() -> None:
    for lengths in (None, LENGTHS[:33]):
        assert sorted(map(len, batches_of_epoch(33, 16, seed=0, lengths=lengths))) == [16, 16]
