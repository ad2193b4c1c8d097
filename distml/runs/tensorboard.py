"""Scalars for TensorBoard, without torch: of a run, and of the many members or trials of a job over jobs."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any


class TensorBoardWriter:
    """Writes one event file into a folder.

    Args:
        folder: made if it is not there.
        resumed_at: the step that the run continues from; what earlier event files hold after it is not shown any more.
    """

    def __init__(self, folder: Path, *, resumed_at: int | None = None) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        folder.mkdir(parents=True, exist_ok=True)
        self._writer = EventFileWriter(str(folder))
        if resumed_at is not None:
            start = SessionLog(status=SessionLog.START)
            self._writer.add_event(Event(step=resumed_at + 1, session_log=start))

    def scalars(self, step: int, values: Mapping[str, float | None], wall_time: float) -> None:
        """Write the values of one step; None is left out.

        Args:
            wall_time: seconds since 1970.
        """
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        entries = [Summary.Value(tag=name, simple_value=value) for name, value in values.items() if value is not None]
        if entries:
            self._writer.add_event(Event(wall_time=wall_time, step=step, summary=Summary(value=entries)))

    def flush(self) -> None:
        """Make everything readable."""
        self._writer.flush()

    def close(self) -> None:
        """Write what is left and close the file."""
        self._writer.close()

    def __enter__(self) -> TensorBoardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class TensorBoardRows:
    """Reports of one of many jobs, in a file that is open only while it is written, without a thread of its own.

    Args:
        folder: made with the first report; what an earlier process left there goes on.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def append(self, rows: Sequence[Mapping[str, object]]) -> None:
        """Write reports as metrics.jsonl has them: `step`, and metrics with a `/` in their names."""
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        events, now = [], time.time()
        for row in rows:
            values = [Summary.Value(tag=name, simple_value=value) for name, value in row.items()
                      if "/" in name and isinstance(value, int | float)]  # fmt: skip
            if values:
                events.append(Event(wall_time=now, step=int(str(row["step"])), summary=Summary(value=values)))
        self._write(events)

    def cut_back(self, step: int) -> None:
        """What was written of steps after this one is not shown any more."""
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        if self.folder.is_dir():
            self._write([Event(step=step + 1, session_log=SessionLog(status=SessionLog.START))])

    def _write(self, events: Sequence[Any]) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.summary.writer.record_writer import RecordWriter

        if not events:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        path = next(iter(sorted(self.folder.glob("events.out.tfevents.*"))), None)
        is_new = path is None
        path = path or self.folder / f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{os.getpid()}"
        with open(path, "ab") as file:
            writer = RecordWriter(file)
            for event in [Event(wall_time=time.time(), file_version="brain.Event:2")] * is_new + list(events):
                writer.write(event.SerializeToString())
