"""The data order: a function of seed and epoch alone, whatever the workers."""

from __future__ import annotations

from collections import namedtuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distml.tasks.data import (
    DataOrder,
    DatasetStream,
    check_dataset,
    length,
    micro_batches,
    mix,
    num_rows,
    take,
    to_device,
)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 50), st.integers(1, 70), st.integers(1, 7), st.integers(0, 9))
def test_the_ranks_slices_are_the_global_batch(count, batch, workers, seed):
    dataset = (torch.arange(count),)
    streams = [DatasetStream(dataset, seed, batch, rank, workers) for rank in range(workers)]
    order = DataOrder(count, seed)
    for version in range(4):
        parts = [stream.next(None, None)[0] for stream in streams]
        assert torch.equal(torch.cat(parts), order.entries(version * batch, (version + 1) * batch))
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_each_epoch_is_a_permutation_of_its_own():
    order = DataOrder(17, seed=3)
    epochs = [order.entries(17 * epoch, 17 * (epoch + 1)) for epoch in range(5)]
    assert all(torch.equal(epoch.sort().values, torch.arange(17)) for epoch in epochs)
    assert len({tuple(epoch.tolist()) for epoch in epochs}) == 5
    assert torch.equal(order.entries(0, 17), epochs[0])  # also when asked for again
    other = DataOrder(17, seed=4).entries(0, 17)
    assert not torch.equal(other, epochs[0])


def test_batches_cross_the_ends_of_epochs():
    order = DataOrder(5, seed=0)
    whole = torch.cat([order.permutation(epoch) for epoch in range(4)])
    assert torch.equal(order.entries(3, 18), whole[3:18])
    assert len(order.entries(4, 4)) == 0


def test_a_stream_continues_at_its_position():
    dataset = (torch.arange(23),)
    straight, resumed = (DatasetStream(dataset, 1, 8, 1, 3) for _ in range(2))
    for _ in range(5):
        straight.next(None, None)
    resumed.load_state(straight.state())
    assert torch.equal(straight.next(None, None)[0], resumed.next(None, None)[0])


def test_datasets_of_all_forms():
    indices = torch.tensor([2, 0])
    pair = (torch.arange(3), torch.arange(6).reshape(3, 2))
    assert [t.tolist() for t in take(pair, indices)] == [[2, 0], [[4, 5], [0, 1]]]
    assert take({"x": pair[0]}, indices)["x"].tolist() == [2, 0]
    mapped = torch.utils.data.TensorDataset(*pair)
    assert [t.tolist() for t in take(mapped, indices)] == [[2, 0], [[4, 5], [0, 1]]]
    point = namedtuple("point", "x y")
    assert take(point(*pair), indices).y.tolist() == [[4, 5], [0, 1]]
    assert (length(pair), length({"x": pair[1]}), length(mapped), length(())) == (3, 3, 3, 0)


def test_micro_batches_are_the_batch_in_pieces():
    batch = {"x": torch.arange(7), "y": torch.arange(14).reshape(7, 2)}
    pieces = list(micro_batches(batch, 3))
    assert [len(piece["x"]) for piece in pieces] == [3, 3, 1]
    assert torch.equal(torch.cat([piece["y"] for piece in pieces]), batch["y"])
    assert list(micro_batches(batch, None)) == [batch]
    assert list(micro_batches(batch, 7)) == [batch]


@pytest.mark.parametrize(("dataset", "message"), [
    ((torch.zeros(3), torch.zeros(2)), "different lengths"), ((torch.zeros(0),), "is empty"),
    ({"x": torch.zeros(3), "y": torch.zeros(2)}, "different lengths"),
    (iter([1]), "map-style dataset")])  # fmt: skip
def test_datasets_that_cannot_be_used(dataset, message):
    with pytest.raises((TypeError, ValueError), match=message):
        check_dataset(dataset, "train")


def test_mixed_seeds_differ():
    seeds = {mix(*numbers) for numbers in ((0, 0), (0, 1), (1, 0), (0,), (1,), (0, 0, 0))}
    assert len(seeds) == 6
    assert all(0 <= seed < 2**63 for seed in seeds)


class Columns:
    """A batch [T, E] whose pieces are cut along E; it notes where it was moved."""

    def __init__(self, values, device="cpu"):
        self.values, self.device = values, device

    def __len__(self):
        return self.values.numel()

    def micro_batches(self, size):
        width = max(1, size // len(self.values))
        for start in range(0, self.values.shape[1], width):
            yield Columns(self.values[:, start : start + width], self.device)

    def to(self, device):
        return Columns(self.values, str(device))


def test_a_batch_may_split_and_move_itself():
    batch = Columns(torch.arange(12).view(3, 4))
    pieces = list(micro_batches(batch, 6))
    assert [piece.values.tolist() for piece in pieces] == [[[0, 1], [4, 5], [8, 9]], [[2, 3], [6, 7], [10, 11]]]
    assert list(micro_batches(batch, None)) == list(micro_batches(batch, 12)) == [batch]
    assert (length(batch), num_rows(batch, 0.0)) == (12, 12.0)
    assert to_device(batch, torch.device("meta")).device == "meta"
    plain = list(micro_batches(batch.values, 2))  # the same tensor on its own is cut along its rows
    assert [piece.tolist() for piece in plain] == [[[0, 1, 2, 3], [4, 5, 6, 7]], [[8, 9, 10, 11]]]
