"""The .safetensors format: a length, a JSON header, then the tensors' bytes.

Files are written here and not by `safetensors.numpy.save_file`, which takes the memory of arrays that are not
contiguous in the wrong order without a word, gives every file mode 0600, and leaves hashing and fsync to a second
pass. They are read here as well: of large ones only some elements are wanted, and a header is not believed before it
agrees with the file's size. Tests hold both against the library.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from distml.errors import UsageError

_CODES = {
    np.dtype(kind): code
    for kind, code in {
        "bool": "BOOL", "int8": "I8", "int16": "I16", "int32": "I32", "int64": "I64",
        "uint8": "U8", "uint16": "U16", "uint32": "U32", "uint64": "U64",
        "float16": "F16", "float32": "F32", "float64": "F64",
    }.items()
}  # fmt: skip
_TYPES: dict[str, np.dtype[Any]] = {code: kind.newbyteorder("<") for kind, code in _CODES.items()}
_TYPES["BF16"] = np.dtype("<u2")  # the upper half of a float32
_LONGEST_HEADER = 100_000_000  # bytes; the library's limit
METADATA = "__metadata__"


class HashingFile:
    """A file that knows the SHA-256 and the number of the bytes written to it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._hash, self.size = file, hashlib.sha256(), 0

    def write(self, data: bytes | memoryview) -> None:
        """Write all of `data`."""
        self._file.write(data)
        self._hash.update(data)
        self.size += len(data)

    @property
    def sha256(self) -> str:
        """The hash so far, in hexadecimal."""
        return self._hash.hexdigest()


@contextlib.contextmanager
def new_file(path: Path, files: dict[str, dict[str, Any]]) -> Iterator[HashingFile]:
    """A file that is durable and entered into a manifest's `files` when the block ends."""
    with open(path, "xb") as raw:
        file = HashingFile(raw)
        yield file
        raw.flush()
        os.fsync(raw.fileno())
    files[path.name] = {"sha256": file.sha256, "bytes": file.size}


def write_tensors(file: HashingFile, tensors: Mapping[str, np.ndarray]) -> None:
    """Write named arrays as .safetensors, one after the other, without a copy of contiguous ones.

    Raises:
        ValueError: an array's type has no place in the format.
        OSError: the disk is full, for example.
    """
    check_tensors(tensors)
    names = widest_first(tensors)
    writer = TensorWriter(file, {name: (tensors[name].dtype, tensors[name].shape) for name in names})
    for name in names:
        writer.write(name, tensors[name])


def widest_first(tensors: Mapping[str, np.ndarray]) -> list[str]:
    """The order of the library's files: every tensor then starts at a multiple of its item size."""
    return sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))


class TensorWriter:
    """Writes a file's header, then its arrays as they come: no two have to be in memory at once.

    Args:
        announced: type and shape of each, in the order in which they will come.
        metadata: text by name, for the header.
    """

    def __init__(
        self, file: HashingFile, announced: Mapping[str, tuple[np.dtype[Any], tuple[int, ...]]],
        metadata: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        self._file, self._awaited = file, list(announced.items())[::-1]
        header: dict[str, Any] = {METADATA: dict(metadata)} if metadata else {}
        position = 0
        for name, (kind, shape) in announced.items():
            stop = position + math.prod(shape) * kind.itemsize
            code = _CODES[kind.newbyteorder("=")]
            header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [position, stop]}
            position = stop
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        file.write(struct.pack("<Q", len(text)) + text)

    def write(self, name: str, array: np.ndarray) -> None:
        """The next array, or its elements in one dimension.

        Raises:
            ValueError: another one was announced.
        """
        awaited, (kind, shape) = self._awaited.pop() if self._awaited else ("nothing", (array.dtype, array.shape))
        if (name, array.dtype, array.size) != (awaited, kind, math.prod(shape)):
            raise ValueError(f"tensor {name} of {array.size} x {array.dtype} came, announced was {awaited} {shape}")
        stored = np.asarray(array, dtype=kind.newbyteorder("<"), order="C")
        if stored.size:  # memoryview cannot cast an empty array
            self._file.write(stored.reshape(-1).view(np.uint8).data)

    def end(self) -> None:
        """All have come.

        Raises:
            ValueError: not so.
        """
        if self._awaited:
            raise ValueError(f"{len(self._awaited)} tensors were announced and have not come: {self._awaited[-1][0]} …")


def check_tensors(tensors: Mapping[str, np.ndarray]) -> None:
    """Refuse arrays that the format cannot hold.

    Raises:
        ValueError: names the array.
    """
    for name, array in tensors.items():
        if not isinstance(array, np.ndarray):
            raise ValueError(f"tensor {name} is of type {type(array).__name__}, not a NumPy array")
        if array.dtype.newbyteorder("=") not in _CODES:
            raise ValueError(f"tensor {name} has type {array.dtype}, which .safetensors does not hold")
        if name == METADATA:
            raise ValueError(f"a tensor cannot be named {METADATA}")


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a .safetensors file, in memory of their own; bfloat16 comes as float32.

    Raises:
        UsageError: there is no such file, or it is damaged or of another format.
    """
    file = TensorFile(path)
    return {name: file.read(name).reshape(shape) for name, shape in file.shapes.items()}


class TensorFile:
    """A .safetensors file, mapped into memory: only what is read of it is fetched from the disk.

    Attributes:
        shapes: of each tensor.
        metadata: the header's text by name.

    Raises:
        UsageError: it cannot be read, or its header is not what the format and the file's size allow.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._bytes: np.ndarray = np.memmap(path, np.uint8, "r") if path.stat().st_size else np.zeros(0, np.uint8)
        except OSError as error:
            raise UsageError(f"cannot read {path}: {error.strerror or error}") from error
        try:
            self._start, header = self._read_header()
            metadata = header.pop(METADATA, {})
            self.metadata = {str(name): _expect(str, text) for name, text in _expect(dict, metadata).items()}
            self._places = {name: _Place.of(entry) for name, entry in header.items()}
            self._check_places()
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise UsageError(f"{path} is not a readable .safetensors file: {error}") from error
        self.shapes = {name: place.shape for name, place in self._places.items()}

    def _read_header(self) -> tuple[int, dict[str, Any]]:
        """(where the data starts, the header)."""
        size = self._bytes.size
        if size < 8:
            raise ValueError(f"it has {size} bytes")
        length = int(struct.unpack("<Q", self._bytes[:8].tobytes())[0])
        if length > min(size - 8, _LONGEST_HEADER):
            raise ValueError(f"its header of {length} bytes does not fit into {size} bytes")
        text = self._bytes[8 : 8 + length].tobytes().decode()
        return 8 + length, _expect(dict, json.loads(text, object_pairs_hook=_unique))

    def _check_places(self) -> None:
        """All of the data belongs to exactly one tensor."""
        position = 0
        for name, place in sorted(self._places.items(), key=lambda item: (item[1].start, item[1].stop)):
            if place.start != position:
                raise ValueError(f"tensor {name} starts at byte {place.start} of the data, not at {position}")
            position = place.stop
        if position != self._bytes.size - self._start:
            raise ValueError(f"its tensors have {position} bytes, its data {self._bytes.size - self._start}")

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Elements [start, stop) of a flattened tensor, in memory of their own; bfloat16 comes as float32."""
        place = self._places[name]
        stop = place.numel if stop is None else stop
        if not 0 <= start <= stop <= place.numel:
            raise IndexError(f"{name} has {place.numel} elements; asked for are {start} to {stop}")
        first, size = self._start + place.start, place.kind.itemsize
        stored = self._bytes[first + start * size : first + stop * size].view(place.kind)
        if place.code == "BF16":
            return (stored.astype(np.uint32) << 16).view(np.float32)
        return np.array(stored, dtype=place.kind.newbyteorder("="))


@dataclass(frozen=True)
class _Place:
    """Bytes [start, stop) of a file's data."""

    code: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @classmethod
    def of(cls, entry: Any) -> _Place:
        """From a header.

        Raises:
            ValueError, TypeError, KeyError: it is none.
        """
        start, stop = (_expect(int, value) for value in entry["data_offsets"])
        shape = tuple(_expect(int, length) for length in _expect(list, entry["shape"]))
        place = cls(_expect(str, entry["dtype"]), shape, start, stop)
        if place.code not in _TYPES:
            raise ValueError(f"type {place.code} is not known")
        if min((0, start, *shape)) < 0 or stop - start != place.numel * place.kind.itemsize:
            raise ValueError(f"bytes {start} to {stop} do not hold {place.code} of shape {list(shape)}")
        return place

    @property
    def kind(self) -> np.dtype[Any]:
        return _TYPES[self.code]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; a name that comes twice is refused."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name comes twice in its header")
    return found


def _expect(kind: type, value: Any) -> Any:
    """`value`, which must be of `kind`."""
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is int):
        raise ValueError(f"{value!r:.80} where the header has {kind.__name__}")
    return value
