"""What tests of members share: a small job, a member of it, and which states are the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from own.oracle import OWN, job_of, spec_of

from distml.population.member import Member
from distml.runtime.cut import Cut
from distml.spec.loader import load_spec, with_values
from distml.spec.schema import JobSpec
from distml.tasks.sources import SourceTree

ADAM = {"name": "adam", "lr": 0.01}


def small_job(task: Any = "dropout:Dropout", **changes: Any) -> JobSpec:
    """Adam on a model with dropout: weights, moments, stream and random states all matter."""
    return job_of(spec_of(task, **({"optimizer": ADAM, "evaluate": {"every": 10}, "steps": 40} | changes)))


def changed(job: JobSpec, **values: Any) -> JobSpec:
    """With other values; `__` stands for a dot."""
    base = load_spec(job.model_dump(mode="python", by_alias=True), directory=OWN)
    return with_values(base, {path.replace("__", "."): value for path, value in values.items()}).job


def member_of(job: JobSpec, start: Cut | None = None, **options: Any) -> Member:
    """A member that is built."""
    member = Member(job, SourceTree.collect(job.task, OWN), Path("unused"), **options)
    member.build(start)
    return member


def same_tree(one: Any, other: Any) -> bool:
    """Equal leaf by leaf, arrays bitwise."""
    if isinstance(one, np.ndarray):
        return isinstance(other, np.ndarray) and one.dtype == other.dtype and one.tobytes() == other.tobytes()
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same_tree(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(same_tree(a, b) for a, b in zip(one, other, strict=True))
    return type(one) is type(other) and one == other


def timeless(cut: Cut) -> dict[str, Any]:
    """A state without what clocks on the wall have measured; nor what asynchronous workers count and never read."""
    unread = ("train_seconds", "meter", "since_average")
    own = {rank: {name: value for name, value in half.items() if name not in unread} for rank, half in cut.own.items()}
    return {"version": cut.version, "shared": cut.shared, "own": own}


def same_state(one: Cut, other: Cut) -> bool:
    """Bitwise, but for seconds."""
    return same_tree(timeless(one), timeless(other))
