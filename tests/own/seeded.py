"""An environment that writes its seeds down, and whose episodes' length depends on the seed alone."""

from __future__ import annotations

from pathlib import Path

import gymnasium as gym
import numpy as np

SHORT, LONG = 3, 60


def length_of(seed: int) -> int:
    """Frames of the first episode after a reset with this seed; later ones are short."""
    return LONG if seed % 3 == 0 else SHORT


class Seeded(gym.Env):
    """Reward 1 per frame for any action."""

    observation_space = gym.spaces.Box(-1.0, 1.0, (2,), np.float32)
    action_space = gym.spaces.Discrete(2)

    def __init__(self, file: str, breaks_after: int | None = None) -> None:
        self.file, self.left, self.breaks_after = Path(file), 0, breaks_after

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        if seed is not None:
            with self.file.open("a") as file:
                file.write(f"{seed}\n")
        self.left = SHORT if seed is None else length_of(seed)
        return np.zeros(2, np.float32), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        self.left -= 1
        if self.breaks_after is not None:
            self.breaks_after -= 1
            if self.breaks_after < 0:
                raise OSError("the motor is broken")
        return np.zeros(2, np.float32), 1.0, self.left <= 0, False, {}
