"""The worker's half where every worker has all weights: a replica whose parameters are views of one flat vector.

Shapes: N trained elements.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from distml.exchange.flat import TAIL, FlatModel, borrowed
from distml.exchange.layout import Array
from distml.exchange.segment import Regions
from distml.exchange.shared_memory import is_finite
from distml.strategies.base import Strategy
from distml.tasks.base import Loss
from distml.tasks.data import Batch


class Replica(Strategy):
    """A whole model, with flat views of its weights and gradients."""

    leaves_gradients = True  # an exchange does not zero them itself

    def _take_parameters(self, phase_patterns: list[str], group_patterns: list[str]) -> None:
        self.flat = FlatModel(self.model, phase_patterns, group_patterns)
        self.layout = self.flat.layout

    def frozen(self) -> dict[str, Tensor]:
        return self.flat.frozen()

    def fingerprint(self) -> str:
        return self.flat.fingerprint()

    def is_finite(self) -> bool:
        return is_finite(self.flat.weights)

    @abstractmethod
    def regions(self, size: int, keeps: bool) -> Regions:
        """What a segment has to hold for `size` workers of a host; `keeps`: also states to go back to."""

    def too_large_to_share(self) -> str | None:
        """What of this model has no place in a segment, or None."""
        return None

    def loss(self, phase: int, batch: Batch, last: bool) -> Loss:
        self.flat.select_phase(phase)
        return super().loss(phase, batch, last)

    def exchange(self, phase: int) -> None:
        message = self.flat.phase_message(phase)
        message[-TAIL:] = message.new_tensor(self._tail())
        super().exchange(phase)

    def _exchange(self, phase: int, count: float, last: bool) -> None:
        self._update(phase, count, last)
        if self.leaves_gradients:
            self.flat.phase_message(phase).zero_()

    @abstractmethod
    def _update(self, phase: int, count: float, last: bool) -> None:
        """What `_exchange` does with the message of this phase; the gradients in it are dropped afterwards."""

    def load_weights(self, weights: Array, carried: Mapping[str, Array]) -> None:
        """Overwrite the replica."""
        with torch.no_grad():
            self.flat.weights.copy_(borrowed(weights))
            self.carried.load(dict(carried))

    def load_shared(self, shared: Mapping[str, Any]) -> None:
        self.load_weights(shared["weights"], shared["carried"])
        self.flat.gradients.zero_()
        self.load_clock(shared["clock"])
