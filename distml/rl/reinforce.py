"""`task: reinforce`: REINFORCE with reward-to-go over whole episodes (Williams 1992), with a choice of baselines.

Per valid step: -log pi(a_t|s_t) (G_t - w_t b) - entropy x H, summed over steps; the update divides by the number of
episodes. G_t = sum_k>=t gamma^(k-t) w_k r_k. On-policy w = 1. With importance weights
w_k = min(prod_j<=k pi(a_j)/mu(a_j), max_weight), per decision (Precup, Sutton & Singh 2000): a reward is weighted by
the choices that led to it, not by those after it. As is usual, a step counts the same whenever it comes: there is no
factor gamma^t (Nota & Thomas 2020).

Baselines b (none of them changes the gradient's mean):

    moving_average   decayed mean of the reward-to-go of earlier batches, a number that the model carries; the same in
                     all uses of a batch
    learned          V(s_t), trained on the reward-to-go; with epochs > 1 later uses of a batch are held against values
                     that have been trained on it already, which biases them a little
    optimal          per time step, b_t = E[w g^2 G] / E[w^2 g^2], with g the norm of the score of step t,
                     d log pi(a_t|s_t) / d theta: what makes the variance of the t-th term least (Greensmith, Bartlett
                     & Baxter 2004). Estimated over the other episodes of the batch, so that none is held against itself

Shapes: T steps of the longest episode, E episodes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from distml.errors import UsageError
from distml.rl.advantages import rewards_to_go
from distml.rl.episodes import EpisodeCollector
from distml.rl.on_policy import ActingStream, OnPolicyTask, masked_sum, mean_of, policy_age
from distml.rl.policies import Policy
from distml.rl.rollout import Collector, Rollout
from distml.spec.rl import ReinforceSpec
from distml.tasks.base import Loss, Mean, Part, Progress, Stream

ROWS_AT_ONCE = 512  # whose gradients are held in memory together


@dataclass
class EpisodeBatch:
    """Episodes with what their loss needs; its rows are episodes.

    Attributes:
        rollout: padded to the longest.
        returns: reward-to-go [T, E], importance-weighted if that is asked for.
        targets: reward-to-go [T, E] as it was, which values are trained on.
        weights: w [T, E]; ones without importance weighting.
        baseline: [T, E]; None: the values.
        frames: environment steps that this batch is the first to use.
    """

    rollout: Rollout
    returns: Tensor
    targets: Tensor
    weights: Tensor
    baseline: Tensor | None
    frames: float = 0.0
    metrics: dict[str, Mean] = field(default_factory=dict)

    def __len__(self) -> int:
        return self.rollout.rewards.shape[1]

    def micro_batches(self, size: int) -> Iterator[EpisodeBatch]:
        """Pieces of at most `size` episodes; frames and metrics go with the first."""
        for start in range(0, len(self), size):
            which = slice(start, start + size)
            yield EpisodeBatch(
                self.rollout.environments(which, with_metrics=False), self.returns[:, which], self.targets[:, which],
                self.weights[:, which], None if self.baseline is None else self.baseline[:, which],
                0.0 if start else self.frames, {} if start else self.metrics,
            )  # fmt: skip

    def to(self, device: torch.device) -> EpisodeBatch:
        """The same on `device`."""
        baseline = None if self.baseline is None else self.baseline.to(device)
        return replace(self, rollout=self.rollout.to(device), returns=self.returns.to(device),
                       targets=self.targets.to(device), weights=self.weights.to(device), baseline=baseline)  # fmt: skip


class Reinforce(OnPolicyTask[ReinforceSpec]):
    """Monte Carlo policy gradients.

    Args:
        spec: the task's block.
        max_failures: how often environments that fail are begun anew.
    """

    def __init__(self, spec: ReinforceSpec, max_failures: int = 0) -> None:
        super().__init__(spec, max_failures)
        self.rollout: Rollout | None = None
        self.uses = 0
        self.past: float | None = None  # the moving average that the rollout is held against

    def build_model(self) -> nn.Module:
        policy = super().build_model()
        assert isinstance(policy, Policy)
        if self.spec.baseline == "moving_average":
            policy.register_buffer("return_total", torch.zeros((), dtype=torch.float64))
            policy.register_buffer("return_weight", torch.zeros((), dtype=torch.float64))
        if self.spec.baseline == "optimal" and policy.is_recurrent:
            raise UsageError("task.baseline optimal needs the gradient of every single step, which a policy with a "
                             "memory does not have; take baseline: learned")  # fmt: skip
        return policy

    def stream(self, part: Part) -> Stream:
        self.rollout = None
        return ActingStream(self, EpisodeCollector(self.spec, part, self.restarts))

    def next_batch(self, collector: Collector, policy: Policy, progress: Progress) -> EpisodeBatch:
        """The episodes in hand once more, or new ones."""
        if self.rollout is not None and self.uses < self.spec.epochs:
            self.uses += 1
            return prepared(self.spec, policy, self.rollout, self.past)
        assert isinstance(collector, EpisodeCollector)
        self.rollout, self.uses = collector.episodes_of(policy, progress.version).to(collector.part.device), 1
        if self.spec.baseline == "moving_average":
            self.past = remembered(policy)
        batch = prepared(self.spec, policy, self.rollout, self.past)
        if self.spec.baseline == "moving_average":  # the batch itself is held against earlier ones, at each use
            remember(policy, self.spec.decay, batch)
        return replace(batch, frames=float(self.rollout.num_frames), metrics=self.rollout.metrics)

    def loss(self, model: nn.Module, batch: EpisodeBatch, progress: Progress) -> Loss:
        assert isinstance(model, Policy)
        spec, rollout, valid = self.spec, batch.rollout, batch.rollout.valid
        parameters, values, _ = model(rollout.observations[:-1], rollout.state, rollout.resets[:-1])
        log_probs, entropies = model.distribution.log_prob_and_entropy(parameters, rollout.actions)
        baseline = values.detach() if batch.baseline is None else batch.baseline
        policy_loss = -masked_sum(log_probs * (batch.returns - batch.weights * baseline), valid)
        entropy = masked_sum(entropies, valid)
        total = policy_loss - spec.entropy * entropy
        episodes, frames = float(len(batch)), float(rollout.num_frames)
        metrics = {
            "policy_loss": mean_of(policy_loss, episodes),
            "entropy": mean_of(entropy, frames),
            **policy_age(rollout.version, progress, frames),
            **batch.metrics,
        }
        if spec.baseline == "learned":
            value_loss = masked_sum((batch.targets - values).square(), valid)
            total = total + spec.value_coefficient * value_loss
            metrics["value_loss"] = mean_of(value_loss, frames)
        if spec.importance_weighting:
            metrics["importance_weight"] = mean_of(masked_sum(batch.weights, valid), frames)
        return Loss(total, episodes, metrics, frames=batch.frames)


@torch.no_grad()
def prepared(spec: ReinforceSpec, policy: Policy, rollout: Rollout, past: float | None = None) -> EpisodeBatch:
    """Returns, weights and baseline for the policy of now.

    Args:
        spec: the task's block.
        policy: whose gradient is wanted.
        rollout: whole episodes, by whatever policy its parameters are of.
        past: moving_average: what it is held against; None: the mean of now.
    """
    targets = to_go(rollout, rollout.rewards, spec.gamma)
    weights, returns = torch.ones_like(targets), targets
    if spec.importance_weighting:
        weights = importance_weights(policy, rollout, spec.max_weight)
        returns = to_go(rollout, rollout.rewards * weights, spec.gamma)
    baseline = None if spec.baseline == "learned" else torch.zeros_like(targets)
    if spec.baseline == "moving_average":
        baseline = torch.full_like(targets, remembered(policy) if past is None else past)
    if spec.baseline == "optimal":
        squares = squared_scores(policy, rollout)
        baseline = ratio_of_others(weights * squares * returns, weights.square() * squares)
    return EpisodeBatch(rollout, returns, targets, weights, baseline)


def to_go(rollout: Rollout, rewards: Tensor, gamma: float) -> Tensor:
    """Discounted sums of rewards [T, E] to each episode's end."""
    found = rewards_to_go(rewards.cpu().numpy(), rollout.ended.cpu().numpy(), gamma)
    return torch.from_numpy(found).to(rewards.device)


def importance_weights(policy: Policy, rollout: Rollout, max_weight: float) -> Tensor:
    """prod_j<=t pi(a_j|s_j) / mu(a_j|s_j) [T, E], at most `max_weight`; mu is the policy that acted."""
    parameters, _, _ = policy(rollout.observations[:-1], rollout.state, rollout.resets[:-1])
    distribution = policy.distribution
    ratios = distribution.log_prob(parameters, rollout.actions) - distribution.log_prob(
        rollout.parameters, rollout.actions
    )
    return ratios.masked_fill(~rollout.valid, 0.0).cumsum(0).clamp(max=math.log(max_weight)).exp()


# ------------------------------------------------------------------------------------------------------ moving average
def remembered(policy: Policy) -> float:
    """The decayed mean of returns, not biased towards its start; 0 before there was any."""
    weight = float(policy.get_buffer("return_weight"))
    return float(policy.get_buffer("return_total")) / weight if weight else 0.0


def remember(policy: Policy, decay: float, batch: EpisodeBatch) -> None:
    """Take a batch's mean reward-to-go into the decayed mean."""
    mean = masked_sum(batch.targets, batch.rollout.valid).double() / batch.rollout.num_frames
    policy.get_buffer("return_total").mul_(decay).add_((1.0 - decay) * mean)
    policy.get_buffer("return_weight").mul_(decay).add_(1.0 - decay)


# -------------------------------------------------------------------------------------------------------------- optimal
def squared_scores(policy: Policy, rollout: Rollout) -> Tensor:
    """Squared norm [T, E] of d log pi(a|s) / d theta, each step by itself; 0 in rows that are not valid."""
    parameters = {name: one.detach() for name, one in policy.named_parameters() if one.requires_grad}

    def log_prob(weights: Mapping[str, Tensor], observation: Tensor, action: Tensor) -> Tensor:
        start = torch.ones(1, 1, dtype=torch.bool, device=observation.device)
        found, _, _ = functional_call(policy, dict(weights), (observation[None, None], (), start))
        return policy.distribution.log_prob(found[0, 0], action)

    def squared(observation: Tensor, action: Tensor) -> Tensor:
        slopes = grad(log_prob)(parameters, observation, action)
        return torch.stack([slope.square().sum() for slope in slopes.values()]).sum()

    valid = rollout.valid
    squares = torch.zeros(valid.shape, device=valid.device)
    each = vmap(squared, chunk_size=ROWS_AT_ONCE)
    squares[valid] = each(rollout.observations[:-1][valid], rollout.actions[valid]).to(squares.dtype)
    return squares


def ratio_of_others(above: Tensor, below: Tensor) -> Tensor:
    """sum_j!=e above[t, j] / sum_j!=e below[t, j], for each t and e [T, E]; 0 where there are no others.

    Sums from both sides instead of total minus own: where one episode outweighs all others nothing is lost.
    """
    return _others(above) / _others(below).clamp(min=torch.finfo(below.dtype).tiny)


def _others(values: Tensor) -> Tensor:
    before = values.cumsum(1).roll(1, 1)
    after = values.flip(1).cumsum(1).flip(1).roll(-1, 1)
    before[:, 0] = after[:, -1] = 0.0
    return before + after
