"""A policy as a user would write one: the layers of the built-in one in a module of their own, which acts in torch."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

from gymnasium import spaces
from torch import Tensor, nn


class ActorAndCritic(nn.Module):
    """Two networks of 64 and 64 tanh units."""

    def __init__(self, observation_space: spaces.Space[Any], action_space: spaces.Space[Any]) -> None:
        super().__init__()
        assert isinstance(observation_space, spaces.Box)
        assert isinstance(action_space, spaces.Discrete)
        inputs = math.prod(observation_space.shape)
        self.policy = network([inputs, 64, 64, int(action_space.n)], 0.01)
        self.value = network([inputs, 64, 64, 1], 1.0)

    def forward(self, observations: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [B, N] and values [B] of observations [B, D]."""
        return self.policy(observations), self.value(observations).squeeze(-1)


def network(widths: list[int], last_gain: float) -> nn.Sequential:
    """Linear layers with tanh between them, orthogonal at the start."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.Tanh()]
    linear = [layer for layer in layers if isinstance(layer, nn.Linear)]
    for layer in linear:
        nn.init.orthogonal_(layer.weight, last_gain if layer is linear[-1] else math.sqrt(2.0))
        nn.init.zeros_(layer.bias)
    return nn.Sequential(*layers[:-1])
