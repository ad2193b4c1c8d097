"""Jobs that are submitted to a cluster of three hosts with a token: what dies on the way costs no result."""

from __future__ import annotations

import re
import signal

import pytest
import torch
from own.on_hosts import (
    DIGITS,
    client,
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

pytestmark = pytest.mark.slow  # test_lost_node.py is not, and needs no root
SWEEP = {
    "distml": "v1",
    "kind": "sweep",
    "name": "sweep",
    "base": {
        "task": {"name": "classification", "data": "digits", "model": {"name": "mlp", "hidden": [8]}},
        "stop": {"steps": 20},
        "evaluate": {"every": 20},
        "log": {"to": []},
    },
    "space": {"optimizer.lr": {"loguniform": [1.0e-4, 1.0e-2]}},
    "trials": 3,
    "max_concurrent": 3,
    "objective": {"metric": "eval/loss", "mode": "min"},
}


def test_a_sweep_is_submitted_and_its_trials_run_on_the_nodes(cluster, tmp_path):
    process = submit(cluster, tmp_path, SWEEP)
    code, said = ended(process)
    assert code == 0, said
    found = result(cluster.runs / "sweep")
    assert (found["status"], found["error"]) == ("done", None)
    assert len(list((cluster.runs / "sweep").glob("trials/*/result.json"))) == 3, said


def test_a_run_outlives_its_client_and_a_node_and_comes_to_the_same_weights(cluster, tmp_path):
    spec = {**DIGITS, "name": "outlives", "stop": {"steps": 1000}}
    run = cluster.runs / "outlives"
    first = submit(cluster, tmp_path, spec)
    wait_for_step(run, 100, first)
    first.send_signal(signal.SIGKILL)
    assert ended(first)[0] == -signal.SIGKILL

    follower = client(cluster, tmp_path, "logs", "-f", "runs/outlives")
    wait_for_step(run, 400, follower)
    assert [len(workers_on(cluster, node)) for node in (0, 1, 2)] == [0, 1, 1]
    wait_until("a checkpoint", lambda: bool(CheckpointStore(run / "checkpoints", 2).steps()))
    committed, reached = CheckpointStore(run / "checkpoints", 2).steps()[-1], step_of(run)
    cluster.kill(1, silently=False)
    code, said = ended(follower)

    assert code == 0, said
    lost = re.search(r"rank \d was lost at step (\d+) \(.*\): all go on from step (\d+) \(restart 1 of 3\)", said)
    assert lost is not None, said  # the control: it was missed
    assert int(lost[1]) >= reached
    assert int(lost[2]) >= committed  # nothing is lost after the newest checkpoint
    assert (result(run)["status"], result(run)["step"]) == ("done", 1000)
    assert result(run)["metrics"]["runtime/restarts"] == 1
    assert torch.allclose(weights(run), undisturbed(tmp_path, spec), rtol=0, atol=1e-3)
    assert "::distml-result" not in said
