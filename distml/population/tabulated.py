"""A search whose rewards are all known beforehand: nothing is trained, so controllers can be compared in seconds."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from distml.population.controller import Choices, make_controller
from distml.spec.nas import ControllerSpec

Table = Mapping[Choices, float]


@dataclass(frozen=True)
class Search:
    """What a controller found.

    Attributes:
        best: the highest reward of its proposals.
        found_at: how many proposals it took to meet the optimum, 1 for the first; None: it did not.
        rewards: of its proposals, in their order.
    """

    best: float
    found_at: int | None
    rewards: list[float]


def tabulated(controller: ControllerSpec, table: Table, samples: int, seed: int) -> Search:
    """Propose and learn `samples` times, one after the other.

    Args:
        table: the reward of every vector of decisions.
    """
    options = [1 + max(choices[index] for choices in table) for index in range(len(next(iter(table))))]
    if math.prod(options) != len(table):
        raise ValueError(f"a table over {options} options has {math.prod(options)} entries, not {len(table)}")
    optimum = max(table.values())
    searcher = make_controller(controller, options, seed)
    rewards: list[float] = []
    for _ in range(samples):
        choices = searcher.propose()
        rewards.append(table[choices])
        searcher.learn(choices, rewards[-1])
    found_at = next((index for index, reward in enumerate(rewards, 1) if reward == optimum), None)
    return Search(max(rewards), found_at, rewards)


def make_table(options: Sequence[int], seed: int, interaction: float = 0.3) -> dict[Choices, float]:
    """Rewards in [0, 1]: what each option is worth by itself, and what pairs of neighbouring decisions add.

    Args:
        interaction: weight of the pairs beside the options.
    """
    generator = random.Random(seed)
    alone = [[generator.random() for _ in range(count)] for count in options]
    pairs = [[[generator.random() for _ in range(after)] for _ in range(before)]
             for before, after in itertools.pairwise(options)]  # fmt: skip
    table = {
        choices: sum(worth[choice] for worth, choice in zip(alone, choices, strict=True))
        + interaction * sum(worth[a][b] for worth, (a, b) in zip(pairs, itertools.pairwise(choices), strict=True))
        for choices in itertools.product(*(range(count) for count in options))
    }
    low, high = min(table.values()), max(table.values())
    return {choices: (reward - low) / (high - low) for choices, reward in table.items()}
