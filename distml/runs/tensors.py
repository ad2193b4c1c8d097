"""The .safetensors format: a length, a JSON header, then the tensors' bytes.

Files are written here and not by `safetensors.numpy.save_file`, which takes the memory of arrays that are not
contiguous in the wrong order without a word, gives every file mode 0600, and leaves hashing and fsync to a second
pass. The library reads them; a test holds the two against each other.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

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


def write_tensors(file: HashingFile, tensors: Mapping[str, np.ndarray]) -> None:
    """Write named arrays as .safetensors, one after the other, without a copy of contiguous ones.

    Raises:
        ValueError: an array's type has no place in the format.
        OSError: the disk is full, for example.
    """
    check_tensors(tensors)
    # The widest types first, as the library does: every tensor then starts at a multiple of its item size.
    names = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    header, position = {}, 0
    for name in names:
        array = tensors[name]
        offsets = [position, position + array.nbytes]
        code = _CODES[array.dtype.newbyteorder("=")]
        header[name] = {"dtype": code, "shape": list(array.shape), "data_offsets": offsets}
        position += array.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(struct.pack("<Q", len(text)) + text)
    for name in names:
        array = np.asarray(tensors[name], dtype=tensors[name].dtype.newbyteorder("<"), order="C")
        if array.size:  # memoryview cannot cast an empty array
            file.write(array.reshape(-1).view(np.uint8).data)


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
        if name == "__metadata__":
            raise ValueError("a tensor cannot be named __metadata__")


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a .safetensors file, in memory of their own; bfloat16 comes as float32.

    Raises:
        UsageError: there is no such file, or it is damaged or of another format.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        try:
            return dict(load_file(os.fspath(path)))
        except TypeError:  # NumPy has no bfloat16
            return _read_widened(path)
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror or error}") from error
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path} is not a readable .safetensors file: {error}") from error


def _read_widened(path: Path) -> dict[str, np.ndarray]:
    from safetensors import deserialize

    arrays = {}
    for name, entry in deserialize(path.read_bytes()):  # type: ignore[no-untyped-call]
        if entry["dtype"] == "BF16":  # the upper half of a float32
            wide = np.frombuffer(entry["data"], dtype="<u2").astype(np.uint32) << 16
            arrays[name] = wide.view(np.float32).reshape(entry["shape"])
        else:
            kind = next(dtype for dtype, code in _CODES.items() if code == entry["dtype"])
            arrays[name] = np.frombuffer(entry["data"], dtype=kind).reshape(entry["shape"]).copy()
    return arrays
