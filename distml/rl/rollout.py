"""Acting: from a policy and environments to batches of experience.

    Collector.collect:  freeze the statistics ▶ T x (observe ▶ act ▶ step) ▶ check ▶ see what was observed ▶ Rollout

Nothing here learns; the weights do not change between `collect` and the backward pass. A collector's environments go
on from rollout to rollout. Their state cannot be saved exactly, so a stream's state is None and it begins anew at
checkpoints, with seeds that the version of the weights is mixed into.

Shapes: T steps, E environments, O one observation, A one action, P distribution parameters, H a recurrent state.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distml.rl.acting import Actor, build_actor
from distml.rl.distributions import Distribution
from distml.rl.environments import Environments, Transition, check_finite, training_seeds
from distml.rl.normalise import RewardScaler
from distml.rl.policies import Policy
from distml.rl.restarts import Restarting, Restarts
from distml.spec.rl import OnPolicyBlock
from distml.tasks.base import Mean, Part
from distml.tasks.data import mix

Array = NDArray[Any]
State = tuple[Tensor, ...]


@dataclass
class Rollout:
    """What E environments did in T steps; a batch of T x E rows, of which some are dummies.

    Attributes:
        observations: [T + 1, E, *O], before each step and after the last.
        actions: [T, E, *A] as they were drawn.
        rewards: float32 [T, E], scaled if rewards are normalised.
        terminated, truncated: bool [T, E].
        valid: bool [T, E]; false: a dummy row, neither trained on nor counted.
        resets: bool [T + 1, E]: the observation is an episode's first, so a recurrent state begins anew before it.
        parameters: float32 [T, E, P], of the distribution that the actions were drawn from.
        state: each [E, H], the recurrent state before the first observation; empty without recurrence.
        final: [T, E, *O] or None: the last observation of an episode that ended, where it is not the next one.
        version: of the weights that acted.
        num_frames: how many rows are valid.
        metrics: about episodes that ended.
    """

    observations: Tensor
    actions: Tensor
    rewards: Tensor
    terminated: Tensor
    truncated: Tensor
    valid: Tensor
    resets: Tensor
    parameters: Tensor
    state: State
    final: Tensor | None = None
    version: int = 0
    num_frames: int = 0
    metrics: dict[str, Mean] = field(default_factory=dict)

    def __len__(self) -> int:
        return self.rewards.numel()

    @property
    def ended(self) -> Tensor:
        """Whether an episode ended with a step, bool [T, E]."""
        return self.terminated | self.truncated

    def micro_batches(self, size: int) -> Iterator[Rollout]:
        """Pieces of at most `size` rows, or of one environment; episodes' metrics go with the first."""
        steps, num_envs = self.rewards.shape
        width = max(1, size // steps)
        for start in range(0, num_envs, width):
            yield self.environments(slice(start, start + width), with_metrics=start == 0)

    def environments(self, which: slice | Tensor, with_metrics: bool) -> Rollout:
        """The same steps of some environments."""
        moved: dict[str, Any] = {}
        for name in TENSORS:
            value = getattr(self, name)
            moved[name] = None if value is None else value[:, which]
        state = tuple(one[which] for one in self.state)
        return replace(self, **moved, state=state, num_frames=int(moved["valid"].sum()),
                       metrics=self.metrics if with_metrics else {})  # fmt: skip

    def to(self, device: torch.device) -> Rollout:
        """The same on `device`."""
        moved: dict[str, Any] = {}
        for name in TENSORS:
            value = getattr(self, name)
            moved[name] = None if value is None else value.to(device)
        return replace(self, **moved, state=tuple(one.to(device) for one in self.state))


TENSORS = [one.name for one in fields(Rollout) if one.name not in ("state", "version", "num_frames", "metrics")]


class Episodes:
    """Returns and lengths of E environments' episodes, in the environment's own rewards."""

    def __init__(self, num_envs: int) -> None:
        self.returns = np.zeros(num_envs)
        self.lengths = np.zeros(num_envs)
        self.ended: list[tuple[float, float]] = []

    def add(self, step: Transition) -> None:
        """Count a step; episodes that it ended are kept until `take`."""
        self.returns += step.rewards  # a dummy row's reward is 0
        self.lengths += step.valid
        ended = step.terminated | step.truncated
        if ended.any():
            for index in np.flatnonzero(ended):
                self.ended.append((float(self.returns[index]), float(self.lengths[index])))
            self.returns[ended] = self.lengths[ended] = 0.0

    def take(self) -> dict[str, Mean]:
        """Means over the episodes that ended since the last call."""
        ended, self.ended = self.ended, []
        if not ended:
            return {}
        returns, lengths = zip(*ended, strict=True)
        return {
            "rl/episode_return_mean": Mean(sum(returns), len(returns)),
            "rl/episode_length_mean": Mean(sum(lengths), len(lengths)),
        }


class Collector(Restarting):
    """One worker's environments, and how it acts in them.

    Args:
        spec: the task's block.
        part: this worker's; its seed is that of everything drawn here.
        restarts: counts environments that fail.
    """

    def __init__(self, spec: OnPolicyBlock, part: Part, restarts: Restarts) -> None:
        self.spec = spec
        super().__init__(part, restarts)

    def begin(self) -> None:
        """Environments, episodes and recurrent states as new."""
        seed = mix(self.part.seed, self.failures)
        self.environments = Environments(self.spec.environment, training_seeds(seed, self.spec.envs_per_worker))
        self.generator = np.random.default_rng(mix(seed, 1))
        self.observations = self.environments.reset()
        self.resets = np.ones(self.spec.envs_per_worker, dtype=bool)
        self.episodes = Episodes(self.spec.envs_per_worker)
        self.actor: Actor | None = None
        self.state: State | None = None
        self.scaler: RewardScaler | None = None

    def collect(self, policy: Policy, num_steps: int, version: int) -> Rollout:
        """Act for T steps.

        Raises:
            EnvironmentFailed: an environment raised or gave what is not a number, once more than it may.
        """
        return self.attempt(lambda: self._collect(policy, num_steps, version))

    def _collect(self, policy: Policy, num_steps: int, version: int) -> Rollout:
        first_state, first_step = self._ready(policy), self.environments.steps
        buffers = Buffers(num_steps, self.spec.envs_per_worker, self.observations, policy.distribution)
        for step in range(num_steps):
            buffers.observe(step, self.observations, self.resets)
            parameters, actions, transition = self._step(policy.distribution)
            buffers.put(step, parameters, actions, transition)
            self.episodes.add(transition)
            self.observations = transition.observations
            self.resets = self._resets_after(transition)
        return self._rollout(policy, buffers, first_state, version, first_step)

    def _ready(self, policy: Policy) -> State:
        """The recurrent state to go on from, with an actor that knows the newest weights and statistics."""
        self.actor = self.actor or build_actor(policy, self.part.device)
        if policy.observation_moments is not None:
            policy.observation_moments.freeze()
        self.actor.refresh()
        if self.state is None:
            self.state = self.actor.initial_state(self.spec.envs_per_worker)
        return self.state

    def _step(self, distribution: Distribution) -> tuple[Array, Array, Transition]:
        """Distributions' parameters, actions, and what came of them."""
        assert self.actor is not None
        assert self.state is not None
        parameters, self.state = self.actor.act(self.observations, self.state, self.resets)
        actions = distribution.sample(parameters, self.generator)
        return parameters, actions, self.environments.step(distribution.to_environment(actions))

    def _resets_after(self, transition: Transition) -> Array:
        """Whose next observation is an episode's first."""
        if self.environments.resets_in_same_step:
            return transition.terminated | transition.truncated
        return ~transition.valid

    def _rollout(self, policy: Policy, buffers: Buffers, state: State, version: int, first_step: int) -> Rollout:
        buffers.observe(-1, self.observations, self.resets)
        check_finite(self.spec.environment.id, buffers.observations, buffers.rewards, self.environments.seeds,
                     first_step)  # fmt: skip
        rewards = buffers.rewards
        ended = buffers.terminated | buffers.truncated
        if policy.reward_moments is not None:
            if self.scaler is None:
                self.scaler = RewardScaler(policy.reward_moments, self.spec.gamma, self.spec.envs_per_worker)
            rewards = self.scaler.scale(rewards, ended, buffers.valid)
        if policy.observation_moments is not None:
            policy.observation_moments.update(buffers.observations[:-1], buffers.valid)
        tensor = torch.from_numpy
        return Rollout(
            tensor(buffers.observations), tensor(buffers.actions), tensor(rewards), tensor(buffers.terminated),
            tensor(buffers.truncated), tensor(buffers.valid), tensor(buffers.resets), tensor(buffers.parameters),
            state, None if buffers.final is None else tensor(buffers.final), version, int(buffers.valid.sum()),
            self.episodes.take(),
        )  # fmt: skip

    def close(self) -> None:
        """End the environments."""
        self.environments.close()


class Buffers:
    """Where a rollout is written while it is made: as `Rollout`, in NumPy."""

    def __init__(self, num_steps: int, num_envs: int, observations: Array, distribution: Any) -> None:
        rows = (num_steps, num_envs)
        kind = np.int64 if distribution.action_dtype == torch.int64 else np.float32
        dtype = np.float32 if observations.dtype == np.float64 else observations.dtype
        self.observations = np.empty((num_steps + 1, *observations.shape), dtype)
        self.actions = np.empty((*rows, *distribution.action_shape), kind)
        self.parameters = np.empty((*rows, distribution.num_parameters), np.float32)
        self.rewards = np.empty(rows, np.float32)
        self.terminated, self.truncated, self.valid = (np.empty(rows, bool) for _ in range(3))
        self.resets = np.empty((num_steps + 1, num_envs), bool)
        self.final: Array | None = None

    def observe(self, step: int, observations: Array, resets: Array) -> None:
        """Write what a step begins with, before it is made: environments may overwrite their last observations."""
        self.observations[step], self.resets[step] = observations, resets

    def put(self, step: int, parameters: Array, actions: Array, after: Transition) -> None:
        """Write one step, and what came of it."""
        self.parameters[step], self.actions[step] = parameters, actions
        self.rewards[step], self.valid[step] = after.rewards, after.valid
        self.terminated[step], self.truncated[step] = after.terminated, after.truncated
        if after.final is not None:
            if self.final is None:
                self.final = np.zeros((len(self.rewards), *self.observations.shape[1:]), self.observations.dtype)
            self.final[step] = after.final

    def resize(self, num_steps: int) -> None:
        """Keep what was written, as far as there is place, and have place for this many steps."""
        for name, array in vars(self).items():
            if array is not None:
                rows = num_steps + (name in ("observations", "resets"))
                resized = np.empty((rows, *array.shape[1:]), array.dtype)
                kept = min(rows, len(array))
                resized[:kept] = array[:kept]
                setattr(self, name, resized)
