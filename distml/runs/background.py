"""One thread that writes what the training thread hands over, with room for one waiting item.

    caller  put(item) ──▶ waiting (at most one) ──▶ thread: work(item)
            put, wait ◀── the first failure

Who waits for whom: `put` returns at once, except for an important item that finds another important one waiting: it
waits until the thread has taken that. The thread waits for items and ends at `close`. It is a daemon: a process that
must leave at once leaves, and what it was writing stays uncommitted.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

Item = TypeVar("Item")


class BackgroundWriter(Generic[Item]):
    """Calls `work` for the items handed over, in their order, on a thread of its own."""

    def __init__(self, work: Callable[[Item], None]) -> None:
        self._work = work
        self._changed = threading.Condition()
        self._waiting: tuple[Item, bool] | None = None
        self._is_busy = self._is_closed = False
        self._failure: BaseException | None = None
        self._thread: threading.Thread | None = None

    def put(self, item: Item, *, important: bool) -> bool:
        """Hand an item over; the newest replaces a waiting one, unless only the waiting one is important.

        Returns:
            Whether the item is in line. False: an important one waits, and this one was let go.

        Raises:
            BaseException: an earlier item failed; this one is not in line.
        """
        with self._changed:
            self._raise_failure()
            if self._has_important() and not important:
                return False
            while self._has_important():
                self._changed.wait()
                self._raise_failure()
            self._waiting = (item, important)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="checkpoint-writer", daemon=True)
                self._thread.start()
            self._changed.notify_all()
            return True

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until everything handed over is written.

        Returns:
            Whether it is; False after `timeout_s` seconds.

        Raises:
            BaseException: an item failed.
        """
        with self._changed:
            is_done = self._changed.wait_for(lambda: self._waiting is None and not self._is_busy, timeout_s)
            self._raise_failure()
            return is_done

    def close(self) -> None:
        """Write what is in line, end the thread, and raise what failed."""
        try:
            self.wait()
        finally:
            with self._changed:
                self._is_closed = True
                self._changed.notify_all()
            if self._thread is not None:
                self._thread.join()
                self._thread = None
            self._is_closed = False

    def _has_important(self) -> bool:
        return self._waiting is not None and self._waiting[1]

    def _raise_failure(self) -> None:
        """Once: afterwards the writer goes on, with the disk cleared perhaps."""
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting is not None or self._is_closed)
                if self._waiting is None:
                    return
                (item, _), self._waiting, self._is_busy = self._waiting, None, True
                self._changed.notify_all()
            failure: BaseException | None = None
            try:
                self._work(item)
            except BaseException as error:
                failure = error
            del item  # a checkpoint's memory is the caller's again, not this thread's until the next one
            with self._changed:
                self._is_busy = False
                self._failure = self._failure or failure
                self._changed.notify_all()
