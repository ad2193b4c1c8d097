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
