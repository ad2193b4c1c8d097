"""The order in which asynchronous workers' sums came in (see `tasks.base.Accumulator`); pure bookkeeping.

    worker: base at place p, sums since ── push (p, base, sums) ──▶ tally: the sums get the next place
    worker: fold what is new, one after the other ◀── answer: all that came in after p

A base at place p is the fold of the first p sums onto what the run began with, whoever folded it: so all bases at a
place are the same, bit for bit, and what anybody pushed is in every later base once and only once. Sums say which base
they are relative to, so that they may be late. The tally keeps the newest base that somebody has pushed and the sums
after it: at most W + 1, since of W + 1 pushes two are one worker's, and the later one brings a base that has all from
before the earlier one's answer (one more for each that prefetches).

Shapes: M elements of the base, S of the sums (float64).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from distml.exchange.channel import Head, News
from distml.exchange.layout import Array


class Tally:
    """The newest base, and the sums that came in since."""

    def __init__(self) -> None:
        self.place = 0
        self.base: Array | None = None  # None: nobody has joined yet, or nothing is counted
        self.parts: list[tuple[Array, Array]] = []  # (the base [M] that they are relative to, sums [S])

    def add(self, head: Head) -> None:
        """Take a worker's sums, and its base where it is newer; only the base of one that joins."""
        if head.base is None:
            return
        if self.base is None or head.place > self.place:
            del self.parts[: head.place - self.place]
            self.place, self.base = head.place, head.base
        if head.sums is not None and head.sums.any():
            self.parts.append((head.base, head.sums))

    def news(self, place: int | None) -> News | None:
        """What a worker whose base is of this place has yet to fold; None: it takes over the newest base."""
        if self.base is None:
            return None
        if place is None or place < self.place:
            return News(self.place, self.base, list(self.parts))
        return News(place, None, self.parts[place - self.place :])

    def dump(self) -> list[Any]:
        """Plain values and bytes."""
        if self.base is None:
            return []
        return [self.place, self.base.tobytes(), [[base.tobytes(), sums.tobytes()] for base, sums in self.parts]]

    def restore(self, dump: list[Any]) -> None:
        """The inverse of `dump`."""
        self.place, self.base, self.parts = 0, None, []
        if dump:
            self.place, self.base = dump[0], np.frombuffer(dump[1])
            self.parts = [(np.frombuffer(base), np.frombuffer(sums)) for base, sums in dump[2]]
