"""New hyperparameters from old ones: pure functions of values, dimensions and a generator.

Values stay inside their dimensions and keep their types: integers stay integers, choices stay what is listed.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

from distml.spec.population import ExploreSpec, PerturbSpec, ResampleSpec
from distml.spec.space import Dimension, Space


def sample(space: Space, generator: random.Random) -> dict[str, Any]:
    """A value for every path, drawn from the whole space."""
    return {dimension.path: dimension.sample(generator) for dimension in space}


def explore(spec: ExploreSpec, space: Space, values: Mapping[str, Any], generator: random.Random) -> dict[str, Any]:
    """Values to try next.

    Args:
        values: by path, of the member that they start from.
    """
    if isinstance(spec, ResampleSpec):
        return sample(space, generator)
    if not isinstance(spec, PerturbSpec):
        return dict(values)
    found: dict[str, Any] = {}
    for dimension in space:
        if generator.random() < spec.resample:
            found[dimension.path] = dimension.sample(generator)
        else:
            found[dimension.path] = perturb(dimension, values[dimension.path], spec.factors, generator)
    return found


def perturb(dimension: Dimension, value: Any, factors: Sequence[float], generator: random.Random) -> Any:
    """A number of an interval times one of `factors`; of a choice, see `neighbour`.

    An integer moves by at least 1, at an end of its interval inwards.
    """
    if dimension.kind == "choice":
        return neighbour(dimension, value, generator)
    factor = generator.choice(factors)
    moved = dimension.clip(value * factor)
    if not dimension.is_integer or moved != value or factor == 1.0:
        return moved
    step = 1 if (factor > 1.0) == (value >= 0) else -1
    one = dimension.clip(value + step)
    return one if one != value else dimension.clip(value - step)


def neighbour(dimension: Dimension, value: Any, generator: random.Random) -> Any:
    """Where all values of a choice are numbers, the one before or after in the listed order; else one drawn anew."""
    if not all(isinstance(known, (int, float)) and not isinstance(known, bool) for known in dimension.values):
        return dimension.sample(generator)
    place = dimension.values.index(value)
    places = [other for other in (place - 1, place + 1) if 0 <= other < len(dimension.values)]
    return dimension.values[generator.choice(places)]
