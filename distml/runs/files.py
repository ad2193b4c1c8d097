"""Files that are either the old ones or the new ones, never halves: what a killed writer leaves behind is readable."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np

TEMPORARY_FILES = ".*.tmp"


def write_atomically(path: Path, data: str | bytes, *, durable: bool = True) -> None:
    """Replace `path` by `data` in one rename; its mode follows the umask.

    Args:
        durable: also survive a power cut (fsync of the file and of its folder), not just a killed process.

    Raises:
        OSError: it cannot be written; `path` is as it was.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            if durable:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    if durable:
        fsync_folder(path.parent)


def fsync_folder(path: Path) -> None:
    """Make the names in a folder durable; file systems that have no such call are left as they are."""
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


def strict_json(value: Any, what: str) -> str:
    """`value` as JSON that reads back as the same values (tuples become lists).

    Raises:
        ValueError: a key that is not text, a number that is not finite, or a value that JSON does not know; named by
            its place under `what`.
    """
    _check_json(value, what)
    return json.dumps(value, indent=1, allow_nan=False) + "\n"


def _check_json(value: Any, where: str) -> None:
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise ValueError(f"{where} has the key {key!r}; JSON keys are text")
            _check_json(item, f"{where}.{key}")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            _check_json(item, f"{where}[{index}]")
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{where} is {value}; JSON has only finite numbers")
    elif value is not None and not isinstance(value, bool | int | float | str):
        raise ValueError(f"{where} is of type {type(value).__name__}, which JSON does not know")


def finite(value: Any) -> Any:
    """`value` with NaN and infinities as None and NumPy scalars as Python numbers, through dicts and lists."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
