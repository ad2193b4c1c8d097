"""An environment that blocks at a step of its life, as often as there is room in a directory for one more file."""

from __future__ import annotations

import time
from pathlib import Path

import gymnasium as gym
import numpy as np


class Blocking(gym.Env):
    observation_space = gym.spaces.Box(-1.0, 1e6, (1,), np.float32)
    action_space = gym.spaces.Discrete(2)

    def __init__(self, directory: str, at: int, times: int) -> None:
        self.directory, self.at, self.times, self.life = Path(directory), at, times, 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.steps, self.life = self.steps + 1, self.life + 1
        if self.life == self.at:
            self._block()
        return np.full(1, self.steps, np.float32), 1.0, self.steps == 5, False, {}

    def _block(self) -> None:
        for number in range(self.times):
            try:
                (self.directory / f"blocked-{number}").touch(exist_ok=False)
            except FileExistsError:
                continue
            while True:
                time.sleep(1.0)
