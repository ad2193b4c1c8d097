"""The inline runtime: one worker at a time, each with its own random states, and no silent deadlock."""

from __future__ import annotations

import random
import threading

import numpy as np
import pytest
import torch
from own.oracle import OWN, job_of, spec_of, train

from distml.events import Failed
from distml.exchange.channel import PeerLost
from distml.loop import random_states, set_random_states
from distml.runtime.inline import Baton, InlineRuntime, drawn, in_rank_order
from distml.tasks.sources import SourceTree


def run_threads(count: int, choose, body) -> list:
    """`body(rank, baton)` in one thread per rank; what each returned or raised."""
    baton, found = Baton(count, choose), [None] * count

    def thread(rank: int) -> None:
        baton.take(rank)
        try:
            found[rank] = body(rank, baton)
        except PeerLost as lost:
            found[rank] = lost
        finally:
            baton.leave(rank)

    threads = [threading.Thread(target=thread, args=(rank,), daemon=True) for rank in range(count)]
    for one in threads:
        one.start()
    baton.start()
    for one in threads:
        one.join(timeout=10)
        assert not one.is_alive()
    return found


def test_the_baton_goes_round_in_rank_order_and_one_runs_at_a_time():
    seen, running = [], []

    def body(rank: int, baton: Baton) -> None:
        for turn in range(3):
            running.append(rank)
            assert running == [rank]
            seen.append((turn, rank))
            running.remove(rank)
            baton.wait(rank, lambda: True, "its turn")

    run_threads(3, in_rank_order(3), body)
    assert seen == [(turn, rank) for turn in range(3) for rank in range(3)]


def test_a_deadlock_names_who_waits_for_what():
    def body(rank: int, baton: Baton) -> None:
        baton.wait(rank, lambda: False, f"the {'moon' if rank else 'sun'}")

    found = run_threads(2, in_rank_order(2), body)
    assert all(isinstance(lost, PeerLost) for lost in found)
    assert str(found[0]) == "nobody can go on: rank 0 waits for the sun; rank 1 waits for the moon"


def test_a_worker_that_leaves_lets_the_others_go_on():
    def body(rank: int, baton: Baton) -> str:
        if rank == 0:
            return "left"
        baton.wait(rank, lambda: True, "its turn")
        return "went on"

    assert run_threads(2, in_rank_order(2), body) == ["left", "went on"]


def numbers() -> list[float]:
    return [float(torch.rand(())), float(np.random.rand()), random.random()]


def test_random_states_are_swapped_with_the_baton():
    def seed(rank: int) -> None:
        torch.manual_seed(rank)
        np.random.seed(rank)
        random.seed(rank)

    def alone(rank: int) -> list[list[float]]:
        seed(rank)
        return [numbers() for _ in range(4)]

    def body(rank: int, baton: Baton) -> list[list[float]]:
        seed(rank)
        found = []
        for _ in range(4):
            found.append(numbers())
            baton.wait(rank, lambda: True, "its turn")
        return found

    assert run_threads(3, in_rank_order(3), body) == [alone(rank) for rank in range(3)]


def test_random_states_are_restored_exactly():
    random.gauss(0, 1)  # keeps its second value for the next call
    np.random.randn()
    states = random_states()
    first = [*numbers(), random.gauss(0, 1), float(np.random.randn())]
    set_random_states(states)
    assert [*numbers(), random.gauss(0, 1), float(np.random.randn())] == first


def test_turns_are_drawn_by_speed():
    choose = drawn(0, [1.0, 1.0, 0.25])
    turns = [choose([0, 1, 2]) for _ in range(4500)]
    assert [turns.count(rank) / 4500 for rank in range(3)] == pytest.approx([4 / 9, 4 / 9, 1 / 9], abs=0.03)
    again = drawn(0, [1.0, 1.0, 0.25])
    assert [again([0, 1, 2]) for _ in range(4500)] == turns
    assert {choose([1]) for _ in range(5)} == {1}


def failing(spec: dict) -> list[Failed]:
    job = job_of(spec)
    runtime = InlineRuntime(job, SourceTree.collect(job.task, OWN))
    runtime.build(None)
    runtime.begin(None)
    try:
        return [event for event in runtime.events() if isinstance(event, Failed)]
    finally:
        runtime.close()


def test_workers_that_call_different_collectives_end_with_an_error():
    found = failing(spec_of("broken:Lonely", workers=3, strategy="all_reduce", steps=5))
    assert [(event.rank, event.version) for event in found] == [(1, 2)] or found[0].rank == 2
    assert "ranks call different collectives: rank" in found[0].message
    assert "rank 1" in found[0].message


def test_a_failure_in_one_worker_ends_all_and_is_told_once():
    task = {"name": "broken:Raises", "args": {"rank": 2, "step": 3}}
    found = failing(spec_of(task, workers=3, strategy="all_reduce"))
    assert [(event.rank, event.version, event.phase) for event in found] == [(2, 3, "loss")]
    assert "ZeroDivisionError" in found[0].message
    assert "broken.py:" in found[0].message


@pytest.mark.parametrize(("name", "workers"), [("single", 1), ("all_reduce", 3), ("parameter_server", 3)])
def test_the_time_budget_of_one_worker_ends_the_run_for_all(name, workers):
    """Workers' clocks differ: one sees its time used up where another does not."""
    job = job_of(spec_of(workers=workers, strategy=name, stop={"seconds": 1000.0}))
    runtime = InlineRuntime(job, SourceTree.collect(job.task, OWN))
    runtime.build(None)
    runtime.begin(None)
    runtime.trainers[-1].strategy.train_seconds = 2000.0
    events = list(runtime.events())
    assert [event for event in events if isinstance(event, Failed)] == []
    ends = [(event.version, event.reason) for event in events if type(event).__name__ == "Finished"]
    assert ends == [(1, "seconds")] * workers
    assert [event.version for event in events if type(event).__name__ == "Evaluated"] == [1]


def test_a_request_to_stop_ends_all_at_one_version_without_an_evaluation():
    job = job_of(spec_of(workers=3, strategy="all_reduce", steps=50, log={"every": 1, "to": []}))
    runtime = InlineRuntime(job, SourceTree.collect(job.task, OWN))
    runtime.build(None)
    runtime.begin(None)
    ends, evaluated = [], []
    for event in runtime.events():
        if type(event).__name__ == "Report" and event.version == 5:
            runtime.request_stop()
        ends += [(event.version, event.reason)] if type(event).__name__ == "Finished" else []
        evaluated += [event] if type(event).__name__ == "Evaluated" else []
    assert len(set(ends)) == 1
    assert ends[0] in {(6, "requested"), (5, "requested")}
    assert evaluated == []


def test_threads_end_when_the_consumer_stops_listening():
    for strategy in ({"name": "all_reduce"}, {"name": "parameter_server", "mode": "async"}):
        job = job_of(spec_of(workers=3, strategy=strategy, steps=500, log={"every": 1, "to": []},
                             checkpoint={"every": 1}, evaluate={"every": 1}))  # fmt: skip
        runtime = InlineRuntime(job, SourceTree.collect(job.task, OWN))
        runtime.build(None)
        runtime.begin(None)
        events = runtime.events()
        for _ in range(20):
            next(events)
        runtime.close()
        assert [thread.is_alive() for thread in runtime.threads] == [False] * 3


def test_the_same_seed_gives_the_same_rows():
    job = spec_of("dropout:Dropout", workers=2, strategy="all_reduce", steps=12, log={"every": 3, "to": []})
    first, again = ([(r.rank, r.version, r.means) for r in train(job).reports] for _ in range(2))
    assert first == again
