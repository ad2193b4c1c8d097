"""Exact solvers: a process solved by hand, and two methods that must find the same optimum."""

from __future__ import annotations

import gymnasium
import numpy as np
import pytest

from distml.rl.solvers import MDP, mdp_of, policy_iteration, policy_values, value_iteration


def by_hand() -> MDP:
    """Two states and an end. Action 0 waits: state 0 for 1 point, state 1 for 0. Action 1 goes on: from state 0 to
    state 1 for 0 points, from state 1 to the end for 10 points, which succeeds half of the time."""
    transitions, rewards = np.zeros((3, 2, 3)), np.zeros((3, 2))
    transitions[0, 0, 0], transitions[1, 0, 1] = 1, 1
    transitions[0, 1, 1] = 1
    transitions[1, 1, 2] = transitions[1, 1, 1] = 0.5
    rewards[0, 0], rewards[1, 1] = 1, 10
    transitions[2, :, 0], rewards[2] = 1, 7  # of the end: must not be read
    return MDP(transitions, rewards, np.array([False, False, True]))


def solutions_by_hand(gamma: float) -> list[float]:
    """v1 = 10 + gamma v1 / 2: each attempt earns 10. State 0 waits for ever, 1 / (1 - gamma), or goes on, gamma v1."""
    there = 10 / (1 - gamma / 2)
    return [max(1 / (1 - gamma), gamma * there), there, 0.0]


@pytest.mark.parametrize("solve", [value_iteration, policy_iteration])
@pytest.mark.parametrize(("gamma", "first_action"), [(0.5, 1), (0.9, 1), (0.96, 0)])
def test_a_process_solved_by_hand(solve, gamma, first_action):
    solution = solve(by_hand(), gamma)
    np.testing.assert_allclose(solution.values, solutions_by_hand(gamma), atol=1e-9)
    assert solution.policy[:2].tolist() == [first_action, 1]
    kept = gamma * solution.values[0] + 1, gamma * solution.values[1]
    np.testing.assert_allclose(solution.action_values[0], kept, atol=1e-9)
    assert not solution.action_values[2].any()


def test_no_discount_where_waiting_earns_for_ever():
    with pytest.raises(ValueError, match="never end"):
        policy_iteration(by_hand(), 1.0)


ENVIRONMENTS = {
    "FrozenLake-v1": {}, "FrozenLake8x8-v1": {}, "CliffWalking-v1": {}, "CliffWalkingSlippery-v1": {}, "Taxi-v3": {},
}  # fmt: skip


@pytest.mark.parametrize("gamma", [0.0, 0.9, 0.99, 1.0])
@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_both_methods_agree(name, gamma):
    mdp = mdp_of(gymnasium.make(name))
    by_values, by_policies = value_iteration(mdp, gamma), policy_iteration(mdp, gamma)
    atol = 1e-9 if gamma < 1 else 1e-7  # without a discount value iteration has no bound, only a last change
    np.testing.assert_allclose(by_values.action_values, by_policies.action_values, atol=atol)
    followed = policy_values(mdp, np.eye(mdp.rewards.shape[1])[by_policies.policy], gamma)
    np.testing.assert_allclose(followed, by_policies.values, atol=1e-12)
    np.testing.assert_allclose(by_policies.action_values.max(1), by_policies.values, atol=1e-9)  # Bellman's equation


def test_known_optima():
    """The slippery 4 x 4 lake is crossed with probability 14 / 17 at best, the way along the cliff has 13 steps."""
    lake = mdp_of(gymnasium.make("FrozenLake-v1"))
    for solve in (value_iteration, policy_iteration):
        assert solve(lake, 1.0).values[0] == pytest.approx(14 / 17, abs=1e-7)
        assert solve(mdp_of(gymnasium.make("CliffWalking-v1")), 1.0).values[36] == -13
    dry = mdp_of(gymnasium.make("FrozenLake-v1", is_slippery=False))
    assert policy_iteration(dry, 0.9).values[0] == pytest.approx(0.9**5)


def test_a_time_limit_costs_what_an_environment_says():
    """100 steps, the lake's own limit: 2,000 episodes of the optimal policy, within 4 standard errors of 0.0098."""
    environment = gymnasium.make("FrozenLake-v1")
    mdp = mdp_of(environment)
    policy = policy_iteration(mdp, 1.0).policy
    expected = policy_values(mdp, np.eye(4)[policy], 1.0, steps=100)[0]
    assert expected == pytest.approx(0.740, abs=1e-3)
    total = 0.0
    for seed in range(2000):
        state, done = environment.reset(seed=seed)[0], False
        while not done:
            state, reward, terminated, truncated, _ = environment.step(int(policy[state]))
            total, done = total + reward, terminated or truncated
    assert total / 2000 == pytest.approx(expected, abs=0.04)
    assert abs(total / 2000 - policy_values(mdp, np.eye(4)[policy], 1.0)[0]) > 0.04  # control: without the limit


def test_taxi_s_states_that_no_episode_reaches_have_no_value():
    mdp = mdp_of(gymnasium.make("Taxi-v3"))
    assert mdp.terminal.sum() == 100  # 96 that are never reached, 4 that end an episode
    assert policy_iteration(mdp, 1.0).values[~mdp.terminal].min() > -25


def test_what_cannot_be_solved_is_said():
    with pytest.raises(ValueError, match="CartPoleEnv has no table P"):
        mdp_of(gymnasium.make("CartPole-v1"))
    for gamma in (-0.1, 1.1):
        with pytest.raises(ValueError, match="between 0 and 1"):
            value_iteration(by_hand(), gamma)
    with pytest.raises(ValueError, match="do not fit together"):
        MDP(np.zeros((2, 2, 2)), np.zeros((2, 3)), np.zeros(2, bool))
    with pytest.raises(ValueError, match="sum to 1"):
        MDP(np.full((2, 1, 2), 0.4), np.zeros((2, 1)), np.zeros(2, bool))
