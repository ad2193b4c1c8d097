"""An environment whose every number is known: observation [steps so far, seed's remainder], reward = steps so far.

An episode lasts `length` steps, and then terminates or is truncated. It can fail, or give NaN, at a step of its life,
and fail to begin.
"""

from __future__ import annotations

import gymnasium as gym
import numpy as np

LIFE = {"failures": 0}


class Counting(gym.Env):
    observation_space = gym.spaces.Box(-1.0, 1e6, (2,), np.float32)
    action_space = gym.spaces.Discrete(2)

    def __init__(self, length=3, truncates=False, raises_at=None, nan_at=None, failures=10**9, fails_to_begin=False):
        self.length, self.truncates, self.raises_at, self.nan_at = length, truncates, raises_at, nan_at
        self.steps, self.life, self.failures, self.fails_to_begin = 0, 0, failures, fails_to_begin

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if self.fails_to_begin and LIFE["failures"] < self.failures:
            LIFE["failures"] += 1
            raise RuntimeError("the motor is cold")
        self.steps = 0
        if seed is not None:
            self.mark = seed % 97
        return self._look(), {}

    def step(self, action):
        self.steps += 1
        self.life += 1
        if self.life == self.raises_at and LIFE["failures"] < self.failures:
            LIFE["failures"] += 1
            raise RuntimeError("the motor is hot")
        ended = self.steps == self.length
        reward = float("nan") if self.life == self.nan_at else float(self.steps)
        return self._look(), reward, ended and not self.truncates, ended and self.truncates, {}

    def _look(self):
        return np.array([self.steps, self.mark], np.float32)


class CountingStates(Counting):
    """The same for tables: the observation is the number of steps."""

    observation_space = gym.spaces.Discrete(100)

    def _look(self):
        return self.steps
