"""The reward of accuracy and cost, and the Pareto front, against their definitions."""

from __future__ import annotations

import itertools
import math
import random

import pytest

from distml.population.reward import exponent, pareto_front, reward_of, worst
from distml.spec.nas import RewardSpec

FLOPS = RewardSpec(metric="eval/accuracy", cost="flops", target=1e6)


def test_the_exponent_at_five_percent():
    assert exponent(0.05) == pytest.approx(-0.0704, abs=5e-5)


def test_twice_the_cost_is_made_up_for_by_what_it_is_worth():
    assert reward_of(FLOPS, 0.8, 1e6) == pytest.approx(0.8)
    assert reward_of(FLOPS, 0.8 * 1.05, 2e6) == pytest.approx(0.8)
    assert reward_of(FLOPS, 0.8, 5e5) == pytest.approx(0.8 * 1.05)
    assert reward_of(RewardSpec(), 0.8, None) == 0.8


def test_more_cost_is_never_better():
    for metric in (0.8, -0.8):
        rewards = [reward_of(FLOPS, metric, cost) for cost in (1e5, 1e6, 1e7)]
        assert rewards == sorted(rewards, reverse=True)
        assert len(set(rewards)) == 3


def test_nan_stays_and_a_failure_gets_the_least():
    assert math.isnan(reward_of(FLOPS, math.nan, 1e6))
    assert worst([]) == worst([0.5, 0.2]) == 0.0
    assert worst([-3.0, 0.5]) == -3.0


def brute(metrics: list[float], costs: list[float]) -> set[tuple[float, float]]:
    pairs = [(m, c) for m, c in zip(metrics, costs, strict=True) if not math.isnan(m)]
    return {(m, c) for m, c in pairs
            if not any((a >= m and b <= c) and (a > m or b < c) for a, b in pairs)}  # fmt: skip


def test_the_front_is_what_nobody_dominates():
    generator = random.Random(0)
    for _ in range(200):
        count = generator.randint(0, 8)
        metrics = [generator.choice([0.1, 0.2, 0.3, 0.4, math.nan]) for _ in range(count)]
        costs = [float(generator.randint(1, 4)) for _ in range(count)]
        front = pareto_front(metrics, costs)
        found = [(metrics[index], costs[index]) for index in front]
        assert set(found) == brute(metrics, costs)
        assert len(found) == len(set(found))
        assert all(a < b for (_, a), (_, b) in itertools.pairwise(found))
