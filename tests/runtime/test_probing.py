"""Every node of a cluster is asked whether it sees the storage."""

from __future__ import annotations

from pathlib import Path

import pytest

from distml.errors import UsageError
from distml.runs.storage import FolderPlace
from distml.runtime import probing


def look_in(folder: Path):
    """A node that has another folder under the same name."""

    def look(storage: str, run: str, token: str, node: str) -> str | None:
        return probing.look(str(folder), run, token, node)

    return look


def test_nodes_that_see_the_folder(shared_ray, tmp_path):
    probing.check_nodes(str(tmp_path), None, tmp_path / "logs", 30.0)
    assert [path.name for path in tmp_path.iterdir()] == ["logs"]


def test_a_node_with_another_folder_under_that_name(shared_ray, tmp_path, monkeypatch):
    (tmp_path / "other").mkdir()
    real = probing.ray.remote

    def remote(**options):
        return lambda function: real(**options)(look_in(tmp_path / "other"))

    monkeypatch.setattr(probing.ray, "remote", remote)
    with pytest.raises(UsageError, match=r"is not seen by node [0-9.]+: on \S+ there is nothing of what the driver "
                       r"wrote; use a folder that all nodes mount, or s3:// or gs://"):  # fmt: skip
        probing.check_nodes(str(tmp_path / "mine"), None, tmp_path / "logs", 30.0)
    assert list((tmp_path / "other").iterdir()) == []  # a node makes no folder of its own


def test_what_a_node_writes_must_come_to_the_driver(tmp_path):
    place = FolderPlace(tmp_path / "run")
    place.write(probing.QUESTION, b"token")
    assert probing.look(str(tmp_path), "run", "token", "node") is None
    assert probing._missing(place, "node", "token") is None
    assert "does not see" in str(probing._missing(place, "elsewhere", "token"))
    assert "another run's file" in str(probing.look(str(tmp_path), "run", "other", "node"))


@pytest.mark.slow
def test_two_nodes_and_a_bucket(buckets, tmp_path):
    from ray.cluster_utils import Cluster

    import distml

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
        import ray

        ray.shutdown()
        cluster.shutdown()
