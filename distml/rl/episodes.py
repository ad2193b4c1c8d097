"""Whole episodes: every environment plays one, all begin together.

An episode that is over is followed by rows that are not valid, until the longest one is over too. Nothing is cut, so
what is learned from them needs no values; who plays only until a number of steps is used up sees short episodes too
often.

Shapes: T steps of the longest episode, E environments.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from distml.errors import UsageError
from distml.rl.environments import EnvironmentFailed, episode_limit
from distml.rl.policies import Policy
from distml.rl.restarts import Restarts
from distml.rl.rollout import Buffers, Collector, Rollout
from distml.spec.rl import OnPolicyBlock
from distml.tasks.base import Part

FIRST_STEPS = 64  # place for so many at first


class EpisodeCollector(Collector):
    """Plays one episode per environment and call.

    Args:
        spec: the task's block.
        part: this worker's.
        restarts: counts environments that fail.

    Raises:
        UsageError: the environment's episodes may never end.
    """

    def __init__(self, spec: OnPolicyBlock, part: Part, restarts: Restarts) -> None:
        limit = episode_limit(spec.environment)
        if limit is None:
            raise UsageError(f"environment {spec.environment.id} has no limit of its own, and whole episodes must end; "
                             "set task.environment.max_episode_steps")  # fmt: skip
        self.limit = limit
        super().__init__(spec, part, restarts)

    def begin(self) -> None:
        """As new, the first episodes' seeds included."""
        super().begin()
        self.is_fresh = True

    def episodes_of(self, policy: Policy, version: int) -> Rollout:
        """One episode of each environment, padded with rows that are not valid."""
        return self.collect(policy, self.limit, version)

    def _collect(self, policy: Policy, num_steps: int, version: int) -> Rollout:
        num_envs = self.spec.envs_per_worker
        if not self.is_fresh:
            self.observations = self.environments.reset(seeded=False)
        self.is_fresh, self.state = False, None
        self.resets, plays = np.ones(num_envs, dtype=bool), np.ones(num_envs, dtype=bool)
        first_state = self._ready(policy)
        buffers = Buffers(min(FIRST_STEPS, num_steps), num_envs, self.observations, policy.distribution)
        step = 0
        while plays.any():
            if step == num_steps:
                raise EnvironmentFailed(f"{self.spec.environment.id} played on after its limit of {num_steps} steps")
            if step == len(buffers.rewards):
                buffers.resize(min(2 * step, num_steps))
            buffers.observe(step, self.observations, self.resets)
            parameters, actions, after = self._step(policy.distribution)
            after = replace(
                after, rewards=np.where(plays, after.rewards, np.float32(0.0)), valid=plays.copy(),
                terminated=after.terminated & plays, truncated=after.truncated & plays, final=None,
            )  # fmt: skip
            buffers.put(step, parameters, actions, after)
            self.episodes.add(after)
            self.observations, self.resets = after.observations, np.zeros(num_envs, dtype=bool)
            plays &= ~(after.terminated | after.truncated)
            step += 1
        buffers.resize(step)
        return self._rollout(policy, buffers, first_state, version, 0)
