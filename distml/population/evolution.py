"""Controllers without gradients: regularised evolution and chance. No torch."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from distml.exchange.layout import Array
from distml.spec.nas import EvolutionSpec

Choices = tuple[int, ...]


class RandomController:
    """Every proposal is drawn uniformly; it learns nothing."""

    baseline: float | None = None

    def __init__(self, options: Sequence[int], seed: int) -> None:
        self.options, self.seed, self.num_proposed = tuple(options), seed, 0

    def propose(self) -> Choices:
        return self._uniform(self._generator())

    def log_prob(self, choices: Sequence[int]) -> float | None:
        return None

    def learn(self, choices: Sequence[int], reward: float) -> None:
        pass

    def state(self) -> tuple[dict[str, Any], dict[str, Array]]:
        return {"proposed": self.num_proposed}, {}

    def load(self, values: Mapping[str, Any], arrays: Mapping[str, Array]) -> None:
        self.num_proposed = int(values["proposed"])

    def _generator(self) -> random.Random:
        """Of the next proposal; the same whatever came before."""
        self.num_proposed += 1
        return random.Random(f"{self.seed}/{self.num_proposed}")

    def _uniform(self, generator: random.Random) -> Choices:
        return tuple(generator.randrange(count) for count in self.options)


class Evolution(RandomController):
    """Regularised (ageing) evolution: Real et al. 2019, algorithm 1.

    The first `population` proposals are random. Each further one mutates the best of a random sample of those who live;
    a child joins them when its reward is known, and then the oldest dies, however good it is. A mutation changes one
    decision to another of its options.
    """

    def __init__(self, spec: EvolutionSpec, options: Sequence[int], seed: int) -> None:
        super().__init__(options, seed)
        self.spec = spec
        self.alive: deque[tuple[Choices, float]] = deque()  # the oldest first
        self.mutable = [index for index, count in enumerate(options) if count > 1]

    def propose(self) -> Choices:
        generator = self._generator()
        if self.num_proposed <= self.spec.population or not self.alive:
            return self._uniform(generator)
        sample = generator.sample(list(self.alive), min(self.spec.sample, len(self.alive)))
        return self._mutated(max(sample, key=lambda one: one[1])[0], generator)

    def learn(self, choices: Sequence[int], reward: float) -> None:
        self.alive.append((tuple(choices), reward))
        if len(self.alive) > self.spec.population:
            self.alive.popleft()

    def state(self) -> tuple[dict[str, Any], dict[str, Array]]:
        return {"proposed": self.num_proposed, "alive": [[list(one), reward] for one, reward in self.alive]}, {}

    def load(self, values: Mapping[str, Any], arrays: Mapping[str, Array]) -> None:
        super().load(values, arrays)
        self.alive = deque((tuple(one), reward) for one, reward in values["alive"])

    def _mutated(self, parent: Choices, generator: random.Random) -> Choices:
        if not self.mutable:
            return parent
        place = generator.choice(self.mutable)
        others = [option for option in range(self.options[place]) if option != parent[place]]
        return (*parent[:place], generator.choice(others), *parent[place + 1 :])
