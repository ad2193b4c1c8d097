"""Whether what computes has the values that were asked for: the one comparison of populations and sweeps. No torch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from distml.spec.base import Block
from distml.spec.schema import JobSpec

TOLERANCE = 1e-12  # relative, between a value that was asked for and the same one read back


class Missing(LookupError):
    """There is no such value."""


def asked(job: JobSpec, paths: Iterable[str]) -> dict[str, Any]:
    """Path -> value as the resolved job has it: short forms (`cosine`) as whole blocks, with their defaults."""
    found: dict[str, Any] = {}
    for path in paths:
        with contextlib.suppress(Missing):
            found[path] = plain(at(job, path.split(".")))
    return found


def same(requested: Mapping[str, object], applied: Mapping[str, object]) -> bool:
    """Whether all values that were asked for, resolved, are the ones read back."""
    return all(path in applied and equal(value, applied[path]) for path, value in requested.items())


def equal(one: object, other: object) -> bool:
    """Whether two values as they stand in a spec are the same: numbers within `TOLERANCE`."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(equal(value, other[key]) for key, value in one.items())
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(equal(a, b) for a, b in zip(one, other, strict=True))
    if isinstance(one, bool) or isinstance(other, bool) or not isinstance(one, (int, float)):
        return one == other
    return isinstance(other, (int, float)) and abs(one - other) <= TOLERANCE * abs(one)


def at(tree: Any, keys: Sequence[str]) -> Any:
    """What lies below these keys of blocks, mappings and lists.

    Raises:
        Missing: nothing does.
    """
    for key in keys:
        if isinstance(tree, Block):
            fields = {field.alias or name: name for name, field in type(tree).model_fields.items()}
            if key not in fields:
                raise Missing(key)
            tree = tree.__dict__[fields[key]]
        elif isinstance(tree, Mapping) and key in tree:
            tree = tree[key]
        elif isinstance(tree, (list, tuple)) and key.isdigit() and int(key) < len(tree):
            tree = tree[int(key)]
        else:
            raise Missing(key)
    return tree


def plain(value: Any) -> Any:
    """As it stands in a spec: blocks become mappings, tuples lists."""
    if isinstance(value, Block):
        return value.model_dump(mode="python", by_alias=True)
    if isinstance(value, Mapping):
        return {key: plain(one) for key, one in value.items()}
    return [plain(one) for one in value] if isinstance(value, (list, tuple)) else value
