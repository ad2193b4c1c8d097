"""Advantages against a loop written by hand, and in the two limits that have names."""

from __future__ import annotations

import numpy as np
import pytest
from own.advantages import by_hand

from distml.rl.advantages import generalised_advantages, next_values, rewards_to_go

GAMMA, LAMBDA, T, E = 0.9, 0.7, 9, 3


@pytest.fixture
def rows():
    generator = np.random.default_rng(0)
    rewards, values = generator.normal(size=(T, E)), generator.normal(size=(T + 1, E))
    terminated, truncated = generator.random((T, E)) < 0.2, generator.random((T, E)) < 0.2
    return rewards, values, terminated, truncated & ~terminated


def advantages_of(rows, gamma=GAMMA, lam=LAMBDA, final=None):
    rewards, values, terminated, truncated = rows
    after = next_values(values, terminated, truncated, final)
    return generalised_advantages(rewards, values[:-1], after, terminated | truncated, gamma, lam)


def test_they_are_the_sum_written_by_hand(rows):
    assert terminated_and_truncated(rows)
    np.testing.assert_allclose(advantages_of(rows), by_hand(*rows, GAMMA, LAMBDA), atol=1e-12)


def terminated_and_truncated(rows):
    return rows[2].any() and rows[3].any()


def test_final_values_stand_in_where_an_environment_began_anew_in_the_same_step(rows):
    final = np.random.default_rng(1).normal(size=(T, E))
    np.testing.assert_allclose(advantages_of(rows, final=final), by_hand(*rows, GAMMA, LAMBDA, final), atol=1e-12)
    assert not np.allclose(advantages_of(rows, final=final), advantages_of(rows))


def test_lambda_0_is_the_td_error(rows):
    rewards, values, terminated, _ = rows
    expected = rewards + GAMMA * np.where(terminated, 0.0, values[1:]) - values[:-1]
    np.testing.assert_allclose(advantages_of(rows, lam=0.0), expected, atol=1e-12)


def test_lambda_1_is_the_monte_carlo_return_less_the_value(rows):
    rewards, values, terminated, truncated = rows
    after = next_values(values, terminated, truncated)
    ended = terminated | truncated
    returns = rewards_to_go(rewards, ended, GAMMA, after)
    np.testing.assert_allclose(advantages_of(rows, lam=1.0), returns - values[:-1], atol=1e-12)


def test_a_truncated_episode_is_worth_more_than_a_terminated_one():
    rewards, values = np.ones((1, 1)), np.full((2, 1), 10.0)
    no, yes = np.zeros((1, 1), bool), np.ones((1, 1), bool)
    assert advantages_of((rewards, values, yes, no), 1.0, 1.0) == 1 - 10
    assert advantages_of((rewards, values, no, yes), 1.0, 1.0) == 1 + 10 - 10


def test_rewards_to_go_stop_at_the_episodes_end():
    rewards = np.array([[1.0], [2.0], [3.0], [4.0]])
    ended = np.array([[False], [True], [False], [False]])
    assert rewards_to_go(rewards, ended, 0.5).ravel().tolist() == [2.0, 2.0, 5.0, 4.0]
