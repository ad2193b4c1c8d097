"""Checkpoints: a killed writer, a flipped byte, a full disk; each with what happens without it."""

import json
import math
import os
import signal
import stat
import struct
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save

from distml.errors import ExitCode, UsageError
from distml.runs import checkpoints as module
from distml.runs.checkpoints import (
    Checkpoint,
    CheckpointDamaged,
    CheckpointFailed,
    CheckpointStore,
    read_tensors,
    resolve_source,
)
from distml.runs.tensors import HashingFile, write_tensors


def checkpoint(step: int, value: float | None = None) -> Checkpoint:
    weights = np.full((4, 3), step if value is None else value, dtype=np.float32)
    tensors = {"model": {"weight": weights, "scale": np.array(2.5)}, "optimizer": {"moment": weights * 2}}
    return Checkpoint(step, tensors, {"examples": step * 64, "nested": {"list": [1, 2.5, "three", None, True]}})


def equal(one: Checkpoint, other: Checkpoint) -> bool:
    def flat(it: Checkpoint) -> dict[tuple[str, str], tuple]:
        return {
            (stem, name): (array.dtype, array.shape, array.tobytes())
            for stem, arrays in it.tensors.items()
            for name, array in arrays.items()
        }

    return (one.step, one.state, flat(one)) == (other.step, other.state, flat(other))


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 0x10
    path.write_bytes(data)


def good(store: CheckpointStore) -> tuple[Checkpoint | None, list[str]]:
    lines: list[str] = []
    return store.newest_good(lines.append), lines


@pytest.fixture
def store(tmp_path):
    return CheckpointStore(tmp_path / "checkpoints", keep=2)


# ----------------------------------------------------------------------------------------------------------- the format
def test_every_kind_of_array_comes_back(store):
    arrays = {
        "bool": np.array([True, False, True]),
        "zero_d": np.array(7, dtype=np.int64),
        "empty": np.zeros((0, 3), dtype=np.float32),
        "half": np.arange(5, dtype=np.float16),
        "bytes": np.arange(7, dtype=np.uint8),
        "transposed": np.arange(6, dtype=np.float64).reshape(2, 3).T,
        "strided": np.arange(10, dtype=np.int32)[::3],
        "big_endian": np.arange(4, dtype=">f4"),
        "nan": np.array([math.nan, math.inf, -0.0]),
    }
    store.write(Checkpoint(5, {"model": arrays, "own": {}}, {}))
    loaded = store.load(5)
    assert loaded.tensors["own"] == {}
    assert set(loaded.tensors["model"]) == set(arrays)
    for name, array in arrays.items():
        read = loaded.tensors["model"][name]
        assert read.dtype == array.dtype.newbyteorder("="), name
        np.testing.assert_array_equal(read, array, strict=name != "big_endian", err_msg=name)
        assert read.shape == array.shape
        assert read.flags.writeable


def test_files_are_those_of_the_safetensors_library(tmp_path):
    arrays = {"b": np.arange(3.0), "a": np.array([True]), "c": np.arange(6, dtype=np.float32).reshape(2, 3)}
    with open(tmp_path / "ours.safetensors", "wb") as raw:
        write_tensors(HashingFile(raw), arrays)
    assert (tmp_path / "ours.safetensors").read_bytes() == save(arrays)
    assert {name: array.tolist() for name, array in load_file(tmp_path / "ours.safetensors").items()} == {
        name: array.tolist() for name, array in arrays.items()
    }


def test_layout_and_modes(store):
    folder = store.write(checkpoint(100))
    assert folder.name == "step-00000100"
    assert sorted(path.name for path in folder.iterdir()) == [
        "manifest.json", "model.safetensors", "optimizer.safetensors", "state.json",
    ]  # fmt: skip
    umask = os.umask(0)
    os.umask(umask)
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o666 & ~umask}
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (manifest["format"], manifest["step"]) == (1, 100)
    assert manifest["files"]["state.json"]["bytes"] == (folder / "state.json").stat().st_size


@pytest.mark.parametrize(
    "bad",
    [
        Checkpoint(1, {}, {"lr": math.nan}),
        Checkpoint(1, {}, {"random": {1: 2}}),
        Checkpoint(1, {}, {"random": np.float32(1)}),
        Checkpoint(1, {"../model": {}}, {}),
        Checkpoint(1, {"model": {"w": np.array(["text"])}}, {}),
        Checkpoint(1, {"model": {"w": np.array([None])}}, {}),
        Checkpoint(-1),
    ],
)
def test_what_cannot_be_written_exactly_is_refused_in_the_callers_thread(store, bad):
    with pytest.raises(ValueError):
        store.write(bad)
    with pytest.raises(ValueError):
        store.write_async(bad)
    assert not store.root.exists()


# ------------------------------------------------------------------------------------------------------ damage is found
DAMAGES = {
    "flipped": (lambda folder: flip(folder / "model.safetensors", -1), "model.safetensors: hash differs"),
    "flipped state": (lambda folder: flip(folder / "state.json", 5), "state.json: hash differs"),
    "cut": (lambda folder: os.truncate(folder / "optimizer.safetensors", 20), "optimizer.safetensors: 20 bytes"),
    "missing": (lambda folder: (folder / "optimizer.safetensors").unlink(), "optimizer.safetensors: missing"),
    "extra": (lambda folder: (folder / "more.safetensors").touch(), "more.safetensors: not in the manifest"),
    "no manifest": (lambda folder: (folder / "manifest.json").unlink(), "manifest.json: No such file"),
    "empty manifest": (lambda folder: os.truncate(folder / "manifest.json", 0), "manifest.json: not a manifest"),
    "a list": (lambda folder: (folder / "manifest.json").write_text("[]"), "manifest.json: not a manifest"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_damage_falls_back_and_says_so(store, kind):
    store.write(checkpoint(100))
    folder = store.write(checkpoint(200))
    assert good(store)[0].step == 200, "the control: undamaged, the newest is used"
    assert good(store)[1] == []
    damage, reason = DAMAGES[kind]
    damage(folder)
    with pytest.raises(CheckpointDamaged, match=reason) as caught:
        store.load(200)
    assert str(folder) in str(caught.value)
    found, lines = good(store)
    assert equal(found, checkpoint(100))
    assert len(lines) == 1
    assert lines[0].startswith(f"checkpoint step-00000200 is damaged ({reason}")
    assert lines[0].endswith("); using step-00000100")


def test_every_single_byte_counts(store):
    folder = store.write(checkpoint(1))
    for path in sorted(folder.iterdir()):
        whole = path.read_bytes()
        for position in range(len(whole)):
            flip(path, position)
            try:
                assert equal(store.load(1), checkpoint(1)), f"{path.name} at {position} changed unnoticed"
                assert path.name == "manifest.json", "only the manifest's white space may change"
            except CheckpointDamaged:
                pass
        path.write_bytes(whole)
    assert equal(store.load(1), checkpoint(1))


def test_the_only_one_damaged(store):
    flip(store.write(checkpoint(100)) / "model.safetensors", -1)
    found, lines = good(store)
    assert found is None
    assert lines == [
        "checkpoint step-00000100 is damaged (model.safetensors: hash differs); there is no good one before it"
    ]
    with pytest.raises(CheckpointDamaged):
        store.load(100)


def test_nothing_there(store):
    assert good(store) == (None, [])
    assert store.steps() == []
    assert store.best() is None
    with pytest.raises(UsageError, match="no checkpoint of step 3"):
        store.load(3)


def test_a_renamed_checkpoint_is_not_another_step(store):
    store.write(checkpoint(100)).rename(store.root / "step-00000300")
    with pytest.raises(CheckpointDamaged, match="of step 100"):
        store.load(300)


def test_pickle_is_never_loaded(store, tmp_path):
    """A state that is a pickle, with a manifest that vouches for it, is refused and not run."""
    import hashlib
    import pickle

    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "exploded"),)

    folder = store.write(checkpoint(1))
    data = pickle.dumps(Bomb())
    (folder / "state.json").write_bytes(data)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["state.json"] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointDamaged):
        store.load(1)
    assert not (tmp_path / "exploded").exists()
    pickle.loads(data)
    assert (tmp_path / "exploded").exists(), "the control: it would have"


# ------------------------------------------------------------------------------------------------------ a killed writer
WRITE = """
import os, signal, sys
import numpy as np
from distml.runs import checkpoints, files
from distml.runs.checkpoints import Checkpoint, CheckpointStore

root, point, value = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
calls = 0
def deadly(function):
    def call(*args, **kwargs):
        global calls
        calls += 1
        if calls == point:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    return call
# Between any two of these calls lies every state of the disk that a kill can leave.
for name in ("open", "fsync", "rename", "replace", "unlink", "rmdir", "mkdir"):
    setattr(os, name, deadly(getattr(os, name)))
store = CheckpointStore(checkpoints.Path(root), keep=1)
weights = np.full((4, 3), value, dtype=np.float32)
store.mark_best(200, "eval/loss", value)
store.write(Checkpoint(200, {"model": {"weight": weights}}, {"value": value}))
print(calls)
"""


def write_until(root: Path, point: int, value: float) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", WRITE, str(root), str(point), str(value)]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.parametrize("first", ["step 100 before", "step 200 before"])
def test_killed_anywhere_the_previous_or_the_new_one_is_there(tmp_path, first):
    """kill -9 at (nearly) every system call that changes names: what is found is whole, and old or new."""
    step = 100 if "100" in first else 200

    def prepare(name: str) -> CheckpointStore:
        store = CheckpointStore(tmp_path / name, keep=1)
        store.write(checkpoint(step, value=1.0))
        return store

    whole = write_until(prepare("whole").root, 0, 2.0)
    points = int(whole.stdout)
    assert points > 10
    seen = set()
    for point in range(1, points + 1, 2 if step == 100 else 1):
        store = prepare(f"killed-{point}")
        died = write_until(store.root, point, 2.0)
        assert died.returncode == -signal.SIGKILL, died.stderr
        found, lines = good(store)
        assert lines == [], f"killed at call {point}: nothing committed may be damaged"
        value = found.tensors["model"]["weight"][0, 0]
        assert (found.step, value) in {(step, 1.0), (200, 2.0)}
        seen.add(value)
        assert store.best() in ({(200, 2.0), (200, 1.0)} if step == 200 else {(200, 2.0)}) | {None}
        store.write(checkpoint(300))
        assert not [path for path in store.root.iterdir() if path.suffix in (".partial", ".replaced", ".tmp")]
    assert seen == {1.0, 2.0}, "kills fell before and after the commit"


@pytest.mark.parametrize("is_control", [False, True])
def test_killed_from_outside_in_the_middle_of_a_file(tmp_path, is_control):
    """The control writes under the final name, as a plain save would: then the half checkpoint counts, as damaged."""
    store = CheckpointStore(tmp_path, keep=2)
    store.write(checkpoint(100))
    code = (
        "import sys, time, pathlib, numpy as np\n"
        "from distml.runs import checkpoints\n"
        "def stuck(file, tensors):\n"
        "    file.write(b'half a tensor'); file._file.flush(); print('writing', flush=True); time.sleep(60)\n"
        "checkpoints.write_tensors = stuck\n"
        "store = checkpoints.CheckpointStore(pathlib.Path(sys.argv[1]), keep=2)\n"
        "one = checkpoints.Checkpoint(200, {'model': {'w': np.zeros(3)}}, {})\n"
        "store.write(one) if sys.argv[2] else checkpoints.write_folder(store.root / 'step-00000200', one)\n"
    )
    suffix = "" if is_control else ".partial"
    writer = subprocess.Popen([sys.executable, "-c", code, str(tmp_path), suffix], stdout=subprocess.PIPE, text=True)
    assert writer.stdout.readline() == "writing\n"
    writer.kill()
    writer.communicate()
    assert (tmp_path / f"step-00000200{suffix}" / "model.safetensors").read_bytes() == b"half a tensor"
    found, lines = good(store)
    assert equal(found, checkpoint(100))
    if is_control:
        assert store.steps() == [100, 200]
        assert "step-00000200 is damaged (manifest.json: No such file" in lines[0]
        return
    assert store.steps() == [100]
    assert lines == []
    store.write(checkpoint(300))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000100", "step-00000300"]


def test_the_same_step_again(store):
    """Replaced when it differs or is damaged, left alone when it is the same."""
    folder = store.write(checkpoint(100))
    inode = folder.stat().st_ino
    store.write(checkpoint(100))
    assert folder.stat().st_ino == inode
    store.write(checkpoint(100, value=9.0))
    assert equal(store.load(100), checkpoint(100, value=9.0))
    flip(folder / "model.safetensors", -1)
    store.write(checkpoint(100, value=9.0))
    assert equal(store.load(100), checkpoint(100, value=9.0))
    assert [path.name for path in store.root.iterdir()] == ["step-00000100"]


# -------------------------------------------------------------------------------------------------- keeping and pruning
def test_the_newest_keep_stay(store):
    for step in range(100, 600, 100):
        store.write(checkpoint(step))
    assert store.steps() == [400, 500]


def test_the_best_stays_besides(store):
    for step in range(100, 700, 100):
        if step in (100, 300):
            store.mark_best(step, "eval/loss", 1 / step)
        store.write(checkpoint(step))
    assert store.steps() == [300, 500, 600]
    again = CheckpointStore(store.root, keep=2)
    assert again.best() == (300, 1 / 300)
    assert again.best("eval/loss") == (300, 1 / 300)
    assert again.best("eval/accuracy") is None, "another metric's best cannot be compared with"


def test_a_mark_counts_with_its_commit(store):
    store.write(checkpoint(100))
    store.mark_best(100, "eval/loss", 0.5)
    store.mark_best(200, "eval/loss", 0.4)
    assert store.best() == (200, 0.4)
    assert CheckpointStore(store.root, keep=2).best() == (100, 0.5), "a driver that dies now still has the old best"
    store.write(checkpoint(200))
    assert CheckpointStore(store.root, keep=2).best() == (200, 0.4)


def test_a_best_that_is_not_a_number(store):
    with pytest.raises(ValueError):
        store.mark_best(1, "eval/loss", math.nan)


def test_after_falling_back_the_damaged_ones_do_not_displace_good_ones(tmp_path):
    store = CheckpointStore(tmp_path, keep=1)
    flip(store.write(checkpoint(200)) / "model.safetensors", -1)
    store.write(checkpoint(150))
    assert store.steps() == [150]
    assert good(store)[0].step == 150


def test_keep_nothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match="at least 1"):
        CheckpointStore(tmp_path, keep=0)


# ---------------------------------------------------------------------------------------------------- in the background
class Gate:
    """Stands in for the write of a folder: says what it begins, and waits to be let on."""

    def __init__(self, monkeypatch):
        self.begun: list[int] = []
        self.started, self.go = threading.Semaphore(0), threading.Semaphore(0)
        self.write_folder = module.write_folder
        monkeypatch.setattr(module, "write_folder", self)

    def __call__(self, folder, checkpoint):
        self.begun.append(checkpoint.step)
        self.started.release()
        assert self.go.acquire(timeout=10)
        self.write_folder(folder, checkpoint)

    def await_start(self):
        assert self.started.acquire(timeout=10)

    def open(self):
        for _ in range(10):
            self.go.release()


def test_write_async_returns_before_anything_is_written(store, monkeypatch):
    gate = Gate(monkeypatch)
    assert store.write_async(checkpoint(100))
    gate.await_start()
    assert store.steps() == []
    assert store.wait(timeout_s=0.01) is False
    gate.open()
    assert store.wait() is True
    assert equal(store.load(100), checkpoint(100))
    store.close()


def test_the_newest_waits_and_important_ones_are_never_dropped(store, monkeypatch):
    gate = Gate(monkeypatch)
    store.write_async(checkpoint(100))
    gate.await_start()
    store.write_async(checkpoint(200))
    store.write_async(checkpoint(300))  # takes the place of 200
    store.write_async(checkpoint(400), important=True)  # takes the place of 300
    assert store.write_async(checkpoint(500)) is False, "400 waits, and is important"
    blocked = threading.Thread(target=lambda: store.write_async(checkpoint(600), important=True))
    blocked.start()
    assert gate.begun == [100]
    assert blocked.is_alive()
    gate.open()
    blocked.join(timeout=10)
    store.close()
    assert gate.begun == [100, 400, 600]
    assert store.steps() == [400, 600]


def test_a_marked_one_is_important_by_itself(store, monkeypatch):
    gate = Gate(monkeypatch)
    store.write_async(checkpoint(100))
    gate.await_start()
    store.mark_best(200, "eval/loss", 0.1)
    store.write_async(checkpoint(200))
    store.write_async(checkpoint(300))
    gate.open()
    store.close()
    assert gate.begun == [100, 200]
    assert CheckpointStore(store.root, keep=1).best() == (200, 0.1)


def full_disk(folder, checkpoint):
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"half")
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("surface", ["wait", "write", "write_async", "close"])
def test_a_failed_write_surfaces_at_the_next_call(store, monkeypatch, surface):
    store.write(checkpoint(100))
    monkeypatch.setattr(module, "write_folder", full_disk)
    store.write_async(checkpoint(200))
    with store._background._changed:  # until it has failed, without taking the failure
        store._background._changed.wait_for(lambda: store._background._failure is not None, timeout=10)
    monkeypatch.undo()
    call = {"write": lambda: store.write(checkpoint(300)), "write_async": lambda: store.write_async(checkpoint(300))}
    with pytest.raises(CheckpointFailed, match="step-00000200 could not be written: No space left") as caught:
        call.get(surface, getattr(store, surface))()
    assert isinstance(caught.value.__cause__, OSError)
    assert (caught.value.exit_code, caught.value.phase, caught.value.step) == (ExitCode.FAILED, "checkpoint", 200)
    assert [path.name for path in store.root.iterdir()] == ["step-00000100"], "the half-written folder is gone"
    store.wait()  # raised once
    store.write(checkpoint(400))
    assert good(store)[0].step == 400


def test_a_full_disk_for_real(tmp_path, monkeypatch):
    """/dev/full under the file's name: the error comes from the kernel, not from a stand-in."""
    store = CheckpointStore(tmp_path, keep=1)
    real = module.write_tensors

    def onto_full_disk(file, tensors):
        with open("/dev/full", "wb", buffering=0) as full:
            real(HashingFile(full), tensors)

    monkeypatch.setattr(module, "write_tensors", onto_full_disk)
    with pytest.raises(CheckpointFailed, match="No space left on device"):
        store.write(checkpoint(1))
    assert list(tmp_path.iterdir()) == []


def test_an_error_that_is_no_disks_surfaces_too(store, monkeypatch):
    monkeypatch.setattr(module, "write_folder", lambda *_: 1 / 0)
    store.write_async(checkpoint(100))
    with pytest.raises(ZeroDivisionError):
        store.wait()


# -------------------------------------------------------------------------------------------------------------- sources
def test_weights_from_a_run_a_checkpoint_or_a_file(tmp_path):
    store = CheckpointStore(tmp_path / "run" / "checkpoints", keep=3)
    for step in (100, 200, 300):
        store.write(checkpoint(step))
    assert set(resolve_source(tmp_path / "run")) == {"weight", "scale"}
    assert resolve_source(tmp_path / "run")["weight"][0, 0] == 300
    store.mark_best(200, "eval/loss", 0.1)
    assert resolve_source(tmp_path / "run")["weight"][0, 0] == 200
    assert resolve_source(store.root / "step-00000100")["weight"][0, 0] == 100
    assert resolve_source(store.root / "step-00000100" / "model.safetensors")["weight"][0, 0] == 100
    flip(store.root / "step-00000200" / "model.safetensors", -1)
    with pytest.raises(CheckpointDamaged, match="step-00000200"):
        resolve_source(tmp_path / "run")


def test_sources_report_damage_and_join_sharded_models(tmp_path):
    store = CheckpointStore(tmp_path / "checkpoints", keep=3)
    parts = {"model-00001-of-00002": {"a": np.zeros(2)}, "model-00002-of-00002": {"b": np.ones(2)}, "modelling": {}}
    store.write(Checkpoint(100, parts, {}))
    flip(store.write(checkpoint(200)) / "model.safetensors", -1)
    lines: list[str] = []
    assert set(resolve_source(tmp_path, lines.append)) == {"a", "b"}
    assert "using step-00000100" in lines[0]


def test_sources_that_are_none(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "text.safetensors").write_text("no tensors here")
    store = CheckpointStore(tmp_path / "other", keep=1)
    folder = store.write(Checkpoint(1, {"optimizer": {}}, {}))
    for path, words in {
        tmp_path / "nowhere": "does not exist",
        tmp_path / "other": "is none of them",
        tmp_path: "no checkpoint",
        tmp_path / "text.safetensors": "not a readable .safetensors",
        folder: "holds no model",
    }.items():
        with pytest.raises(UsageError, match=words):
            resolve_source(path)


def test_a_bfloat16_file_from_elsewhere_is_widened(tmp_path):
    header = json.dumps(
        {
            "w": {"dtype": "BF16", "shape": [1, 2], "data_offsets": [0, 4]},
            "n": {"dtype": "I16", "shape": [1], "data_offsets": [4, 6]},
        }
    ).encode()
    data = struct.pack("<Q", len(header)) + header + b"\x80\x3f\x20\xc0" + b"\x05\x00"
    (tmp_path / "x.safetensors").write_bytes(data)
    arrays = read_tensors(tmp_path / "x.safetensors")
    assert arrays["w"].tolist() == [[1.0, -2.5]]
    assert arrays["w"].dtype == np.float32
    assert arrays["n"].tolist() == [5]
