"""Acting: from what environments show to the parameters of a distribution, as NumPy arrays, without gradients.

`TorchActor` runs the policy's own `act`. For small fully connected networks most of that is the price of torch's calls,
so where a policy is nothing else, `NumpyActor` computes the same with NumPy on views of the very same weights.

Shapes: E environments, O observation, P distribution parameters.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from distml.rl.distributions import Categorical, Gaussian, MultiCategorical, SquashedGaussian
from distml.rl.networks import ActionBranch, Dense, OneHotEncoding, State, ValueBranch, VectorEncoding
from distml.rl.normalise import RunningMoments
from distml.rl.policies import FeedForwardPolicy, Policy

Array = NDArray[Any]

PLAIN = (FeedForwardPolicy, ActionBranch, ValueBranch, Dense, nn.ModuleList, nn.Linear, RunningMoments)
PLAIN_PARTS = (VectorEncoding, OneHotEncoding, Categorical, MultiCategorical, Gaussian, SquashedGaussian)
NUMPY_ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "tanh": lambda values: np.tanh(values, out=values),
    "relu": lambda values: np.maximum(values, 0.0, out=values),
}


class Actor(ABC):
    """Acts with a policy as it is at the last `refresh`, or newer."""

    @abstractmethod
    def refresh(self) -> None:
        """To be called before each rollout: the weights may lie elsewhere, statistics may have been frozen anew."""

    @abstractmethod
    def initial_state(self, num_envs: int) -> State:
        """The policy's state at an episode's start."""

    @abstractmethod
    def act(self, observations: Array, state: State, resets: Array) -> tuple[Array, State]:
        """Parameters [E, P] (float32, the caller's own) for observations [E, *O], and the state after them.

        Args:
            observations: as the environment gives them.
            state: before them.
            resets: [E], whether the environment has just begun an episode.
        """


class TorchActor(Actor):
    """Any policy on any device."""

    def __init__(self, policy: Policy, device: torch.device) -> None:
        self.policy, self.device = policy, device

    def refresh(self) -> None:
        """Nothing to do: the policy's tensors are looked up at each call."""

    def initial_state(self, num_envs: int) -> State:
        return self.policy.initial_state(num_envs)

    @torch.no_grad()
    def act(self, observations: Array, state: State, resets: Array) -> tuple[Array, State]:
        seen = torch.as_tensor(observations, device=self.device)
        parameters, state = self.policy.act(seen, state, torch.as_tensor(resets, device=self.device))
        return parameters.float().cpu().numpy(), state


class NumpyActor(Actor):
    """A policy that `is_plain`, in NumPy; environments are columns, so that weights are read as they lie in memory."""

    def __init__(self, policy: FeedForwardPolicy) -> None:
        assert isinstance(policy.encoding, VectorEncoding | OneHotEncoding)
        self.policy, self.encode = policy, policy.encoding.array
        bodies = (policy.trunk, policy.policy.body)
        self.dense = [body for body in bodies if isinstance(body, Dense)]
        self.num_envs, self.buffers = 0, list[Array]()
        self.refresh()

    def refresh(self) -> None:
        """Look up the weights (views of the parameters' storage) and what is normalised with."""
        self.layers = [
            (_view(layer.weight), _column(layer.bias), NUMPY_ACTIVATIONS[body.activation])
            for body in self.dense
            for layer in body.layers
            if isinstance(layer, nn.Linear)
        ]
        branch = self.policy.policy
        self.weight, self.bias = _view(branch.output.weight), _column(branch.output.bias)
        self.log_std = None if branch.log_std is None else _column(branch.log_std)
        moments = self.policy.observation_moments
        self.moments = None if moments is None else (_view(moments.frozen_mean), _view(moments.frozen_scale))

    def initial_state(self, num_envs: int) -> State:
        return ()

    def act(self, observations: Array, state: State, resets: Array) -> tuple[Array, State]:
        num_envs = len(observations)
        if self.num_envs != num_envs:
            self.num_envs = num_envs
            self.buffers = [np.empty((len(bias), num_envs), np.float32) for _, bias, _ in self.layers]
        seen = observations if self.moments is None else self._normalised(observations, *self.moments)
        values = self.encode(seen).T
        for (weight, bias, activate), buffer in zip(self.layers, self.buffers, strict=True):
            np.matmul(weight, values, out=buffer)
            np.add(buffer, bias, out=buffer)
            values = activate(buffer)
        outputs: Array = self.weight @ values
        outputs += self.bias
        if self.log_std is not None:
            outputs = np.concatenate((outputs, np.broadcast_to(self.log_std, outputs.shape)))
        return np.ascontiguousarray(outputs.T), state

    def _normalised(self, observations: Array, mean: Array, scale: Array) -> Array:
        moments = self.policy.observation_moments
        assert moments is not None
        normalised: Array = np.clip((observations - mean) * scale, -moments.clip, moments.clip)
        return normalised


def build_actor(policy: Policy, device: torch.device) -> Actor:
    """The fastest actor that computes what the policy does."""
    if isinstance(policy, FeedForwardPolicy) and is_plain(policy, device):
        return NumpyActor(policy)
    return TorchActor(policy, device)


def is_plain(policy: FeedForwardPolicy, device: torch.device) -> bool:
    """Whether it is fully connected layers of ours and nothing else, in float32 on the CPU.

    A subclass, a hook or a replaced `forward` anywhere may compute something else, so such a policy is not.
    """
    parts = (policy.encoding, policy.distribution)
    return (
        device.type == "cpu"
        and all(type(module) in PLAIN and not _is_altered(module) for module in policy.modules())
        and all(type(part) in PLAIN_PARTS for part in parts)
        and all(p.dtype == torch.float32 and p.device.type == "cpu" for p in policy.parameters())
    )


def _is_altered(module: nn.Module) -> bool:
    hooks = (module._forward_hooks, module._forward_pre_hooks)  # pruning and spectral norms are pre-hooks
    return any(hooks) or not vars(module).keys().isdisjoint({"forward", "head", "act", "features", "normalise"})


def _view(tensor: Tensor) -> Array:
    array: Array = tensor.detach().numpy()
    return array


def _column(vector: Tensor) -> Array:
    column: Array = _view(vector)[:, None]
    return column
