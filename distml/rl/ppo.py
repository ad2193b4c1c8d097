"""`task: ppo`: proximal policy optimisation (Schulman et al. 2017); DD-PPO (Wijmans et al. 2020) under all_reduce.

    collect ▶ old log-probabilities, values, advantages, once ▶ epochs x minibatches, each of them one update ▶ collect

Per valid step: -min(r A, clip(r, 1 - c, 1 + c) A) - entropy x H + value_coefficient x (R - V)^2 with
r = pi(a|s) / pi_old(a|s). What is old is computed on the very pieces of the first pass, so that the first minibatch has
r = 1 and KL = 0 to the last bit.

A column is what a minibatch is made of: a row where policies have no memory (T = 1, C = steps x environments, of which
the valid ones are dealt out), a whole environment's sequence where they have one (C = environments).

Shapes: T steps, E environments, C columns, O one observation, A one action, P distribution parameters, H a state.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from distml.errors import UsageError
from distml.rl.on_policy import OnPolicyTask, estimate, masked_sum, mean_of, policy_age, standardised
from distml.rl.policies import Policy
from distml.rl.rollout import Collector, Rollout
from distml.spec.rl import PPOSpec
from distml.tasks.base import Loss, Mean, Part, Progress, Stream


@dataclass
class Minibatch:
    """Columns of a rollout with all that their loss needs.

    Attributes:
        observations: [T, C, *O].
        actions: [T, C, *A].
        resets, valid: bool [T, C], as a rollout's.
        parameters, log_probs, values: [T, C, P], [T, C], [T, C]: what the policy said before the first update.
        advantages, returns: [T, C].
        state: each [C, H], before the first observation.
        version: of the weights that acted.
        frames: environment steps that this minibatch is the first to use: all the rollout's, or 0.
        metrics: about the rollout; with its first minibatch.
    """

    observations: Tensor
    actions: Tensor
    resets: Tensor
    valid: Tensor
    parameters: Tensor
    log_probs: Tensor
    values: Tensor
    advantages: Tensor
    returns: Tensor
    state: tuple[Tensor, ...]
    version: int
    frames: float = 0.0
    metrics: dict[str, Mean] = field(default_factory=dict)

    def __len__(self) -> int:
        return self.valid.numel()

    def columns(self, which: slice | Tensor) -> Minibatch:
        """Some of its columns, without frames and metrics."""
        picked: dict[str, Any] = {name: getattr(self, name)[:, which] for name in TENSORS}
        return replace(self, **picked, state=tuple(one[which] for one in self.state), frames=0.0, metrics={})

    def micro_batches(self, size: int) -> Iterator[Minibatch]:
        """Pieces of at most `size` rows, or of one column; frames and metrics go with the first."""
        steps, num_columns = self.valid.shape
        width = max(1, size // steps)
        for start in range(0, num_columns, width):
            piece = self.columns(slice(start, start + width))
            yield piece if start else replace(piece, frames=self.frames, metrics=self.metrics)

    def to(self, device: torch.device) -> Minibatch:
        """The same on `device`."""
        moved: dict[str, Any] = {name: getattr(self, name).to(device) for name in TENSORS}
        return replace(self, **moved, state=tuple(one.to(device) for one in self.state))


TENSORS = [one.name for one in fields(Minibatch) if one.name not in ("state", "version", "frames", "metrics")]


class PPO(OnPolicyTask[PPOSpec]):
    """Proximal policy optimisation with a clipped objective.

    Args:
        spec: the task's block.
        max_failures: how often environments that fail are begun anew.
    """

    def __init__(self, spec: PPOSpec, max_failures: int = 0) -> None:
        super().__init__(spec, max_failures)
        self.needs = spec.all_needs  # type: ignore[misc]
        self.minibatches: Iterator[Minibatch] = iter(())
        self.divergence = Mean(0.0, 0.0)

    def stream(self, part: Part) -> Stream:
        self.minibatches, self.divergence = iter(()), Mean(0.0, 0.0)  # what is left of a rollout goes with its stream
        return super().stream(part)

    def next_batch(self, collector: Collector, policy: Policy, progress: Progress) -> Minibatch:
        """The next minibatch of the rollout in hand, or the first one of a new rollout."""
        batch = None if self._is_far() else next(self.minibatches, None)
        if batch is None:
            assert self.spec.n_steps is not None
            rollout = collector.collect(policy, self.spec.n_steps, progress.version).to(collector.part.device)
            self.minibatches = passes(self.spec, policy, rollout, collector.generator)
            batch = next(self.minibatches)
        return batch

    def _is_far(self) -> bool:
        """Whether the last update saw a larger KL than it should, over all workers: all leave their rollouts then.

        Every worker takes part in every step, whatever it has in hand, so that nobody waits for one that began anew.
        """
        if self.spec.target_kl is None:
            return False
        own, self.divergence = self.divergence, Mean(0.0, 0.0)
        total, count = self.group_mean(torch.tensor([own.total, own.count], dtype=torch.float64)).tolist()
        return bool(count) and total / count > self.spec.target_kl

    def loss(self, model: nn.Module, batch: Minibatch, progress: Progress) -> Loss:
        assert isinstance(model, Policy)
        spec, valid = self.spec, batch.valid
        count = float(valid.sum())
        parameters, values, _ = model(batch.observations, batch.state, batch.resets)
        log_probs, entropies = model.distribution.log_prob_and_entropy(parameters, batch.actions)
        ratio = (log_probs - batch.log_probs).exp()
        clipped = ratio.clamp(1.0 - spec.clip, 1.0 + spec.clip)
        policy_loss = -masked_sum(torch.minimum(ratio * batch.advantages, clipped * batch.advantages), valid)
        value_loss = masked_sum(self._value_losses(values, batch), valid)
        entropy = masked_sum(entropies, valid)
        total = policy_loss + spec.value_coefficient * value_loss - spec.entropy * entropy
        with torch.no_grad():
            divergence = masked_sum(model.distribution.kl(batch.parameters, parameters), valid)
            is_clipped = masked_sum(((ratio - 1.0).abs() > spec.clip).float(), valid)
        metrics = {
            "policy_loss": mean_of(policy_loss, count),
            "value_loss": mean_of(value_loss, count),
            "entropy": mean_of(entropy, count),
            "approx_kl": mean_of(divergence, count),
            "clip_fraction": mean_of(is_clipped, count),
            **policy_age(batch.version, progress, count),
            **batch.metrics,
        }
        self.divergence += metrics["approx_kl"]
        return Loss(total, count, metrics, frames=batch.frames)

    def _value_losses(self, values: Tensor, batch: Minibatch) -> Tensor:
        """Squared errors [T, C]; where values may not move far, of the worse of the free and the held value."""
        errors = (batch.returns - values).square()
        if self.spec.value_clip is None:
            return errors
        held = batch.values + (values - batch.values).clamp(-self.spec.value_clip, self.spec.value_clip)
        return torch.maximum(errors, (batch.returns - held).square())


def passes(spec: PPOSpec, policy: Policy, rollout: Rollout, generator: np.random.Generator) -> Iterator[Minibatch]:
    """All of a rollout's minibatches, as many on every worker; each pass in an order of its own.

    No minibatch is without a valid row: the spec's rules leave at least one for each.

    Raises:
        UsageError: a policy with a memory has fewer environments than there are minibatches.
    """
    num_columns = rollout.rewards.shape[1] if policy.is_recurrent else len(rollout)
    if num_columns < spec.minibatches:
        raise UsageError(f"{num_columns} {'environments' if policy.is_recurrent else 'rows'} per worker cannot be cut "
                         f"into {spec.minibatches} minibatches; lower task.minibatches")  # fmt: skip
    is_trained = torch.ones(num_columns, dtype=torch.bool) if policy.is_recurrent else rollout.valid.flatten().cpu()
    trained, dummies = is_trained.nonzero().flatten(), (~is_trained).nonzero().flatten()
    pieces = shuffled(trained, spec.minibatches, generator)
    whole = evaluated(spec, policy, rollout, [*pieces, dummies] if len(dummies) else pieces)
    first: dict[str, Any] = {"frames": float(rollout.num_frames), "metrics": whole.metrics}
    for epoch in range(spec.epochs):
        if epoch:
            pieces = shuffled(trained, spec.minibatches, generator)
        for piece in pieces:
            batch = whole.columns(piece)
            if spec.normalise_advantages:
                batch.advantages = standardised(batch.advantages, batch.valid)
            yield replace(batch, **first)
            first = {}


def shuffled(numbers: Tensor, num_pieces: int, generator: np.random.Generator) -> list[Tensor]:
    """The numbers, drawn into pieces of nearly equal size."""
    return list(torch.from_numpy(generator.permutation(numbers.numpy())).tensor_split(num_pieces))


def evaluated(spec: PPOSpec, policy: Policy, rollout: Rollout, pieces: list[Tensor]) -> Minibatch:
    """All columns of a rollout, with what the policy says of them before it is trained on them.

    Gradients stay on while they are evaluated: without them a recurrent cell rounds otherwise than in the loss.

    Args:
        spec: the task's block.
        policy: with the weights that acted.
        rollout: of T steps of E environments.
        pieces: of all columns, in which they are evaluated: the same numbers come out of the same pieces.
    """

    def columns(rows: Tensor) -> Tensor:
        return rows if policy.is_recurrent else rows.flatten(0, 1).unsqueeze(0)

    unknown = rollout.rewards.new_zeros(columns(rollout.rewards).shape)
    whole = Minibatch(columns(rollout.observations[:-1]), columns(rollout.actions), columns(rollout.resets[:-1]),
                      columns(rollout.valid), columns(rollout.parameters), unknown, unknown, unknown, unknown,
                      rollout.state, rollout.version)  # fmt: skip
    found: list[tuple[Tensor, ...]] = []
    for piece in pieces:
        part = whole.columns(piece)
        parameters, values, state = policy(part.observations, part.state, part.resets)
        log_probs, _ = policy.distribution.log_prob_and_entropy(parameters, part.actions)
        found.append(tuple(one.detach() for one in (parameters, log_probs, values, *(s.unsqueeze(0) for s in state))))
    place = torch.cat(pieces).argsort()
    joined = [torch.cat(parts, 1)[:, place] for parts in zip(*found, strict=True)]
    whole.parameters, whole.log_probs, whole.values = joined[:3]
    _, last, _ = policy(rollout.observations[-1:], tuple(one[0] for one in joined[3:]), rollout.resets[-1:])
    values = torch.cat((whole.values.reshape(rollout.rewards.shape), last.detach()))
    advantages, returns = estimate(policy, rollout, values, spec.gamma, spec.gae_lambda)
    whole.advantages, whole.returns = columns(advantages), columns(returns)
    whole.metrics = {**rollout.metrics, **explained_variance(values[:-1], returns, rollout.valid)}
    return whole


def explained_variance(values: Tensor, returns: Tensor, valid: Tensor) -> dict[str, Mean]:
    """1 - Var(R - V) / Var(R) over a rollout's valid steps [T, E]: 1 is a perfect critic, 0 a constant one."""
    known = returns[valid].double()
    variance = float(known.var(correction=0)) if known.numel() else 0.0
    if variance == 0.0:
        return {}
    left = float((known - values[valid].double()).var(correction=0))
    return {"explained_variance": Mean((1.0 - left / variance) * known.numel(), known.numel())}
