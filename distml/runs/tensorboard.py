"""Scalars for TensorBoard, without torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType


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
