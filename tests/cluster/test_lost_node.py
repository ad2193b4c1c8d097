"""A node of a cluster in one network that dies under a run; needs no root."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import yaml
from own.on_hosts import DIGITS, ended, result, undisturbed, wait_for_step, weights

from distml.runtime.authentication import prepare_authentication


@pytest.fixture
def two_nodes() -> Iterator[Any]:
    """A head with room for two workers, and a node with room for one; on the loopback interface, with a token."""
    prepare_authentication(None)
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 2, "include_dashboard": False, "object_store_memory": 100 * 2**20}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        cluster.add_node(num_cpus=1, object_store_memory=100 * 2**20)
        yield cluster
    finally:
        cluster.shutdown()


def test_the_loss_of_a_node_is_one_restart_and_costs_no_result(two_nodes, tmp_path):
    spec = {**DIGITS, "stop": {"steps": 800}}
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(spec))
    run = tmp_path / "run"
    command = [sys.executable, "-m", "distml", "run", str(tmp_path / "spec.yaml"), "--out", str(run),
               "--address", two_nodes.address]  # fmt: skip
    process = subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    wait_for_step(run, 100, process)
    two_nodes.remove_node(next(iter(two_nodes.worker_nodes)), allow_graceful=False)
    code, said = ended(process)
    assert code == 0, said
    assert "all go on from step" in said  # the control: it was missed
    assert "one worker on each of 2 hosts" in said
    assert result(run)["metrics"]["runtime/restarts"] == 1, said
    assert (result(run)["status"], result(run)["step"]) == ("done", 800)
    assert torch.allclose(weights(run), undisturbed(tmp_path, spec), rtol=0, atol=1e-3)
