"""The run directory: who may write into it, and the small files in it.

    DIR/spec.yaml  environment.json  metrics.jsonl  result.json  checkpoints/  logs/  tensorboard/  report.html  lock

One driver process writes, from `RunDirectory.open` to `close`, under an flock on DIR/lock: the kernel drops it when
the process dies, so nothing is ever stale, whatever the file says. Any number of processes read.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import socket
import threading
import time
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Literal, get_args

from distml.errors import UsageError
from distml.runs.files import TEMPORARY_FILES, finite, strict_json, write_atomically

Status = Literal["running", "done", "goal_met", "goal_missed", "failed", "interrupted"]

_LOCK_TRIES, _LOCK_PAUSE_S = 4, 0.05
_OURS = re.compile(r"^distml\s*:", re.MULTILINE)


@dataclass(frozen=True)
class Holder:
    """The process that holds a run directory, as far as its lock file says."""

    host: str | None
    pid: int | None

    def __str__(self) -> str:
        return f"process {self.pid} on host {self.host}" if self.pid is not None else "another process"


@dataclass(frozen=True)
class Result:
    """What result.json holds.

    Attributes:
        step: version of the weights.
        wall_s: seconds of training, counted over resumes.
        metrics: the last value of each metric; None where it was not a finite number.
        best: the best evaluation, for example `{"metric": "eval/loss", "value": 0.1, "step": 300}`.
        checkpoint: the newest committed checkpoint, relative to the run directory.
        error: `{"rank", "phase", "step", "message"}` of a failed run.
        pid: process id of the driver that wrote last.
        host: where it ran.
    """

    status: Status = "running"
    step: int = 0
    wall_s: float = 0.0
    metrics: dict[str, Any] = field(default_factory=dict)
    best: dict[str, Any] | None = None
    checkpoint: str | None = None
    error: dict[str, Any] | None = None
    pid: int = 0
    host: str = ""


class ResultFile:
    """result.json: there from the start, replaced as a whole at every change."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()

    def read(self) -> Result | None:
        """The result so far; None before the run has started.

        Raises:
            UsageError: the file is not one of ours.
        """
        text = _text_of(self.path)
        if text is None:
            return None
        try:
            values = json.loads(text)
            known = {item.name for item in fields(Result)}
            result = Result(**{key: value for key, value in values.items() if key in known})
            _check_status(result.status)
        except (ValueError, TypeError, AttributeError) as error:
            raise UsageError(f"{self.path} is not a result of distml ({error})") from error
        return result

    def update(self, *, durable: bool = True, **changes: Any) -> Result:
        """Change the given fields of `Result`, and `pid` and `host` to this process.

        Args:
            durable: see `write_atomically`; False for frequent progress.

        Raises:
            TypeError: there is no such field.
            ValueError: no such status, or a value that JSON does not know.
        """
        _check_status(changes.get("status", "running"))
        with self._lock:
            process = {"pid": os.getpid(), "host": socket.gethostname()}
            result = replace(self.read() or Result(), **{**finite(changes), **process})
            write_atomically(self.path, strict_json(asdict(result), "result"), durable=durable)
        return result


class MetricsFile:
    """metrics.jsonl: one JSON object per report and line. A line counts once its newline is written."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: BinaryIO | None = None

    def append(self, row: dict[str, Any]) -> None:
        """Write one report, so that readers see it at once; numbers that are not finite become null."""
        if self._file is None:
            self._drop_torn_line()
            self._file = open(self.path, "ab")  # noqa: SIM115 (stays open until `close`)
        # In one write: a killed process leaves at most the last line torn.
        self._file.write(json.dumps(finite(row), allow_nan=False).encode() + b"\n")
        self._file.flush()

    def read(self) -> list[dict[str, Any]]:
        """All reports; a torn last line is not one.

        Raises:
            UsageError: a line is not a JSON object.
        """
        return [json.loads(line) for line in self._lines()]

    def cut_back(self, step: int) -> int:
        """Remove the reports of steps after `step` (-1: all), atomically, and a torn last line.

        Returns:
            How many reports were removed.
        """
        self.close()
        lines = self._lines()
        kept = [line for line in lines if json.loads(line).get("step", 0) <= step]
        if self.path.exists():
            write_atomically(self.path, b"".join(line + b"\n" for line in kept))
        return len(lines) - len(kept)

    def close(self) -> None:
        """Close the file; a later `append` opens it again."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _lines(self) -> list[bytes]:
        try:
            data = self.path.read_bytes()
        except FileNotFoundError:
            return []
        lines = data.split(b"\n")[:-1]  # after the last newline: nothing, or a torn line
        for number, line in enumerate(lines, 1):
            with contextlib.suppress(ValueError):
                if isinstance(json.loads(line), dict):
                    continue
            raise UsageError(f"{self.path}:{number}: not a JSON object; remove the line to go on without it")
        return lines

    def _drop_torn_line(self) -> None:
        """Otherwise the first new report would be glued to what a killed process left."""
        if self.path.exists():
            with open(self.path, "r+b") as file:
                file.truncate(file.read().rfind(b"\n") + 1)


class RunDirectory:
    """A run directory: its paths and small files; locked for writing when it comes from `open`.

    Attributes:
        path: the folder.
        moved_to: where `fresh` moved the folder that was there before.
    """

    def __init__(self, path: Path, *, lock: int | None = None, moved_to: Path | None = None) -> None:
        self.path, self.moved_to = path, moved_to
        self._lock = lock
        self.result = ResultFile(path / "result.json")
        self.metrics = MetricsFile(path / "metrics.jsonl")

    @classmethod
    def open(cls, path: Path | str, *, fresh: bool = False) -> RunDirectory:
        """Create or take over a run directory and lock it until `close` (or the end of a `with` block).

        Args:
            fresh: move what is there to DIR.1 (or the next free number) and begin in an empty folder.

        Raises:
            UsageError: it is in use, is a file, cannot be written, or holds something that is not a run; nothing in
                it was touched.
        """
        path = Path(path).expanduser()
        moved_to = None
        try:
            _refuse_foreign(path)
            path.mkdir(parents=True, exist_ok=True)
            lock = _take_lock(path)
            if fresh and any(entry.name != "lock" for entry in path.iterdir()):
                lock, moved_to = _move_aside(path, lock)
            for leftover in path.glob(TEMPORARY_FILES):
                leftover.unlink()
        except OSError as error:
            raise UsageError(f"cannot write the run directory {path}: {_cause(error)}; choose another --out") from error
        return cls(path, lock=lock, moved_to=moved_to)

    @classmethod
    def view(cls, path: Path | str) -> RunDirectory:
        """A run directory for reading: not locked, nothing created.

        Raises:
            UsageError: there is no run there.
        """
        path = Path(path).expanduser()
        if not path.is_dir():
            raise UsageError(f"{path} is not a run directory: there is no such folder")
        if not ((path / "spec.yaml").is_file() or (path / "result.json").is_file()):
            raise UsageError(f"{path} is not a run directory: it has neither spec.yaml nor result.json")
        return cls(path)

    def close(self) -> None:
        """Release the lock. The lock file stays: removing it would race with the next process."""
        self.metrics.close()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> RunDirectory:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def spec(self) -> Path:
        """The resolved spec; runs as it is."""
        return self.path / "spec.yaml"

    @property
    def environment(self) -> Path:
        """Versions, commit, hosts, transport chosen and why."""
        return self.path / "environment.json"

    @property
    def checkpoints(self) -> Path:
        """The root of the run's `CheckpointStore`."""
        return self.path / "checkpoints"

    @property
    def logs(self) -> Path:
        """ROLE-INDEX.log of each process."""
        return self.path / "logs"

    @property
    def tensorboard(self) -> Path:
        """Event files."""
        return self.path / "tensorboard"

    @property
    def report(self) -> Path:
        """What `show` writes."""
        return self.path / "report.html"

    @property
    def episode(self) -> Path:
        """What `show` writes of a run that acts."""
        return self.path / "episode.gif"

    def write_spec(self, text: str) -> None:
        """Write spec.yaml, atomically."""
        write_atomically(self.spec, text)

    def read_spec_text(self) -> str | None:
        """spec.yaml as it stands; None before it is written."""
        return _text_of(self.spec)

    def write_environment(self, values: dict[str, Any]) -> None:
        """Write environment.json, atomically."""
        write_atomically(self.environment, strict_json(finite(values), "environment"))

    def read_environment(self) -> dict[str, Any]:
        """environment.json; empty before it is written or when it is not readable."""
        values = _json_of(self.environment)
        return values if isinstance(values, dict) else {}

    def in_use(self) -> Holder | None:
        """Who holds the directory right now; None: nobody, so a status of `running` means that the driver died."""
        try:
            handle = os.open(self.path / "lock", os.O_RDONLY)
        except OSError:
            return None
        try:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return _holder(handle)
        except OSError:
            return None
        finally:
            os.close(handle)
        return None


def _refuse_foreign(path: Path) -> None:
    """Refuse what is not a folder, and a folder with content none of which is a run's."""
    if not path.exists():
        return
    if not path.is_dir():
        raise UsageError(f"{path} is a file, not a run directory; choose another --out")
    names = {entry.name for entry in path.iterdir()}
    result, lock = _json_of(path / "result.json"), _json_of(path / "lock")
    is_run = (
        not names
        or names == {"lock"}
        or _OURS.search(_text_of(path / "spec.yaml") or "") is not None
        or (isinstance(result, dict) and result.get("status") in get_args(Status))
        or (isinstance(lock, dict) and {"host", "pid"} <= lock.keys())
    )
    if not is_run:
        raise UsageError(f"{path} is not empty and is not a run directory; nothing was touched; choose another --out")


def _take_lock(path: Path) -> int:
    """The file descriptor that holds DIR/lock."""
    for attempt in range(1, _LOCK_TRIES + 1):
        handle = os.open(path / "lock", os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # A `fresh` elsewhere may have moved the folder away since `open`: then this is DIR.1's lock.
            if _is_same_file(handle, path / "lock"):
                os.ftruncate(handle, 0)
                os.pwrite(handle, json.dumps({"host": socket.gethostname(), "pid": os.getpid()}).encode(), 0)
                return handle
        except BlockingIOError:
            if attempt == _LOCK_TRIES:
                holder = _holder(handle)
                os.close(handle)
                stop = f"stop it (kill {holder.pid})" if holder.pid is not None else "stop it"
                message = f"{path} is in use by {holder}; wait until it ends, {stop}, or choose another --out"
                raise UsageError(message) from None
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)
        time.sleep(_LOCK_PAUSE_S)  # a reader's `in_use` holds it for a moment
    raise UsageError(f"{path} is being moved by another process; try again")


def _move_aside(path: Path, lock: int) -> tuple[int, Path]:
    """Rename a locked folder to DIR.1, DIR.2, …; begin an empty one. Returns the new lock and the old folder."""
    try:
        number = 1
        while os.path.lexists(f"{path}.{number}"):
            number += 1
        target = path.with_name(f"{path.name}.{number}")
        path.rename(target)
        path.mkdir()
        return _take_lock(path), target
    finally:
        os.close(lock)


def _is_same_file(handle: int, path: Path) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(handle), path.stat())
    return False


def _holder(handle: int) -> Holder:
    """Who wrote the lock file; it may not have been written yet."""
    with contextlib.suppress(ValueError, KeyError, TypeError):
        values = json.loads(os.pread(handle, 4096, 0))
        return Holder(str(values["host"]), int(values["pid"]))
    return Holder(None, None)


def _check_status(status: object) -> None:
    if status not in get_args(Status):
        raise ValueError(f"status {status!r} is not one of {', '.join(get_args(Status))}")


def _text_of(path: Path) -> str | None:
    """A small file's text; None when it is missing."""
    try:
        return path.read_text(errors="replace")
    except (FileNotFoundError, IsADirectoryError):
        return None
    except OSError as error:
        raise UsageError(f"cannot read {path}: {_cause(error)}") from error


def _json_of(path: Path) -> Any:
    """A small JSON file's value; None when it is missing or is not JSON."""
    text = _text_of(path)
    with contextlib.suppress(ValueError):
        return json.loads(text or "")
    return None


def _cause(error: OSError) -> str:
    return error.strerror or str(error)
