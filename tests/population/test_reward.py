"""The reward of accuracy and cost, against its definition."""

from __future__ import annotations

import math

import pytest

from distml.population.reward import exponent, reward_of, worst
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
    assert worst([0.5, 0.2]) == 0.0
    assert worst([-3.0, 2.0]) == -3.5
    assert worst([-3.0]) == pytest.approx(-3.3)
    assert worst([0.0]) < 0
