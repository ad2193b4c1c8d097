"""Rules of jobs over jobs: whether a space fits its base, and how the keys go together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from distml.errors import UsageError
from distml.spec.base import Block
from distml.spec.messages import Problem, near
from distml.spec.nas import NasSpec
from distml.spec.over_jobs import OverJobs
from distml.spec.population import PopulationSpec
from distml.spec.space import Dimension, Space, parse_space
from distml.spec.sweep import SweepSpec
from distml.spec.yaml import dotted

FIXED = ("distml", "kind", "name")
# How long, where and with whom a member trains does not change while it does.
FIXED_IN_POPULATIONS = (
    *FIXED, "seed", "init", "stop", "evaluate", "checkpoint", "log", "resources", "limits", "inline", "transport",
    "precision",
)  # fmt: skip

Variant = Callable[[Mapping[str, Any]], object]


def space_of(job: PopulationSpec | SweepSpec | NasSpec) -> Space:
    """The dimensions of a checked job."""
    return parse_space(job.space)[0]


def check_search(job: OverJobs, variant: Variant) -> list[Problem]:
    """Every rule that a job over jobs breaks.

    Args:
        job: valid key by key, its base whole.
        variant: makes the base with other values at some paths, or raises `UsageError`.
    """
    return list(_problems(job, variant))


def _problems(job: OverJobs, variant: Variant) -> Iterator[Problem]:
    if isinstance(job, NasSpec) and "name" in job.space:
        return
    assert isinstance(job, (PopulationSpec, SweepSpec, NasSpec))
    space, problems = parse_space(job.space)
    yield from problems
    fixed = FIXED_IN_POPULATIONS if isinstance(job, PopulationSpec) else FIXED
    for dimension in space:
        yield from _dimension(job.base, dimension, fixed, variant)


def _dimension(base: Block, dimension: Dimension, fixed: tuple[str, ...], variant: Variant) -> Iterator[Problem]:
    at = ("space", dimension.path)
    known = list(paths_of(base.model_dump(mode="python", by_alias=True)))
    if dimension.path.split(".")[0] in fixed:
        yield Problem(f"{dotted(at)} may not be searched: {dimension.path.split('.')[0]} is the same for all; "
                      f"remove it", (at,))  # fmt: skip
        return
    ends = dimension.values if dimension.kind == "choice" else (dimension.low, dimension.high)
    for value in ends:
        try:
            variant({dimension.path: value})
        except UsageError as error:
            close = near(dimension.path, known)
            hint = f"; did you mean {close!r}?" if close and dimension.path not in known else ""
            text = str(error).partition(": ")[2] or str(error)
            yield Problem(f"{dotted(at)}: the base does not take {value!r} there: {text}{hint}", (at,))
            return


def paths_of(tree: Any, prefix: str = "") -> Iterator[str]:
    """The dotted paths of all single values in a spec."""
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from paths_of(value, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(tree, (list, tuple)):
        for index, value in enumerate(tree):
            yield from paths_of(value, f"{prefix}.{index}")
    else:
        yield prefix
