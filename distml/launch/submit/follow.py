"""A job's log as it grows, over connections that may be cut.

A thread reads one connection at a time and puts what comes into a queue; the caller's thread waits there, with a limit,
asks for the job's state when it stays empty, and connects again when the connection is gone. A connection brings the
log from its beginning: the lines that were given out are counted and left out. The log ends when the job is over and a
connection has ended by itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator

from distml.launch.submit.contact import NotReached
from distml.launch.submit.state import ClusterError, JobState

SILENCE_S = 5.0  # of a log, until the job is asked for
MAX_SILENCES = 2  # of a job that is over, until its log counts as complete
OUT_OF_REACH_S = 60.0
RETRY_S = 1.0


class Cut(Exception):
    """The connection has gone."""


class Clock:
    """When the cluster was last heard."""

    def __init__(self) -> None:
        self.heard = time.monotonic()

    def hear(self) -> None:
        self.heard = time.monotonic()

    @property
    def silence(self) -> float:
        """Seconds."""
        return time.monotonic() - self.heard


def followed(
    tail: Callable[[], AsyncIterator[str]], status: Callable[[], JobState], retry_s: float = RETRY_S,
    silence_s: float = SILENCE_S, out_of_reach_s: float = OUT_OF_REACH_S,
) -> Iterator[str]:  # fmt: skip
    """Whole lines, without their ends.

    Args:
        tail: opens a connection; pieces of the log from its beginning.
        status: asks for the job.

    Raises:
        UsageError: there is no such job.
        ClusterError: nothing was heard of the cluster for `out_of_reach_s`.
    """
    status()
    given, clock = 0, Clock()
    while True:
        try:
            for number, line in enumerate(_lines(tail, status, clock, silence_s)):
                if number >= given:
                    given += 1
                    yield line
            if status().is_over:
                return
        except (Cut, NotReached, ClusterError) as error:
            if clock.silence > out_of_reach_s:
                raise ClusterError(
                    f"nothing was heard of the cluster for {out_of_reach_s:g} s ({error}); the job may go on: follow "
                    "it again with 'distml logs -f'"
                ) from None
        time.sleep(retry_s)


def _lines(
    tail: Callable[[], AsyncIterator[str]], status: Callable[[], JobState], clock: Clock, silence_s: float
) -> Iterator[str]:
    """Of one connection; the last one may lack its end."""
    rest = ""
    for piece in _pieces(tail, status, clock, silence_s):
        *lines, rest = (rest + piece).split("\n")
        yield from lines
    if rest and status().is_over:
        yield rest


def _pieces(
    tail: Callable[[], AsyncIterator[str]], status: Callable[[], JobState], clock: Clock, silence_s: float
) -> Iterator[str]:
    connection = _Connection(tail)
    silences = 0
    try:
        while silences < MAX_SILENCES:
            try:
                piece = connection.next(silence_s)
            except queue.Empty:
                silences += status().is_over
                clock.hear()
                continue
            if piece is None:
                return
            clock.hear()
            yield piece
    finally:
        connection.close()


class _Connection:
    """One connection, read on a thread of its own."""

    def __init__(self, tail: Callable[[], AsyncIterator[str]]) -> None:
        self._tail = tail
        self._found: queue.SimpleQueue[str | Exception | None] = queue.SimpleQueue()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._read, name="distml-follow", daemon=True)
        self._thread.start()

    def next(self, seconds: float) -> str | None:
        """The next piece; None: that was all.

        Raises:
            queue.Empty: nothing came in time.
            Cut: the connection has gone.
        """
        found = self._found.get(timeout=seconds)
        if isinstance(found, Exception):
            raise Cut(f"{type(found).__name__}: {found}") from found
        return found

    def close(self) -> None:
        """Without waiting: the other side may not answer."""
        with contextlib.suppress(RuntimeError):  # it has ended by itself
            self._loop.call_soon_threadsafe(self._cancel)

    def _cancel(self) -> None:
        for task in asyncio.all_tasks(self._loop):
            task.cancel()

    def _read(self) -> None:
        try:
            self._loop.run_until_complete(self._pump())
            self._found.put(None)
        except asyncio.CancelledError:
            pass
        except Exception as error:
            self._found.put(error)
        finally:
            self._loop.close()

    async def _pump(self) -> None:
        async for piece in self._tail():
            self._found.put(piece)
