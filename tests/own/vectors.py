"""A vector environment of a user's own: observation [steps so far], all alike; it may reuse its buffers."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode


class Alike(gym.vector.VectorEnv):
    def __init__(self, num_envs, length=3, reuses=False, same_step=False, gives_final=True):
        self.num_envs, self.length, self.reuses, self.gives_final = num_envs, length, reuses, gives_final
        mode = AutoresetMode.SAME_STEP if same_step else AutoresetMode.NEXT_STEP
        self.metadata = {"autoreset_mode": mode}
        self.single_observation_space, self.single_action_space = gym.spaces.Box(0, 9, (1,)), gym.spaces.Discrete(2)
        self.same_step, self.steps = same_step, 0
        self.buffer = np.zeros((num_envs, 1), np.float32)

    def reset(self, *, seed=None, options=None):
        self.steps = 0
        return self._look(), {}

    def step(self, actions):
        begins = self.steps == self.length
        self.steps = 0 if begins else self.steps + 1
        ended = np.full(self.num_envs, self.steps == self.length)
        rewards, infos = np.full(self.num_envs, float(self.steps)), {}
        if self.same_step and ended[0]:
            if self.gives_final:
                infos["final_obs"] = np.full((self.num_envs, 1), float(self.steps), np.float32)
            self.steps = 0
        return self._look(), rewards, ended, np.zeros(self.num_envs, bool), infos

    def _look(self):
        if not self.reuses:
            return np.full((self.num_envs, 1), self.steps, np.float32)
        self.buffer[:] = self.steps
        return self.buffer
