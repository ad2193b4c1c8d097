"""Every kind of job through a real submit to three hosts; links are cut, nodes, drivers and clients die on the way."""

from __future__ import annotations

import os
import re
import signal
import threading
from typing import Any

import pytest
import torch
from own.on_hosts import (
    DIGITS,
    drivers,
    ended,
    result,
    step_of,
    submit,
    undisturbed,
    wait_for_step,
    wait_until,
    weights,
    workers_on,
)

from distml.runs.checkpoints import CheckpointStore

pytestmark = pytest.mark.slow
SMALL_BASE = {
    "task": {"name": "classification", "data": "digits", "model": {"name": "mlp", "hidden": [8]}},
    "stop": {"steps": 40},
    "log": {"to": []},
}
ASYNC = {"name": "parameter_server", "mode": "async", "servers": 2}
JOBS: dict[str, dict[str, Any]] = {
    "all-reduce": DIGITS,
    "ps-async": {**DIGITS, "strategy": ASYNC},
    "a3c": {
        "distml": "v1",
        "task": {"name": "actor_critic", "environment": "CartPole-v1", "envs_per_worker": 4, "n_steps": 16},
        "strategy": ASYNC,
        "stop": {"frames": 8000},
        "log": {"to": []},
        "resources": {"workers": 2, "placement": "spread"},
    },
    "gpt-zero2": {
        "distml": "v1",
        "task": {
            "name": "language_model",
            "data": {"path": "stdlib", "validation": 0.02, "test": 0.02},
            "tokenizer": {"name": "bytes"},
            "block": 32,
            "model": {"name": "gpt", "layers": 1, "heads": 2, "width": 32},
        },
        "strategy": {"name": "zero", "stage": 2},
        "batch_size": 8,
        "stop": {"steps": 40},
        "checkpoint": {"every": 20},
        "evaluate": {"every": 40},
        "log": {"to": []},
        "resources": {"workers": 2, "placement": "spread"},
    },
    "pbt": {
        "distml": "v1",
        "kind": "population",
        "base": SMALL_BASE,
        "members": 2,
        "every": 20,
        "space": {"optimizer.lr": {"loguniform": [1.0e-4, 1.0e-1]}},
        "objective": {"metric": "eval/loss", "mode": "min"},
    },
    "nas": {
        "distml": "v1",
        "kind": "nas",
        "base": {
            **SMALL_BASE,
            "task": {**SMALL_BASE["task"], "model": {"name": "nasnet", "repeats": 1, "filters": 2}},
            "stop": {"steps": 5},
            "evaluate": {"every": 5},
        },
        "space": {"name": "nasnet", "blocks": 1, "operations": ["identity", "max_3x3"]},
        "controller": {"name": "random"},
        "reward": {"metric": "eval/accuracy"},
        "trials": 3,
    },
}


@pytest.fixture
def whole(cluster):
    """The cluster with two nodes for workers, the later ones of which live; their numbers."""
    alive = [number for number in range(1, len(cluster.nodes)) if cluster.pids(number)]
    if len(alive) < 2:
        alive += cluster.add(2 - len(alive))
    return cluster, alive


@pytest.mark.parametrize("name", JOBS)
def test_every_kind_of_job_is_submitted_and_done(whole, tmp_path, name):
    cluster, _ = whole
    code, said = ended(submit(cluster, tmp_path, {**JOBS[name], "name": name}))
    assert code == 0, said
    assert result(cluster.runs / name)["error"] is None


@pytest.mark.parametrize("strategy", ["all_reduce", ASYNC])
def test_a_node_without_power_is_missed_and_costs_no_result(whole, tmp_path, strategy):
    """All limits are the defaults: 30 s until the run misses it, and until Ray does."""
    cluster, alive = whole
    name = f"power-{strategy if isinstance(strategy, str) else strategy['mode']}"
    spec = {**DIGITS, "name": name, "strategy": strategy, "stop": {"steps": 6000}}
    run = cluster.runs / name
    process = submit(cluster, tmp_path, spec)
    wait_for_step(run, 200, process)
    assert [len(workers_on(cluster, node)) for node in alive] == [1, 1]
    cluster.kill(alive[0])
    code, said = ended(process, 240.0)
    assert code == 0, said
    assert " was lost at step " in said
    assert result(run)["metrics"]["runtime/restarts"] == 1, said
    assert result(run)["status"] == "done"
    if strategy == "all_reduce":
        assert torch.allclose(weights(run), undisturbed(tmp_path, spec), rtol=0, atol=1e-3)


@pytest.mark.parametrize("strategy", ["all_reduce", ASYNC])
def test_a_link_that_is_cut_for_20_s_costs_no_restart(whole, tmp_path, strategy):
    cluster, alive = whole
    name = f"cut-{strategy if isinstance(strategy, str) else strategy['mode']}"
    spec = {**DIGITS, "name": name, "strategy": strategy, "stop": {"seconds": 60}}
    run = cluster.runs / name
    process = submit(cluster, tmp_path, spec)
    wait_for_step(run, 200, process)
    cut = threading.Thread(target=cluster.cut, args=(alive[0], 20.0))
    cut.start()
    cut.join(5.0)
    still = step_of(run)
    cut.join(60.0)
    if strategy == "all_reduce":  # the control: it was cut; asynchronous workers do not wait for each other
        assert step_of(run) <= still + 20
    wait_until("it trains again", lambda: step_of(run) > still + 100, 60.0)
    code, said = ended(process, 150.0)
    assert code == 0, said
    assert "was lost" not in said
    assert "runtime/restarts" not in result(run)["metrics"]


def test_a_killed_driver_is_named_and_the_same_command_goes_on(whole, tmp_path):
    cluster, _ = whole
    spec = {**DIGITS, "name": "driver", "stop": {"steps": 2000}}
    run = cluster.runs / "driver"
    process = submit(cluster, tmp_path, spec)
    wait_for_step(run, 300, process)
    committed = CheckpointStore(run / "checkpoints", 2).steps()
    [driver] = drivers(cluster, "driver")
    os.kill(driver, signal.SIGKILL)
    code, said = ended(process)
    assert code == 3, said
    assert committed

    code, said = ended(submit(cluster, tmp_path, spec))
    assert code == 0, said
    resumed = re.search(r"resuming from step (\d+)", said)
    assert resumed is not None, said
    assert int(resumed[1]) >= committed[-1]
    assert (result(run)["status"], result(run)["step"]) == ("done", 2000)
    assert torch.allclose(weights(run), undisturbed(tmp_path, spec), rtol=0, atol=1e-3)


def test_a_run_that_cannot_be_placed_again_fails_with_its_cause(whole, tmp_path):
    """One worker a node, and a node less: exit 3 after `limits.start_s`."""
    cluster, alive = whole
    placed = {"workers": 2, "placement": "strict_spread"}
    spec = {**DIGITS, "name": "no-place", "resources": placed, "limits": {"start_s": 25.0}, "stop": {"steps": 100000}}
    process = submit(cluster, tmp_path, spec)
    wait_for_step(cluster.runs / "no-place", 200, process)
    cluster.kill(alive[0], silently=False)
    code, said = ended(process)
    assert code == 3, said
    [line] = [line for line in said.splitlines() if line.startswith("error: ")]
    assert re.match(r"error: rank \d, .*not recovered", line), line
    assert CheckpointStore(cluster.runs / "no-place" / "checkpoints", 2).steps()
