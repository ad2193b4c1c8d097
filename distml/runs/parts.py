"""A checkpoint in parts: each rank writes what it holds, and anybody reads the elements that he wants.

    rank r's pieces ──▶ write_part ──▶ model-0000r-of-0000N.safetensors, optimizer-0000r-of-0000N.safetensors
    any rank of any run ◀── read(kind, name, start, stop) ── PartReader ◀── all files of a folder, mapped into memory

What lies where is said by logical index alone: a parameter that one rank has whole stands under its own name in its
own shape; a piece of it is one-dimensional and stands under `NAME[start:stop]`, in elements of the flattened parameter,
and its file's header says the whole parameter's shape. So nothing of a checkpoint depends on how many ranks wrote it or
where they cut, and a folder with a single `model.safetensors` reads the same. Optimiser's tensors are `MOMENT/NAME`.

Neither side ever has more in memory than one tensor besides what it asked for. No torch here.
"""

from __future__ import annotations

import bisect
import contextlib
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from distml.errors import UsageError
from distml.runs.files import fsync_folder
from distml.runs.tensors import TensorFile, TensorWriter, new_file, widest_first

__all__ = ["MODEL", "OPTIMIZER", "CheckpointDamaged", "Files", "PartReader", "Piece", "is_part", "write_part"]

MODEL, OPTIMIZER = "model", "optimizer"  # files' stems; MODEL is also the kind of the weights themselves
_FILE = re.compile(rf"({MODEL}|{OPTIMIZER})(?:-(\d+)-of-(\d+))?\.safetensors")
_PIECE = re.compile(r"(.+)\[(\d+):(\d+)\]", re.DOTALL)
_FLOAT = np.dtype(np.float32)
Shape = tuple[int, ...]
# (kind, parameter's name, first of its elements, the elements: 1-D float32); kind is "model" or a moment's name.
Piece = tuple[str, str, int, np.ndarray]
Files = dict[str, dict[str, Any]]


class CheckpointDamaged(UsageError):
    """A checkpoint does not agree with its manifest, or with itself."""

    def __init__(self, folder: Path, reason: str) -> None:
        self.folder, self.reason = folder, reason
        super().__init__(f"checkpoint {folder} is damaged ({reason})")

    def __reduce__(self) -> tuple[Any, ...]:
        """Between processes an exception travels as the arguments that make it anew."""
        return type(self), (self.folder, self.reason)


def is_part(file_name: str) -> bool:
    """Whether it is one of several files that hold a model or its optimiser's state together."""
    match = _FILE.fullmatch(file_name)
    return match is not None and match[2] is not None


# -------------------------------------------------------------------------------------------------------------- writing
def write_part(
    folder: Path, index: int, count: int, pieces: Callable[[], Iterable[Piece]], shapes: Mapping[str, Shape],
    others: Mapping[str, np.ndarray] | None = None,
) -> Files:  # fmt: skip
    """Write one rank's part into a folder that others write theirs into, durably.

    Args:
        index: the rank.
        count: ranks.
        pieces: gives this rank's pieces; called twice, for the header and for the values, which are let go one by one.
        shapes: of the parameters that pieces are of.
        others: further tensors of the model, whole.

    Returns:
        For the manifest: file name to `{"sha256", "bytes"}`.

    Raises:
        OSError: the disk is full, for example; what has been written stays.
    """
    folder.mkdir(parents=True, exist_ok=True)
    others = others or {}
    wide = [name for name in widest_first(others) if others[name].dtype.itemsize >= _FLOAT.itemsize]
    narrow = [name for name in widest_first(others) if name not in wide]
    announced, cut = announce(pieces(), shapes)
    before, after = ({name: (others[name].dtype, others[name].shape) for name in names} for names in (wide, narrow))
    announced[MODEL] = before | announced[MODEL] | after
    files: Files = {}
    with contextlib.ExitStack() as opened:
        writers = {}
        for stem in announced:
            path = folder / f"{stem}-{index + 1:05d}-of-{count:05d}.safetensors"
            file = opened.enter_context(new_file(path, files))
            writers[stem] = TensorWriter(file, announced[stem], cut[stem])
        for name in wide:
            writers[MODEL].write(name, others[name])
        for kind, name, first, values in filter(has_elements, pieces()):
            stored, _ = stored_as(kind, name, first, values.size, shapes[name])
            writers[stem_of(kind)].write(stored, values)
        for name in narrow:
            writers[MODEL].write(name, others[name])
        for writer in writers.values():
            writer.end()
    fsync_folder(folder)
    return files


def announce(
    pieces: Iterable[Piece], shapes: Mapping[str, Shape]
) -> tuple[dict[str, dict[str, tuple[np.dtype[Any], Shape]]], dict[str, dict[str, str]]]:
    """For each stem: type and shape of what its file will have, and the shapes of parameters that are in it cut."""
    announced: dict[str, dict[str, tuple[np.dtype[Any], Shape]]] = {MODEL: {}, OPTIMIZER: {}}
    cut: dict[str, dict[str, str]] = {MODEL: {}, OPTIMIZER: {}}
    for kind, name, first, values in filter(has_elements, pieces):
        stored, shape = stored_as(kind, name, first, values.size, shapes[name])
        announced[stem_of(kind)][stored] = _FLOAT, shape
        if values.size < math.prod(shapes[name]):
            cut[stem_of(kind)][name] = ",".join(map(str, shapes[name]))
    return announced, cut


def has_elements(piece: Piece) -> bool:
    """A rank beyond a parameter's last element has none of it."""
    return bool(piece[3].size)


def stem_of(kind: str) -> str:
    """The stem of the file that pieces of this kind are in."""
    return MODEL if kind == MODEL else OPTIMIZER


def stored_as(kind: str, name: str, first: int, numel: int, shape: Shape) -> tuple[str, Shape]:
    """(name, shape) in the file of elements [first, first + numel) of a parameter."""
    prefix = "" if kind == MODEL else f"{kind}/"
    if (first, numel) == (0, math.prod(shape)):
        return f"{prefix}{name}", tuple(shape)
    return f"{prefix}{name}[{first}:{first + numel}]", (numel,)


# -------------------------------------------------------------------------------------------------------------- reading
@dataclass(frozen=True)
class _Stored:
    """Elements [start, stop) of a tensor: where they are."""

    start: int
    stop: int
    file: TensorFile
    name: str  # in that file


@dataclass
class _Tensor:
    """One tensor, in as many files as there are: sorted pieces without overlaps."""

    shape: Shape
    pieces: list[_Stored]


class PartReader:
    """The model's and the optimiser's tensors of a checkpoint's folder, however many files hold them.

    Raises:
        CheckpointDamaged: a file cannot be read, is missing, or says something that another one contradicts.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._index: dict[str, dict[str, _Tensor]] = {}
        try:
            names = sorted(name for name in os.listdir(folder) if _FILE.fullmatch(name))
            self._files = {name: TensorFile(folder / name) for name in names}
        except OSError as error:
            raise CheckpointDamaged(folder, error.strerror or str(error)) from error
        except UsageError as error:
            raise CheckpointDamaged(folder, str(error)) from error
        self._check_names()
        for name, file in self._files.items():
            self._enter(file, name.startswith(MODEL))
        for tensors in self._index.values():
            for name, tensor in tensors.items():
                self._check_overlaps(name, tensor)

    # -- opening
    def _check_names(self) -> None:
        """Of several files there must be all."""
        for stem in (MODEL, OPTIMIZER):
            found = [match for name in self._files if (match := _FILE.fullmatch(name)) is not None and match[1] == stem]
            counts = {match[3] for match in found}
            if len(counts) > 1:
                raise self._damaged(f"{stem} files are of several sets: {sorted(match[0] for match in found)}")
            expected = range(1, int(counts.pop() or 0) + 1) if counts else range(0)
            there = {int(match[2]) for match in found if match[2] is not None}
            for number in sorted(there ^ set(expected)):
                raise self._damaged(f"part {number} of {stem} is {'missing' if number in expected else 'too many'}")

    def _enter(self, file: TensorFile, is_model: bool) -> None:
        for stored_name, own_shape in file.shapes.items():
            kind, separator, full_name = (MODEL, "/", stored_name) if is_model else stored_name.partition("/")
            if not separator:
                raise self._damaged(f"{file.path.name}: {stored_name!r} names no moment")
            name, shape, start, stop = full_name, own_shape, 0, math.prod(own_shape)
            match = _PIECE.fullmatch(full_name)
            if match is not None and match[1] in file.metadata:
                name, shape, start, stop = self._piece(file, match, own_shape)
            tensor = self._index.setdefault(kind, {}).setdefault(name, _Tensor(shape, []))
            if tensor.shape != shape:
                raise self._damaged(f"{name} has shape {tensor.shape} and, in {file.path.name}, {shape}")
            tensor.pieces.append(_Stored(start, stop, file, stored_name))

    def _piece(self, file: TensorFile, match: re.Match[str], own_shape: Shape) -> tuple[str, Shape, int, int]:
        """(parameter, its shape, start, stop) of what a file calls `NAME[start:stop]`."""
        try:
            shape = tuple(int(length) for length in file.metadata[match[1]].split(",") if length)
            start, stop = int(match[2]), int(match[3])
        except ValueError as error:
            raise self._damaged(f"{file.path.name}: {match[0]} has no shape ({error})") from error
        if min(shape, default=0) < 0 or not 0 <= start <= stop <= math.prod(shape) or own_shape != (stop - start,):
            raise self._damaged(f"{file.path.name}: {match[0]} is no piece of shape {shape}")
        return match[1], shape, start, stop

    def _check_overlaps(self, name: str, tensor: _Tensor) -> None:
        tensor.pieces.sort(key=lambda piece: (piece.start, piece.stop))
        for one, other in zip(tensor.pieces, tensor.pieces[1:], strict=False):
            if other.start < one.stop:
                files = f"{one.file.path.name} and {other.file.path.name}"
                raise self._damaged(f"{name}: elements {other.start} to {min(one.stop, other.stop)} are in {files}")

    def _damaged(self, reason: str) -> CheckpointDamaged:
        return CheckpointDamaged(self.folder, reason)

    # -- what there is
    def kinds(self) -> list[str]:
        """ "model", where there is one, and the moments' names."""
        return sorted(self._index)

    def names(self, kind: str) -> list[str]:
        """The tensors of a kind."""
        return sorted(self._index.get(kind, {}))

    def shapes(self, kind: str) -> dict[str, Shape]:
        """Of all tensors of a kind."""
        return {name: tensor.shape for name, tensor in self._index.get(kind, {}).items()}

    def check(self) -> None:
        """Whether every tensor's elements are all there.

        Raises:
            CheckpointDamaged: some are in no file.
        """
        for tensors in self._index.values():
            for name, tensor in tensors.items():
                for _ in self._covering(name, tensor, 0, math.prod(tensor.shape)):
                    pass

    # -- values
    def read(self, kind: str, name: str, start: int, stop: int) -> np.ndarray | None:
        """Elements [start, stop) of a flattened tensor as float32; None: there is no such tensor.

        Raises:
            CheckpointDamaged: some of them are in no file.
        """
        tensor = self._index.get(kind, {}).get(name)
        if tensor is None:
            return None
        values = np.empty(stop - start, _FLOAT)
        for piece, first, last in self._covering(name, tensor, start, stop):
            values[first - start : last - start] = piece.file.read(piece.name, first - piece.start, last - piece.start)
        return values

    def whole(self, kind: str, name: str) -> np.ndarray:
        """A tensor in its own shape; of its own type where one file has it whole, else float32.

        Raises:
            KeyError: there is no such tensor.
            CheckpointDamaged: some of it is in no file.
        """
        tensor = self._index[kind][name]
        first = tensor.pieces[0]
        if first.stop - first.start == math.prod(tensor.shape):
            return first.file.read(first.name).reshape(tensor.shape)
        values = self.read(kind, name, 0, math.prod(tensor.shape))
        assert values is not None
        return values.reshape(tensor.shape)

    def _covering(self, name: str, tensor: _Tensor, start: int, stop: int) -> Iterator[tuple[_Stored, int, int]]:
        """The pieces that elements [start, stop) are in, each with what of them it has."""
        index = bisect.bisect_right(tensor.pieces, start, key=lambda piece: piece.stop)
        for piece in tensor.pieces[index:]:
            if start >= stop or piece.start > start:
                break
            last = min(piece.stop, stop)
            yield piece, start, last
            start = last
        if start < stop:
            raise self._damaged(f"{name}: elements from {start} on are in no file")

    # -- closing
    def __enter__(self) -> PartReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._index, self._files = {}, {}  # the last reference unmaps a file
