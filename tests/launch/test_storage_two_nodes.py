"""A run over two nodes of a cluster, each of which is asked about the bucket."""

from __future__ import annotations

import pytest
import ray

import distml


@pytest.mark.slow
def test_two_nodes_and_a_bucket(buckets, tmp_path):
    from ray.cluster_utils import Cluster

    if ray.is_initialized():
        pytest.skip("another Ray of this process has its nodes without the bucket's credentials")
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        cluster.add_node(num_cpus=1)
        bucket = buckets.new_bucket()
        spec = {"distml": "v1", "name": "two", "task": "classification", "stop": {"steps": 4},
                "resources": {"workers": 2, "placement": "spread"}, "log": {"to": []},
                "storage": buckets.url(bucket)}  # fmt: skip
        result = distml.run(spec, out=tmp_path / "run", address=cluster.address)
        assert result.status == "done"
        asked = [path for method, path in buckets.requests if ".distml-probe" in path and method == "PUT"]
        assert len({path.rpartition("/")[2] for path in asked}) == 3  # the driver and two nodes
        assert any(name.endswith("step-00000004/manifest.json") for name in buckets.objects(bucket))
    finally:
        ray.shutdown()
        cluster.shutdown()
