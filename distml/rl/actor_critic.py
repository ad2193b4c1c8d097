"""`task: actor_critic`: A3C (Mnih et al. 2016) under asynchronous parameter servers, A2C under synchronous strategies.

Per valid step: -log pi(a|s) A - entropy x H(pi(.|s)) + value_coefficient x (R - V(s))^2, with A and R = A + V held
constant. Everything is computed in one pass over the rollout: acting needs no values.

Shapes: T steps, E environments, P distribution parameters.
"""

from __future__ import annotations

from torch import nn

from distml.rl.on_policy import OnPolicyTask, estimate, masked_sum, mean_of, next_rollout, policy_age, standardised
from distml.rl.policies import Policy
from distml.rl.rollout import Collector, Rollout
from distml.spec.rl import ActorCriticSpec
from distml.tasks.base import Loss, Progress


class ActorCritic(OnPolicyTask[ActorCriticSpec]):
    """Advantage actor-critic over n-step returns or generalised advantages."""

    def next_batch(self, collector: Collector, policy: Policy, progress: Progress) -> Rollout:
        assert self.spec.n_steps is not None
        return next_rollout(collector, policy, self.spec.n_steps, progress.version)

    def loss(self, model: nn.Module, batch: Rollout, progress: Progress) -> Loss:
        assert isinstance(model, Policy)
        spec, valid, count = self.spec, batch.valid, float(batch.num_frames)
        parameters, values, _ = model(batch.observations, batch.state, batch.resets)
        log_probs, entropies = model.distribution.log_prob_and_entropy(parameters[:-1], batch.actions)
        advantages, returns = estimate(model, batch, values, spec.gamma, spec.gae_lambda)
        if spec.normalise_advantages:
            advantages = standardised(advantages, valid)
        policy_loss = -masked_sum(log_probs * advantages, valid)
        value_loss = masked_sum((returns - values[:-1]).square(), valid)
        entropy = masked_sum(entropies, valid)
        total = policy_loss + spec.value_coefficient * value_loss - spec.entropy * entropy
        metrics = {
            "policy_loss": mean_of(policy_loss, count),
            "value_loss": mean_of(value_loss, count),
            "entropy": mean_of(entropy, count),
            **policy_age(batch.version, progress, count),
            **batch.metrics,
        }
        return Loss(total, count, metrics, frames=count)
