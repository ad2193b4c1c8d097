"""Optimisers over ranges of the flat vector: torch's own update rules, with moments that are flat vectors too.

torch.optim's functional forms are used, fused where torch has them: the classes would import torch's compiler for
their decorators, which takes longer than a small run. Each (phase, parameter group) segment is one tensor for them.

Shapes: S elements of this shard, [start, start + S) of the flat vector.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.optim.adam import adam
from torch.optim.adamw import adamw
from torch.optim.rmsprop import rmsprop
from torch.optim.sgd import sgd

from distml.exchange.compression.build import corrects_momentum
from distml.exchange.layout import MAX_BLOCK, Layout
from distml.spec.schema import AdamSpec, AdamWSpec, JobSpec, OptimizerSpec, ScheduleSpec, SGDSpec
from distml.strategies.moments import moment_names


def schedule_factor(schedule: ScheduleSpec, version: int, budget: int | None) -> float:
    """What the learning rate is multiplied by for the update that makes version + 1 of `version`.

    Warm-up rises linearly to 1 over `warmup` steps; linear and cosine (Loshchilov & Hutter 2017) then fall to `final`
    at `steps`, else at `budget`; step multiplies by `factor` after each `every` steps.
    """
    if version < schedule.warmup:
        return (version + 1) / schedule.warmup
    if schedule.name == "step":
        return float(schedule.factor ** (version // (schedule.every or 1)))
    if schedule.name == "constant":
        return 1.0
    end = schedule.steps or budget or version + 1
    share = min(1.0, (version - schedule.warmup) / max(1, end - schedule.warmup))
    fall = 1.0 - share if schedule.name == "linear" else 0.5 * (1.0 + math.cos(math.pi * share))
    return schedule.final + (1.0 - schedule.final) * fall


def applied_optimizer(job: JobSpec) -> OptimizerSpec:
    """The optimiser's block as the update applies it: without the momentum that the workers accumulate (topk).

    What is left is plain SGD. Its weight decay is that of the velocity it replaces, 1 / (1 - m) times as large: the
    weights change slowly, and a velocity that sums m^k of nearly equal decays is their geometric series.
    """
    spec = job.optimizer
    if not isinstance(spec, SGDSpec) or not corrects_momentum(job):
        return spec
    scale = 1.0 / (1.0 - spec.momentum)
    groups = [group.model_copy(update={"weight_decay": group.weight_decay * scale})
              if group.weight_decay is not None else group for group in spec.groups]  # fmt: skip
    changes = {"momentum": 0.0, "nesterov": False, "weight_decay": spec.weight_decay * scale, "groups": groups}
    return spec.model_copy(update=changes)


def written_optimizer(spec: OptimizerSpec, job: JobSpec) -> OptimizerSpec:
    """The block as a job writes it, of which `applied_optimizer` made this one; else this one."""
    return job.optimizer if spec == applied_optimizer(job) else spec


def group_values(spec: OptimizerSpec, group: int, version: int, budget: int | None) -> dict[str, float]:
    """The live learning rate and weight decay of a group at `version`; group k + 1 is the spec's k-th."""
    own = spec.groups[group - 1] if group else None
    lr = spec.lr if own is None or own.lr is None else own.lr
    decay = spec.weight_decay if own is None or own.weight_decay is None else own.weight_decay
    return {"lr": lr * schedule_factor(spec.schedule, version, budget), "weight_decay": decay}


class FlatOptimizer:
    """Updates elements [start, stop) of the flat vector.

    Args:
        spec: the optimiser's block.
        layout: the whole vector's index.
        shard: [start, stop) that this instance owns.
        like: a tensor whose type and device the moments take.
        budget: steps of the run, for schedules without an end of their own.
    """

    def __init__(
        self, spec: OptimizerSpec, layout: Layout, shard: tuple[int, int], like: Tensor, budget: int | None
    ) -> None:
        self.spec, self.layout, self.budget = spec, layout, budget
        self.start, self.stop = shard
        self.updates = 0
        self.like = like.new_empty(0)
        self.moments = {name: self._zeros() for name in moment_names(spec)}

    def _zeros(self) -> Tensor:
        return self.like.new_zeros(self.stop - self.start)

    def change_rule(self, spec: OptimizerSpec) -> None:
        """Go on by another block: moments that both rules have stay as they are, others begin at zero.

        Adam's begin with a count of zero, too: their bias correction is a function of it.
        """
        both_adam = all(isinstance(rule, (AdamSpec, AdamWSpec)) for rule in (self.spec, spec))
        kept = self.moments if both_adam or type(spec) is type(self.spec) else {}
        self.moments = {name: kept[name] if name in kept else self._zeros() for name in moment_names(spec)}
        if isinstance(spec, (AdamSpec, AdamWSpec)) and not both_adam:
            self.updates = 0
        self.spec = spec

    def hyperparameters(self, group: int, version: int, lr_factor: float = 1.0) -> dict[str, float]:
        """The live learning rate and weight decay of a group at `version`."""
        values = group_values(self.spec, group, version, self.budget)
        return {**values, "lr": values["lr"] * lr_factor}

    def update(self, weights: Tensor, gradients: Tensor, phase: int, version: int, lr_factor: float = 1.0) -> None:
        """One update in place.

        Args:
            weights: [S], this shard.
            gradients: the mean gradient of this shard's part of `phase`, in the flat vector's order.
            phase: which elements are updated.
            version: of the weights before the step.
            lr_factor: what the learning rate is multiplied by, besides the schedule.
        """
        offset = 0
        for segment in self.layout.segments:
            start, stop = max(segment.start, self.start), min(segment.stop, self.stop)
            if segment.phase != phase or start >= stop:
                continue
            own = slice(start - self.start, stop - self.start)
            moments = {name: vector[own] for name, vector in self.moments.items()}
            values = self.hyperparameters(segment.group, version, lr_factor)
            self._apply(weights[own], gradients[offset : offset + stop - start], moments, values)
            offset += stop - start

    def step_done(self) -> None:
        """All phases of a step are updated: count it (Adam's bias correction)."""
        self.updates += 1

    def _apply(self, weights: Tensor, gradient: Tensor, moments: dict[str, Tensor], values: dict[str, float]) -> None:
        spec = self.spec
        rule: Any
        if isinstance(spec, SGDSpec):
            buffers = [moments["momentum"]] if spec.momentum else [None]
            rule = sgd
            rule([weights], [gradient], buffers, fused=True, foreach=False, momentum=spec.momentum, dampening=0.0,
                nesterov=spec.nesterov, maximize=False, **values)  # fmt: skip
        elif isinstance(spec, (AdamSpec, AdamWSpec)):
            step = torch.tensor(float(self.updates), dtype=torch.float32, device=weights.device)
            rule = adam if isinstance(spec, AdamSpec) else adamw
            rule([weights], [gradient], [moments["exp_avg"]], [moments["exp_avg_sq"]], [], [step], foreach=False,
                 fused=True, amsgrad=False, beta1=spec.betas[0], beta2=spec.betas[1], eps=spec.eps, maximize=False,
                 **values)  # fmt: skip
        else:
            # torch has no fused RMSprop: pieces that stay in the cache between its passes come close to one.
            pieces = {name: list(vector.split(MAX_BLOCK)) for name, vector in moments.items()}
            parts = list(weights.split(MAX_BLOCK))
            steps = [torch.tensor(float(self.updates)) for _ in parts]
            rule = rmsprop
            rule(parts, list(gradient.split(MAX_BLOCK)), pieces["square_avg"], [], pieces.get("momentum", []), steps,
                 foreach=False, alpha=spec.alpha, eps=spec.eps, momentum=spec.momentum, centered=False,
                 **values)  # fmt: skip


def block_square_norms(layout: Layout, gradients: Tensor, shard: tuple[int, int], phase: int) -> list[float]:
    """Squared L2 norm of each block of this shard's part of `phase`, in float64 and in the blocks' order."""
    first = max(layout.phase_range(phase)[0], shard[0])
    last = min(layout.phase_range(phase)[1], shard[1])
    return [
        float(torch.linalg.vector_norm(gradients[start - first : stop - first], dtype=torch.float64)) ** 2
        for start, stop in layout.blocks
        if first <= start and stop <= last
    ]


def clip_scale(norm: float, limit: float | None) -> float:
    """What gradients of this global norm are multiplied by (as torch's clip_grad_norm_)."""
    return 1.0 if limit is None else min(1.0, limit / (norm + 1e-6))
