"""Running moments of observations and returns, frozen while a rollout lasts and merged exactly over workers.

Each worker adds what it sees to sums about the mean that all agree on. The exchange sums these over workers and folds
them into what all agree on (`Accumulator`), so that the moments are those of all data together, every row once. What
is normalised with is frozen: it changes only at `freeze`, so that a rollout's observations mean the same when they
are acted on and when they are learned from.

Shapes: N rows, O shape of a row, T time, E environments.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distml.tasks.base import Accumulator

Array = NDArray[Any]
EPSILON = 1e-8


class RunningMoments(Accumulator):
    """Mean and variance of all rows seen so far, in float64 (Chan, Golub & LeVeque 1983).

    The sums are about the base mean. Until the first merge that is 0, which costs (mean / deviation)^2 x 1e-16 of the
    variance: far less than float32 rows have lost already.

    Args:
        shape: O.
        clip: largest normalised value.
    """

    sums: ClassVar[tuple[str, ...]] = ("new_count", "new_total", "new_squares")

    count: Tensor
    mean: Tensor
    m2: Tensor
    new_count: Tensor
    new_total: Tensor
    new_squares: Tensor
    frozen_mean: Tensor
    frozen_scale: Tensor

    def __init__(self, shape: tuple[int, ...], clip: float = 10.0) -> None:
        super().__init__()
        self.shape, self.clip = shape, clip
        for name in ("count", "mean", "m2", *self.sums):
            self.register_buffer(name, torch.zeros(() if "count" in name else shape, dtype=torch.float64))
        self.register_buffer("frozen_mean", torch.zeros(shape, dtype=torch.float64), persistent=False)
        self.register_buffer("frozen_scale", torch.ones(shape, dtype=torch.float64), persistent=False)

    @torch.no_grad()
    def update(self, rows: Tensor | Array, mask: Tensor | Array | None = None) -> None:
        """See rows [..., *O], of which those count where `mask` [...] is true. What is frozen stays."""
        flat = torch.as_tensor(rows, dtype=torch.float64, device=self.mean.device).reshape(-1, *self.shape)
        if mask is not None:
            flat = flat[torch.as_tensor(mask, device=flat.device).reshape(-1)]
        from_mean = flat - self.mean
        self.new_count += len(flat)
        self.new_total += from_mean.sum(0)
        self.new_squares += from_mean.square().sum(0)

    def merged(self) -> tuple[Tensor, Tensor, Tensor]:
        """Count, mean and sum of squared deviations of base and sums together."""
        count = self.count + self.new_count
        shift = self.new_total / self.new_count.clamp(min=1.0)  # of the new rows' mean from the base mean
        new_m2 = (self.new_squares - self.new_total * shift).clamp(min=0.0)
        share = self.new_count / count.clamp(min=1.0)
        return count, self.mean + shift * share, self.m2 + new_m2 + shift.square() * self.count * share

    def absorb(self) -> None:
        """Fold what was seen into the base; what is frozen stays."""
        count, mean, m2 = self.merged()
        self.count.copy_(count)
        self.mean.copy_(mean)
        self.m2.copy_(m2)
        for name in self.sums:
            self.get_buffer(name).zero_()

    def rebase(self, before: Mapping[str, Tensor]) -> None:
        """Sums about the mean of `before` become sums about the mean of now."""
        shift = before["mean"].to(self.mean.device) - self.mean
        self.new_squares += 2.0 * shift * self.new_total + self.new_count * shift.square()
        self.new_total += self.new_count * shift

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """What is frozen is not saved: it follows from what is loaded."""
        super()._load_from_state_dict(*args, **kwargs)
        self.freeze()

    def freeze(self) -> None:
        """Normalise with all that was seen until now, until the next call."""
        count, mean, m2 = self.merged()
        if float(count) > 0:
            self.frozen_mean.copy_(mean)
            self.frozen_scale.copy_((m2 / count + EPSILON).rsqrt())

    @contextmanager
    def newest(self) -> Iterator[None]:
        """Inside, normalise with all that was seen until now (to evaluate); afterwards with what was frozen before."""
        before = self.frozen_mean.clone(), self.frozen_scale.clone()
        self.freeze()
        try:
            yield
        finally:
            self.frozen_mean.copy_(before[0])
            self.frozen_scale.copy_(before[1])

    def normalise(self, rows: Tensor) -> Tensor:
        """(rows - mean) / sqrt(variance + 1e-8), clipped, as float32; before anything was seen only clipped."""
        return ((rows - self.frozen_mean) * self.frozen_scale).clamp_(-self.clip, self.clip).float()


class RewardScaler:
    """Divides rewards by the standard deviation of the discounted return, as Gymnasium's `NormalizeReward` and SB3.

    A whole rollout is divided by one number, which already knows the rollout: it was finished before. The moments are
    the policy's, shared by all workers; the returns so far are this stream's own and begin at zero with it.

    Args:
        moments: of returns, shape ().
        gamma: discount per step.
        num_envs: E.
    """

    def __init__(self, moments: RunningMoments, gamma: float, num_envs: int) -> None:
        self.moments, self.gamma = moments, gamma
        self.returns = np.zeros(num_envs)

    def scale(self, rewards: Array, done: Array, valid: Array) -> Array:
        """Scaled rewards [T, E], float32.

        Args:
            rewards: [T, E].
            done: [T, E], whether the episode ended with this step; the next return begins at zero.
            valid: [T, E], false where nothing happened: such a row changes nothing.
        """
        seen = np.empty(rewards.shape)
        for step, (reward, is_valid, is_done) in enumerate(zip(rewards, valid, done, strict=True)):
            self.returns = np.where(is_valid, self.returns * self.gamma + reward, self.returns)
            seen[step] = self.returns
            self.returns = np.where(is_valid & is_done, 0.0, self.returns)
        self.moments.update(seen, valid)
        self.moments.freeze()
        clip = self.moments.clip
        return np.clip(rewards * float(self.moments.frozen_scale), -clip, clip).astype(np.float32)
