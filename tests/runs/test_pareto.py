"""The Pareto front against its definition, of any number of objectives."""

from __future__ import annotations

import math
import random

import pytest

from distml.runs.pareto import pareto_front


def dominated(row: list[float], rows: list[list[float]], modes: list[str]) -> bool:
    """By the definition: another one is nowhere worse and somewhere better."""

    def is_better(other: list[float]) -> bool:
        signs = [1 if mode == "max" else -1 for mode in modes]
        gains = [sign * (a - b) for sign, a, b in zip(signs, other, row, strict=True)]
        return min(gains) >= 0 and max(gains) > 0

    return any(is_better(other) for other in rows)


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_the_front_is_what_nobody_dominates(count):
    generator = random.Random(count)
    for _ in range(200):
        modes = [generator.choice(["min", "max"]) for _ in range(count)]
        values = [0.0, 1.0, 2.0, 3.0, math.nan, math.inf, -math.inf]
        rows = [generator.choices(values, [4, 4, 4, 4, 1, 1, 1], k=count) for _ in range(generator.randint(0, 12))]
        finite = [row for row in rows if all(map(math.isfinite, row))]
        found = [rows[index] for index in pareto_front(rows, modes)]
        assert {tuple(row) for row in found} == {tuple(row) for row in finite if not dominated(row, finite, modes)}
        assert len({tuple(row) for row in found}) == len(found)


def test_of_equals_the_first_is_on_it_and_the_best_in_the_first_objective_comes_first():
    rows = [(3.0, 1.0), (1.0, 0.5), (3.0, 1.0), (2.0, None), (2.0, 0.7), (1.0, 0.4)]
    assert pareto_front(rows, ["min", "max"]) == [1, 4, 0]
    assert pareto_front(rows, ["max", "min"]) == [0, 4, 5]
    assert pareto_front([(math.nan, 1.0), (1.0, None)], ["min", "max"]) == []
