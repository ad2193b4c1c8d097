"""Server 0's order of updates, by hand: who is applied when, from which version, and who is waited for."""

from __future__ import annotations

import copy
import marshal
import random
from types import SimpleNamespace

import numpy as np
import pytest
from own.oracle import job_of, spec_of

from distml.exchange.channel import PULL, Head, Reply
from distml.strategies import parameter_server
from distml.strategies.agenda import Agenda
from distml.strategies.base import REQUESTED, TIMED_OUT
from distml.strategies.parameter_server import Clock


class Workers:
    """A clock, and workers that number their gradients and remember which version they hold."""

    def __init__(self, mode: str, count: int, *, bound: int | None = None, servers: int = 1, phases: int = 1, **keys):
        block = {"name": "parameter_server", "mode": mode, "servers": servers}
        block |= {} if bound is None else {"max_staleness": bound}
        job = job_of(spec_of(workers=count, strategy=block, **keys))
        self.clock = Clock(job, Agenda(job, updates_per_round=count), phases)
        self.clock.begin(list(range(count)))
        self.tickets, self.reads = dict.fromkeys(range(count), 0), dict.fromkeys(range(count), 0)

    def head(self, rank: int, count: float = 1.0, phase: int = 0, **values) -> Head:
        self.tickets[rank] += 1
        values.setdefault("rows", count)
        return Head(rank, self.tickets[rank] - 1, phase, self.reads[rank], count, **values)

    def push(self, rank: int, **values) -> list:
        head = self.head(rank, **values)
        return self.saw(self.clock.arrive(0, rank, head.ticket, head))

    def join(self, rank: int) -> list:
        return self.push(rank, phase=PULL)

    def saw(self, entries: list) -> list:
        for entry in entries:
            for (rank, _), reply in entry.replies.items():
                self.reads[rank] = reply.version
        return entries


def ranks(entries) -> list[list[int]]:
    return [[rank for rank, _ in entry.members] for entry in entries]


def answer(entry, rank: int) -> Reply:
    """What an entry answers to a rank."""
    (found,) = [reply for (member, _), reply in entry.replies.items() if member == rank]
    return found


def test_sync_waits_for_all_and_sums_in_rank_order():
    workers = Workers("sync", 3)
    assert workers.push(2, count=3.0) == []
    assert workers.push(0, count=1.0) == []
    (entry,) = workers.push(1, count=2.0)
    assert entry.members == [(0, 0), (1, 0), (2, 0)]
    assert (entry.number, entry.count, entry.version, workers.clock.version) == (1, 6.0, 0, 1)
    assert workers.clock.computing == {0: 1, 1: 1, 2: 1}
    assert [reply.staleness for reply in entry.replies.values()] == [0, 0, 0]


def test_async_applies_at_once_and_counts_staleness():
    workers = Workers("async", 2)
    assert ranks(workers.push(0)) == [[0]]
    assert ranks(workers.push(0)) == [[0]]
    (entry,) = workers.push(1)
    assert (entry.version, answer(entry, 1).staleness, answer(entry, 1).version) == (2, 2, 3)


def test_ssp_holds_the_fast_worker_until_the_slow_one_arrives_and_averages_both():
    workers = Workers("ssp", 2, bound=1)
    assert ranks(workers.push(0, count=4.0)) == [[0]]  # v 0: nobody started before 0 + 1 - 1
    assert workers.push(0, count=4.0) == []  # v 1: rank 1 started at 0 < 1 + 1 - 1
    (entry,) = workers.push(1, count=2.0)
    assert entry.members == [(0, 1), (1, 0)]
    assert (entry.count, entry.version, workers.clock.version) == (6.0, 1, 2)
    assert (answer(entry, 0).staleness, answer(entry, 1).staleness) == (0, 1)
    assert workers.clock.computing == {0: 2, 1: 2}


def test_ssp_of_three_by_hand():
    workers = Workers("ssp", 3, bound=2)
    assert ranks(workers.push(0)) == [[0]]  # v 0 -> 1
    assert ranks(workers.push(0)) == [[0]]  # v 1 -> 2: ranks 1 and 2 started at 0, not before 1 + 1 - 2
    assert workers.push(0) == []  # v 2: ranks 1 and 2 started at 0, before 2 + 1 - 2
    assert workers.push(1) == []  # rank 2 still
    assert ranks(workers.push(2)) == [[0, 1, 2]]
    assert workers.clock.version == 3


def test_a_leaving_worker_releases_who_waits_for_it():
    workers = Workers("ssp", 2, bound=0)
    assert workers.push(0) == []
    assert ranks(workers.saw(workers.clock.leave(1))) == [[0]]
    assert ranks(workers.push(0)) == [[0]]


def test_what_a_leaving_worker_pushed_is_dropped():
    workers = Workers("sync", 3)
    assert workers.push(0) == []
    assert workers.clock.leave(0) == []
    assert workers.push(1) == []
    assert ranks(workers.push(2)) == [[1, 2]]


def test_slices_of_two_servers_may_arrive_interleaved():
    workers = Workers("async", 2, servers=2)
    first, second = workers.head(0), workers.head(1)
    assert workers.clock.arrive(1, 0, 0) == []
    assert workers.clock.arrive(0, 1, 0, second) == []
    assert ranks(workers.clock.arrive(1, 1, 0)) == [[1]]  # complete first, ordered first
    (entry,) = workers.clock.arrive(0, 0, 0, first)
    assert (entry.number, entry.members, answer(entry, 0).staleness) == (2, [(0, 0)], 1)
    assert (workers.clock.arrived, workers.clock.heads) == ({}, {})


def test_a_half_arrived_gradient_of_a_worker_that_leaves_is_dropped():
    workers = Workers("sync", 2, servers=2)
    head = workers.head(0)
    assert workers.clock.arrive(0, 0, 0, head) == []
    assert workers.clock.leave(0) == []
    assert (workers.clock.arrived, workers.clock.heads) == ({}, {})
    assert workers.clock.arrive(1, 0, 0) == []  # the other half comes late
    other = workers.head(1)
    assert workers.clock.arrive(1, 1, 0) == []
    assert ranks(workers.clock.arrive(0, 1, 0, other)) == [[1]]


@pytest.mark.parametrize(("mode", "bound"), [("async", None), ("ssp", 1), ("sync", None)])
def test_a_gradient_that_comes_after_its_worker_has_left_changes_nothing(mode, bound):
    workers = Workers(mode, 3, bound=bound)
    workers.clock.leave(2)
    assert workers.push(2, count=9.0, carried=np.ones(2)) == []
    assert (workers.clock.held, workers.clock.carried, sorted(workers.clock.computing)) == ([], {}, [0, 1])
    late = workers.head(2)
    for _ in range(3):  # nobody waits for it
        entries = workers.push(0) + workers.push(1)
        assert all(2 not in members for members in ranks(entries))
    before = workers.clock.version
    assert before >= 3
    assert ranks(workers.join(2)) == [[2]]
    assert workers.clock.arrive(0, 2, late.ticket, late) == []  # nor is it taken for one of who came in its place
    assert (workers.clock.held, workers.clock.version, workers.clock.computing[2]) == ([], before, before)
    entries = workers.push(0) + workers.push(1) + workers.push(2)
    assert any(2 in members for members in ranks(entries))


def test_a_pull_is_answered_in_the_order_of_the_updates():
    workers = Workers("ssp", 2, bound=0)
    workers.clock.leave(1)
    workers.push(0)
    (pull,) = workers.join(1)
    assert (pull.number, pull.dropped, answer(pull, 1).version, workers.clock.version) == (2, True, 1, 1)
    assert workers.push(0) == []  # from now on it is waited for again
    assert ranks(workers.push(1)) == [[0, 1]]


def test_an_evaluation_blocks_nobody_and_one_is_under_way_at_a_time():
    workers = Workers("ssp", 2, bound=0, evaluate={"every": 2})
    for _ in range(2):
        workers.push(0)
        (entry,) = workers.push(1)
    assert (answer(entry, 0).duties, answer(entry, 1).duties) == (("evaluate",), ())
    for version in (3, 4):  # rank 0 evaluates version 2: nobody waits for it, and version 4 must wait for that
        (entry,) = workers.push(1)
        assert (ranks([entry]), workers.clock.version, answer(entry, 1).duties) == ([[1]], version, ())
    assert workers.clock.judge(0, 2, {"eval/loss": 1.0}) == (None, [])
    (entry,) = workers.push(1)  # what was put off follows
    assert (workers.clock.version, answer(entry, 1).duties) == (5, ("evaluate",))
    (pull,) = workers.join(0)
    assert answer(pull, 0).version == 5
    (entry,) = workers.push(0)
    assert (ranks([entry]), answer(entry, 0).duties) == ([[0]], ())


def test_the_evaluation_of_a_worker_that_died_is_done_by_another():
    workers = Workers("async", 2, evaluate={"every": 10})
    for _ in range(10):
        (entry,) = workers.push(0)
    assert answer(entry, 0).duties == ("evaluate",)
    workers.clock.leave(0)
    (entry,) = workers.push(1)
    assert (workers.clock.version, answer(entry, 1).duties) == (11, ("evaluate",))


def test_the_budget_ends_the_run_and_later_gradients_change_nothing():
    workers = Workers("async", 2, steps=2)
    workers.push(0)
    (last,) = workers.push(0)
    assert answer(last, 0).finished == "steps"
    assert answer(last, 0).duties == ("evaluate", "checkpoint", "snapshot")
    (late,) = workers.push(1)
    assert (late.dropped, answer(late, 1).finished, answer(late, 1).version) == (True, "steps", 2)
    assert workers.clock.version == 2
    (pull,) = workers.join(1)
    assert answer(pull, 1).finished == "steps"


def test_a_goal_releases_who_waits():
    goal = {"metric": "eval/loss", "at_most": 0.5}
    workers = Workers("ssp", 3, bound=0, stop={"steps": 50, "goal": goal}, evaluate={"every": 1})
    for rank in range(3):
        workers.push(rank)
    assert workers.push(1) == []  # rank 2 is computing, rank 0 evaluates
    verdict, entries = workers.clock.judge(0, 1, {"eval/loss": 0.4})
    assert (verdict, ranks(entries), entries[0].dropped) == ("goal", [[1]], True)
    assert answer(entries[0], 1).finished == "goal"
    assert workers.clock.version == 1


@pytest.mark.parametrize(("vote", "reason"), [(0.0, None), (REQUESTED, "requested"), (TIMED_OUT, "seconds")])
def test_one_vote_ends_the_run_for_all(vote, reason):
    workers = Workers("sync", 2)
    workers.push(0)
    (entry,) = workers.push(1, vote=vote)
    assert [reply.finished for reply in entry.replies.values()] == [reason, reason]


def test_two_phases_make_one_version():
    workers = Workers("sync", 2, phases=2)
    workers.push(0, phase=0)
    (first,) = workers.push(1, phase=0)
    assert (first.last_phase, workers.clock.version, workers.clock.examples) == (False, 0, 0)
    workers.push(0, phase=1, count=2.0)
    (second,) = workers.push(1, phase=1, count=3.0)
    assert (second.last_phase, workers.clock.version, workers.clock.examples) == (True, 1, 5)


def test_tokens_divide_the_gradient_and_rows_use_up_the_budget():
    workers = Workers("sync", 2, stop={"examples": 8})
    for version, reason in ((1, None), (2, "examples")):
        workers.push(0, count=30.0, rows=2.0)
        (entry,) = workers.push(1, count=10.0, rows=2.0)
        assert (entry.count, entry.rows, workers.clock.examples) == (40.0, 4.0, 4 * version)
        assert answer(entry, 0).finished == reason


def test_phases_are_never_averaged_with_each_other():
    workers = Workers("ssp", 2, bound=0, phases=2)
    workers.clock.leave(1)
    workers.push(0, phase=0)
    workers.join(1)
    assert workers.push(0, phase=1) == []
    (entry,) = workers.push(1, phase=0)  # whoever is in the midst of a step ends it first
    assert (entry.phase, ranks([entry])) == (0, [[1]])
    (entry,) = workers.push(1, phase=1)  # from here on they are in step
    assert (entry.phase, ranks([entry])) == (1, [[0, 1]])


def test_buffers_are_averaged_by_the_examples_since_the_last_average():
    workers = Workers("async", 2, evaluate={"every": 4})
    vectors = {0: np.array([1.0, 0.0]), 1: np.array([4.0, 6.0])}
    for rank, count in ((0, 2.0), (1, 3.0), (1, 1.0), (1, 2.0)):
        (entry,) = workers.push(rank, count=count, carried=vectors[rank], integers={"n": np.array(rank)})
    reply = answer(entry, 1)
    np.testing.assert_allclose(reply.carried, [(1 * 2 + 4 * 6) / 8, (0 * 2 + 6 * 6) / 8], rtol=1e-15)
    assert reply.integers["n"] == 0


def as_read(dump: dict) -> dict:
    """As it would come back from a segment; the buffers' arrays are no part of the text."""
    carried = dump["carried"]
    return marshal.loads(marshal.dumps({key: value for key, value in dump.items() if key != "carried"})) | {
        "carried": copy.deepcopy(carried)
    }


def play(workers: Workers, choices: random.Random, moves: int, hand_over) -> list:
    """Random arrivals, deaths, joins and verdicts; `hand_over` may put another clock in the place of the one before."""
    seen, owed = [], {}
    for _ in range(moves):
        hand_over(workers)
        clock, rank = workers.clock, choices.randrange(len(workers.tickets))
        if choices.random() < 0.1:
            entries = clock.leave(rank)
            owed.pop(rank, None)
        elif rank in clock.evaluators:
            verdict, entries = clock.judge(rank, clock.version, {"eval/loss": choices.random()})
            seen.append(verdict)
        elif rank in owed:
            server = owed[rank].pop()
            head, ticket = workers.heads[rank], workers.heads[rank].ticket
            entries = clock.arrive(server, rank, ticket, copy.deepcopy(head) if server == 0 else None)
            if not owed[rank]:
                del owed[rank]
        else:
            joins = rank not in clock.joined
            values = {"phase": PULL} if joins else {"carried": np.array([choices.random()]), "integers": {}}
            workers.heads[rank] = workers.head(rank, count=float(choices.randint(1, 5)), **values)
            owed[rank] = choices.sample(range(3), 3)
            entries = []
        seen += [repr(entry) for entry in workers.saw(entries)]
    return seen


@pytest.mark.parametrize(("mode", "bound"), [("sync", None), ("async", None), ("ssp", 1)])
def test_a_clock_goes_on_from_another_ones_dump_at_any_moment(mode, bound, monkeypatch):
    monkeypatch.setattr(parameter_server, "time", SimpleNamespace(monotonic=lambda: 5.0))

    def move_on(workers: Workers) -> None:
        dump = as_read(workers.clock.dump())
        workers.clock = Clock(workers.clock.job, Agenda(workers.clock.job, updates_per_round=3), 1)
        workers.clock.restore(dump)

    for seed in range(30):
        runs = []
        for hand_over in (lambda workers: None, move_on):
            workers = Workers(mode, 3, bound=bound, servers=3, steps=40, evaluate={"every": 7})
            workers.heads = {}
            seen = play(workers, random.Random(seed), 250, hand_over)
            runs.append((seen, repr(workers.clock.dump())))
        assert runs[0] == runs[1]
        assert len(runs[0][0]) > 10
        fields = {name for name, value in vars(workers.clock).items() if name not in CONSTANT}
        assert fields <= workers.clock.dump().keys()  # whatever a clock comes to know must be handed over


CONSTANT = {"job", "agenda", "num_phases", "is_sync", "num_servers", "bound", "prefetch", "scales"}


def test_snapshots_of_fast_asynchronous_workers_are_left_out_but_not_checkpoints():
    spec = spec_of(workers=1, strategy={"name": "parameter_server", "mode": "async"}, steps=100,
                   checkpoint={"every": 35})  # fmt: skip
    job = job_of(spec)

    def due(seconds_ago: float) -> dict[int, tuple[str, ...]]:
        """Duties by version, where before each one the last snapshot is put so far back."""
        clock, found = Clock(job, Agenda(job, snapshot_every=10), 1), {}
        clock.begin([0])
        for ticket in range(70):
            clock.snapshot_at -= seconds_ago
            (entry,) = clock.arrive(0, 0, ticket, Head(0, ticket, 0, clock.version, 1.0, rows=1.0))
            if entry.replies[0, ticket].duties:
                found[clock.version] = entry.replies[0, ticket].duties
        return found

    snapshot, both = ("snapshot",), ("checkpoint", "snapshot")
    assert due(0.0) == {10: snapshot, 35: both, 70: both}
    assert due(60.0) == {10: snapshot, 20: snapshot, 30: snapshot, 35: both, 40: snapshot, 50: snapshot, 60: snapshot,
                         70: both}  # fmt: skip
