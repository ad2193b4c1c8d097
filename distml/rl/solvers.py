"""Exact solutions of finite Markov decision processes: what learned tables are held against.

Shapes: S states, A actions; all arrays are float64.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
MAX_SWEEPS = 1_000_000


@dataclass(frozen=True)
class MDP:
    """A finite Markov decision process.

    Attributes:
        transitions: [S, A, S], the probability of the next state; rows of terminal states are never read.
        rewards: [S, A], the expected reward.
        terminal: [S] bool, states that end an episode: nothing is earned in them, their value is 0.
    """

    transitions: Floats
    rewards: Floats
    terminal: NDArray[np.bool_]

    def __post_init__(self) -> None:
        num_states, num_actions = self.rewards.shape
        if self.transitions.shape != (num_states, num_actions, num_states) or self.terminal.shape != (num_states,):
            raise ValueError(
                f"transitions {self.transitions.shape}, rewards {self.rewards.shape} and terminal "
                f"{self.terminal.shape} do not fit together; they are [S, A, S], [S, A] and [S]"
            )
        sums = self.transitions[~self.terminal].sum(2)
        if not np.allclose(sums, 1.0, rtol=0, atol=1e-9) or self.transitions.min() < 0:
            raise ValueError("the probabilities of the next state must be positive and sum to 1 for every action")


@dataclass(frozen=True)
class Solution:
    """Optimal values.

    Attributes:
        values: [S].
        action_values: [S, A]; 0 in terminal states.
        policy: [S] int64, an action that is optimal, of several one. Without a discount going in circles can be as
            good as going on; value iteration's policy may do so, policy iteration's does not.
        sweeps: over all states (value iteration), or policies evaluated (policy iteration).
    """

    values: Floats
    action_values: Floats
    policy: NDArray[np.int64]
    sweeps: int


def mdp_of(environment: Any) -> MDP:
    """The process behind a tabular environment of Gymnasium (FrozenLake, CliffWalking, Taxi), from its table `P`.

    States that no episode reaches (Taxi has 96 of its 500) count as terminal.

    Raises:
        ValueError: it has no such table, or ends in a state that it also passes through.
    """
    inner = environment.unwrapped
    if not (hasattr(inner, "P") and hasattr(inner, "initial_state_distrib")):
        raise ValueError(f"{type(inner).__name__} has no table P of its transitions; an exact solution needs one")
    num_states, num_actions = int(inner.observation_space.n), int(inner.action_space.n)
    transitions, rewards = np.zeros((num_states, num_actions, num_states)), np.zeros((num_states, num_actions))
    passed, ends = set(np.flatnonzero(inner.initial_state_distrib).tolist()), set()
    unexplored = list(passed)
    while unexplored:
        state = unexplored.pop()
        for action in range(num_actions):
            for probability, next_state, reward, terminated in inner.P[state][action]:
                transitions[state, action, next_state] += probability
                rewards[state, action] += probability * reward
                if terminated:
                    ends.add(next_state)
                elif next_state not in passed:
                    passed.add(next_state)
                    unexplored.append(next_state)
    if ends & passed:
        raise ValueError(f"state {min(ends & passed)} ends an episode on one way in and not on another")
    terminal = np.ones(num_states, bool)
    terminal[list(passed)] = False
    return MDP(transitions, rewards, terminal)


def action_values(mdp: MDP, values: Floats, gamma: float) -> Floats:
    """Bellman's backup of each action, [S, A]: r + gamma * sum over s' of p(s') * v(s')."""
    backed_up: Floats = mdp.rewards + gamma * mdp.transitions @ values
    backed_up[mdp.terminal] = 0.0
    return backed_up


def value_iteration(mdp: MDP, gamma: float, tolerance: float = 1e-10) -> Solution:
    """v <- max over a of the backup, until the values are known to `tolerance`.

    A backup contracts by gamma, so values whose last change was d are within d * gamma / (1 - gamma) of the optimum
    (Sutton & Barto 2018, 4.4). Without a discount there is no such bound: it ends when no value changes by more.

    Raises:
        ValueError: gamma is not in [0, 1], or the values do not converge (no discount, and episodes need not end).
    """
    _check_discount(gamma)
    limit = tolerance * (1.0 - gamma) / gamma if 0.0 < gamma < 1.0 else tolerance
    values = np.zeros(len(mdp.terminal))
    for sweep in range(1, MAX_SWEEPS + 1):
        updated = action_values(mdp, values, gamma).max(1)
        change = float(np.abs(updated - values).max())
        values = updated
        if change <= limit:
            backed_up = action_values(mdp, values, gamma)
            return Solution(values, backed_up, backed_up.argmax(1), sweep)
    raise ValueError(f"the values still change by {change:g} after {MAX_SWEEPS} sweeps; gamma < 1 bounds them")


def policy_iteration(mdp: MDP, gamma: float) -> Solution:
    """Evaluate a policy exactly, improve it, until it is its own improvement (Sutton & Barto 2018, 4.3).

    It begins with the uniformly random policy, and an action gives way only to one that is better by more than
    rounding: so it ends, and without a discount its policies go on to end their episodes.

    Raises:
        ValueError: gamma is not in [0, 1], or gamma is 1 and a policy has episodes that never end.
    """
    _check_discount(gamma)
    num_states, num_actions = mdp.rewards.shape
    values = policy_values(mdp, np.full((num_states, num_actions), 1.0 / num_actions), gamma)
    policy = action_values(mdp, values, gamma).argmax(1)
    rows = np.arange(num_states)
    evaluated = 1
    while True:
        values = policy_values(mdp, np.eye(num_actions)[policy], gamma)
        evaluated += 1
        backed_up = action_values(mdp, values, gamma)
        best = backed_up.argmax(1)
        margin = 1e-10 * np.maximum(1.0, np.abs(values))
        is_better = backed_up[rows, best] > backed_up[rows, policy] + margin
        if not is_better.any():
            return Solution(values, backed_up, policy, evaluated)
        policy = np.where(is_better, best, policy)


def policy_values(mdp: MDP, policy: Floats, gamma: float, steps: int | None = None) -> Floats:
    """Expected return of a policy from each state, [S].

    Args:
        policy: [S, A], probabilities of the actions.
        steps: after which an episode is cut off, as a time limit does; None: never.

    Raises:
        ValueError: no discount, no time limit, and the policy has episodes that never end.
    """
    chain = np.einsum("sa,sat->st", policy, mdp.transitions)
    rewards = (policy * mdp.rewards).sum(1)
    chain[mdp.terminal], rewards[mdp.terminal] = 0.0, 0.0
    if steps is not None:
        values = np.zeros(len(rewards))
        for _ in range(steps):
            values = rewards + gamma * chain @ values
        return values
    if gamma == 1.0 and not _always_ends(chain, mdp.terminal):
        raise ValueError("the policy has episodes that never end, whose return without a discount is not defined")
    solved: Floats = np.linalg.solve(np.eye(len(rewards)) - gamma * chain, rewards)
    return solved


def _always_ends(chain: Floats, terminal: NDArray[np.bool_]) -> bool:
    """Whether a terminal state can be reached from every state of a chain [S, S]; `chain` lacks their own rows."""
    ends = terminal.copy()
    while True:
        more = ends | ((chain > 0.0) @ ends)
        if (more == ends).all():
            return bool(ends.all())
        ends = more


def _check_discount(gamma: float) -> None:
    if not 0.0 <= gamma <= 1.0:
        raise ValueError(f"gamma is {gamma:g}; a discount is between 0 and 1")
