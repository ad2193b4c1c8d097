"""Parts: what N ranks write, M others read, element by element; and no damage goes unseen."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from distml.errors import UsageError
from distml.runs.checkpoints import (
    Checkpoint,
    CheckpointFailed,
    CheckpointStore,
    Parts,
    load_folder,
    ranks_folder_name,
    resolve_source,
)
from distml.runs.parts import CheckpointDamaged, PartReader, write_part
from distml.runs.tensors import TensorFile, read_tensors

KINDS = ("model", "exp_avg")
SHAPES = {"w": (4, 3), "b": (5,), "scale": ()}


def values_of(shapes: dict) -> dict[str, dict[str, np.ndarray]]:
    """Kind to name to array: no two elements are equal."""
    found, count = {}, 0
    for kind in KINDS:
        found[kind] = {}
        for name, shape in shapes.items():
            size = math.prod(shape)
            found[kind][name] = np.arange(count, count + size, dtype=np.float32).reshape(shape)
            count += size
    return found


def pieces_of(values: dict, bounds: list[int], rank: int) -> list:
    """Rank's share of each kind's tensors end to end, cut at `bounds`: as optimisers' partitions are."""
    found, start, stop = [], bounds[rank], bounds[rank + 1]
    for kind, tensors in values.items():
        offset = 0
        for name, array in tensors.items():
            first, last = max(start - offset, 0), min(stop - offset, array.size)
            if first <= last:
                found.append((kind, name, first, array.reshape(-1)[first:last]))
            offset += array.size
    return found


def write(folder: Path, values: dict, shapes: dict, bounds: list[int], others: dict | None = None) -> dict:
    """All ranks' parts; the manifest's entries."""
    files: dict = {}
    count = len(bounds) - 1
    for rank in range(count):
        pieces = pieces_of(values, bounds, rank)
        files |= write_part(folder, rank, count, lambda p=pieces: p, shapes, others if rank == 0 else None)
    return files


def write_small(folder: Path) -> dict:
    """Three ranks; `w` is cut in three, `b` in two."""
    return write(folder, values_of(SHAPES), SHAPES, [0, 5, 13, 18], {"steps": np.arange(3)})


# ------------------------------------------------------------------------------------------------------ what comes back
cuts = st.lists(st.integers(0, 10_000), max_size=4)
shapes_strategy = st.lists(st.lists(st.integers(0, 5), max_size=3), min_size=1, max_size=5)


@settings(max_examples=60, deadline=None)
@given(shapes_strategy, cuts, cuts)
def test_whatever_n_ranks_write_m_others_read(tmp_path_factory, rows, written, read):
    """The oracle: all elements in one array, cut where the readers want them."""
    folder = tmp_path_factory.mktemp("parts")
    shapes = {f"layer.{index}": tuple(row) for index, row in enumerate(rows)}
    values = values_of(shapes)
    total = sum(map(math.prod, shapes.values()))
    write(folder, values, shapes, sorted([0, *(cut % (total + 1) for cut in written), total]))
    bounds = sorted([0, *(cut % (total + 1) for cut in read), total])
    with PartReader(folder) as reader:
        reader.check()
        for kind in KINDS:
            end_to_end = np.concatenate([array.ravel() for array in values[kind].values()])
            for start, stop in itertools.pairwise(bounds):
                assert np.array_equal(gathered(reader, kind, shapes, start, stop), end_to_end[start:stop])
            for name, array in values[kind].items():
                if array.size:
                    assert np.array_equal(reader.whole(kind, name), array)
                    assert reader.shapes(kind)[name] == array.shape


def gathered(reader: PartReader, kind: str, shapes: dict, start: int, stop: int) -> np.ndarray:
    """Elements [start, stop) of all parameters end to end."""
    found, offset = [np.zeros(0, np.float32)], 0
    for name, shape in shapes.items():
        first, last = max(start - offset, 0), min(stop - offset, math.prod(shape))
        if first < last:
            found.append(reader.read(kind, name, first, last))
        offset += math.prod(shape)
    return np.concatenate(found)


def test_what_a_rank_has_whole_stands_under_its_own_name_in_its_own_shape(tmp_path):
    write_small(tmp_path)
    first, last = (load_file(tmp_path / f"model-0000{n}-of-00003.safetensors") for n in (1, 3))
    assert {name: array.shape for name, array in first.items()} == {"w[0:5]": (5,), "steps": (3,)}
    assert {name: array.shape for name, array in last.items()} == {"b[1:5]": (4,), "scale": ()}
    second = load_file(tmp_path / "optimizer-00002-of-00003.safetensors")
    assert set(second) == {"exp_avg/w[5:12]", "exp_avg/b[0:1]"}


def test_one_file_of_whole_tensors_reads_the_same(tmp_path):
    store = CheckpointStore(tmp_path, keep=1)
    arrays = {"w": np.arange(12, dtype=np.float64).reshape(4, 3), "w[0:5]": np.ones(2, np.float32)}
    folder = store.write(Checkpoint(1, {"model": arrays, "optimizer": {"exp_avg/a/b": np.ones(3, np.float32)}}, {}))
    with PartReader(folder) as reader:
        assert reader.read("model", "w", 2, 5).tolist() == [2.0, 3.0, 4.0]
        assert reader.whole("model", "w").dtype == np.float64
        assert reader.names("model") == ["w", "w[0:5]"]
        assert reader.read("exp_avg", "a/b", 0, 3).tolist() == [1.0, 1.0, 1.0]
        assert reader.read("exp_avg_sq", "a/b", 0, 3) is None
        assert reader.read("model", "v", 0, 1) is None


def test_a_parameters_name_may_look_like_a_piece(tmp_path):
    shapes = {"w[0:2]": (6,), "w": (2,)}
    values = values_of(shapes)
    write(tmp_path, values, shapes, [0, 3, 8])
    with PartReader(tmp_path) as reader:
        assert {name: reader.whole("model", name).tolist() for name in reader.names("model")} == {
            "w[0:2]": [0, 1, 2, 3, 4, 5], "w": [6, 7]}  # fmt: skip


def test_what_the_library_writes_is_read(tmp_path):
    kinds = ["bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "float16", "float32",
             "float64"]  # fmt: skip
    arrays = {kind: np.arange(6).reshape(2, 3).astype(kind) for kind in kinds}
    arrays |= {"scalar": np.array(2.5), "empty": np.zeros((0, 3), np.float32)}
    save_file(arrays, tmp_path / "library.safetensors", metadata={"format": "pt"})
    found = read_tensors(tmp_path / "library.safetensors")
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape)
        assert np.array_equal(found[name], array)
        found[name][...] = 0  # memory of its own


def test_bfloat16_is_widened(tmp_path):
    header = json.dumps({"w": {"dtype": "BF16", "shape": [2], "data_offsets": [0, 4]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"\x80\x3f\x00\xc0")
    with PartReader(tmp_path) as reader:
        assert reader.read("model", "w", 0, 2).tolist() == [1.0, -2.0]


def test_pieces_are_let_go_one_by_one(tmp_path):
    """A rank that has to copy its pieces from a device never has two of them."""
    alive, most = [0], [0]

    class Counted(np.ndarray):
        def __del__(self) -> None:
            alive[0] -= 1

    def pieces():
        for index in range(8):
            array = np.zeros(100, np.float32).view(Counted)
            alive[0] += 1
            most[0] = max(most[0], alive[0])
            yield "model", f"p{index}", 0, array
            del array

    write_part(tmp_path, 0, 1, pieces, {f"p{index}": (100,) for index in range(8)})
    assert most[0] <= 2, "the one that is written, and the one that comes"
    assert len(load_file(tmp_path / "model-00001-of-00001.safetensors")) == 8


# ----------------------------------------------------------------------------------------------------- the whole folder
def commit(store: CheckpointStore, step: int = 7) -> Path:
    folder = store.root / ranks_folder_name(step, "abc")
    files = write_small(folder)
    return store.write(Checkpoint(step, {"own": {}}, {"clock": 1}, parts=Parts(folder, files)))


def test_a_checkpoint_in_parts_is_one_like_any_other(tmp_path):
    store = CheckpointStore(tmp_path / "checkpoints", keep=1)
    folder = commit(store)
    assert store.ranks_folders() == []
    loaded, values = store.load(7), values_of(SHAPES)
    assert set(loaded.tensors) == {"model", "optimizer", "own"}
    for name, array in values["model"].items():
        assert np.array_equal(loaded.tensors["model"][name], array)
        assert loaded.tensors["model"][name].shape == array.shape
        assert np.array_equal(loaded.tensors["optimizer"][f"exp_avg/{name}"], values["exp_avg"][name])
    assert loaded.tensors["model"]["steps"].tolist() == [0, 1, 2]
    assert loaded.tensors["model"]["steps"].dtype == np.int64
    assert resolve_source(folder).keys() == loaded.tensors["model"].keys()
    light = store.load(7, whole=False)
    assert (set(light.tensors), light.folder, light.state) == ({"own"}, folder, {"clock": 1})
    with pytest.raises(UsageError, match=r"one of several files.*name their folder"):
        resolve_source(folder / "model-00001-of-00003.safetensors")


@pytest.mark.parametrize(("harm", "reason"), [
    (lambda folder: (folder / "model-00002-of-00003.safetensors").unlink(), "not there"),
    (lambda folder: (folder / "more").touch(), "not of this checkpoint"),
    (lambda folder: os.truncate(folder / "optimizer-00001-of-00003.safetensors", 20), "20 bytes, not the"),
])  # fmt: skip
def test_what_ranks_have_not_written_whole_is_not_committed(harm, reason, tmp_path):
    store = CheckpointStore(tmp_path, keep=1)
    commit(store, 5)
    folder = tmp_path / ranks_folder_name(6, "abc")
    files = write_small(folder)
    harm(folder)
    with pytest.raises(CheckpointFailed, match=reason):
        store.write(Checkpoint(6, {}, {}, parts=Parts(folder, files)))
    assert store.steps() == [5]
    assert store.ranks_folders() == [folder]
    store.discard(store.ranks_folders())
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000005"]


# ----------------------------------------------------------------------------------------------------------- the damage
def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def rename(folder: Path, old: str, new: str) -> None:
    (folder / old).rename(folder / new)


M2 = "model-00002-of-00003.safetensors"
DAMAGES = {
    "flipped": (lambda folder: flip(folder / M2), "hash differs"),
    "cut": (lambda folder: os.truncate(folder / M2, 100), "100 bytes, not"),
    "missing": (lambda folder: (folder / M2).unlink(), "missing"),
    "extra": (lambda folder: (folder / "model-00004-of-00003.safetensors").write_bytes(b""), "not in the manifest"),
}


@pytest.mark.parametrize("kind", DAMAGES)
@pytest.mark.parametrize("whole", [True, False])
def test_a_damaged_part_makes_the_run_fall_back(kind, whole, tmp_path):
    store = CheckpointStore(tmp_path, keep=2)
    commit(store, 5)
    folder, lines = commit(store, 6), []
    assert store.newest_good(lines.append, whole=whole).step == 6
    harm, reason = DAMAGES[kind]
    harm(folder)
    assert store.newest_good(lines.append, whole=whole).step == 5
    assert reason in lines[0]


def seal(folder: Path) -> None:
    """A manifest that agrees with whatever the folder holds: the parts contradict each other, not their hashes."""
    import hashlib

    (folder / "manifest.json").unlink()
    (folder / "state.json").write_text("{}")
    files = {path.name: {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
             for path in folder.iterdir()}  # fmt: skip
    (folder / "manifest.json").write_text(json.dumps({"format": 1, "step": 7, "files": files}))


def store_piece(path: Path, tensors: dict, shapes: dict[str, str]) -> None:
    save_file({name: np.zeros(size, np.float32) for name, size in tensors.items()}, path, metadata=shapes)


CONTRADICTIONS = {
    "a gap": (lambda f: store_piece(f / M2, {"w[5:11]": 6}, {"w": "4,3"}), "w: elements from 11 on are in no file"),
    "an overlap": (lambda f: store_piece(f / M2, {"w[4:12]": 8, "b[0:1]": 1}, {"w": "4,3", "b": "5"}),
                   "w: elements 4 to 5 are in model-00001.* and model-00002"),
    "twice": (lambda f: store_piece(f / M2, {"w[5:12]": 7, "b[0:1]": 1, "scale": 1}, {"w": "4,3", "b": "5"}),
              "scale has shape"),
    "another shape": (lambda f: store_piece(f / M2, {"w[5:12]": 7}, {"w": "3,4"}), "w has shape"),
    "beyond its end": (lambda f: store_piece(f / M2, {"w[5:13]": 8}, {"w": "4,3"}), "no piece of shape"),
    "another length": (lambda f: store_piece(f / M2, {"w[5:12]": 6}, {"w": "4,3"}), "no piece of shape"),
    "a shape that is none": (lambda f: store_piece(f / M2, {"w[5:12]": 7}, {"w": "4,x"}), "has no shape"),
    "a part too few": (lambda f: (f / M2).unlink(), "part 2 of model is missing"),
    "two sets": (lambda f: rename(f, M2, "model-00002-of-00004.safetensors"), "several sets"),
    "no moment": (lambda f: store_piece(f / "optimizer-00002-of-00003.safetensors", {"w": 1}, {}), "names no moment"),
}  # fmt: skip


@pytest.mark.parametrize("kind", CONTRADICTIONS)
@pytest.mark.parametrize("whole", [True, False])
def test_parts_that_contradict_each_other_are_damage_whatever_the_manifest_says(kind, whole, tmp_path):
    folder = commit(CheckpointStore(tmp_path, keep=1))
    seal(folder)
    load_folder(folder, whole=whole)  # the control
    harm, reason = CONTRADICTIONS[kind]
    harm(folder)
    seal(folder)
    with pytest.raises(CheckpointDamaged, match=reason):
        load_folder(folder, whole=whole)


def test_damage_travels_between_processes(tmp_path):
    error = pickle.loads(pickle.dumps(CheckpointDamaged(tmp_path, "a gap")))
    assert (error.folder, error.reason, "a gap" in str(error)) == (tmp_path, "a gap", True)


# -------------------------------------------------------------------------------------------------------- hostile files
def entry(**changes) -> dict:
    return {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}


HOSTILE = {
    "empty": b"",
    "short": b"\x01\x02",
    "a header longer than the file": struct.pack("<Q", 2**63) + b"{}",
    "not JSON": struct.pack("<Q", 2) + b"[}",
    "a list": struct.pack("<Q", 2) + b"[]",
    "deep": struct.pack("<Q", 200_000) + b"[" * 200_000,
    "not text": struct.pack("<Q", 2) + b"\xff\xff",
}
HEADERS = {
    "beyond the data": entry(data_offsets=[0, 16], shape=[4]),
    "before the data": entry(data_offsets=[-8, 0]),
    "backwards": entry(data_offsets=[8, 0]),
    "a hole": entry(data_offsets=[4, 8], shape=[1]),
    "a shape of another size": entry(shape=[3]),
    "negative lengths": entry(shape=[-1, -2]),
    "a huge shape": entry(shape=[2**62, 2**62]),
    "a length that is no number": entry(shape=["2"]),
    "a length that is true": entry(shape=[True, 2]),
    "an unknown type": entry(dtype="F7"),
    "no offsets": {"dtype": "F32", "shape": [2]},
    "no entry": 3,
}


def headed(header: dict | str) -> bytes:
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    return struct.pack("<Q", len(text)) + text + b"\0" * 8


@pytest.mark.parametrize("data", [
    *HOSTILE.values(), *(headed({"w": one}) for one in HEADERS.values()),
    headed({"w": entry(), "v": entry()}), headed({}), headed({"__metadata__": 3, "w": entry()}),
    headed('{"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, "w": 3}'),
], ids=[*HOSTILE, *HEADERS, "overlapping", "data of nobody", "metadata of no names", "a name twice"])  # fmt: skip
def test_a_hostile_header_is_refused_in_one_line(data, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(headed({"w": entry()}))
    assert TensorFile(path).read("w").tolist() == [0.0, 0.0], "the control"
    path.write_bytes(data)
    with pytest.raises(UsageError, match=r"not a readable \.safetensors file") as caught:
        TensorFile(path)
    assert "\n" not in str(caught.value)
    with pytest.raises(CheckpointDamaged):
        PartReader(tmp_path)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_whatever_bytes_are_changed_no_other_exception_comes(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("fuzz") / "model-00001-of-00001.safetensors"
    write_part(path.parent, 0, 1, lambda: [("model", "w", 0, np.ones(8, np.float32))], {"w": (8,)})
    content = bytearray(path.read_bytes())
    read = []
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    with contextlib.suppress(CheckpointDamaged), PartReader(path.parent) as reader:
        for kind in reader.kinds():
            for name in reader.names(kind):
                read.append(reader.whole(kind, name))
    assert all(array.dtype == np.float32 and array.nbytes <= len(content) for array in read)
