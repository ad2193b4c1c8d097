"""Whether ranks see the driver's folder: they do, they see another one, or one that they cannot write to."""

from __future__ import annotations

import pytest

from distml.runs import probe as module
from distml.runs.probe import Probe, answer


def test_ranks_that_see_the_folder_leave_nothing_in_it(tmp_path):
    with Probe(tmp_path / "run" / "checkpoints") as probe:
        assert "is not on the driver's host" in probe.missing(0), "the control: nobody has answered"
        for rank in range(2):
            assert answer(probe.folder, probe.token, rank) is None
            assert probe.missing(rank) is None
        assert probe.missing(2) is not None
    assert list(probe.folder.iterdir()) == []


def test_a_host_with_a_folder_of_its_own_is_found(tmp_path):
    """Where there is no such folder, and where there is one of the same name."""
    with Probe(tmp_path / "shared") as probe:
        assert answer(tmp_path / "own", probe.token, 0) == "No such file or directory"
        assert not (tmp_path / "own").exists(), "a rank makes none: it would hide the mistake"
        (tmp_path / "own").mkdir()
        assert answer(tmp_path / "own", probe.token, 0) == "No such file or directory"
        (tmp_path / "own" / f".probe-{probe.token}").write_text("something else")
        assert "is not the driver's" in answer(tmp_path / "own", probe.token, 0)
        (tmp_path / "own" / f".probe-{probe.token}").write_text(probe.token)
        assert answer(tmp_path / "own", probe.token, 0) is None
        assert "is not on the driver's host" in probe.missing(0), "what it wrote went elsewhere"


def test_a_folder_that_only_the_driver_can_write_to_is_found(tmp_path, monkeypatch: pytest.MonkeyPatch):
    def refuse(path, data):
        raise OSError(30, "Read-only file system")

    with Probe(tmp_path) as probe:
        monkeypatch.setattr(module, "write_atomically", refuse)
        assert answer(tmp_path, probe.token, 0) == "Read-only file system"
