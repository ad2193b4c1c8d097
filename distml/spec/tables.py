"""Settings of other libraries, checked against tables that were written off them: keys, kinds of values, bounds."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from distml.spec.messages import Problem, describe
from distml.spec.yaml import KeyPath, dotted

KINDS: dict[str, tuple[tuple[type, ...], str]] = {
    "bool": ((bool,), "true or false"),
    "int": ((int,), "an integer"),
    "float": ((float,), "a number"),
    "str": ((str,), "a string"),
    "list": ((list,), "a list"),
    "dict": ((dict,), "a mapping"),
}
BOUNDS = {"ge": "at least", "gt": "greater than", "le": "at most", "lt": "less than"}


def check_value(path: KeyPath, value: Any, entry: list[str]) -> Iterator[Problem]:
    """What is wrong with a value by its table's entry: kinds, `any`, bounds (`ge=0`), one of some (`in=a|b`).

    Null is always right: it stands for the library's default.
    """
    kinds = [word for word in entry if word in KINDS]
    types = [one for kind in kinds for one in KINDS[kind][0]]
    if value is None or "any" in entry:
        return
    choices = next((word.removeprefix("in=").split("|") for word in entry if word.startswith("in=")), None)
    if choices is not None:
        if value not in choices:
            yield Problem(f"{dotted(path)} must be one of {', '.join(choices)}, got {describe(value)}",
                          (path,), "value")  # fmt: skip
        return
    if type(value) not in types:
        words = " or ".join(KINDS[kind][1] for kind in kinds if not (kind == "int" and "float" in kinds))
        yield Problem(f"{dotted(path)} must be {words}, got {describe(value)}", (path,), "value")
        return
    for word in entry:
        name, equals, bound = word.partition("=")
        if equals and not _holds(name, value, float(bound)):
            yield Problem(f"{dotted(path)} must be {BOUNDS[name]} {bound}, got {describe(value)}", (path,), "value")


def _holds(name: str, value: float, bound: float) -> bool:
    """Whether a bound does; not for a number that is none."""
    return {"ge": value >= bound, "gt": value > bound, "le": value <= bound, "lt": value < bound}[name]
