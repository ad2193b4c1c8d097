"""The Pareto front, for all that look for it: searches, sweeps, and the reports of both."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence


def pareto_front(rows: Iterable[Sequence[float | None]], modes: Sequence[str]) -> list[int]:
    """Indices of those that no other one equals or beats in everything; the best in the first objective first.

    Args:
        rows: one per candidate, one value per objective. Whoever has one that is None, NaN or infinite is on no front.
            Of equals in everything the first is.
        modes: "max" or "min" per objective.
    """
    signs = [1.0 if mode == "max" else -1.0 for mode in modes]
    known = [
        (tuple(sign * value for sign, value in zip(signs, row, strict=True) if value is not None), index)
        for index, row in enumerate(rows)
        if all(value is not None and math.isfinite(value) for value in row)
    ]
    kept: list[tuple[tuple[float, ...], int]] = []
    for own, index in sorted(known, key=lambda one: (*(-value for value in one[0]), one[1])):
        # Whoever comes later dominates nobody before; of two objectives the newest kept one decides.
        if not any(all(a >= b for a, b in zip(other, own, strict=True)) for other, _ in reversed(kept)):
            kept.append((own, index))
    return [index for _, index in kept]
