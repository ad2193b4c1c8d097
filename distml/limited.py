"""Waits that end."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def within(seconds: float, awaited: str, call: Callable[[], T]) -> T:
    """What `call` returns or raises, on a thread: not every library's waits have limits.

    Raises:
        TimeoutError: it takes longer; the message names what was awaited.
    """
    answers: list[T] = []
    errors: list[BaseException] = []

    def work() -> None:
        try:
            answers.append(call())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work, name="distml-limited", daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not answers:
        raise TimeoutError(f"waited {seconds:g} s for {awaited}")
    return answers[0]
