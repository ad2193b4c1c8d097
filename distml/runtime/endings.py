"""How a run is asked to end, and how its end does not hang, for every kind of job with a driver. No torch, no ray."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

from distml.runtime.authentication import STUCK_THREAD

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopSignals:
    """The first SIGINT or SIGTERM asks for a checkpoint and the end; the second ends at once.

    Before training there is nothing to write: the first one raises KeyboardInterrupt.

    Attributes:
        asked: whether one has come.
        is_training: whether a checkpoint can be asked for.
    """

    def __init__(self, ask: Callable[[], object] = lambda: None) -> None:
        self.ask, self.asked, self.is_training = ask, False, False

    @contextlib.contextmanager
    def handled(self) -> Iterator[None]:
        """Inside, signals come here; afterwards where they went before."""
        before = {number: signal.getsignal(number) for number in SIGNALS}
        self.take()
        try:
            yield
        finally:
            if threading.current_thread() is threading.main_thread():
                for number, handler in before.items():
                    signal.signal(number, handler)

    def take(self) -> None:
        """Set the handlers; again after Ray has started, which sets its own."""
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: object) -> None:
        if self.asked:
            os._exit(130)
        self.asked = True
        if not self.is_training:
            raise KeyboardInterrupt
        self.ask()


def record_of_end(error: BaseException, step: int | None = None) -> dict[str, Any]:
    """`status` and `error` of result.json for a run that an exception has ended.

    Args:
        step: where it was, for an exception that does not say.
    """
    if isinstance(error, KeyboardInterrupt):
        return {"status": "interrupted", "error": None}
    return {"status": "failed", "error": {
        "rank": getattr(error, "role", "driver"), "phase": getattr(error, "phase", "start"),
        "step": getattr(error, "step", step), "message": getattr(error, "message", str(error)),
    }}  # fmt: skip


def close_all(*closes: Callable[[], object]) -> None:
    """Call them all, whatever each raises: what matters was raised before, and the others must still be closed."""
    for close in closes:
        with contextlib.suppress(Exception):
            close()


def close_within(close: Callable[[], object], seconds: float) -> None:
    """End what lives on Ray, without waiting for a Ray that no longer answers."""
    closing = threading.Thread(target=close, name=STUCK_THREAD, daemon=True)
    closing.start()
    closing.join(seconds)
    if closing.is_alive():
        print(f"Ray did not end within {seconds:g} s; leaving it behind", file=sys.stderr, flush=True)
