"""What tasks that learn from their own acting share: a policy, a stream that acts with it, and episodes to evaluate."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from distml.rl.advantages import generalised_advantages, next_values
from distml.rl.environments import check_recurrent, spaces_of
from distml.rl.evaluation import Act, acting, evaluate_policy
from distml.rl.policies import Policy, build_policy
from distml.rl.restarts import Restarts
from distml.rl.rollout import Collector, Rollout
from distml.spec.rl import OnPolicyBlock, RolloutBlock
from distml.tasks.base import Mean, Part, Progress, Stream, Task

Array = NDArray[Any]
Spec = TypeVar("Spec", bound=OnPolicyBlock)


class OnPolicyTask(Task, Generic[Spec]):
    """A policy trained on what it has just done.

    Args:
        spec: the task's block.
        max_failures: how often environments that fail are begun anew.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"whole_weights"})

    def __init__(self, spec: Spec, max_failures: int = 0) -> None:
        self.spec, self.restarts = spec, Restarts(max_failures)

    def build_model(self) -> nn.Module:
        policy = build_policy(self.spec.policy, *spaces_of(self.spec.environment), self.spec.normalise)
        if policy.is_recurrent and isinstance(self.spec, RolloutBlock):
            check_recurrent(self.spec.environment)
        return policy

    def stream(self, part: Part) -> Stream:
        return ActingStream(self, Collector(self.spec, part, self.restarts))

    @abstractmethod
    def next_batch(self, collector: Collector, policy: Policy, progress: Progress) -> Any:
        """What one update learns from."""

    def evaluate(self, model: nn.Module, part: Part, progress: Progress) -> dict[str, Mean]:
        assert isinstance(model, Policy)
        return evaluate_policy(model, self.spec.environment, self.spec.evaluation, part)

    def greedy(self, model: nn.Module, num_envs: int) -> Act:
        """How the policy acts when it does what is most probable."""
        assert isinstance(model, Policy)
        if model.observation_moments is not None:
            model.observation_moments.freeze()
        return acting(model, num_envs, torch.device("cpu"))


class ActingStream:
    """A collector as a task's stream. Environments cannot be saved: it begins anew at checkpoints."""

    def __init__(self, task: OnPolicyTask[Any], collector: Collector) -> None:
        self.task, self.collector = task, collector

    def next(self, model: nn.Module, progress: Progress) -> Any:
        """Act with the current weights, or take what is left of a rollout."""
        assert isinstance(model, Policy)
        return self.task.next_batch(self.collector, model, progress)

    def state(self) -> None:
        """None: it begins anew."""

    def load_state(self, state: dict[str, Any]) -> None:
        """Never called: there is no state."""
        raise TypeError("environments cannot go on from a state")


def next_rollout(collector: Collector, policy: Policy, num_steps: int, version: int) -> Rollout:
    """Act for T steps, and on until a step is valid: what all environments only began anew in is nothing to learn from.

    That can be so with T = 1 alone, as no environment begins anew twice in a row.
    """
    rollout = collector.collect(policy, num_steps, version)
    while not rollout.num_frames:
        rollout = collector.collect(policy, num_steps, version)
    return rollout


def estimate(
    policy: Policy, rollout: Rollout, values: Tensor, gamma: float, gae_lambda: float
) -> tuple[Tensor, Tensor]:
    """Advantages and returns [T, E] of a rollout, constants; dummy rows hold anything.

    Args:
        policy: for the values of final observations that are not in `values`.
        rollout: with T steps of E environments.
        values: [T + 1, E], of all its observations.
        gamma: discount.
        gae_lambda: weight of longer returns.
    """
    known = values.detach().cpu().numpy()
    terminated, truncated = rollout.terminated.cpu().numpy(), rollout.truncated.cpu().numpy()
    after = next_values(known, terminated, truncated, final_values(policy, rollout))
    rewards = rollout.rewards.cpu().numpy()
    advantages = generalised_advantages(rewards, known[:-1], after, terminated | truncated, gamma, gae_lambda)
    found = torch.from_numpy(advantages).to(values.device)
    return found, found + values.detach()[:-1]


@torch.no_grad()
def final_values(policy: Policy, rollout: Rollout) -> Array | None:
    """V of the last observation of episodes that ended [T, E], where it is not the next observation; else None."""
    if rollout.final is None:
        return None
    assert not policy.is_recurrent, "see check_recurrent"
    ended = rollout.ended
    _, values, _ = policy(rollout.final[ended].unsqueeze(0), (), ended.new_ones(1, int(ended.sum())))
    found = np.zeros(ended.shape, np.float32)
    found[ended.cpu().numpy()] = values[0].cpu().numpy()
    return found


def standardised(values: Tensor, valid: Tensor) -> Tensor:
    """With mean 0 and variance 1 over the valid ones."""
    known = values[valid]
    if known.numel() < 2:
        return values
    return (values - known.mean()) / (known.std() + 1e-8)


def masked_sum(values: Tensor, valid: Tensor) -> Tensor:
    """The sum over valid rows; what dummy rows hold, NaN even, has no part in it."""
    return values.masked_fill(~valid, 0.0).sum()


def mean_of(total: Tensor, count: float) -> Mean:
    """A sum over `count` rows, for the metrics."""
    return Mean(float(total.detach()), count)


def policy_age(version: int, progress: Progress, count: float) -> dict[str, Mean]:
    """How many versions older than the weights that are trained those of `version` were, which acted."""
    return {"rl/policy_age_mean": Mean(float(progress.version - version) * count, count)}
