"""A corridor whose states count from 10 and whose actions count from 1: small enough to be solved by hand."""

from __future__ import annotations

from typing import Any

import gymnasium


class Corridor(gymnasium.Env):
    """States 10 to 14, from left to right. Action 1 goes left (not beyond the end), 2 right; 14 pays 1 and ends it."""

    def __init__(self) -> None:
        self.observation_space = gymnasium.spaces.Discrete(5, start=10)
        self.action_space = gymnasium.spaces.Discrete(2, start=1)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[int, dict[str, Any]]:
        super().reset(seed=seed)
        self.place = 10
        return self.place, {}

    def step(self, action: int) -> tuple[int, float, bool, bool, dict[str, Any]]:
        assert action in (1, 2)
        self.place = max(10, self.place + (1 if action == 2 else -1))
        return self.place, float(self.place == 14), self.place == 14, False, {}
