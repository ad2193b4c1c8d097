"""Environments that are solved in seconds, and one whose gradient is known."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

Step = tuple[Any, float, bool, bool, dict[str, Any]]


class Identity(gym.Env):
    """Shows k; to do k is worth 1. `is_blind`: what it shows has nothing to do with k."""

    def __init__(self, choices: int = 4, length: int = 8, is_blind: bool = False) -> None:
        self.observation_space, self.action_space = spaces.Discrete(choices), spaces.Discrete(choices)
        self.length, self.is_blind = length, is_blind

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[int, dict[str, Any]]:
        super().reset(seed=seed)
        self.time = 0
        return self._show(), {}

    def step(self, action: int) -> Step:
        reward, self.time = float(action == self.wanted), self.time + 1
        return self._show(), reward, False, self.time == self.length, {}

    def _show(self) -> int:
        self.wanted = int(self.np_random.integers(self.action_space.n))
        return int(self.np_random.integers(self.action_space.n)) if self.is_blind else self.wanted


class Memory(gym.Env):
    """Shows a bit once; `delay` steps later doing it is worth 1."""

    def __init__(self, delay: int = 3) -> None:
        self.observation_space, self.action_space = spaces.Box(-1.0, 1.0, (2,), np.float32), spaces.Discrete(2)
        self.delay = delay

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.time, self.bit = 0, int(self.np_random.integers(2))
        return np.array([2.0 * self.bit - 1.0, 0.0], np.float32), {}

    def step(self, action: int) -> Step:
        ends = self.time == self.delay
        self.time += 1
        asks = np.array([0.0, float(self.time == self.delay)], np.float32)
        return asks, float(ends and action == self.bit), ends, False, {}


class LateArm(gym.Env):
    """Arm 0 brings 0.3; arm 1 brings nothing, and 1 from the `after`-th episode of this environment on."""

    def __init__(self, after: int = 160) -> None:
        self.observation_space, self.action_space = spaces.Box(1.0, 1.0, (1,), np.float32), spaces.Discrete(2)
        self.after, self.episodes = after, 0

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.episodes += 1
        return np.ones(1, np.float32), {}

    def step(self, action: int) -> Step:
        reward = float(self.episodes > self.after) if action == 1 else 0.3
        return np.ones(1, np.float32), reward, True, False, {}


class Arms(gym.Env):
    """A bandit of one step: arm k brings `rewards[k]`."""

    def __init__(self, rewards: tuple[float, ...] = (1.0, 2.0, 4.0)) -> None:
        self.rewards = rewards
        self.observation_space = spaces.Box(1.0, 1.0, (1,), np.float32)
        self.action_space = spaces.Discrete(len(rewards))

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        return np.ones(1, np.float32), {}

    def step(self, action: int) -> Step:
        return np.ones(1, np.float32), self.rewards[action], True, False, {}


class TwoPulls(gym.Env):
    """Two pulls of one of two arms; it shows what was pulled. The second pays by both."""

    first = np.array([0.0, 1.0])
    second = np.array([[3.0, 0.0], [1.0, 2.0]])

    def __init__(self) -> None:
        self.observation_space, self.action_space = spaces.Discrete(3), spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[int, dict[str, Any]]:
        super().reset(seed=seed)
        self.pulled: int | None = None
        return 0, {}

    def step(self, action: int) -> Step:
        if self.pulled is None:
            self.pulled = int(action)
            return 1 + self.pulled, float(self.first[action]), False, False, {}
        return 0, float(self.second[self.pulled, action]), True, False, {}
