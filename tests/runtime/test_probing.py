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


def elsewhere(monkeypatch, folder: Path) -> None:
    """Every node looks into another folder."""
    folder.mkdir()
    real = probing.ray.remote
    monkeypatch.setattr(probing.ray, "remote", lambda **options: lambda function: real(**options)(look_in(folder)))


def test_nodes_that_see_the_folder(shared_ray, tmp_path):
    probing.check_nodes(str(tmp_path), None, tmp_path / "logs", 30.0)
    assert [path.name for path in tmp_path.iterdir()] == ["logs"]


def test_a_node_with_another_folder_under_that_name(shared_ray, tmp_path, monkeypatch):
    elsewhere(monkeypatch, tmp_path / "other")
    with pytest.raises(UsageError, match=r"is not seen by node [0-9.]+: on \S+ there is nothing of what the driver "
                       r"wrote; use a folder that all nodes mount, or s3:// or gs://"):  # fmt: skip
        probing.check_nodes(str(tmp_path / "mine"), None, tmp_path / "logs", 30.0)
    assert list((tmp_path / "other").iterdir()) == []  # a node makes no folder of its own


def test_a_run_directory_that_trials_write_into(shared_ray, tmp_path, monkeypatch):
    root, logs = tmp_path / "run", tmp_path / "logs"
    root.mkdir()
    real = probing.ray.nodes
    with monkeypatch.context() as patch:
        elsewhere(patch, tmp_path / "other")
        probing.check_directory(root, None, logs, 30.0)  # one node is the driver's own
        patch.setattr(probing.ray, "nodes", lambda: 2 * real())
        said = (
            r"run directory \S+/run is not seen by node [0-9.]+: .*; trials of a sweep write into it from their nodes"
        )
        with pytest.raises(UsageError, match=said):
            probing.check_directory(root, None, logs, 30.0)
    monkeypatch.setattr(probing.ray, "nodes", lambda: 2 * real())
    probing.check_directory(root, None, logs, 30.0)
    assert list(root.iterdir()) == []


def test_a_storage_that_fails_to_tidy_up_hides_no_answer(shared_ray, tmp_path, monkeypatch):
    def remove(self, name):
        raise OSError("busy")

    monkeypatch.setattr(FolderPlace, "remove", remove)
    probing.check_nodes(str(tmp_path), None, tmp_path / "logs", 30.0)
    elsewhere(monkeypatch, tmp_path / "other")
    with pytest.raises(UsageError, match="is not seen by node"):
        probing.check_nodes(str(tmp_path / "mine"), None, tmp_path / "logs", 30.0)


def test_what_a_node_writes_must_come_to_the_driver(tmp_path):
    place = FolderPlace(tmp_path / "run")
    place.write(probing.QUESTION, b"token")
    assert probing.look(str(tmp_path), "run", "token", "node") is None
    assert probing._missing(place, "node", "token") is None
    assert "does not see" in str(probing._missing(place, "elsewhere", "token"))
    assert "another run's file" in str(probing.look(str(tmp_path), "run", "other", "node"))
