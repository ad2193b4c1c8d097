"""What the manifest covers and the seal tells: a checkpoint of RLlib's is opened only where this run wrote it."""

from __future__ import annotations

import os
import shutil

import pytest

from distml.adapters.rllib_seal import KEY_FILE, SEAL_FILE, make_key, opened, seal
from distml.errors import UsageError
from distml.runs.checkpoints import Checkpoint, CheckpointDamaged, CheckpointStore, folder_name


@pytest.fixture
def run(tmp_path):
    """A run directory with two sealed checkpoints."""
    path = tmp_path / "run"
    path.mkdir()
    make_key(path)
    store = CheckpointStore(path / "checkpoints", keep=2)
    for step in (1, 2):

        def write(folder, step=step):
            (folder / "rllib" / "learner").mkdir(parents=True)
            (folder / "rllib" / "learner" / "state.pkl").write_bytes(b"weights %d" % step)
            (folder / "rllib" / "x.safetensors").write_bytes(b"not ours to read")
            seal(path, folder, step)

        store.write(Checkpoint(step, state={"step": step}, more=write))
    return path


def refused(path, step=2):
    with pytest.raises(UsageError, match="was not written here by this run") as caught:
        opened(path, step)
    return "\n" not in str(caught.value)


def test_what_was_written_here_is_opened_also_after_a_rename(run):
    assert (opened(run, 2) / "learner" / "state.pkl").read_bytes() == b"weights 2"
    moved = run.rename(run.with_name("elsewhere"))
    assert opened(moved, 1).is_dir()
    assert (moved / KEY_FILE).stat().st_mode & 0o777 == 0o600
    make_key(moved)  # a run that goes on keeps its key
    assert opened(moved, 1).is_dir()


def test_a_copy_is_refused_whatever_it_keeps(run):
    copy = run.with_name("copy")
    shutil.copytree(run, copy)  # with times and modes, as cp -a and tar do
    assert (copy / KEY_FILE).read_text() == (run / KEY_FILE).read_text()
    assert refused(copy)
    assert opened(run, 2)


@pytest.mark.parametrize(
    "what", ["changed", "added", "removed", "renamed", "other step", "no seal", "no key", "opened"]
)
def test_what_was_touched_is_refused(what, run):
    folder = run / "checkpoints" / folder_name(2)
    state = folder / "rllib" / "learner" / "state.pkl"
    if what == "changed":
        state.write_bytes(b"weights 3")
    elif what == "added":
        (folder / "rllib" / "more.pkl").write_bytes(b"")
    elif what == "removed":
        state.unlink()
    elif what == "renamed":
        state.rename(state.with_name("other.pkl"))
    elif what == "other step":
        shutil.rmtree(folder)
        shutil.copytree(run / "checkpoints" / folder_name(1), folder)
    elif what == "no seal":
        (folder / SEAL_FILE).write_text("{}")
    elif what == "no key":
        (run / KEY_FILE).unlink()
    else:
        os.chmod(run / KEY_FILE, 0o644)
    assert refused(run)


def test_what_another_user_sealed_is_refused(run, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    assert refused(run)


def test_the_manifest_covers_folders_of_others(run):
    store = CheckpointStore(run / "checkpoints", keep=2)
    assert store.load(2).state == {"step": 2}
    assert store.load(2).tensors == {}
    state = run / "checkpoints" / folder_name(2) / "rllib" / "learner" / "state.pkl"
    state.write_bytes(b"weights 9")
    with pytest.raises(CheckpointDamaged, match=r"rllib/learner/state.pkl: hash differs"):
        store.load(2)
    state.with_name("more.pkl").write_bytes(b"")
    with pytest.raises(CheckpointDamaged, match=r"rllib/learner/more.pkl: not in the manifest"):
        store.load(2)
    lines: list[str] = []
    found = store.newest_good(lines.append)
    assert found is not None
    assert found.step == 1
    assert len(lines) == 1
