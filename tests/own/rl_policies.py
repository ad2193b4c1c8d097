"""Small policies of a user's own in float64, for what must be exact."""

from __future__ import annotations

import torch
from torch import nn


class Exact(nn.Module):
    """Logits and values, both linear (`hidden`: after one layer of tanh)."""

    def __init__(self, observation_space, action_space, hidden=None):
        super().__init__()
        inputs, actions = observation_space.shape[0], int(action_space.n)
        self.policy, self.value = self._branch(inputs, hidden, actions), self._branch(inputs, hidden, 1)
        self.double()

    @staticmethod
    def _branch(inputs, hidden, outputs):
        if hidden is None:
            return nn.Sequential(nn.Linear(inputs, outputs))
        return nn.Sequential(nn.Linear(inputs, hidden), nn.Tanh(), nn.Linear(hidden, outputs))

    def forward(self, observations):
        return self.policy(observations.double()), self.value(observations.double()).squeeze(-1)


class Entangled(Exact):
    """Has layers of which nobody knows whose they are."""

    def __init__(self, observation_space, action_space):
        super().__init__(observation_space, action_space)
        self.trunk = nn.Linear(4, 4).double()

    def forward(self, observations):
        return super().forward(torch.tanh(self.trunk(observations.double())))
