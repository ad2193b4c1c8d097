"""How much better an action was than expected, from rewards and values.

Generalised advantage estimation (Schulman et al. 2016, equations 11 and 16): delta_t = r_t + gamma V(s_t+1) - V(s_t),
A_t = sum_k (gamma lambda)^k delta_t+k within an episode. lambda = 1 is the n-step return minus V, lambda = 0 the TD
error. An episode that terminated has no value after its end; one that was truncated by a limit goes on without us, so
it is bootstrapped with the value of its last observation.

Shapes: T steps, E environments.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def next_values(values: Array, terminated: Array, truncated: Array, final_values: Array | None = None) -> Array:
    """V(s_t+1) [T, E] as step t saw it: 0 after a terminal step.

    Args:
        values: [T + 1, E], of the observation before each step and of the last one.
        terminated, truncated: bool [T, E].
        final_values: [T, E], read where an episode ended, for environments that begin anew in the same step; None:
            the next observation is the last one of its episode.
    """
    after: Array = values[1:]
    if final_values is not None:
        after = np.where(terminated | truncated, final_values, after)
    return np.where(terminated, np.float32(0.0), after)


def generalised_advantages(
    rewards: Array, values: Array, after: Array, ended: Array, gamma: float, gae_lambda: float
) -> Array:
    """A [T, E].

    Args:
        rewards: [T, E].
        values: V(s_t) [T, E].
        after: V(s_t+1) [T, E], see `next_values`.
        ended: bool [T, E], whether the episode ended with step t.
        gamma: discount.
        gae_lambda: weight of longer returns.
    """
    advantages = rewards + gamma * after - values
    decay = np.where(ended, 0.0, gamma * gae_lambda).astype(advantages.dtype)
    for step in range(len(advantages) - 2, -1, -1):
        advantages[step] += decay[step] * advantages[step + 1]
    return np.asarray(advantages)


def rewards_to_go(rewards: Array, ended: Array, gamma: float, after: Array | None = None) -> Array:
    """Discounted sums of the rewards from t to the episode's end [T, E].

    Args:
        rewards: [T, E].
        ended: bool [T, E].
        gamma: discount.
        after: [T, E], what an episode is worth after its last step here (0 if it terminated); None: nothing.
    """
    total = np.zeros_like(rewards)
    running = np.zeros(rewards.shape[1], rewards.dtype)
    for step in range(len(rewards) - 1, -1, -1):
        rest = np.zeros_like(running) if after is None else after[step]
        last = ended[step] if step + 1 < len(rewards) else np.ones_like(ended[step])
        running = rewards[step] + gamma * np.where(last, rest, running)
        total[step] = running
    return total
