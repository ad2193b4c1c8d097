"""Shared memory: segments, waits, collectives, and that what is trained there is bitwise what is trained inline.

The workers are threads that map the segment each for itself (`hosted.py`); deaths of processes are in
tests/runtime/test_shared_memory_on_ray.py.
"""

from __future__ import annotations

import math
import os
import re
import stat
import subprocess
import sys
import threading
import time
from itertools import pairwise

import numpy as np
import pytest
import torch
from hosted import PATIENCE_S, advance, groups, together, trainers
from own.oracle import distance, oracle, spec_of, train

from distml.events import Report, Snapshot
from distml.exchange import segment as segments
from distml.exchange.channel import PeerLost
from distml.exchange.flat import to_numpy
from distml.exchange.segment import KeptStates, NoSharedMemory, Regions, Segment, kept_regions, read_kept
from distml.exchange.shared_memory import ABORT, BOARD_BYTES, Host, host_regions, is_finite, pack, unpack
from distml.strategies.in_place import pieces

SMALL = {"name": "small:Small", "args": {"dtype": "float32"}}
OPTIMIZERS = {
    "sgd": {"name": "sgd", "lr": 0.2, "weight_decay": 0.01},
    "sgd+momentum": {"name": "sgd", "lr": 0.1, "momentum": 0.9, "clip_norm": 0.3,
                     "groups": [{"match": "*.bias", "weight_decay": 0.0}]},
    "adam": {"name": "adam", "lr": 0.01, "clip_norm": 0.2},
    "adamw": {"name": "adamw", "lr": 0.01, "weight_decay": 0.1},
    "rmsprop": {"name": "rmsprop", "lr": 0.002, "momentum": 0.9, "clip_norm": 0.3},
}  # fmt: skip


def hosted(spec: dict, **keys):
    """Trainers that have trained to the end, and their events."""
    found = trainers(spec, **keys)
    return found, together([lambda t=t: advance(t) for t in found])


# ------------------------------------------------------------------------------------------------------------- equality
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(("workers", "strategy"), [(2, "all_reduce"), (3, "all_reduce"), (3, "parameter_server")])
def test_in_place_updates_are_bitwise_those_of_inline_workers(optimizer, workers, strategy):
    spec = spec_of(SMALL, workers=workers, strategy=strategy, optimizer=OPTIMIZERS[optimizer], batch_size=14)
    found, events = hosted(spec)
    inline = train(spec)
    assert all(torch.equal(t.strategy.flat.weights, inline.weights) for t in found)
    norms = [[e.values["grad_norm"] for e in rows if isinstance(e, Report)] for rows in events]
    assert norms[0] == [report.values["grad_norm"] for report in inline.reports if report.rank == 0]


def test_the_comparison_tells_a_wrong_sum(monkeypatch):
    """Control: a worker whose gradient is left out is seen."""
    spec = spec_of(SMALL, workers=2, strategy="all_reduce", batch_size=14)
    found = trainers(spec)
    for trainer in found:
        trainer.strategy.in_place.everyones[1] = torch.zeros_like(trainer.strategy.in_place.everyones[1])
    together([lambda t=t: advance(t) for t in found])
    assert not torch.equal(found[0].strategy.flat.weights, train(spec).weights)


@pytest.mark.parametrize("task", ["gan_1d:GAN", "bn:BN", "target:Target", "uneven:Uneven"])
def test_phases_buffers_targets_and_uneven_counts(task):
    spec = spec_of(task, workers=2, strategy="all_reduce")
    found, _ = hosted(spec)
    inline = train(spec)
    assert torch.equal(found[1].strategy.flat.weights, inline.weights)
    buffers = inline.strategies[0].carried.tensors
    assert all(torch.equal(tensor, buffers[name]) for name, tensor in found[1].strategy.carried.tensors.items())


@pytest.mark.parametrize("strategy", ["all_reduce", {"name": "parameter_server", "mode": "ssp", "max_staleness": 0}])
def test_a_phase_without_parameters_leaves_the_others_alone(strategy):
    """What travels with a phase (its count ...) has a place of its own, also when all its parameters are frozen."""
    spec = spec_of("gan_1d:GAN", workers=2, strategy=strategy, steps=12, init={"freeze": ["g.*"]})
    found, _ = hosted(spec)
    newest = max(found, key=lambda t: t.strategy.progress.version).strategy
    named = newest.flat.layout.names(to_numpy(newest.flat.weights))
    assert distance(named, train(spec).named) <= 1e-12


def test_micro_batches_accumulate():
    spec = spec_of(SMALL, workers=2, strategy="all_reduce", batch_size=14, micro_batch_size=3)
    assert torch.equal(hosted(spec)[0][0].strategy.flat.weights, train(spec).weights)


def test_more_workers_than_blocks():
    task = {"name": "small:Small", "args": {"hidden": 4}}
    spec = spec_of(task, workers=5, strategy="all_reduce", steps=8)
    assert torch.equal(hosted(spec)[0][4].strategy.flat.weights, train(spec).weights)


def test_asynchronous_with_one_worker_is_serial_sgd_bitwise():
    for block in OPTIMIZERS.values():
        optimizer = {key: value for key, value in block.items() if key != "clip_norm"}
        spec = spec_of(SMALL, workers=1, optimizer=optimizer, strategy={"name": "parameter_server", "mode": "async"})
        found, _ = hosted(spec)
        assert torch.equal(found[0].strategy.flat.weights, train(spec | {"strategy": "single"}).weights)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("workers", [2, 3])
def test_bounded_staleness_of_zero_is_synchronous(optimizer, workers):
    task = {"name": "small:Small", "args": {"dtype": "float64"}}
    strategy = {"name": "parameter_server", "mode": "ssp", "max_staleness": 0}
    block = OPTIMIZERS[optimizer]
    spec = spec_of(task, workers=workers, strategy=strategy, optimizer=block, steps=24)
    found, _ = hosted(spec)
    newest = max(found, key=lambda t: t.strategy.progress.version).strategy
    named = newest.flat.layout.names(to_numpy(newest.flat.weights))
    assert distance(named, oracle(spec, 24)) <= 1e-12


@pytest.mark.parametrize("bound", [1, 3])
def test_observed_staleness_keeps_the_bound(bound):
    strategy = {"name": "parameter_server", "mode": "ssp", "max_staleness": bound}
    spec = spec_of(SMALL, workers=4, strategy=strategy, steps=60)
    _, events = hosted(spec)
    seen = [e.values["staleness_max"] for rows in events for e in rows if isinstance(e, Report)]
    assert seen
    assert max(seen) <= bound


def test_asynchronous_workers_lose_no_update_and_count_every_example():
    """Every gradient is 1 per weight: the sum of all applied steps is exact whatever their order."""
    spec = spec_of("ones:Ones", workers=4, strategy={"name": "parameter_server", "mode": "async"}, steps=200,
                   optimizer={"name": "sgd", "lr": 1.0})  # fmt: skip
    found, _ = hosted(spec)
    newest = max(found, key=lambda t: t.strategy.progress.version).strategy
    assert newest.progress.version == 200
    assert newest.progress.examples == 200 * 3
    assert torch.equal(newest.flat.weights, torch.full_like(newest.flat.weights, -200.0))


# ---------------------------------------------------------------------------------------------------------- kept states
def test_a_kept_state_is_the_state_of_its_version():
    spec = spec_of(SMALL, workers=3, strategy="all_reduce", optimizer=OPTIMIZERS["adamw"], steps=20)
    found = trainers(spec, keeps=True, snapshot_every=10)
    events = together([lambda t=t: advance(t) for t in found])
    rows = [e for e in events[0] if isinstance(e, Snapshot)]
    assert [row.version for row in rows] == [10, 20]
    assert "weights" not in rows[0].shared
    kept = read_kept(found[1].strategy.group.host.segment, 10)
    short = train(spec | {"stop": {"steps": 10}, "checkpoint": {"every": 10}})
    shared = next(s for s in short.snapshots if s.shared is not None).shared
    assert np.array_equal(kept["weights"], shared["weights"])
    assert all(np.array_equal(kept[name], shared["moments"][name]) for name in ("exp_avg", "exp_avg_sq"))


def test_an_asynchronous_kept_state_is_whole():
    spec = spec_of("ones:Ones", workers=3, strategy={"name": "parameter_server", "mode": "async"}, steps=95,
                   optimizer={"name": "sgd", "lr": 1.0, "momentum": 0.5})  # fmt: skip
    found = trainers(spec, keeps=True, snapshot_every=10)
    events = together([lambda t=t: advance(t) for t in found])
    versions = [e.version for rows in events for e in rows if isinstance(e, Snapshot) and not e.checkpoint]
    newest = max(versions)
    kept = read_kept(found[0].strategy.channel.host.segment, newest)
    momentum, weight = 0.0, 0.0
    for _ in range(newest):
        momentum = 0.5 * momentum + 1.0
        weight -= momentum
    assert np.allclose(kept["weights"], weight, rtol=1e-6)
    assert np.unique(kept["weights"]).size == np.unique(kept["momentum"]).size == 1


def test_a_run_that_writes_every_version_loses_none():
    spec = spec_of("ones:Ones", workers=6, strategy={"name": "parameter_server", "mode": "async"}, steps=40,
                   optimizer={"name": "sgd", "lr": 1.0, "momentum": 0.5}, checkpoint={"every": 1})  # fmt: skip
    _, events = hosted(spec)
    rows = {e.version: e.shared for part in events for e in part if isinstance(e, Snapshot)}
    assert rows.keys() == set(range(1, 41))
    assert all(shared is not None for shared in rows.values())


def test_a_state_without_moments_starts_them_at_zero():
    """As a checkpoint of a strategy that kept its momentum elsewhere has it."""
    spec = spec_of("ones:Ones", workers=1, strategy={"name": "parameter_server", "mode": "async"}, steps=3,
                   optimizer={"name": "sgd", "lr": 1.0, "momentum": 0.5})  # fmt: skip
    found = trainers(spec)
    channel = found[0].strategy.channel
    channel.host.segment.tensor("moment-momentum").fill_(7.0)
    clock = {"version": 0, "examples": 0, "updates": 0, "agenda": {"evaluations": []}}
    weights = to_numpy(found[0].strategy.flat.weights).copy()
    channel.load({"weights": weights, "moments": {}, "clock": clock, "carried": {}})
    together([lambda: advance(found[0])])
    assert torch.allclose(found[0].strategy.flat.weights, torch.tensor(-(1.0 + 1.5 + 1.75)))


def test_what_becomes_a_checkpoint_waits_for_a_slow_worker():
    """Each worker that owes a checkpoint lets the others make 40 versions before it takes the state."""
    spec = spec_of("ones:Ones", workers=3, strategy={"name": "parameter_server", "mode": "async"}, steps=240,
                   optimizer={"name": "sgd", "lr": 1.0, "momentum": 0.5}, checkpoint={"every": 60})  # fmt: skip
    found = trainers(spec, keeps=True, snapshot_every=10)

    def newest() -> int:
        return max(t.strategy.progress.version for t in found)

    def linger(strategy) -> None:
        end = time.monotonic() + 5.0
        while newest() < min(strategy.progress.version + 40, 230) and time.monotonic() < end:
            time.sleep(0.001)

    for trainer in found:
        trainer.strategy.average_carried = lambda s=trainer.strategy: linger(s)
    events = together([lambda t=t: advance(t) for t in found])
    rows = {e.version: e.shared for part in events for e in part if isinstance(e, Snapshot) and e.checkpoint}
    assert {60, 120, 180, 240} <= rows.keys()
    for version, shared in rows.items():
        momentum, weight = 0.0, 0.0
        for _ in range(version):
            momentum = 0.5 * momentum + 1.0
            weight -= momentum
        assert shared is not None, version
        assert np.allclose(shared["moments"]["momentum"], momentum)
        assert np.allclose(shared["weights"], weight, rtol=1e-6)


def test_a_state_that_is_written_in_part_is_not_read():
    regions = Regions.build(kept_regions(8, "float32", ["m"], 2))
    segment = Segment.create(regions)
    writers = [KeptStates(segment, part) for part in range(2)]
    vectors = {"weights": torch.arange(8.0), "m": torch.ones(8)}
    for part, writer in enumerate(writers):
        writer.write(10, vectors, slice(4 * part, 4 * part + 4))
    assert np.array_equal(read_kept(segment, 10)["weights"], np.arange(8))
    writers[0].write(20, vectors, slice(0, 4))
    assert read_kept(segment, 20) is None
    assert read_kept(segment, 10) is not None
    writers[0].write(30, vectors, slice(0, 4))
    assert read_kept(segment, 10) is None, "half of it is overwritten"
    segment.close()


# --------------------------------------------------------------------------------------------------------- collectives
@pytest.mark.parametrize("size", [1, 2, 4])
def test_collectives_of_a_host(size):
    found = groups(list(range(size)), Regions.build(host_regions(size)), [list(range(size))])
    payloads = [bytes([rank]) * (BOARD_BYTES * rank + rank) for rank in range(size)]
    assert together([lambda g=g: g.all_gather(payloads[g.rank]) for g in found]) == [payloads] * size
    vectors = [torch.rand(BOARD_BYTES // 8 + 77, dtype=torch.float64) for _ in range(size)]
    total = sum(vectors[1:], vectors[0].clone())
    together([lambda g=g: g.all_reduce(vectors[g.rank]) for g in found])
    assert all(torch.equal(vector, total) for vector in vectors)


def test_long_vectors_are_summed_in_slices():
    size, count = 3, BOARD_BYTES
    rows = 4 * count
    regions = Regions.build([*host_regions(size), ("scratch", size * rows, "uint8")])
    found = groups(list(range(size)), regions, [list(range(size))])
    vectors = [torch.rand(count) for _ in range(size)]
    total = vectors[0] + vectors[1] + vectors[2]
    together([lambda g=g: g.all_reduce(vectors[g.rank]) for g in found])
    assert all(torch.equal(vector, total) for vector in vectors)
    assert found[0].bytes_sent == math.ceil(2 * 2 / 3 * 4 * count)


class Wire:
    """Leaders of hosts that are threads: what a process group between them does."""

    def __init__(self, size: int) -> None:
        self.barrier, self.rows, self.size, self.bytes_sent = threading.Barrier(size), {}, size, 0

    def of(self, rank: int):
        wire = Wire.__new__(Wire)
        wire.__dict__.update(self.__dict__)
        wire.rank = rank
        return wire

    def all_reduce(self, vector: torch.Tensor) -> None:
        self.rows[self.rank] = vector.clone()
        self.barrier.wait(PATIENCE_S)
        total = self.rows[0].clone()
        for rank in range(1, self.size):
            total += self.rows[rank]
        vector.copy_(total)
        self.bytes_sent += vector.numel() * vector.element_size()
        self.barrier.wait(PATIENCE_S)

    def all_gather(self, payload: bytes) -> list[bytes]:
        self.rows[self.rank] = payload
        self.barrier.wait(PATIENCE_S)
        found = [self.rows[rank] for rank in range(self.size)]
        self.barrier.wait(PATIENCE_S)
        return found


HOSTS = [[0, 2], [1, 3, 4]]


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_a_sum_inside_hosts_and_then_between_them_is_the_flat_sum(optimizer):
    wire = Wire(2)
    task = {"name": "small:Small", "args": {"dtype": "float64"}}
    spec = spec_of(task, workers=5, strategy="all_reduce", optimizer=OPTIMIZERS[optimizer], batch_size=15)
    found, _ = hosted(spec, hosts=HOSTS, wires={0: wire.of(0), 1: wire.of(1)})
    named = [t.strategy.flat.layout.names(to_numpy(t.strategy.flat.weights)) for t in found]
    assert all(distance(one, train(spec).named) <= 1e-12 for one in named)
    leader, other = found[0].strategy.group, found[2].strategy.group
    assert leader.bytes_sent > other.bytes_sent, "only leaders are on the wire"


def test_collectives_between_hosts_keep_the_order_of_ranks():
    wire = Wire(2)
    wires = {0: wire.of(0), 1: wire.of(1)}
    found = [g for ranks in HOSTS for g in groups(ranks, Regions.build(host_regions(len(ranks))), HOSTS, wires)]
    payloads = [b"%d" % rank * (rank + 1) for rank in range(5)]
    assert together([lambda g=g: g.all_gather(payloads[g.rank]) for g in found]) == [payloads] * 5
    vectors = [torch.tensor([float(rank), 1.0]) for rank in range(5)]
    together([lambda g=g: g.all_reduce(vectors[g.rank]) for g in found])
    assert all(vector.tolist() == [10.0, 5.0] for vector in vectors)


def test_packing():
    parts = [b"", b"abc", b"\0" * 9]
    assert unpack(pack(parts)) == parts


# -------------------------------------------------------------------------------------------------- segments and waits
def test_a_segment_has_no_name_is_private_and_goes_with_its_last_user():
    regions = Regions.build([("a", 10, "float32"), ("b", 3, "int64")])
    segment = Segment.create(regions)
    status = os.fstat(segment.descriptor)
    assert status.st_nlink == 0
    assert stat.S_IMODE(status.st_mode) == 0o600
    other = Segment.open(os.getpid(), segment.descriptor, regions)
    other.array("b")[1] = 7
    assert segment.array("b").tolist() == [0, 7, 0]
    assert segment.tensor("a").shape == (10,)
    assert not [name for name in os.listdir(segments.FOLDER) if name.startswith(f"distml-{os.getpid()}-")]
    segment.close()
    other.close()


def test_a_segment_that_does_not_fit_says_what_there_is(monkeypatch):
    monkeypatch.setattr(segments, "free_bytes", lambda: 3 * 2**20)
    with pytest.raises(NoSharedMemory, match=re.escape("/dev/shm has 3 MiB to give, 8 MiB are needed")):
        Segment.create(Regions.build([("a", 2**20, "float64")]))


def test_a_segment_of_a_process_that_is_gone_cannot_be_opened():
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    with pytest.raises(PeerLost, match=f"the segment of process {ended.pid} cannot be opened"):
        Segment.open(ended.pid, 5, Regions.build([("a", 1, "int64")]))


def test_a_waiting_worker_notices_a_peer_that_dies_and_tells_the_others():
    """The peer is a process that lives, and is killed while the others wait for it."""
    peer = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    regions = Regions.build(host_regions(3))
    first = Segment.create(regions)
    pids = [os.getpid(), os.getpid(), peer.pid]
    hosts = [Host(Segment.open(os.getpid(), first.descriptor, regions), [0, 1, 2], rank, pids, PATIENCE_S)
             for rank in range(2)]  # fmt: skip
    threading.Timer(0.2, peer.kill).start()
    messages = []
    for host in hosts:
        host.unwatch(2) if host is hosts[1] else None  # it must be told

    def wait(host: Host) -> None:
        try:
            host.barrier("nothing")
        except PeerLost as lost:
            messages.append(str(lost))

    together([lambda h=h: wait(h) for h in hosts])
    peer.wait()
    assert len(messages) == 2
    assert any("rank 0 waited for rank 2 (nothing): rank 2 has died" in message for message in messages)
    assert any("rank 1 waited for rank 2 (nothing): the group has broken up" in message for message in messages)


def test_waiting_sleeps():
    """A wait of 0.4 s costs almost no processor time; the control spins, and does."""
    regions = Regions.build(host_regions(2))
    first = Segment.create(regions)
    hosts = [Host(first, [0, 1], rank, [os.getpid()] * 2, PATIENCE_S) for rank in range(2)]

    def cpu_of(work) -> float:
        before = time.thread_time()
        work()
        return time.thread_time() - before

    threading.Timer(0.4, lambda: hosts[1].words.set(2, 1)).start()
    assert cpu_of(lambda: hosts[0].barrier("the other")) < 0.1

    def spin() -> None:
        end = time.monotonic() + 0.4
        while time.monotonic() < end and not hosts[0].words.get(ABORT):
            pass

    assert cpu_of(spin) > 0.1


def test_a_wait_ends_at_its_limit():
    regions = Regions.build(host_regions(2))
    host = Host(Segment.create(regions), [0, 1], 0, [os.getpid()] * 2, timeout_s=0.2)
    with pytest.raises(PeerLost, match=re.escape("rank 0 waited for rank 1 (the other): nothing for 0.2 s")):
        host.barrier("the other")


def test_counters_may_pass_32_bits():
    regions = Regions.build(host_regions(2))
    first = Segment.create(regions)
    hosts = [Host(first, [0, 1], rank, [os.getpid()] * 2, PATIENCE_S) for rank in range(2)]
    for host in hosts:
        host.sequence = 2**32 - 2
        host.words.set(1 + host.index, host.sequence)
    together([lambda h=h: [h.barrier("the other") for _ in range(5)] for h in hosts])
    assert hosts[0].words.get(1) == 3


def test_finite():
    assert is_finite(torch.ones(5)) and is_finite(torch.zeros(0))  # noqa: PT018
    assert not is_finite(torch.tensor([1.0, float("nan"), 2.0]))
    assert not is_finite(torch.tensor([1.0, -float("inf")]))


def test_pieces_are_runs_of_whole_blocks_that_cover_a_shard():
    layout = trainers(spec_of(SMALL, workers=1, strategy="all_reduce", resources={"workers": 1}))[
        0
    ].strategy.flat.layout
    starts = {start for start, _ in layout.blocks}
    for count in (1, 2, 3):
        runs = [run for index in range(count) for run in pieces(layout, index, count)]
        assert runs[0][0] == 0
        assert runs[-1][1] == layout.numel
        assert all(a[1] == b[0] for a, b in pairwise(runs))
        assert {start for start, _ in runs} <= starts
