"""What goes over from one state to another, and what a change of a spec does to it. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from distml.errors import UsageError
from distml.population.applied import Missing, at, plain
from distml.runtime.cut import Cut, without_carried
from distml.spec.schema import JobSpec
from distml.spec.search_rules import paths_of

OF_THE_WEIGHTS = ("updates", "optimizer")  # of a clock: steps that the moments are of, and the rule they are of


def copied(clock: Mapping[str, Any], own: Mapping[int, Mapping[str, Any]], donor: Cut) -> Cut:
    """The donor's shared half with the own clock and own halves.

    Residuals and inner moments that a worker keeps for its weights are dropped with these weights.
    """
    theirs = {name: donor.shared["clock"][name] for name in OF_THE_WEIGHTS if name in donor.shared["clock"]}
    kept = {name: value for name, value in clock.items() if name not in OF_THE_WEIGHTS}
    halves = {rank: {**without_carried(half), "strategy": {}} for rank, half in own.items()}
    return Cut(int(clock["version"]), {**donor.shared, "clock": {**kept, **theirs}}, halves)


def moved(half: Mapping[str, Any], before: JobSpec, after: JobSpec) -> dict[str, Any]:
    """An own half whose stream is at the same example, counted in batches of another size."""
    stream = half.get("stream")
    if not isinstance(stream, Mapping) or set(stream) != {"round"}:
        return dict(half)
    return {**half, "stream": {"round": stream["round"] * before.batch_size // after.batch_size}}


def changed_paths(before: JobSpec, after: JobSpec) -> list[str]:
    """The paths of single values in which two specs differ."""
    old, new = plain(before), plain(after)
    both = dict.fromkeys([*paths_of(new), *paths_of(old)])
    return [path for path in both if _value(old, path) != _value(new, path)]


def _value(tree: Any, path: str) -> Any:
    try:
        return at(tree, path.split("."))
    except Missing:
        return Missing


def changed_shape(before: JobSpec, after: JobSpec) -> UsageError:
    """What is said where a state does not fit the model of another spec."""
    paths = [path for path in changed_paths(before, after) if not path.startswith("optimizer.") or ".match" in path]
    return UsageError(f"{', '.join(paths) or 'the task'} changes the model's shape; a population copies weights "
                      "between members; use kind: sweep")  # fmt: skip
