"""An architecture as a list of decisions, each one of a few options; there and back. No torch.

    space: {task.model.hidden.0: {choice: [16, 64]}, ...}    one decision per path
    space: {name: nasnet}     50: 2 cells x 5 blocks x (two inputs, two operations, how they are combined)
    space: {name: stages}     42: 7 rows x (operation, kernel, squeeze-excitation, skip, channels, layers)

A choice has its values as options, and an integer interval of at most `CUTS` values all of these. Any other interval is
cut into `CUTS` values, both ends among them: at equal distances, of a logarithmic one at equal ratios, of integers
rounded (those that coincide once).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from distml.spec.architectures import (
    COMBINATIONS,
    KERNELS,
    SKIPS,
    SQUEEZES,
    STAGE_OPERATIONS,
    STRUCTURED,
    NasNetSpace,
    StageSpec,
    StagesSpace,
    StagesSpec,
)
from distml.spec.nas import NasSpec
from distml.spec.schema import ClassificationSpec
from distml.spec.space import Dimension, Space, parse_space

CUTS = 8
CELLS = ("normal", "reduction")
CHANNELS_OF = 8  # channels of rows are multiples of it (Tan & Le 2019)


@dataclass(frozen=True)
class Decision:
    """One of several options.

    Attributes:
        name: what it is about, for example `optimizer.lr` or `normal.2.operations.0`.
    """

    name: str
    options: tuple[Any, ...]

    def index(self, value: Any) -> int:
        """Which option a value is, its type included.

        Raises:
            ValueError: none.
        """
        for index, option in enumerate(self.options):
            if type(option) is type(value) and option == value:
                return index
        raise ValueError(f"{self.name}: {value!r} is none of {list(self.options)}")


class DecisionSpace(ABC):
    """Decisions in the order in which they are taken, and the values of the base's paths that they come to."""

    def __init__(self, decisions: Sequence[Decision]) -> None:
        self.decisions = tuple(decisions)

    @property
    def options(self) -> list[int]:
        """How many options each decision has."""
        return [len(decision.options) for decision in self.decisions]

    @property
    def size(self) -> int:
        """Vectors of decisions."""
        return math.prod(self.options)

    def values(self, choices: Sequence[int]) -> dict[str, Any]:
        """The base's values by path.

        Args:
            choices: the index of an option per decision.

        Raises:
            ValueError: too many or too few, or an option that there is not.
        """
        if len(choices) != len(self.decisions):
            raise ValueError(f"{len(choices)} choices for {len(self.decisions)} decisions")
        for choice, decision in zip(choices, self.decisions, strict=True):
            if not 0 <= choice < len(decision.options):
                raise ValueError(f"{decision.name} has {len(decision.options)} options; there is no {choice}")
        return self._join([d.options[choice] for d, choice in zip(self.decisions, choices, strict=True)])

    def choices(self, values: Mapping[str, Any]) -> list[int]:
        """The inverse of `values`.

        Raises:
            ValueError: a value that no options come to; KeyError: a path is missing.
        """
        return [d.index(picked) for d, picked in zip(self.decisions, self._split(values), strict=True)]

    @abstractmethod
    def _join(self, picked: list[Any]) -> dict[str, Any]:
        """One option per decision -> values by path."""

    @abstractmethod
    def _split(self, values: Mapping[str, Any]) -> list[Any]:
        """The inverse."""


class PathSpace(DecisionSpace):
    """One decision per dimension."""

    def __init__(self, space: Space) -> None:
        super().__init__([Decision(dimension.path, cut(dimension)) for dimension in space])

    def _join(self, picked: list[Any]) -> dict[str, Any]:
        return {decision.name: value for decision, value in zip(self.decisions, picked, strict=True)}

    def _split(self, values: Mapping[str, Any]) -> list[Any]:
        return [values[decision.name] for decision in self.decisions]


def cut(dimension: Dimension) -> tuple[Any, ...]:
    """The options of a dimension; see the top of this file."""
    if dimension.kind == "choice":
        return dimension.values
    low, high = dimension.ends
    if dimension.is_integer and high - low < CUTS:
        return tuple(range(int(low), int(high) + 1))
    shares = [index / (CUTS - 1) for index in range(CUTS)]
    inner = [low * (high / low) ** s if dimension.is_log else low + (high - low) * s for s in shares[1:-1]]
    points = [low, *inner, high]
    return tuple(dict.fromkeys(dimension.clip(point) for point in points))


class CellSpace(DecisionSpace):
    """NASNet's two cells: per block two inputs, two operations, add or concatenate."""

    def __init__(self, spec: NasNetSpace) -> None:
        self.blocks = spec.blocks
        super().__init__(list(self._decisions(spec)))

    @staticmethod
    def _decisions(spec: NasNetSpace) -> Iterator[Decision]:
        for cell in CELLS:
            for block in range(spec.blocks):
                for key, options in (("inputs", tuple(range(block + 2))), ("operations", tuple(spec.operations))):
                    for position in range(2):
                        yield Decision(f"{cell}.{block}.{key}.{position}", options)
                yield Decision(f"{cell}.{block}.combine", COMBINATIONS)

    def _join(self, picked: list[Any]) -> dict[str, Any]:
        fives = [picked[start : start + 5] for start in range(0, len(picked), 5)]
        blocks = [{"inputs": five[:2], "operations": five[2:4], "combine": five[4]} for five in fives]
        halves = (blocks[: self.blocks], blocks[self.blocks :])
        return {f"task.model.{cell}": half for cell, half in zip(CELLS, halves, strict=True)}

    def _split(self, values: Mapping[str, Any]) -> list[Any]:
        blocks = [block for cell in CELLS for block in values[f"task.model.{cell}"]]
        return [item for block in blocks for item in (*block["inputs"], *block["operations"], block["combine"])]


class RowSpace(DecisionSpace):
    """EfficientNet's rows around those of a base: what each layer is, and how wide and deep a row is."""

    KEYS = ("operation", "kernel", "squeeze_excitation", "skip", "channels", "layers")

    def __init__(self, spec: StagesSpace, base: StagesSpec) -> None:
        self.rows = base.rows
        super().__init__([
            Decision(f"rows.{index}.{key}", options)
            for index, row in enumerate(base.rows)
            for key, options in zip(self.KEYS, self._options(spec, row), strict=True)
        ])  # fmt: skip

    @staticmethod
    def _options(spec: StagesSpace, row: StageSpec) -> tuple[tuple[Any, ...], ...]:
        channels = [max(1, int(row.channels * factor / CHANNELS_OF + 0.5)) * CHANNELS_OF for factor in spec.channels]
        layers = [max(1, row.layers + more) for more in spec.layers]
        return (STAGE_OPERATIONS, KERNELS, SQUEEZES, SKIPS, *(tuple(dict.fromkeys(n)) for n in (channels, layers)))

    def _join(self, picked: list[Any]) -> dict[str, Any]:
        size = len(self.KEYS)
        chosen = [picked[index * size : (index + 1) * size] for index in range(len(self.rows))]
        rows = [
            {**dict(zip(self.KEYS, values, strict=True)), "stride": row.stride}
            for values, row in zip(chosen, self.rows, strict=True)
        ]
        return {"task.model.rows": rows}

    def _split(self, values: Mapping[str, Any]) -> list[Any]:
        return [row[key] for row in values["task.model.rows"] for key in self.KEYS]


def decision_space(job: NasSpec) -> DecisionSpace:
    """The decisions of a checked job."""
    if "name" not in job.space:
        return PathSpace(parse_space(job.space)[0])
    found = structured(job)
    if isinstance(found, NasNetSpace):
        return CellSpace(found)
    assert isinstance(job.base.task, ClassificationSpec)
    assert isinstance(job.base.task.model, StagesSpec)
    return RowSpace(found, job.base.task.model)


def structured(job: NasSpec) -> NasNetSpace | StagesSpace:
    """The block of a structured space.

    Raises:
        ValidationError: it is none; KeyError: no such name.
    """
    return STRUCTURED[job.space["name"]].model_validate(job.space)
