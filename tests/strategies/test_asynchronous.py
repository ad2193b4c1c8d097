"""async and ssp: what they become at the ends of their range, and the bound that ssp keeps."""

from __future__ import annotations

import pytest
import torch
from own.oracle import spec_of, train
from test_equivalence import OPTIMIZERS

UNEVEN = {"speeds": [1.0, 1.0, 0.05]}


def server(mode: str, bound: int | None = None, servers: int = 2) -> dict:
    block = {"name": "parameter_server", "mode": mode, "servers": servers}
    return block if bound is None else block | {"max_staleness": bound}


def staleness(trained) -> float:
    return max(report.values["staleness_max"] for report in trained.reports)


@pytest.mark.parametrize("optimizer", ["sgd", "nesterov", "adamw", "rmsprop+momentum"])
def test_ssp_with_bound_0_is_sync(optimizer):
    values = {**OPTIMIZERS[optimizer], "clip_norm": None}
    job = spec_of(workers=3, optimizer=values, strategy=server("sync"), steps=25)
    sync, ssp = train(job), train(job | {"strategy": server("ssp", 0), "inline": UNEVEN})
    assert torch.equal(sync.weights, ssp.weights)
    assert [s.progress for s in sync.strategies] == [s.progress for s in ssp.strategies]
    assert staleness(ssp) == 0
    loose = train(job | {"strategy": server("ssp", 2), "inline": UNEVEN})
    assert not torch.equal(sync.weights, loose.weights)  # the control


@pytest.mark.parametrize("bound", [1, 2, 4])
@pytest.mark.parametrize("seed", [0, 1])
def test_ssp_keeps_its_bound_where_async_does_not(bound, seed):
    job = spec_of(workers=3, steps=120, seed=seed, inline=UNEVEN, log={"every": 1, "to": []})
    assert 0 < staleness(train(job | {"strategy": server("ssp", bound)})) <= bound
    assert staleness(train(job | {"strategy": server("async")})) > bound


@pytest.mark.parametrize("bound", [1, 3])
def test_ssp_keeps_its_bound_over_two_phases(bound):
    job = spec_of("gan_1d:GAN", workers=3, steps=80, inline=UNEVEN, log={"every": 1, "to": []})
    assert 0 < staleness(train(job | {"strategy": server("ssp", bound)})) <= bound


@pytest.mark.parametrize("servers", [1, 3])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_async_with_one_worker_is_single(optimizer, servers):
    values = {**OPTIMIZERS[optimizer], "clip_norm": None}
    task = {"name": "small:Small", "args": {"dtype": "float32"}}
    alone = train(spec_of(task, optimizer=values, strategy={"name": "single"}))
    served = train(spec_of(task, optimizer=values, strategy=server("async", servers=servers)))
    assert torch.equal(alone.weights, served.weights)
    assert alone.strategies[0].progress == served.strategies[0].progress


def test_async_clips_each_workers_gradient():
    job = spec_of(optimizer={"name": "sgd", "lr": 0.1, "clip_norm": 0.05})
    alone, served = train(job | {"strategy": {"name": "single"}}), train(job | {"strategy": server("async")})
    assert torch.allclose(alone.weights, served.weights, rtol=0, atol=1e-12)
    free = train(job | {"strategy": server("async"), "optimizer": {"name": "sgd", "lr": 0.1}})
    assert not torch.allclose(alone.weights, free.weights, rtol=0, atol=1e-6)


def test_async_counts_updates_of_a_workers_share_each():
    trained = train(spec_of(workers=3, strategy=server("async"), batch_size=12, steps=31))
    clock = trained.runtime.servers.clock
    assert (clock.version, clock.examples, clock.finished) == (31, 31 * 4, "steps")
    assert [shard.optimizer.updates for shard in trained.runtime.servers.shards] == [31, 31]
    assert {event.reason for event in trained.finished} == {"steps"}
    assert staleness(trained) > 0
    assert len(trained.evaluated) == 1
    assert trained.evaluated[0].version == 31


@pytest.mark.parametrize(("mode", "bound"), [("sync", None), ("async", None), ("ssp", 2)])
def test_the_run_ends_exactly_at_its_budget_of_examples(mode, bound):
    job = spec_of(workers=3, strategy=server(mode, bound), batch_size=12, stop={"examples": 120})
    clock = train(job).runtime.servers.clock
    assert clock.examples == 120
    assert clock.finished == "examples"
    if mode != "ssp":  # ssp may average several gradients into one update
        assert clock.version == {"sync": 10, "async": 30}[mode]


def test_speeds_are_drawn_from_the_seed():
    job = spec_of(workers=3, strategy=server("async"), inline=UNEVEN, steps=60)
    first, again, other = train(job), train(job), train(job | {"seed": 5})

    def order(trained):
        return [(r.rank, r.version, r.examples, r.means) for r in trained.reports]

    assert order(first) == order(again)
    assert torch.equal(first.weights, again.weights)
    assert [(r.rank, r.version) for r in first.reports] != [(r.rank, r.version) for r in other.reports]
    slow = sum(r.values["steps"] for r in first.reports if r.rank == 2)
    assert slow < 60 / 3 / 2


def test_a_fast_worker_goes_on_while_another_evaluates():
    job = spec_of(workers=2, strategy=server("async"), steps=40, evaluate={"every": 10})
    trained = train(job)
    versions = [event.version for event in trained.evaluated]
    assert versions[-1] == 40
    assert len(versions) >= 3
    assert sorted(versions) == versions
