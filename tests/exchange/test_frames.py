"""Environment steps add up exactly on every way that gradients take, end a run, and are carried over a resume."""

from __future__ import annotations

import json

import pytest
import torch
from hosted import advance, together, trainers
from own.oracle import OWN, job_of, saved, spec_of, train
from own.stepping import frames_of

import distml
from distml.runs.checkpoints import CheckpointStore
from distml.strategies.agenda import Agenda, Spent
from distml.tasks.base import as_loss

STEPS = 12
SYNC = {
    "single": (1, {"name": "single"}),
    "all_reduce": (3, {"name": "all_reduce"}),
    "compressed": (2, {"name": "all_reduce", "compression": "int8"}),
    "server": (2, {"name": "parameter_server", "servers": 2}),
    "local_sgd": (2, {"name": "local_sgd", "inner_steps": 4}),
}
LOOSE = {
    "async": (3, {"name": "parameter_server", "mode": "async", "servers": 2}),
    "ssp": (2, {"name": "parameter_server", "mode": "ssp", "max_staleness": 1}),
    "prefetch": (2, {"name": "parameter_server", "mode": "async", "prefetch": True}),
}


def case(name: str, **changes) -> dict:
    workers, strategy = {**SYNC, **LOOSE}[name]
    return spec_of("stepping:Stepping", workers=workers, strategy=strategy, **{"steps": STEPS, **changes})


def total(workers: int, steps: int) -> int:
    """Of the first batches of all workers."""
    return sum(frames_of(rank, number) for rank in range(workers) for number in range(1, steps + 1))


@pytest.mark.parametrize("name", SYNC)
@pytest.mark.parametrize("micro", [None, 1])
def test_synchronous_workers_count_each_others_frames(name, micro):
    strategies = train(case(name, micro_batch_size=micro)).strategies
    assert {s.progress.frames for s in strategies} == {total(len(strategies), STEPS)}
    assert total(3, STEPS) != 3 * STEPS * 4 != total(2, STEPS)  # neither examples nor counts


@pytest.mark.parametrize("name", ["all_reduce", "server", "local_sgd"])
def test_in_shared_memory(name):
    found = trainers(case(name))
    together([lambda one=one: advance(one) for one in found])
    assert {one.strategy.progress.frames for one in found} == {total(len(found), STEPS)}


@pytest.mark.parametrize("name", LOOSE)
def test_asynchronous_ones_count_the_frames_of_applied_gradients(name):
    trained = train(case(name, steps=40, log={"every": 1, "to": []}))
    clock = trained.runtime.servers.clock
    applied = {rank: round(rows * len(trained.strategies) / 12) for rank, rows in clock.contributed.items()}
    by_hand = sum(frames_of(rank, number) for rank, count in applied.items() for number in range(1, count + 1))
    assert sum(applied.values()) >= 40
    assert clock.frames == by_hand == max(s.progress.frames for s in trained.strategies)


@pytest.mark.parametrize("name", ["async", "ssp"])
def test_asynchronous_ones_in_shared_memory(name):
    spec = case(name, steps=60)
    spec["strategy"].pop("servers", None)
    found = trainers(spec)
    together([lambda one=one: advance(one) for one in found])
    channel = max((one.strategy.channel for one in found), key=lambda channel: channel.clock.frames)
    applied = {rank: round(rows * len(found) / 12) for rank, rows in channel.clock.contributed.items()}
    by_hand = sum(frames_of(rank, number) for rank, count in applied.items() for number in range(1, count + 1))
    assert channel.clock.frames == by_hand > 0


@pytest.mark.parametrize("name", [*SYNC, *LOOSE])
def test_a_budget_of_frames_ends_the_run_at_the_first_version_that_has_come_to_it(name):
    whole = train(case(name, steps=40, log={"every": 1, "to": []}))
    by_version = {report.version: report.frames for report in whole.reports}
    limit = 150
    ended = train(case(name, stop={"frames": limit}, log={"every": 1, "to": []}))
    version = max(event.version for event in ended.finished)
    first = min(v for v, frames in by_version.items() if frames >= limit)
    round_end = 4 * -(-first // 4) if name == "local_sgd" else first
    assert version == round_end
    assert {event.reason for event in ended.finished} == {"frames"}


def test_fraction_and_the_end_of_schedules():
    job = job_of(case("all_reduce", stop={"frames": 1000, "steps": 200}))
    assert Agenda(job).budget_steps == 84  # 1000 frames, each an example once, 12 of them a step
    assert Agenda(job, updates_per_round=3).budget_steps == 200
    assert Agenda(job).fraction(Spent(10, 0, 250)) == 0.25
    assert [Agenda(job).spent(Spent(10, 0, frames)) for frames in (999, 1000)] == [None, "frames"]


@pytest.mark.parametrize("name", ["single", "server", "all_reduce", "local_sgd"])
def test_a_resumed_run_goes_on_with_the_exact_number(name, tmp_path, monkeypatch):
    monkeypatch.chdir(OWN)
    often = {"checkpoint": {"every": 4}, "evaluate": {"every": 4}, "log": {"every": 2, "to": []}}
    for out, steps in (("whole", (16,)), ("parts", (8, 16))):
        for limit in steps:
            distml.run(case(name, steps=limit, **often), out=tmp_path / out, runtime="inline")
    workers = SYNC[name][0]
    clocks = [CheckpointStore(tmp_path / out / "checkpoints", 1).load(16).state["clock"] for out in ("whole", "parts")]
    assert [clock["frames"] for clock in clocks] == [total(workers, 16)] * 2
    rows = {out: [json.loads(line) for line in (tmp_path / out / "metrics.jsonl").read_text().splitlines()]
            for out in ("whole", "parts")}  # fmt: skip
    for found in rows.values():
        assert [row["rl/frames"] for row in found if "rl/frames" in row][-1] == total(workers, 16)
        evaluated = {row["step"]: row["eval/frames"] for row in found if "eval/frames" in row}
        assert evaluated == {step: total(workers, step) for step in (4, 8, 12, 16)}
        timed = [row for row in found if "throughput/frames_per_s" in row]
        assert timed
        assert all(row["throughput/frames_per_s"] > 0 for row in timed)
    assert saved(tmp_path / "whole")["model"].keys() == saved(tmp_path / "parts")["model"].keys()


def test_a_metric_with_a_room_of_its_own_keeps_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(OWN)
    metrics = distml.run(case("single"), out=tmp_path / "run", runtime="inline").metrics
    assert (metrics["rl/age_mean"], metrics["train/error"]) == (1.5, 0.5)
    assert "train/rl/age_mean" not in metrics


def test_rows_of_tasks_without_frames_stay_as_they_were(tmp_path, monkeypatch):
    monkeypatch.chdir(OWN)
    metrics = distml.run(spec_of(), out=tmp_path / "run", runtime="inline").metrics
    assert not {"rl/frames", "throughput/frames_per_s"} & metrics.keys()


@pytest.mark.parametrize("frames", [-1.0, float("nan"), "many"])
def test_frames_that_are_no_number_are_refused(frames):
    batch = (torch.ones(2, 3),)
    with pytest.raises((TypeError, ValueError), match="frames of loss"):
        as_loss(distml.Loss(torch.tensor(1.0), 2, frames=frames), batch, "loss")
