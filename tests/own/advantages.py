"""Generalised advantages as they stand in the paper, term by term (Schulman et al. 2016, equation 16)."""

from __future__ import annotations

import numpy as np


def by_hand(rewards, values, terminated, truncated, gamma, lam, final=None):
    """A [T, E] as a sum of TD errors up to each episode's end; `values` are [T + 1, E]."""
    advantages = np.zeros_like(rewards)
    for t, e in np.ndindex(*rewards.shape):
        weight = 1.0
        for k in range(t, len(rewards)):
            after = values[k + 1, e] if final is None or not truncated[k, e] else final[k, e]
            after = 0.0 if terminated[k, e] else after
            advantages[t, e] += weight * (rewards[k, e] + gamma * after - values[k, e])
            weight *= gamma * lam
            if terminated[k, e] or truncated[k, e]:
                break
    return advantages
