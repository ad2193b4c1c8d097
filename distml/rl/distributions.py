"""From the numbers that a policy gives to actions: how probable one is, how to draw it, what the environment takes.

Distributions hold no tensors: the parameters [..., P] are always an argument. The learner's half is torch code of few
kernels, the actor's half NumPy. Actions are kept as they were drawn (class from 0, unclipped, before the tanh), so that
their probability is exact; `to_environment` makes of them what `env.step` takes.

Shapes: P parameters, E environments, A action (the space's shape), K numbers of an action, N classes.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from distml.errors import UsageError

Array = NDArray[Any]

HALF_LOG_TWO_PI = 0.5 * math.log(2.0 * math.pi)
TINY = np.float32(1e-30)  # a draw of exactly 0 would be log(0)
SUPPORTED = "Discrete, MultiDiscrete, MultiBinary and floating Box"


class Distribution(ABC):
    """A family of distributions over actions.

    Attributes:
        num_parameters: P, what a policy gives per action.
        action_shape: A, the shape of one action.
        action_dtype: the type in which actions are kept, int64 or float32.
    """

    num_parameters: int
    action_shape: tuple[int, ...]
    action_dtype: torch.dtype

    @abstractmethod
    def log_prob(self, parameters: Tensor, actions: Tensor) -> Tensor:
        """Log-probability (density) [...] of actions [..., *A] under parameters [..., P]."""

    @abstractmethod
    def entropy(self, parameters: Tensor) -> Tensor:
        """Entropy [...] in nats."""

    @abstractmethod
    def kl(self, old: Tensor, new: Tensor) -> Tensor:
        """KL(old || new) [...] in nats."""

    def log_prob_and_entropy(self, parameters: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        """Both at once, where they share work."""
        return self.log_prob(parameters, actions), self.entropy(parameters)

    @abstractmethod
    def sample(self, parameters: Array, generator: np.random.Generator) -> Array:
        """Actions [E, *A] drawn under float32 parameters [E, P]."""

    @abstractmethod
    def mode(self, parameters: Array) -> Array:
        """The most probable actions [E, *A]."""

    @abstractmethod
    def to_environment(self, actions: Array) -> Array:
        """What `env.step` takes for actions [E, *A]."""


class Categorical(Distribution):
    """One of N classes; the parameters are unnormalised log-probabilities.

    Args:
        classes: N.
        start: what the environment calls class 0.
    """

    def __init__(self, classes: int, start: int = 0) -> None:
        self.num_parameters, self.start = classes, start
        self.action_shape, self.action_dtype = (), torch.int64

    def log_prob(self, parameters: Tensor, actions: Tensor) -> Tensor:
        return _pick(F.log_softmax(parameters, -1), actions)

    def entropy(self, parameters: Tensor) -> Tensor:
        return _entropy(F.log_softmax(parameters, -1))

    def log_prob_and_entropy(self, parameters: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        log_probs = F.log_softmax(parameters, -1)
        return _pick(log_probs, actions), _entropy(log_probs)

    def kl(self, old: Tensor, new: Tensor) -> Tensor:
        before = F.log_softmax(old, -1)
        return (before.exp() * (before - F.log_softmax(new, -1))).sum(-1)

    def sample(self, parameters: Array, generator: np.random.Generator) -> Array:
        """Exponential races: class k is first with probability softmax(parameters)[k], in one call for all."""
        race = generator.standard_exponential(parameters.shape, dtype=np.float32)
        np.maximum(race, TINY, out=race)
        np.log(race, out=race)
        classes: Array = np.subtract(parameters, race, out=race).argmax(-1)
        return classes

    def mode(self, parameters: Array) -> Array:
        classes: Array = parameters.argmax(-1)
        return classes

    def to_environment(self, actions: Array) -> Array:
        return actions + self.start if self.start else actions


class MultiCategorical(Distribution):
    """K independent choices, the k-th among `classes[k]`; the parameters are their logits end to end.

    Args:
        classes: the number of classes of each choice, in the shape of an action.
        start: what the environment calls class 0 of each choice.
        dtype: what the environment takes.
    """

    def __init__(self, classes: Array, start: Array, dtype: Any = np.int64) -> None:
        self.factors = [Categorical(int(count)) for count in classes.reshape(-1)]
        self.sizes = [factor.num_parameters for factor in self.factors]
        self.cuts = np.cumsum(self.sizes)[:-1]
        self.start, self.dtype = np.asarray(start, np.int64), dtype
        self.num_parameters = sum(self.sizes)
        self.action_shape, self.action_dtype = classes.shape, torch.int64

    def log_prob(self, parameters: Tensor, actions: Tensor) -> Tensor:
        choices = _rows(actions, parameters).unbind(-1)
        rows = zip(self.factors, parameters.split(self.sizes, -1), choices, strict=True)
        return _sum(factor.log_prob(logits, choice) for factor, logits, choice in rows)

    def entropy(self, parameters: Tensor) -> Tensor:
        rows = zip(self.factors, parameters.split(self.sizes, -1), strict=True)
        return _sum(factor.entropy(logits) for factor, logits in rows)

    def log_prob_and_entropy(self, parameters: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        choices = _rows(actions, parameters).unbind(-1)
        rows = zip(self.factors, parameters.split(self.sizes, -1), choices, strict=True)
        log_probs, entropies = zip(*(factor.log_prob_and_entropy(*row) for factor, *row in rows), strict=True)
        return _sum(log_probs), _sum(entropies)

    def kl(self, old: Tensor, new: Tensor) -> Tensor:
        rows = zip(self.factors, old.split(self.sizes, -1), new.split(self.sizes, -1), strict=True)
        return _sum(factor.kl(before, after) for factor, before, after in rows)

    def sample(self, parameters: Array, generator: np.random.Generator) -> Array:
        rows = zip(self.factors, np.split(parameters, self.cuts, -1), strict=True)
        return self._joined([factor.sample(logits, generator) for factor, logits in rows])

    def mode(self, parameters: Array) -> Array:
        rows = zip(self.factors, np.split(parameters, self.cuts, -1), strict=True)
        return self._joined([factor.mode(logits) for factor, logits in rows])

    def _joined(self, choices: Sequence[Array]) -> Array:
        return np.stack(choices, -1).reshape(-1, *self.action_shape)

    def to_environment(self, actions: Array) -> Array:
        return (actions + self.start).astype(self.dtype, copy=False)


class Gaussian(Distribution):
    """Independent normal distributions; the parameters are K means, then K logarithms of standard deviations.

    The environment gets the action clipped to the space's bounds; what is learned from is the action before that.
    """

    def __init__(self, space: spaces.Box) -> None:
        self.size = math.prod(space.shape)
        self.num_parameters = 2 * self.size
        self.action_shape, self.action_dtype = space.shape, torch.float32
        self.low, self.high, self.dtype = space.low, space.high, space.dtype

    def log_prob(self, parameters: Tensor, actions: Tensor) -> Tensor:
        mean, log_std = parameters.chunk(2, -1)
        standard = (_rows(actions, parameters) - mean) * (-log_std).exp()
        return -(0.5 * standard.square() + log_std).sum(-1) - self.size * HALF_LOG_TWO_PI

    def entropy(self, parameters: Tensor) -> Tensor:
        return parameters[..., self.size :].sum(-1) + self.size * (0.5 + HALF_LOG_TWO_PI)

    def kl(self, old: Tensor, new: Tensor) -> Tensor:
        (mean, log_std), (new_mean, new_log_std) = old.chunk(2, -1), new.chunk(2, -1)
        shift = ((mean - new_mean) * (-new_log_std).exp()).square()
        widths = log_std - new_log_std
        return 0.5 * (torch.expm1(2 * widths) - 2 * widths + shift).sum(-1)

    def sample(self, parameters: Array, generator: np.random.Generator) -> Array:
        mean, log_std = parameters[:, : self.size], parameters[:, self.size :]
        noise = generator.standard_normal(mean.shape, dtype=np.float32)
        noise *= np.exp(log_std)
        noise += mean
        return noise.reshape(-1, *self.action_shape)

    def mode(self, parameters: Array) -> Array:
        return parameters[:, : self.size].reshape(-1, *self.action_shape)

    def to_environment(self, actions: Array) -> Array:
        clipped: Array = np.clip(actions.astype(self.dtype, copy=False), self.low, self.high)
        return clipped


class SquashedGaussian(Gaussian):
    """A normal u, squashed into the bounds: low + (high - low) (tanh(u) + 1) / 2 (Haarnoja et al. 2018, appendix C).

    Actions are kept as u. `log_prob` is the density of the environment's action, the Jacobian of tanh and scale
    included. KL is exact (a bijection leaves it as it is). The entropy has no closed form: the one of u stands for it,
    which has the same gradient where tanh is nearly linear and does not see how u is squeezed at the bounds.
    """

    def __init__(self, space: spaces.Box) -> None:
        super().__init__(space)
        if not (space.is_bounded() and (space.low < space.high).all()):
            raise UsageError(
                f"squashed: true needs an action space with finite bounds, low below high, not {space}; "
                "take squashed: false"
            )
        self.half_range = (space.high - space.low) / 2
        self.log_scale = float(np.log(self.half_range.astype(np.float64)).sum())

    def log_prob(self, parameters: Tensor, actions: Tensor) -> Tensor:
        u = _rows(actions, parameters)
        log_slope = 2.0 * (math.log(2.0) - u - F.softplus(-2.0 * u))  # log(1 - tanh(u)^2), also far from 0
        return super().log_prob(parameters, actions) - log_slope.sum(-1) - self.log_scale

    def to_environment(self, actions: Array) -> Array:
        squashed = np.tanh(actions.astype(self.dtype, copy=False))
        scaled: Array = np.clip(self.low + (squashed + 1) * self.half_range, self.low, self.high)
        return scaled


def build_distribution(action_space: spaces.Space[Any], squashed: bool = False) -> Distribution:
    """The distribution over a space's actions.

    Raises:
        UsageError: no distribution is known for the space, or it cannot be squashed.
    """
    if isinstance(action_space, spaces.Box) and np.issubdtype(action_space.dtype, np.floating):
        return SquashedGaussian(action_space) if squashed else Gaussian(action_space)
    if isinstance(action_space, spaces.Discrete | spaces.MultiDiscrete | spaces.MultiBinary) and squashed:
        raise UsageError(f"squashed: true is for continuous actions, not {action_space}; leave it out")
    if isinstance(action_space, spaces.Discrete):
        return Categorical(int(action_space.n), int(action_space.start))
    if isinstance(action_space, spaces.MultiDiscrete):
        return MultiCategorical(action_space.nvec, action_space.start, action_space.dtype)
    if isinstance(action_space, spaces.MultiBinary):
        classes = np.full(action_space.shape, 2)
        return MultiCategorical(classes, np.zeros_like(classes), action_space.dtype)
    raise UsageError(
        f"actions of {action_space} are not supported, {SUPPORTED} are; wrap the environment so that it takes one of "
        "these (environment.wrappers, or an own gymnasium.Env)"
    )


def _pick(log_probs: Tensor, actions: Tensor) -> Tensor:
    return log_probs.gather(-1, actions.unsqueeze(-1)).squeeze(-1)


def _entropy(log_probs: Tensor) -> Tensor:
    return -(log_probs.exp() * log_probs).sum(-1)


def _rows(actions: Tensor, parameters: Tensor) -> Tensor:
    """Actions [..., *A] as [..., K]."""
    return actions.reshape(*parameters.shape[:-1], -1)


def _sum(terms: Any) -> Tensor:
    total: Tensor = torch.stack(tuple(terms)).sum(0)
    return total
