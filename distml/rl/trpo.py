"""`task: trpo`: trust region policy optimisation (Schulman et al. 2015); `step: natural`: the natural gradient.

    policy phase   surrogate's gradient g ▶ conjugate gradients: (F + damping) x = g ▶ scaled to max_kl ▶ line search
    value phase    a few times: Gauss-Newton step towards the returns, in a trust region

Each worker finds the same step d: gradients, products with F, surrogates and divergences are means over the steps of
all workers (sums and counts through `group_mean`). The loss of a phase has the gradient -d x count, so that plain SGD
at rate 1 makes theta + d of theta, however gradients travel. Nothing is tried on the model itself: points along the
search are tensors of their own.

F is the Fisher matrix, the second derivative of the mean KL. The critic's region is that of Schulman et al. (2016,
section 5): the mean of (V - V_old)^2 / (2 sigma^2) is at most `value_step`, with sigma^2 the mean squared error.

Shapes: T steps, E environments, N parameters of a phase.
"""

from __future__ import annotations

import fnmatch
import math
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from distml.errors import UsageError
from distml.rl.conjugate_gradient import Point, Surface, backtracked, conjugate_gradient, curvature_of, slope
from distml.rl.on_policy import OnPolicyTask, estimate, masked_sum, mean_of, next_rollout, policy_age
from distml.rl.policies import OwnPolicy, Policy
from distml.rl.ppo import explained_variance
from distml.rl.rollout import Collector, Rollout
from distml.spec.rl import TRPOSpec
from distml.tasks.base import Loss, Mean, Phase, Progress

ACTOR, CRITIC = "*policy.*", "*value.*"


class TRPO(OnPolicyTask[TRPOSpec]):
    """The update of the policy that improves it most within a bound on the KL."""

    needs: ClassVar[frozenset[str]] = frozenset({"whole_weights", "group_mean"})
    phases: ClassVar[tuple[Phase, ...]] = (("policy_loss", ACTOR), ("value_loss", "*"))

    def build_model(self) -> nn.Module:
        policy = super().build_model()
        if isinstance(policy, OwnPolicy):
            for name, _ in policy.module.named_parameters(prefix="module"):
                if fnmatch.fnmatchcase(name, ACTOR) == fnmatch.fnmatchcase(name, CRITIC):
                    raise UsageError(f"task trpo must know what acts and what judges: parameter {name} is in neither "
                                     "`policy` nor `value`; name the module's two parts so")  # fmt: skip
        return policy

    def next_batch(self, collector: Collector, policy: Policy, progress: Progress) -> Rollout:
        assert self.spec.n_steps is not None
        return next_rollout(collector, policy, self.spec.n_steps, progress.version)

    # ---------------------------------------------------------------------------------------------------------- policy
    def policy_loss(self, model: nn.Module, batch: Rollout, progress: Progress) -> Loss:
        """The policy's step; none if all of it is frozen."""
        assert isinstance(model, Policy)
        trained = matching(model, is_actor=True)
        if not trained:
            count = float(batch.num_frames)
            metrics = {**policy_age(batch.version, progress, count), **batch.metrics}
            return Loss(batch.rewards.new_zeros(()), count, metrics)
        means, surface = MeansOverWorkers(self, batch), Surface(trained)
        objective = Surrogate(model, batch, self._advantages(model, batch, means), self.spec.entropy)
        step = self._policy_step(objective, surface, means)
        gain, divergence = (one.detach() for one in objective(surface.at(step)))
        count = means.count
        metrics = {
            "surrogate_gain": mean_of(gain - objective.before, count),
            "approx_kl": mean_of(divergence, count),
            "entropy": mean_of(objective.entropy, count),
            "step_taken": Mean(float(bool(step.any())) * count, count),
            **policy_age(batch.version, progress, count),
            **batch.metrics,
        }
        return Loss(-count * surface.along(step) - objective.before, count, metrics)

    def _policy_step(self, objective: Surrogate, surface: Surface, means: MeansOverWorkers) -> Tensor:
        spec, point = self.spec, surface.at()
        gain, divergence = objective(point)
        product = curvature_of(divergence, point)

        def fisher(vector: Tensor) -> Tensor:
            return means(product(vector))

        uphill = means(slope(gain, point))
        direction = conjugate_gradient(lambda v: fisher(v) + spec.damping * v, uphill, spec.cg_iterations)
        curvature = float(direction @ fisher(direction))
        if curvature <= 0.0:  # no gradient, or one along which nothing changes
            return surface.zeros()
        step = math.sqrt(2.0 * spec.max_kl / curvature) * direction
        if spec.step == "natural":
            return step
        before = float(means(gain.detach()))

        def accepts(tried: Tensor) -> bool:
            with torch.no_grad():
                gained, moved = means(torch.stack(objective(surface.at(tried)))).tolist()
            return bool(moved <= spec.max_kl and gained > before)

        return backtracked(step, accepts, spec.line_search_steps)

    def _advantages(self, model: Policy, batch: Rollout, means: MeansOverWorkers) -> Tensor:
        """[T, E], to mean 0 and variance 1 over all workers if that is asked for."""
        with torch.no_grad():
            _, values, _ = model(batch.observations, batch.state, batch.resets)
        advantages, _ = estimate(model, batch, values, self.spec.gamma, self.spec.gae_lambda)
        if not self.spec.normalise_advantages:
            return advantages
        mean = means(masked_sum(advantages.double(), batch.valid))
        deviations = advantages.double() - mean
        variance = means(masked_sum(deviations.square(), batch.valid))
        return (deviations / (variance.sqrt() + 1e-8)).to(advantages.dtype)

    # ----------------------------------------------------------------------------------------------------------- value
    def value_loss(self, model: nn.Module, batch: Rollout, progress: Progress) -> Loss:
        """The critic's step; it sees the values that the policy's step was found with. None if all of it is frozen."""
        assert isinstance(model, Policy)
        with torch.no_grad():
            _, values, _ = model(batch.observations, batch.state, batch.resets)
        _, returns = estimate(model, batch, values, self.spec.gamma, self.spec.gae_lambda)
        metrics, count = explained_variance(values[:-1], returns, batch.valid), float(batch.num_frames)
        trained = matching(model, is_actor=False)
        if not trained:
            return Loss(batch.rewards.new_zeros(()), count, metrics, frames=count)
        means, surface = MeansOverWorkers(self, batch), Surface(trained)
        critic, step = Critic(model, batch, returns), surface.zeros()
        for _ in range(self.spec.value_iterations):
            step = step + self._value_step(critic, surface, step, means)
        error = critic.error(critic(surface.at()).detach())
        return Loss(-count * surface.along(step) + error, count, metrics, frames=count)

    def _value_step(self, critic: Critic, surface: Surface, start: Tensor, means: MeansOverWorkers) -> Tensor:
        """One Gauss-Newton step from `start` [N], scaled into the region, halved until the error falls."""
        spec, point = self.spec, surface.at(start)
        values = critic(point)
        error = critic.error(values)
        downhill = -means(slope(0.5 * error, point))
        product = curvature_of(critic.distance(values, values.detach()), point)

        def gauss_newton(vector: Tensor) -> Tensor:
            return means(product(vector))

        step = conjugate_gradient(lambda v: gauss_newton(v) + spec.damping * v, downhill, spec.cg_iterations)
        variance = float(means(error.detach()))
        moved = float(step @ gauss_newton(step))
        if variance <= 0.0 or moved <= 0.0:
            return surface.zeros()
        step = step * min(1.0, math.sqrt(2.0 * variance * spec.value_step / moved))

        def accepts(tried: Tensor) -> bool:
            with torch.no_grad():
                return bool(float(means(critic.error(critic(surface.at(start + tried))))) < variance)

        return backtracked(step, accepts, spec.line_search_steps)


class MeansOverWorkers:
    """Means per valid step over all workers, from each worker's sums.

    Args:
        task: whose group it is.
        batch: this worker's.
    """

    def __init__(self, task: TRPO, batch: Rollout) -> None:
        self.group_mean, self.count = task.group_mean, float(batch.num_frames)
        count = self.group_mean(torch.tensor([self.count], dtype=torch.float64, device=batch.rewards.device))
        self.mean_count = float(count) or 1.0

    def __call__(self, total: Tensor) -> Tensor:
        """A sum over this worker's steps, of any shape, as the mean over all workers' steps (float64)."""
        flat = total.detach().double().reshape(-1)
        return (self.group_mean(flat) / self.mean_count).reshape(total.shape)


class Surrogate:
    """What the policy's step makes larger, and how far it goes, as sums over a worker's steps.

    Args:
        policy: as it acted.
        batch: this worker's.
        advantages: [T, E].
        entropy_coefficient: of the bonus.
    """

    def __init__(self, policy: Policy, batch: Rollout, advantages: Tensor, entropy_coefficient: float) -> None:
        self.policy, self.batch, self.advantages = policy, batch, advantages
        self.entropy_coefficient = entropy_coefficient
        with torch.no_grad():
            self.old = self._parameters({})
            self.old_log_probs, entropies = policy.distribution.log_prob_and_entropy(self.old, batch.actions)
            self.entropy = masked_sum(entropies, batch.valid)
            self.before = masked_sum(advantages, batch.valid) + entropy_coefficient * self.entropy

    def __call__(self, point: Point) -> tuple[Tensor, Tensor]:
        """(sum of ratio x advantage and the bonus, sum of KL(old || new)) at a point."""
        distribution, valid = self.policy.distribution, self.batch.valid
        parameters = self._parameters(point)
        log_probs, entropies = distribution.log_prob_and_entropy(parameters, self.batch.actions)
        gain = masked_sum((log_probs - self.old_log_probs).exp() * self.advantages, valid)
        divergence = masked_sum(distribution.kl(self.old, parameters), valid)
        return gain + self.entropy_coefficient * masked_sum(entropies, valid), divergence

    def _parameters(self, point: Point) -> Tensor:
        return outputs(self.policy, point, self.batch)[0]


class Critic:
    """Values at a point, and how wrong they are, as sums over a worker's steps.

    Args:
        policy: whose values.
        batch: this worker's.
        returns: [T, E], what they should be.
    """

    def __init__(self, policy: Policy, batch: Rollout, returns: Tensor) -> None:
        self.policy, self.batch, self.returns = policy, batch, returns

    def __call__(self, point: Point) -> Tensor:
        return outputs(self.policy, point, self.batch)[1]

    def error(self, values: Tensor) -> Tensor:
        """The sum of squared errors."""
        return masked_sum((self.returns - values).square(), self.batch.valid)

    def distance(self, values: Tensor, others: Tensor) -> Tensor:
        """Half the sum of squared differences."""
        return 0.5 * masked_sum((values - others).square(), self.batch.valid)


def outputs(policy: Policy, point: Point, batch: Rollout) -> tuple[Tensor, Tensor]:
    """Parameters [T, E, P] and values [T, E] of a policy some of whose parameters are replaced."""
    arguments = (batch.observations[:-1], batch.state, batch.resets[:-1])
    parameters, values, _ = functional_call(policy, dict(point), arguments)
    return parameters, values


def matching(model: nn.Module, *, is_actor: bool) -> dict[str, Tensor]:
    """The trained parameters of actor or critic."""
    return {
        name: one
        for name, one in model.named_parameters()
        if one.requires_grad and fnmatch.fnmatchcase(name, ACTOR) == is_actor
    }
