"""CartPole whose velocities are hidden: a policy has to remember where cart and pole were to know how they move."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray


class MaskedCartPole(gym.ObservationWrapper):  # type: ignore[type-arg]
    """Shows the cart's position and the pole's angle only."""

    def __init__(self, **args: Any) -> None:
        super().__init__(gym.make("CartPole-v1", **args))
        low, high = self.env.observation_space.low[[0, 2]], self.env.observation_space.high[[0, 2]]
        self.observation_space = gym.spaces.Box(low, high, dtype=np.float32)

    def observation(self, observation: NDArray[Any]) -> NDArray[Any]:
        return observation[[0, 2]]
