"""What a copy of a run directory holds at every moment, and what is fetched from it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from own.bucket import files_of

from distml.errors import UsageError
from distml.runs import holder as holders
from distml.runs import mirror as mirrors
from distml.runs.checkpoints import Checkpoint, CheckpointStore, verify
from distml.runs.holder import Holder
from distml.runs.mirror import Mark, Mirror
from distml.runs.storage import FolderPlace
from distml.runs.stored import fetch, opened


class Failing(FolderPlace):
    """Fails at the first write of a name with this end, and after it, as a driver that is killed there."""

    end = ""
    is_dead = False

    def _check(self, name: str) -> None:
        self.is_dead = self.is_dead or bool(self.end and name.endswith(self.end))
        if self.is_dead:
            raise OSError("killed")

    def write(self, name, data):
        self._check(name)
        super().write(name, data)

    def upload(self, name, source, watch):
        self._check(name)
        super().upload(name, source, watch)

    def remove(self, name):
        self._check(name)
        super().remove(name)


def save(root: Path, step: int, *, keep: int = 1, at: str = "checkpoints") -> None:
    """A checkpoint, and small files that speak of it."""
    store = CheckpointStore(root / at, keep)
    store.write(Checkpoint(step, {"model": {"w": np.full(64, step, np.float32)}}, {"step": step}))
    (root / "spec.yaml").write_text("distml: v1\n")
    (root / "result.json").write_text(json.dumps({"status": "running", "step": step}))
    with open(root / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"step": step}) + "\n")


def mirror_of(root: Path, place: FolderPlace, notes: list[str] | None = None) -> Mirror:
    said = notes if notes is not None else []
    return Mirror(root, place, Holder(place), Mark("run", 1, "me"), place.sizes(), said.append, lambda: None)


@pytest.fixture(autouse=True)
def settles_soon(monkeypatch):
    monkeypatch.setattr(holders, "SETTLE_S", 0.0)


@pytest.fixture
def root(tmp_path) -> Path:
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


def committed(place: FolderPlace) -> list[str]:
    return sorted(path.parent.name for path in place.folder.rglob("manifest.json"))


def fetched(place: FolderPlace, to: Path) -> tuple[list[int], list[str]]:
    notes: list[str] = []
    to.mkdir()
    fetch(place, Mark("run", 1, "me"), to, notes.append)
    return CheckpointStore(to / "checkpoints", 1).steps(), notes


def test_copies_what_counts_and_removes_what_was_pruned(root, tmp_path):
    place = FolderPlace(tmp_path / "there")
    mirror = mirror_of(root, place)
    (root / "tune").mkdir()
    for name in ("lock", ".x.tmp", "tune/big", "own_task.py"):
        (root / name).write_text("x")
    (root / "checkpoints" / "step-00000009.partial").mkdir(parents=True)
    (root / "checkpoints" / "step-00000009.partial" / "model.safetensors").write_text("x")
    save(root, 10)
    mirror.copy()
    assert committed(place) == ["step-00000010"]
    names = files_of(place.folder).keys()
    assert {"own_task.py", "metrics.jsonl", "result.json", "mirror.json"} <= names
    assert not {"lock", ".x.tmp", "tune/big"} & names
    assert not any(".partial" in name for name in names)

    save(root, 20)
    (root / "own_task.py").unlink()
    mirror.copy()
    assert committed(place) == ["step-00000020"]
    assert "own_task.py" not in files_of(place.folder)
    assert not (root / mirrors.LINKS).exists()
    assert verify(place.folder / "checkpoints" / "step-00000020")


@pytest.mark.parametrize("end", ["model.safetensors", "state.json", "metrics.jsonl", "manifest.json", "result.json",
                                 "mirror.json"])  # fmt: skip
def test_killed_at_any_write_leaves_a_checkpoint(root, tmp_path, end):
    place = Failing(tmp_path / "there")
    mirror = mirror_of(root, place)
    save(root, 10)
    mirror.copy()
    save(root, 20)  # which prunes step 10 here
    place.end = end
    with pytest.raises(OSError, match="killed"):
        mirror.copy(everything=True)
    assert all(verify(place.folder / "checkpoints" / name) for name in committed(place))
    steps, _ = fetched(FolderPlace(place.folder), tmp_path / "new")
    assert steps == ([20] if end in ("result.json", "mirror.json") else [10])


@pytest.mark.parametrize("end", ["model.safetensors", "state.json", "metrics.jsonl", "manifest.json", "result.json"])
@pytest.mark.parametrize("is_other", [False, True])
def test_a_driver_after_one_that_was_killed_at_any_write(root, tmp_path, end, is_other):
    """What the first one left of a checkpoint neither goes with what is no longer here nor stays in the new one."""
    place = Failing(tmp_path / "there")
    save(root, 10)
    mirror_of(root, place).copy()
    save(root, 20)
    if is_other:  # written by more ranks than the second time
        store = CheckpointStore(root / "checkpoints", 1)
        store.write(Checkpoint(20, {"model": {"w": np.zeros(2)}, "extra": {"w": np.zeros(2)}}, {}))
    place.end = end
    with pytest.raises(OSError, match="killed"):
        mirror_of(root, place).copy(everything=True)
    if is_other:
        CheckpointStore(root / "checkpoints", 1).write(Checkpoint(20, {"model": {"w": np.ones(2)}}, {}))
    second = mirror_of(root, FolderPlace(place.folder))
    for _ in range(2):
        second.copy(everything=True)
        there = place.folder / "checkpoints" / "step-00000020"
        assert files_of(there) == files_of(root / "checkpoints" / "step-00000020")
    assert fetched(FolderPlace(place.folder), tmp_path / "new")[0] == [20]
    save(root, 30)
    second.copy()
    assert files_of(place.folder / "checkpoints") == files_of(root / "checkpoints")


@pytest.mark.parametrize("bad", [10, 20])
def test_a_checkpoint_that_lacks_a_file_is_passed_over(root, tmp_path, monkeypatch, bad):
    monkeypatch.setattr(mirrors, "SETTLE_PAUSE_S", 0.0)
    place, notes = FolderPlace(tmp_path / "there"), list[str]()
    for step in (10, 20):
        save(root, step, keep=2)
    (root / "checkpoints" / f"step-{bad:08d}" / "model.safetensors").unlink()
    mirror = mirror_of(root, place, notes)
    for _ in range(2):
        mirror.copy(everything=True)
        assert committed(place) == [f"step-{30 - bad:08d}"]
        assert verify(place.folder / "checkpoints" / f"step-{30 - bad:08d}")
        assert "result.json" in files_of(place.folder)
    assert notes == [f"checkpoint checkpoints/step-{bad:08d} is damaged (model.safetensors: missing) and is not copied "
                     f"to {place.url}"]  # fmt: skip
    shutil.rmtree(root / "checkpoints" / f"step-{bad:08d}")
    save(root, bad, keep=3)
    mirror.copy()
    assert committed(place) == ["step-00000010", "step-00000020"]


def test_the_first_checkpoint_finds_a_run_around_it(root, tmp_path):
    place = Failing(tmp_path / "there")
    save(root, 10)
    (root / "best.yaml").write_text("x")
    place.end = "best.yaml"
    with pytest.raises(OSError, match="killed"):
        mirror_of(root, place).copy()
    names = files_of(place.folder).keys()
    assert {"spec.yaml", "result.json", "checkpoints/step-00000010/manifest.json"} <= names


def test_manifest_first_would_not(root, tmp_path, monkeypatch):
    """The control of the test above."""
    place = Failing(tmp_path / "there")
    mirror = mirror_of(root, place)
    save(root, 10)
    send = Mirror._send

    def commit_first(self, name, folder, manifest):
        self._commit(name, manifest)
        del self.committed[name]
        send(self, name, folder, manifest)

    monkeypatch.setattr(Mirror, "_send", commit_first)
    place.end = "model.safetensors"
    with pytest.raises(OSError, match="killed"):
        mirror.copy()
    with pytest.raises(Exception, match="missing"):
        assert all(verify(place.folder / "checkpoints" / name) for name in committed(place))


def test_pruned_while_it_is_copied(root, tmp_path):
    class Pruning(FolderPlace):
        def upload(self, name, source, watch):
            if "step-00000010" in name:
                save(root, 20)
            super().upload(name, source, watch)

    place = Pruning(tmp_path / "there")
    mirror = mirror_of(root, place)
    save(root, 10)
    mirror.copy()
    assert committed(place) == ["step-00000010"]  # of the same moment as the files beside it
    assert json.loads((place.folder / "result.json").read_text())["step"] == 10
    mirror.copy(everything=True)
    assert committed(place) == ["step-00000020"]


def test_a_run_that_never_stands_still(root, tmp_path, monkeypatch):
    """Its checkpoints are copied, and what does not name them; a journal that does waits for its moment."""
    place = FolderPlace(tmp_path / "there")
    mirror = mirror_of(root, place)
    save(root, 10)
    (root / "population.json").write_text("{}")
    monkeypatch.setattr(mirrors, "SETTLE_PAUSE_S", 0.0)
    real, steps = mirrors.scan, iter(range(20, 1000, 10))

    def moving(path: Path) -> mirrors.Scan:
        save(path, next(steps), keep=2)
        return real(path)

    with monkeypatch.context() as patch:
        patch.setattr(mirrors, "scan", moving)
        mirror.copy()
    assert committed(place)
    assert "result.json" in files_of(place.folder)
    assert "population.json" not in files_of(place.folder)
    mirror.copy()
    assert "population.json" in files_of(place.folder)
    assert committed(place) == sorted(path.name for path in (root / "checkpoints").glob("step-*"))


def test_a_step_written_anew_is_copied_anew(root, tmp_path):
    place = FolderPlace(tmp_path / "there")
    mirror = mirror_of(root, place)
    save(root, 10)
    mirror.copy()
    CheckpointStore(root / "checkpoints", 1).write(Checkpoint(10, {"model": {"w": np.zeros(3, np.float32)}}, {}))
    mirror_of(root, place).copy()
    assert files_of(place.folder / "checkpoints") == files_of(root / "checkpoints")


def test_members_that_are_gone_go_there_too(root, tmp_path):
    place = FolderPlace(tmp_path / "there")
    mirror = mirror_of(root, place)
    for member in ("members/00", "members/01"):
        save(root, 10, at=f"{member}/checkpoints")
    mirror.copy()
    assert len(committed(place)) == 2
    (root / "members" / "01").rename(tmp_path / "away")
    mirror.copy()
    assert "members/01" not in " ".join(files_of(place.folder))
    assert len(committed(place)) == 1


def test_what_was_not_fetched_stays_until_a_newer_one_is_there(root, tmp_path):
    place = FolderPlace(tmp_path / "there")
    for step in (10, 20):
        save(root, step, keep=2)
    mirror_of(root, place).copy()
    steps, notes = fetched(place, tmp_path / "new")
    assert steps == [20]
    assert "step-00000020" in notes[-1]
    mirror = mirror_of(tmp_path / "new", place)
    mirror.copy()
    assert committed(place) == ["step-00000010", "step-00000020"]
    save(tmp_path / "new", 30, keep=2)
    mirror.copy()
    assert committed(place) == ["step-00000020", "step-00000030"]


def test_the_best_is_fetched_too_and_the_damaged_is_not(root, tmp_path):
    place = FolderPlace(tmp_path / "there")
    store = CheckpointStore(root / "checkpoints", 2)
    save(root, 10, keep=2)
    store.mark_best(10, "eval/loss", 1.0)
    for step in (20, 30):
        save(root, step, keep=2)
    mirror_of(root, place).copy()
    bad = place.folder / "checkpoints" / "step-00000030" / "model.safetensors"
    bad.write_bytes(bad.read_bytes()[:-1] + b"\1")
    steps, notes = fetched(place, tmp_path / "new")
    assert steps == [10, 20]
    assert "step-00000030 is damaged (model.safetensors: hash differs)" in notes[0]


def test_what_is_damaged_there_is_copied_anew(root, tmp_path):
    place = FolderPlace(tmp_path / "there" / "run")
    for step in (10, 20):
        save(root, step, keep=2)
    mirror_of(root, place).copy()
    good = files_of(place.folder / "checkpoints" / "step-00000020")
    (place.folder / "checkpoints" / "step-00000020" / "model.safetensors").write_bytes(b"1")
    found, notes = session(tmp_path / "b", place, None)
    assert found == [10]
    assert "step-00000020 is damaged" in notes[0]
    assert committed(place) == ["step-00000010", "step-00000020"]  # until there is a better one
    (tmp_path / "b" / "mirror.json").unlink()
    shutil.rmtree(tmp_path / "b")
    notes.clear()
    with opened(tmp_path / "c", place, False, notes.append, lambda: None, None) as (directory, mirror):
        assert mirror is not None
        save(directory.path, 20, keep=2)  # trained again, the same
        mirror.start()
    assert files_of(place.folder / "checkpoints" / "step-00000020") == good


@pytest.mark.parametrize("name", ["../out", "a/../../out", "/out", "a//b", "a\\b", "a\nb"])
def test_names_that_lead_out_are_refused(root, tmp_path, name):
    class Listing(FolderPlace):
        def sizes(self):
            return {name: 1}

    place = Listing(tmp_path / "there")
    with pytest.raises(OSError, match="which no run has"):
        fetch(place, Mark("run", 1, "me"), root, lambda line: None)
    assert files_of(root).keys() == {"mirror.json"}


# ------------------------------------------------------------------------------------------------------ here and there
def session(path: Path, place: FolderPlace, step: int | None, *, fresh: bool = False) -> tuple[list[int], list[str]]:
    """A run that comes to `step`; the steps that it found, and what was said."""
    notes: list[str] = []
    with opened(path, place, fresh, notes.append, lambda: None, None) as (directory, mirror):
        found = CheckpointStore(directory.checkpoints, 1).steps()
        assert mirror is not None
        if step is not None:
            save(directory.path, step)
            mirror.start()
    return found, notes


def test_goes_on_wherever_it_is_begun(tmp_path):
    place = FolderPlace(tmp_path / "there" / "run")
    assert session(tmp_path / "a", place, 10) == ([], [])
    assert session(tmp_path / "a", place, 20)[0] == [10]
    found, notes = session(tmp_path / "b", place, 30)
    assert found == [20]
    assert notes[0].startswith(f"fetched the run from {place.url}")
    found, notes = session(tmp_path / "a", place, 40)  # the older one: not lost, and not gone on from
    assert found == [30]
    assert notes[0] == f"{tmp_path / 'a'} is older than {place.url} and was moved to {tmp_path / 'a.1'}"
    assert CheckpointStore(tmp_path / "a.1" / "checkpoints", 1).steps() == [20]


def test_a_directory_that_is_ahead_of_its_copy_stays(tmp_path):
    place = Failing(tmp_path / "there" / "run")
    session(tmp_path / "a", place, 10)
    save(tmp_path / "a", 20)  # by a driver that was killed before it could copy
    assert session(tmp_path / "a", place, None) == ([20], [])
    assert committed(place) == ["step-00000020"]


def test_a_fetch_that_was_broken_off_is_begun_anew(tmp_path):
    place = FolderPlace(tmp_path / "there" / "run")
    session(tmp_path / "a", place, 10)
    (tmp_path / "b").mkdir()
    mark = Mark.parse((place.folder / "mirror.json").read_bytes())
    assert mark is not None
    (tmp_path / "b" / "mirror.json").write_bytes(Mark(mark.run, 0, "").data)
    (tmp_path / "b" / "result.json").write_text('{"status": "done"}')
    (tmp_path / "b" / "lock").write_text('{"host": "h", "pid": 1}')
    assert session(tmp_path / "b", place, None)[0] == [10]
    assert json.loads((tmp_path / "b" / "result.json").read_text())["status"] == "running"


def test_different_runs_and_foreign_folders_are_refused(tmp_path):
    place = FolderPlace(tmp_path / "there" / "run")
    session(tmp_path / "a", place, 10)
    (tmp_path / "b").mkdir()
    save(tmp_path / "b", 10)
    with pytest.raises(UsageError, match="hold different runs of this name; use --out"):
        session(tmp_path / "b", place, 20)
    assert not (place.folder / "holder.json").exists()
    found, notes = session(tmp_path / "b", place, 20, fresh=True)
    assert found == []
    assert notes == [f"{place.url} moved to {place.url}.1"]
    assert committed(FolderPlace(tmp_path / "there" / "run.1")) == ["step-00000010"]
    assert committed(place) == ["step-00000020"]

    foreign = FolderPlace(tmp_path / "there" / "photos")
    foreign.write("one.jpg", b"x")
    with pytest.raises(UsageError, match=r"photos is not empty and holds no run of distml \(one.jpg\); nothing was"):
        session(tmp_path / "c", foreign, 10)


def test_failures_are_said_once_and_retried(root, tmp_path, monkeypatch):
    monkeypatch.setattr(mirrors, "PASS_S", 0.01)
    notes: list[str] = []
    place = Failing(tmp_path / "there")
    failed = threading.Event()
    tries = []

    def check(name: str) -> None:
        tries.append(name)
        if len(tries) >= 3:
            failed.set()
        raise OSError("no space there")

    place._check = check  # type: ignore[method-assign]
    save(root, 10)
    mirror = mirror_of(root, place, notes)
    mirror.start()
    assert failed.wait(20)
    place._check = lambda name: None  # type: ignore[method-assign]
    assert mirror.close(20.0) is None
    assert committed(place) == ["step-00000010"]
    assert sum("no space there; trying again, the run goes on in" in line for line in notes) == 1


def test_a_last_copy_that_fails_says_why(root, tmp_path, monkeypatch):
    monkeypatch.setattr(mirrors, "CLOSING_PAUSE_S", 0.01)
    place = Failing(tmp_path / "there")
    place.end = "safetensors"
    save(root, 10)
    assert mirror_of(root, place).close(0.2) == "killed"


def test_whoever_loses_the_place_writes_no_more(root, tmp_path, monkeypatch):
    monkeypatch.setattr(mirrors, "BEAT_S", 0.02)
    monkeypatch.setattr(mirrors, "PASS_S", 0.02)
    place, notes, lost = FolderPlace(tmp_path / "there"), [], threading.Event()
    mirror = Mirror(root, place, Holder(place), Mark("run", 1, "me"), {}, notes.append, lost.set)
    save(root, 10)
    mirror.holder.renew()
    mirror.start()
    Holder(place, watch_s=0.0, look_s=0.01).renew()  # after it was silent for too long
    assert lost.wait(20)
    save(root, 20)
    problem = mirror.close(5.0)
    assert problem is not None
    assert "has taken it over" in problem
    assert "step-00000020" not in committed(place)
    assert "this run ends" in notes[-1]


def test_one_that_was_frozen_looks_before_it_writes(root, tmp_path):
    place, lost = FolderPlace(tmp_path / "there"), threading.Event()
    mirror = Mirror(root, place, Holder(place), Mark("run", 1, "me"), {}, lambda line: None, lost.set)
    mirror.holder.renew()
    save(root, 10)
    mirror.copy()
    other = Holder(place)
    other.renew()
    mark = Mark("run", 7, "new").data
    place.write("mirror.json", mark)
    before = files_of(place.folder)
    mirror.holder.renewed_s -= holders.SILENT_S + 1.0
    save(root, 20)
    with pytest.raises(mirrors.Stopped, match="has taken it over"):
        mirror.copy(everything=True)
    assert files_of(place.folder) == before


def test_one_that_is_frozen_within_a_copy_commits_nothing(root, tmp_path):
    class Freezing(FolderPlace):
        def upload(self, name, source, watch):
            super().upload(name, source, watch)
            if name.endswith("model.safetensors"):
                mirror.holder.renewed_s -= holders.SILENT_S + 1.0
                Holder(place).renew()

    place = Freezing(tmp_path / "there")
    mirror = mirror_of(root, place)
    mirror.holder.renew()
    save(root, 10)
    with pytest.raises(mirrors.Stopped, match="has taken it over"):
        mirror.copy()
    assert committed(place) == []


def test_fresh_moves_nothing_while_another_one_holds_the_place(tmp_path, monkeypatch):
    place = FolderPlace(tmp_path / "there" / "run")
    session(tmp_path / "a", place, 10)
    before = files_of(tmp_path)

    def refuse(self, note):
        raise UsageError("held")

    with monkeypatch.context() as patch:
        patch.setattr(Holder, "acquire", refuse)
        with pytest.raises(UsageError, match="held"):
            session(tmp_path / "a", place, None, fresh=True)
    after = files_of(tmp_path)
    assert {name for name in after if not name.endswith("lock")} == {name for name in before if name != "a/lock"}
    assert session(tmp_path / "a", place, None, fresh=True)[0] == []  # the control: who has the place moves both
    assert (tmp_path / "a.1").is_dir()


def test_a_last_copy_says_what_it_waits_for(root, tmp_path, monkeypatch):
    monkeypatch.setattr(mirrors, "QUIET_S", 0.0)
    monkeypatch.setattr(mirrors, "CLOSING_PAUSE_S", 0.01)
    notes: list[str] = []
    place = Failing(tmp_path / "there")
    place.end = "safetensors"
    save(root, 10)
    assert mirror_of(root, place, notes).close(0.3) == "killed"
    assert sorted(notes) == [f"copying what came last to {place.url}, up to 0 s",
                             f"storage {place.url}: killed; trying again"]  # fmt: skip


def test_a_signal_in_the_last_copy_gives_the_place_back(tmp_path, monkeypatch):
    monkeypatch.setattr(mirrors, "CLOSING_PAUSE_S", 0.01)
    place, notes, tried = Failing(tmp_path / "there" / "run"), list[str](), threading.Event()

    def upload(name, source, watch):
        tried.set()
        raise OSError("no space there")

    place.upload = upload  # type: ignore[method-assign]

    def interrupt() -> None:
        assert tried.wait(20)
        time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    mirrors_made: list[Mirror] = []

    def run() -> None:
        with opened(tmp_path / "a", place, False, notes.append, lambda: None, None) as (directory, mirror):
            assert mirror is not None
            mirrors_made.append(mirror)
            save(directory.path, 10)
            thread.start()

    with pytest.raises(KeyboardInterrupt):
        run()
    thread.join()
    (mirror,) = mirrors_made
    mirror._threads[0].join(20)
    assert not mirror._threads[0].is_alive()  # nobody writes into a place that was given back
    assert mirror.holder.beat() is None
    assert not (place.folder / "holder.json").exists()
    assert "lacks what came last: stopped; all of it is in" in notes[-1]
