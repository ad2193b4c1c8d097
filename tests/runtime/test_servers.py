"""Parameter servers as processes: where they stand, what they send, and what the dead leave behind."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from own.oracle import job_of, spec_of

import distml
from distml.exchange.channel import PULL, Head
from distml.exchange.layout import Layout
from distml.runs.checkpoints import CheckpointStore
from distml.runtime.actors import INLINE_BYTES
from distml.runtime.planning import server_nodes
from distml.strategies.agenda import Agenda
from distml.strategies.parameter_server import Clock
from distml.strategies.shard import Shard

OWN = Path(__file__).parents[1] / "own"


@pytest.fixture(autouse=True)
def _beside_the_tasks(monkeypatch) -> None:
    monkeypatch.chdir(OWN)


ALIVE = {"a": True, "b": True, "c": True, "head": False}


SERVED = {"name": "parameter_server", "servers": 2}
SPEC = {
    "distml": "v1",
    "name": "servers",
    "task": {"name": "small:Small", "args": {"hidden": 8192}},
    "strategy": SERVED,
    "optimizer": {"name": "sgd", "lr": 0.05, "momentum": 0.9},
    "batch_size": 12,
    "stop": {"steps": 40},
    "evaluate": {"every": 1000},
    "checkpoint": {"every": 1000},
    "log": {"every": 10, "to": []},
    "resources": {"workers": 2},
    "transport": "object_store",
    "limits": {"heartbeat_s": 0.5, "lost_after_s": 5.0, "start_s": 60.0},
}


# ------------------------------------------------------------------------------------------------------------ placement
@pytest.mark.parametrize(
    ("placement", "workers", "expected"),
    [
        ("spread", ["b", "a"], ["b", "a", "c", "b", "a"]),
        ("spread", ["c", "c"], ["c", "a", "b", "c", "a"]),
        ("colocated", ["b", "b", "a"], ["b", "a", "b", "a", "b"]),
        ("colocated", ["dead", "c"], ["c"] * 5),
        ("colocated", ["dead"], ["a", "b", "c", "a", "b"]),
    ],
)
def test_servers_stand_on_nodes_in_turn(placement, workers, expected):
    assert server_nodes(placement, ALIVE, workers, 5) == expected


def test_a_cluster_of_one_node_without_cpus_still_has_a_place():
    assert server_nodes("spread", {"head": False}, ["gone"], 2) == ["head", "head"]


TWO_NODES = """
import json, sys
from distml.runtime.authentication import prepare_authentication
prepare_authentication(None)
import ray
from ray.cluster_utils import Cluster
from distml.runtime.ray import RayRuntime
import distml

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
cluster.add_node(num_cpus=1)
cluster.wait_for_nodes()
ray.init(address=cluster.address, log_to_driver=False)
places = {}
load = RayRuntime._load_servers
def noting(self, cut):
    load(self, cut)
    places.update({role: node for role, (node, _) in self.places.items()})
RayRuntime._load_servers = noting
found = {}
for placement, where in (("spread", "strict_pack"), ("colocated", "strict_pack"), ("colocated", "strict_spread")):
    job = json.loads(sys.argv[1])
    job["strategy"]["server_placement"], job["resources"]["placement"] = placement, where
    result = distml.run(job, out=f"{sys.argv[2]}/{placement}-{where}", runtime="ray")
    found[f"{placement}-{where}"] = result.status, dict(places)
print("FOUND", json.dumps(found))
ray.shutdown()
cluster.shutdown()
"""


@pytest.mark.slow
def test_on_two_nodes_servers_are_spread_or_stand_with_the_workers(tmp_path):
    resources = {"workers": 1}
    job = {**SPEC, "strategy": {**SERVED, "servers": 2}, "resources": resources, "stop": {"steps": 4}}
    command = [sys.executable, "-c", TWO_NODES, json.dumps(job), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=150, check=False)
    assert "FOUND" in done.stdout, done.stdout + done.stderr
    found = json.loads(done.stdout.split("FOUND")[1])
    assert {status for status, _ in found.values()} == {"done"}
    nodes = {name: places for name, (_, places) in found.items()}
    assert len({nodes["spread-strict_pack"][f"server {index}"] for index in (0, 1)}) == 2
    alone = nodes["colocated-strict_pack"]
    assert {alone["server 0"], alone["server 1"]} == {alone["rank 0"]}


# ------------------------------------------------------------------------------------------------------------- messages
def run(out: Path, runtime: str = "ray", inject=(), **keys) -> tuple[dict[str, np.ndarray], distml.Result]:
    """The weights at the end, under their names."""
    result = distml.run({**SPEC, **keys}, out=out, runtime=runtime, inject=inject)
    return CheckpointStore(out / "checkpoints", 1).load(result.step).tensors["model"], result


def same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


def test_large_shards_travel_by_reference_and_bring_the_same_numbers(shared_ray, tmp_path):
    fast, _ = run(tmp_path / "ray")
    plain, _ = run(tmp_path / "inline", "inline")
    assert same(fast, plain)
    half = sum(array.nbytes for array in plain.values()) / 2
    assert half > 2 * INLINE_BYTES  # else the answers would have held the weights themselves


def test_two_phases_are_answered_with_their_own_slices(shared_ray, tmp_path):
    task = {"name": "gan_1d:GAN"}
    one, served = run(tmp_path / "ray", task=task)
    other, plain = run(tmp_path / "inline", "inline", task=task)
    assert same(one, other)
    size = sum(array.nbytes for array in one.values())
    for result in (served, plain):  # of each worker: every weight once in each direction
        assert result.metrics["comm/bytes_per_step"] == pytest.approx(2 * 2 * size)


def test_prefetch_of_one_worker_is_the_same_on_ray(shared_ray, tmp_path):
    ahead = {"strategy": {**SERVED, "mode": "async", "prefetch": True}, "resources": {"workers": 1}}
    fast, result = run(tmp_path / "ray", **ahead)
    assert same(fast, run(tmp_path / "inline", "inline", **ahead)[0])
    assert (result.metrics["staleness/max"], result.metrics["staleness/p50"]) == (1, 1)


@pytest.mark.parametrize(
    "injection", [pytest.param("kill:rank=1,step=30", marks=pytest.mark.slow), "kill:server=1,step=30"]
)
def test_a_death_while_an_answer_is_under_way_hangs_nobody(injection, shared_ray, tmp_path):
    strategy = {**SERVED, "mode": "ssp", "max_staleness": 2, "prefetch": True}
    _, result = run(tmp_path / "run", strategy=strategy, inject=[injection], evaluate={"every": 40},
                    stop={"steps": 120}, checkpoint={"every": 40})  # fmt: skip
    assert (result.status, result.step, result.metrics["runtime/restarts"]) == ("done", 120, 1)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert max(line.get("staleness/max", 0) for line in lines) <= 2
    assert [line["step"] for line in lines if "eval/loss" in line][-1] == 120


# ---------------------------------------------------------------------------------------------- half-sent gradients
def test_a_gradient_that_was_sent_by_half_is_dropped_by_all_shards():
    job = job_of(spec_of(workers=2, strategy={**SERVED, "mode": "async"}))
    layout = Layout.build([("weight", (512,), 0, 0)])
    clock = Clock(job, Agenda(job, updates_per_round=2), 1)
    shards = [Shard(job, layout, layout.shard(index, 2), None) for index in range(2)]
    for shard in shards:
        shard.load(torch.zeros(512), {}, 0)
    clock.begin([0, 1])
    shards[1].hold(0, 3, torch.ones(256))  # rank 0 dies before server 0 gets its half
    assert clock.arrive(1, 0, 3) == []
    assert clock.leave(0) == []
    late = Head(0, 10, PULL, 0, 0.0)
    assert clock.arrive(0, 0, 10, late) == []
    (pull,) = clock.arrive(1, 0, 10)
    assert [shard.reduce(pull) for shard in shards] == [[], []]
    shards[1].hold(0, 4, torch.ones(256))  # what was still under way when another joined in its place
    assert clock.arrive(1, 0, 4) == []
    assert [shard.gradients for shard in shards] == [{}, {}]
    assert (clock.arrived, clock.heads, clock.held) == ({}, {}, [])
    shards[1].hold(0, 11, torch.ones(256))
    assert list(shards[1].gradients) == [(0, 11)]
