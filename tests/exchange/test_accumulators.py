"""What workers count is summed: once and only once, on every way, over averages, resumes and deaths."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from hosted import advance, together, trainers
from own.counted import WIDTH, Moments, moments, rows_of
from own.oracle import OWN, spec_of, train
from torch import nn

import distml
from distml.exchange.channel import Head
from distml.exchange.flat import Carried, from_numpy, to_numpy
from distml.runs.checkpoints import CheckpointStore
from distml.strategies.tally import Tally

SYNC = {
    "single": (1, {"name": "single"}),
    "all_reduce": (3, {"name": "all_reduce"}),
    "server": (3, {"name": "parameter_server", "servers": 2}),
    "local_sgd": (2, {"name": "local_sgd", "inner_steps": 4}),
}
LOOSE = {
    "async-1": (1, {"name": "parameter_server", "mode": "async"}),
    "async": (3, {"name": "parameter_server", "mode": "async", "servers": 2}),
    "ssp": (3, {"name": "parameter_server", "mode": "ssp", "max_staleness": 2}),
    "prefetch": (3, {"name": "parameter_server", "mode": "async", "prefetch": True}),
}


def case(name: str, averaged: bool = False, **changes) -> dict:
    workers, strategy = {**SYNC, **LOOSE}[name]
    values = {"steps": 12, "evaluate": {"every": 4}, "checkpoint": {"every": 6}}
    task = {"name": "counted:Counted", "args": {"averaged": averaged}}
    return spec_of(task, workers=workers, strategy=dict(strategy), **{**values, **changes})


def seen_by(buffers: dict[str, np.ndarray]) -> list[int]:
    """Batches that each rank has seen, by the buffers."""
    return [round(number) for number in buffers["seen.batches"].tolist()]


def distance(buffers: dict[str, np.ndarray], batches: list[int]) -> float:
    """Of the kept moments from those of the first so many batches of each rank, all at once."""
    rows = [rows_of(rank, number) for rank, count in enumerate(batches) for number in range(1, count + 1)]
    count, mean, m2 = moments(torch.cat(rows))
    assert not buffers["seen.new_count"].any()
    found = {name: from_numpy(buffers[f"seen.{name}"]) for name in ("count", "mean", "m2")}
    return max(float((found["count"] - count).abs().max()), float((found["mean"] - mean).abs().max()),
               float((found["m2"] / m2 - 1).abs().max()))  # fmt: skip


def buffers_of(trainer) -> dict[str, np.ndarray]:
    return trainer.strategy.carried.arrays()


# --------------------------------------------------------------------------------------------------------- synchronous
@pytest.mark.parametrize("name", SYNC)
@pytest.mark.parametrize("shared", [False, True])
def test_synchronous_workers_moments_are_those_of_all_data(name, shared):
    if shared and name in ("single", "server"):
        pytest.skip("no exchange in shared memory of its own")
    if shared:
        found = trainers(case(name))
        together([lambda one=one: advance(one) for one in found])
    else:
        found = train(case(name)).runtime.trainers
    kept = [buffers_of(one) for one in found]
    assert seen_by(kept[0])[: len(found)] == [12] * len(found)
    assert distance(kept[0], [12] * len(found)) <= 1e-12
    for other in kept[1:]:
        assert all(np.array_equal(other[key], kept[0][key]) for key in other if key.startswith("seen."))


@pytest.mark.parametrize("name", ["all_reduce", "async"])
def test_averages_instead_of_sums_are_not_those_of_all_data(name):
    """Control."""
    kept = train(case(name, averaged=True)).runtime.trainers[0].strategy.carried.arrays()
    assert kept["seen.new_count"] < 12 * 4 * 2
    with pytest.raises(AssertionError):
        assert distance(kept, [12, 12, 12]) <= 1e-12


# -------------------------------------------------------------------------------------------------------- asynchronous
@pytest.mark.parametrize("name", LOOSE)
@pytest.mark.parametrize("speeds", [None, [1, 0.3, 0.1]])
def test_what_was_pushed_is_in_every_snapshot_once(name, speeds):
    workers = LOOSE[name][0]
    if workers == 1 and speeds is not None:
        pytest.skip("one worker has one speed")
    trained = train(case(name, steps=60, inline={"speeds": speeds and speeds[:workers]}))
    assert len(trained.snapshots) >= 10
    for snapshot in trained.snapshots:
        batches = seen_by(snapshot.carried)
        assert sum(batches) == snapshot.version or (name == "ssp" and sum(batches) > snapshot.version)  # it averages
        assert distance(snapshot.carried, batches) <= 1e-12
        assert snapshot.own["carried"] == {}  # or a recovery would begin from bases of several places


@pytest.mark.parametrize("name", ["async", "ssp"])
def test_what_was_pushed_in_shared_memory_is_there_once(name):
    spec = case(name, steps=60)
    spec["strategy"].pop("servers", None)
    found = trainers(spec)
    events = together([lambda one=one: advance(one) for one in found])
    last = max((e for row in events for e in row if hasattr(e, "carried")), key=lambda event: event.version)
    batches = seen_by(last.carried)
    assert sum(batches) == 60 or (name == "ssp" and sum(batches) > 60)
    assert distance(last.carried, batches) <= 1e-12


@pytest.mark.parametrize("name", ["single", "all_reduce", "server", "async-1", "async"])
def test_a_resumed_run_counts_on(name, tmp_path, monkeypatch):
    monkeypatch.chdir(OWN)
    for limit in (12, 24):
        distml.run(case(name, steps=limit), out=tmp_path, runtime="inline")
    checkpoint = CheckpointStore(tmp_path / "checkpoints", 1).load(24)
    batches, workers = seen_by(checkpoint.tensors["model"]), {**SYNC, **LOOSE}[name][0]
    if name == "async":  # a worker goes on from where its stream was at its own last checkpoint
        assert sum(batches) == 24
        assert checkpoint.tensors["model"]["seen.count"] == sum((2 + r) * n for r, n in enumerate(batches))
        return
    assert batches[:workers] == [24] * workers
    assert distance(checkpoint.tensors["model"], batches) <= 1e-12


# --------------------------------------------------------------------------------------------------------------- tally
class Worker:
    """A replica whose module counts; several messages may be under way."""

    def __init__(self, rank: int) -> None:
        self.rank, self.number, self.place = rank, 0, 0
        self.model = nn.Sequential(Moments())
        self.carried = Carried(self.model)
        self.asked: list[int] = []

    def see(self) -> None:
        self.number += 1
        self.model[0].see(rows_of(self.rank, self.number), self.rank)

    def push(self, tally: Tally) -> None:
        head = Head(self.rank, 0, 0, 0, 1.0, place=self.place, base=to_numpy(self.carried.base_vector()),
                    sums=to_numpy(self.carried.take_sums()))  # fmt: skip
        tally.add(head)
        self.asked.append(head.place)

    def take(self, tally: Tally, joins: bool = False) -> None:
        news = tally.news(None if joins else self.asked.pop(0))
        assert news is not None
        known = self.place - news.place if news.base is None else 0
        self.carried.fold(news.base, news.parts[known:])
        self.place = news.place + len(news.parts)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("ahead", [1, 2])
def test_every_base_is_the_fold_of_a_prefix_of_what_came_in(seed, ahead):
    draw, tally, order, bases = random.Random(seed), Tally(), [], {}
    workers = [Worker(rank) for rank in range(3)]
    for worker in workers:
        tally.add(Head(worker.rank, 0, -1, 0, 0.0, base=to_numpy(worker.carried.base_vector())))
    counted = [[] for _ in workers]  # batches that were pushed
    pending = [[] for _ in workers]
    for _ in range(150):
        worker = draw.choices(workers, [10, 3, 1])[0]
        rank = worker.rank
        if draw.random() < 0.05:  # it dies; another one takes its place from an older state, with numbers of its own
            fresh = Worker(rank)
            fresh.number = worker.number
            tally.add(Head(rank, 0, -1, 0, 0.0, base=to_numpy(fresh.carried.base_vector())))
            fresh.take(tally, joins=True)
            workers[rank], pending[rank] = fresh, []
        elif len(worker.asked) < ahead and draw.random() < 0.6:
            worker.see()
            pending[rank].append(worker.number)
            worker.push(tally)
            counted[rank] += pending[rank]
            order += [(rank, number) for number in pending[rank]]
            pending[rank] = []
        elif worker.asked:
            if ahead == 2 and draw.random() < 0.5:  # what it sees in between is relative to the base before
                worker.see()
                pending[rank].append(worker.number)
            worker.take(tally)
            value = worker.carried.base_vector()
            assert torch.equal(bases.setdefault(worker.place, value), value)
            sums = moments(torch.cat([rows_of(*one) for one in order]))
            if worker.place == tally.place + len(tally.parts) and not pending[rank]:
                module = worker.model[0]
                assert float(module.count) == sums[0]
                assert torch.allclose(module.mean, sums[1], rtol=0, atol=1e-12)
                assert torch.allclose(module.m2, sums[2], rtol=1e-12)
        assert len(tally.parts) <= (len(workers) + 1) * ahead
    assert len(bases) > 10


def test_a_tally_is_restored_as_it_was():
    tally, worker = Tally(), Worker(1)
    tally.restore(Tally().dump())
    assert tally.news(None) is None
    worker.see()
    worker.push(tally)
    again = Tally()
    again.restore(tally.dump())
    one, other = tally.news(None), again.news(None)
    assert (one.place, len(one.parts)) == (other.place, len(other.parts)) == (0, 1)
    assert np.array_equal(one.base, other.base)
    assert all(np.array_equal(a, b) for a, b in zip(one.parts[0], other.parts[0], strict=True))


# ------------------------------------------------------------------------------------------------------------- refusal
def test_buffers_that_are_not_what_the_class_says_are_refused():
    class Lacking(distml.Accumulator):
        sums = ("new",)

    class Counting(distml.Accumulator):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("number", torch.zeros(1, dtype=torch.int64))

    with pytest.raises(TypeError, match=r"Lacking \(0\): its sums name 'new'"):
        Carried(nn.Sequential(Lacking()))
    with pytest.raises(TypeError, match=r"Counting \(the model\).*floating, number is torch.int64"):
        Carried(Counting())
    assert Carried(nn.Sequential(Moments())).base_vector().numel() == 2 * WIDTH + 1 + 4
