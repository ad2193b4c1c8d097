"""Lag-aware training: prefetch and what it costs, steps divided by their staleness, who contributes how much."""

from __future__ import annotations

import json
from dataclasses import dataclass

import pytest
import torch
from own.oracle import OWN, job_of, spec_of, train
from own.schedule import World

import distml
from distml.exchange.channel import PULL, Head
from distml.exchange.layout import Layout
from distml.strategies.agenda import Agenda
from distml.strategies.base import seed_everything
from distml.strategies.parameter_server import Clock, answered_range
from distml.strategies.shard import Entry, Shard
from distml.tasks.build import build_task
from distml.tasks.data import DataOrder, take
from distml.tasks.sources import SourceTree

SSP = {"mode": "ssp", "servers": 2}
SEEDS = range(30)


def server(mode: str = "async", **keys) -> dict:
    return {"name": "parameter_server", "mode": mode, **keys}


@dataclass
class Applied:
    """One update as the server made it: who, from which version, and the gradients' sums."""

    ranks: list[int]
    staleness: list[int]
    gradients: list[torch.Tensor]


@pytest.fixture
def applied(monkeypatch) -> list[Applied]:
    """Every update that a run's only shard makes, in order."""
    found: list[Applied] = []
    reduce = Shard.reduce

    def recording(self: Shard, entry: Entry) -> list[float]:
        if not entry.dropped:
            replies = [entry.replies[member] for member in entry.members]
            gradients = [self.gradients[member].clone() for member in entry.members]
            found.append(Applied([rank for rank, _ in entry.members], [r.staleness for r in replies], gradients))
        return reduce(self, entry)

    monkeypatch.setattr(Shard, "reduce", recording)
    return found


def start_of(spec: dict) -> torch.Tensor:
    """The weights before the first update, flat."""
    job = job_of(spec)
    SourceTree.collect(job.task, OWN).install()
    seed_everything(job.seed)
    model = build_task(job).build_model()
    return torch.cat([parameter.detach().reshape(-1) for parameter in model.parameters()])


# ------------------------------------------------------------------------------------------------------------ the clock
@pytest.mark.parametrize("phases", [1, 2])
@pytest.mark.parametrize("bound", [0, 1, 2, 3])
@pytest.mark.parametrize("prefetch", [False, True])
def test_in_every_schedule_the_bound_is_kept_and_nobody_waits_for_good(prefetch, bound, phases):
    seen = []
    for seed in SEEDS:
        strategy = {**SSP, "max_staleness": bound, "prefetch": prefetch}
        world = World(strategy, workers=3, phases=phases, seed=seed, steps=25, evaluate={"every": 6})
        world.play()
        assert max(world.staleness) <= bound
        assert (world.clock.version, world.clock.finished) == (25, "steps")
        assert world.evaluated.count(25) == 1
        assert len(world.evaluated) == len(set(world.evaluated))
        given_up = world.heads.keys() - world.answered  # at most what was under way when the run was over
        assert all(prefetch and ticket == world.tickets[rank] - 1 for rank, ticket in given_up)
        seen += world.staleness
    assert set(seen) == set(range(bound + 1))


@pytest.mark.parametrize(
    "mode", [{"mode": "async", "servers": 2}, {**SSP, "max_staleness": 0}, {**SSP, "max_staleness": 2}]
)
@pytest.mark.parametrize("prefetch", [False, True])
def test_workers_that_die_at_any_moment_hang_nobody_and_leave_nothing(prefetch, mode):
    for seed in SEEDS:
        world = World({**mode, "prefetch": prefetch}, workers=3, phases=1, seed=seed, steps=40, evaluate={"every": 7})
        world.play(deaths=4)
        assert (world.clock.version, world.clock.finished) == (40, "steps")
        assert len(world.evaluated) == len(set(world.evaluated))
        if mode["mode"] == "ssp":
            assert max(world.staleness) <= mode["max_staleness"]
        assert world.clock.held == []


def test_a_step_begins_with_all_weights_of_one_version_and_in_between_a_phase_brings_its_own():
    layout = Layout.build([("first", (300,), 0, 0), ("second", (500,), 1, 0)])

    def entry(phase: int, dropped: bool = False) -> Entry:
        return Entry(1, phase, [(0, 0)], 1.0, 1.0, 0.0, 0, last_phase=phase == 1, dropped=dropped)

    assert [answered_range(layout, entry(phase), True) for phase in (0, 1)] == [(0, 300), (300, 800)]
    assert [answered_range(layout, entry(phase), False) for phase in (0, 1)] == [(0, 300), (0, 800)]
    assert answered_range(layout, entry(PULL, dropped=True), True) == (0, 800)


# ------------------------------------------------------------------------------------------------------------- prefetch
def delayed(spec: dict, steps: int) -> torch.Tensor:
    """Serial SGD whose gradient k is of version k - 1, by hand: the weights after `steps` updates, flat."""
    job = job_of(spec)
    SourceTree.collect(job.task, OWN).install()
    task = build_task(job)
    seed_everything(job.seed)
    model = task.build_model()
    parameters = list(model.parameters())
    ours = [parameter.detach().clone() for parameter in parameters]
    optimizer = torch.optim.SGD(ours, lr=job.optimizer.lr, momentum=job.optimizer.momentum, fused=True)
    dataset, before = task.data("train"), None
    order = DataOrder(len(dataset[0]), job.seed)
    for k in range(steps):
        for parameter in parameters:
            parameter.grad = None
        loss = task.loss(model, take(dataset, order.entries(k * job.batch_size, (k + 1) * job.batch_size)), None)
        loss.total.backward()
        newest = [weights.clone() for weights in ours]
        for weights, parameter in zip(ours, parameters, strict=True):
            weights.grad = parameter.grad / loss.count
        optimizer.step()
        if before is not None:
            for parameter, weights in zip(parameters, newest, strict=True):
                parameter.data.copy_(weights)
        before = newest
    return torch.cat([weights.reshape(-1) for weights in ours])


@pytest.mark.parametrize("mode", [server(), server("ssp", max_staleness=1), server(servers=3)])
def test_prefetch_of_one_worker_is_sgd_with_one_version_of_delay(mode):
    job = spec_of(optimizer={"name": "sgd", "lr": 0.3, "momentum": 0.5}, steps=21, log={"every": 1, "to": []})
    trained = train(job | {"strategy": {**mode, "prefetch": True}})
    assert torch.equal(trained.weights, delayed(job, 21))
    assert not torch.equal(train(job | {"strategy": mode}).weights, trained.weights)  # the control
    counts: dict[str, int] = {}
    for report in trained.reports:
        for versions, number in report.staleness.items():
            counts[versions] = counts.get(versions, 0) + number
    assert counts == {"0": 1, "1": 20}


@pytest.mark.parametrize("bound", [0, 1, 3])
@pytest.mark.parametrize("task", ["small:Small", "gan_1d:GAN"])
def test_prefetch_keeps_the_bound_and_every_duty(task, bound):
    job = spec_of(task, workers=3, steps=40, inline={"speeds": [1.0, 1.0, 0.1]}, log={"every": 1, "to": []},
                  evaluate={"every": 8}, strategy=server("ssp", max_staleness=bound, prefetch=True))  # fmt: skip
    first, again = train(job), train(job)
    assert torch.equal(first.weights, again.weights)
    assert max(report.values["staleness_max"] for report in first.reports) <= bound
    assert {event.reason for event in first.finished} == {"steps"}
    assert len(first.finished) == 3
    versions = [event.version for event in first.evaluated]
    assert versions.count(40) == 1
    assert len(versions) == len(set(versions)) >= 4
    assert [snapshot.version for snapshot in first.snapshots if snapshot.last] == [40]


@pytest.mark.parametrize("steps", [6, 11, 20])
def test_what_the_answer_under_way_asks_for_is_done_after_an_evaluation(steps):
    job = spec_of(steps=steps, evaluate={"every": 5}, checkpoint={"every": 6}, strategy=server(prefetch=True))
    trained = train(job)  # one worker: version 6 is made while 5 is evaluated
    assert [event.version for event in trained.evaluated] == sorted({*range(5, steps + 1, 5), steps})
    checkpoints = [snapshot.version for snapshot in trained.snapshots if snapshot.checkpoint]
    assert checkpoints == sorted({*range(6, steps + 1, 6), steps})
    assert trained.snapshots[-1].last


def test_prefetch_ends_when_an_evaluation_says_so():
    goal = {"metric": "eval/loss", "at_most": 1000.0}
    job = spec_of(workers=2, stop={"steps": 500, "goal": goal}, evaluate={"every": 5}, strategy=server(prefetch=True))
    trained = train(job)
    assert {event.reason for event in trained.finished} == {"goal"}
    assert trained.evaluated[0].finished == "goal"


# ---------------------------------------------------------------------------------------------------- staleness scaling
def test_scaled_steps_by_hand():
    job = job_of(spec_of(workers=2, strategy=server("ssp", max_staleness=9, staleness_scaling=True)))
    clock = Clock(job, Agenda(job, updates_per_round=2), 1)
    clock.version = 7
    old, new, fresh = Head(0, 5, 0, 4, 2.0), Head(1, 6, 0, 7, 4.0), Head(1, 7, 0, 6, 4.0)
    alone = clock._order(0, [old])
    assert (alone.lr_factor, alone.count, alone.factors) == (1 / 3, 2.0, None)
    clock.version = 7
    both = clock._order(0, [old, new])
    assert both.factors == [1 / 3, 1.0]
    assert both.count == pytest.approx(2 / 3 + 4)
    assert both.lr_factor == pytest.approx((2 / 3 + 4) / 6)
    clock.version = 7
    equal = clock._order(0, [fresh, new])  # staleness 1 and 0: both count in full
    assert (equal.lr_factor, equal.count, equal.factors) == (1.0, 8.0, None)


@pytest.mark.parametrize("optimizer", [{"name": "sgd", "lr": 0.2}, {"name": "adam", "lr": 0.01}])
@pytest.mark.parametrize("mode", [server(), server("ssp", max_staleness=3)])
def test_every_step_is_divided_by_its_staleness(mode, optimizer, applied):
    job = spec_of(workers=3, steps=40, optimizer=optimizer, inline={"speeds": [1.0, 1.0, 0.2]})
    trained = train(job | {"strategy": {**mode, "staleness_scaling": True}})
    weights = torch.nn.Parameter(start_of(job | {"strategy": mode}))
    rule = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[optimizer["name"]]([weights], lr=0.0)
    for update in applied:
        factors = [1 / max(1, versions) for versions in update.staleness]
        scaled = sum(factor * 4.0 for factor in factors)  # 4 examples in each
        rule.param_groups[0]["lr"] = optimizer["lr"] * scaled / (4.0 * len(factors))
        weights.grad = (
            sum(factor * gradient for factor, gradient in zip(factors, update.gradients, strict=True)) / scaled
        )
        rule.step()
    assert max(versions for update in applied for versions in update.staleness) > 1
    assert torch.allclose(trained.weights, weights.detach(), rtol=0, atol=1e-12)
    plain = train(job | {"strategy": mode})
    assert not torch.allclose(plain.weights, weights.detach(), rtol=0, atol=1e-5)  # the control


# ----------------------------------------------------------------------------------------------- stragglers and metrics
def straggling(seed: int = 0, scaling: bool = False, slow: float = 0.25, **keys) -> dict:
    changes = {"steps": 450, "optimizer": {"name": "sgd", "lr": 0.1}, **keys}
    return spec_of(workers=3, seed=seed, inline={"speeds": [1.0, 1.0, slow]}, batch_size=12,
                   strategy=server(staleness_scaling=scaling), **changes)  # fmt: skip


def test_a_straggler_is_reproduced_and_contributes_its_share():
    first, again, other = train(straggling()), train(straggling()), train(straggling(slow=1.0))
    assert torch.equal(first.weights, again.weights)
    assert not torch.equal(first.weights, other.weights)
    shares = first.runtime.servers.clock.contributed
    assert sum(shares.values()) == 450 * 4
    assert 0.15 < shares[2] / ((shares[0] + shares[1]) / 2) < 0.35
    equal = other.runtime.servers.clock.contributed
    assert 0.8 < equal[2] / ((equal[0] + equal[1]) / 2) < 1.25  # the control


def final_loss(trained) -> float:
    """Of the newest weights on the whole training split."""
    trainer = trained.runtime.trainers[0]
    inputs, labels = trainer.task.data("train")
    trainer.strategy.flat.weights.copy_(trained.weights)
    with torch.no_grad():
        return float(torch.nn.functional.cross_entropy(trainer.model(inputs), labels))


def test_scaling_takes_the_harm_out_of_stale_gradients_at_a_large_step():
    def run(seed: int, scaling: bool, workers: int = 6) -> float:
        speeds = {"speeds": [1.0] * (workers - 1) + [0.1]}
        return final_loss(train(spec_of(workers=workers, seed=seed, inline=speeds, steps=240,
                                        strategy=server(staleness_scaling=scaling),
                                        optimizer={"name": "sgd", "lr": 0.5})))  # fmt: skip

    plain, scaled = (sum(run(seed, scaling) for seed in range(4)) / 4 for scaling in (False, True))
    assert scaled < plain / 2  # over five seeds: 10.1 and 2.0 on the mean, standard deviations 4.8 and 0.8
    assert run(0, scaling=True, workers=1) == run(0, scaling=False, workers=1)  # nothing is stale there


def test_contributions_go_on_from_a_checkpoint():
    clock = train(straggling(steps=30)).runtime.servers.clock
    job = job_of(straggling())
    later = Clock(job, Agenda(job, updates_per_round=3), 1)
    later.load_state(json.loads(json.dumps(clock.state())))
    later.begin([0, 1, 2])
    assert later.contributed == clock.contributed


def test_the_metrics_of_a_run_say_how_late_and_how_unequal(tmp_path, monkeypatch):
    monkeypatch.chdir(OWN)
    spec = straggling(steps=120) | {"log": {"every": 20, "to": ["tensorboard"]}}
    result = distml.run(spec, out=tmp_path / "run", runtime="inline")
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    late = [row for row in rows if "staleness/mean" in row]
    assert sum(sum(v for k, v in row.items() if k.startswith("staleness/count_")) for row in late) == 120
    for row in late:
        assert row["staleness/p50"] <= row["staleness/p95"] <= row["staleness/max"]
    assert 0.1 < result.metrics["workers/gini"] < 0.4


# --------------------------------------------------------------------------------------------- shared statistics (A3C)
def test_rmsprop_of_async_workers_has_one_stream_of_statistics(applied):
    job = spec_of(workers=3, steps=60, strategy=server(), optimizer={"name": "rmsprop", "lr": 0.003, "alpha": 0.9})
    trained = train(job)
    (shard,) = trained.runtime.servers.shards

    def replay(ranks: set[int]) -> tuple[torch.Tensor, torch.Tensor]:
        weights = torch.nn.Parameter(start_of(job))
        rule = torch.optim.RMSprop([weights], lr=0.003, alpha=0.9, eps=job_of(job).optimizer.eps)
        for update in applied:
            if update.ranks[0] in ranks:
                weights.grad = update.gradients[0] / 4.0
                rule.step()
        return weights.detach(), rule.state[weights]["square_avg"]

    weights, square_avg = replay({0, 1, 2})
    assert torch.allclose(trained.weights, weights, rtol=0, atol=1e-12)
    assert torch.allclose(shard.optimizer.moments["square_avg"], square_avg, rtol=0, atol=1e-14)
    for rank in range(3):  # the control: statistics of one worker's own gradients
        assert not torch.allclose(square_avg, replay({rank})[1], rtol=1e-2)
