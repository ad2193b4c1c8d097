"""Our side of `distml bench rl`: the shipped jobs' tasks, which keep copies of their weights while they train.

A subclass per task, constructed with the same block, does all that the task does; rank 0 looks at the frames after
each update, and copies the weights at every multiple. Checkpoints are not used for it, because environments begin anew
there. Evaluations are empty: the kept weights are evaluated afterwards, as those of the peers are.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from torch import nn

from distml.bench.rl_kept import RETURN, Arrays, Keeper, as_arrays
from distml.bench.rl_own import ActorAndCritic
from distml.rl.actor_critic import ActorCritic
from distml.rl.on_policy import OnPolicyTask
from distml.rl.policies import FeedForwardPolicy, OwnPolicy, Policy
from distml.rl.ppo import PPO
from distml.rl.reinforce import Reinforce
from distml.rl.trpo import TRPO
from distml.spec.rl import (
    ActorCriticSpec,
    CNNPolicySpec,
    MLPPolicySpec,
    OnPolicyBlock,
    OwnPolicySpec,
    PPOSpec,
    ReinforceSpec,
    TRPOSpec,
)
from distml.tasks.base import Mean, Part, Progress, Stream

EPISODES_SEEN = 100


def layers(policy: Policy) -> Arrays:
    """The acting network's, with the moments that observations are normalised by."""
    parts: tuple[nn.Module, ...]
    if isinstance(policy, FeedForwardPolicy):
        parts = (policy.trunk, policy.policy.body, policy.policy.output)
    else:
        assert isinstance(policy, OwnPolicy)
        assert isinstance(policy.module, ActorAndCritic)
        parts = (policy.module.policy,)
    linear = [module for part in parts for module in part.modules() if isinstance(module, nn.Linear)]
    moments = policy.observation_moments
    known = None if moments is None else (moments.frozen_mean, 1.0 / moments.frozen_scale)
    return as_arrays([(one.weight.detach(), one.bias.detach()) for one in linear], known)


class Watched:
    """A stream that starts the clock with its first batch, and remembers its latest episodes' returns."""

    def __init__(self, stream: Stream, keeper: Keeper) -> None:
        self.stream, self.keeper = stream, keeper
        self.episodes: deque[Mean] = deque()

    def next(self, model: nn.Module, progress: Progress) -> Any:
        """The stream's own."""
        self.keeper.start()
        batch = self.stream.next(model, progress)
        seen: Mapping[str, Mean] = batch.metrics
        if "rl/episode_return_mean" in seen:
            self.episodes.append(seen["rl/episode_return_mean"])
            while sum(mean.count for mean in self.episodes) - self.episodes[0].count >= EPISODES_SEEN:
                self.episodes.popleft()
        return batch

    def training_return(self) -> Arrays:
        """The mean over this worker's last episodes, about 100."""
        return {RETURN: np.array(sum(self.episodes, Mean(0.0, 0.0)).value)}

    def state(self) -> dict[str, Any] | None:
        """The stream's own."""
        return self.stream.state()

    def load_state(self, state: dict[str, Any]) -> None:
        """The stream's own."""
        self.stream.load_state(state)


class Keeping(OnPolicyTask[Any]):
    """What the subclasses below add to a task.

    Args:
        block: the task's, resolved.
        path: of the file for what rank 0 keeps.
        every: frames from one copy to the next.
        max_failures: how often environments that fail are begun anew.
    """

    spec_class: ClassVar[type[OnPolicyBlock]]

    def __init__(self, block: dict[str, Any], path: str, every: int, max_failures: int) -> None:
        super().__init__(self.spec_class.model_validate(block), max_failures)
        self.path, self.keeper, self.rank = Path(path), Keeper(every), -1

    def stream(self, part: Part) -> Stream:
        self.rank, self.watched = part.index, Watched(super().stream(part), self.keeper)
        return self.watched

    def after_update(self, model: nn.Module, progress: Progress) -> None:
        super().after_update(model, progress)
        if self.rank == 0:
            self.keeper.offer(progress.frames, lambda: self.copy(model))

    def copy(self, model: nn.Module) -> Arrays:
        """What is kept of the weights: all that acts, or the training return of a policy for images."""
        if isinstance(self.spec.policy, CNNPolicySpec):
            return self.watched.training_return()
        assert isinstance(model, Policy)
        return layers(model)

    def evaluate(self, model: nn.Module, part: Part, progress: Progress) -> dict[str, Mean]:
        if self.rank == 0:
            policy = self.spec.policy
            own = "tanh" if isinstance(policy, OwnPolicySpec) else "linear"
            self.keeper.save(self.path, policy.activation if isinstance(policy, MLPPolicySpec) else own)
        return {}


class KeepingActorCritic(Keeping, ActorCritic):
    """A3C and A2C."""

    spec_class = ActorCriticSpec


class KeepingPPO(Keeping, PPO):
    """PPO."""

    spec_class = PPOSpec


class KeepingReinforce(Keeping, Reinforce):
    """REINFORCE."""

    spec_class = ReinforceSpec


class KeepingTRPO(Keeping, TRPO):
    """TRPO and the natural gradient."""

    spec_class = TRPOSpec
