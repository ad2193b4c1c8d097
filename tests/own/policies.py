"""Policies of a user's own, whole and broken."""

from __future__ import annotations

import torch
from torch import nn


class Linear(nn.Module):
    """One layer for each head, on flat observations."""

    def __init__(self, observation_space, action_space, scale=1.0):
        super().__init__()
        self.inputs, self.scale = observation_space.shape[0], scale
        self.drop, self.norm = nn.Dropout(0.5), nn.BatchNorm1d(self.inputs)
        self.policy, self.value = nn.Linear(self.inputs, int(action_space.n)), nn.Linear(self.inputs, 1)

    def forward(self, observations):
        observations = self.norm(self.drop(observations))
        return self.scale * self.policy(observations), self.value(observations).squeeze(-1)


class Counter(nn.Module):
    """Its state counts the steps of the episode; it is the value, too."""

    def __init__(self, observation_space, action_space):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(int(action_space.n)))

    def initial_state(self, num_envs):
        return (torch.zeros(num_envs, 1),)

    def forward(self, observations, state, resets):
        (count,), values = state, []
        for reset in resets:
            count = count.masked_fill(reset.unsqueeze(-1), 0.0) + 1
            values.append(count.squeeze(-1))
        return self.weight.expand(*observations.shape[:2], -1), torch.stack(values), (count,)


class Noisy(Linear):
    """Draws whenever it is asked."""

    def forward(self, observations):
        parameters, values = super().forward(observations)
        return parameters + torch.rand(()), values


class ValueColumn(Linear):
    """Forgets to squeeze the values."""

    def forward(self, observations):
        return self.policy(observations), self.value(observations)


class OneThing(Linear):
    """Gives no values."""

    def forward(self, observations):
        return self.policy(observations)


class Raises(Linear):
    def forward(self, observations):
        return observations @ torch.zeros(77, 2), None


class LostState(Counter):
    """Its state has no environments."""

    def initial_state(self, num_envs):
        return (torch.zeros(1, num_envs + 1),)


class OddState(Counter):
    """Gives back another state than it takes."""

    def forward(self, observations, state, resets):
        parameters, values, (count,) = super().forward(observations, state, resets)
        return parameters, values, (count.squeeze(-1),)


class NoModule:
    """Not a module at all."""
