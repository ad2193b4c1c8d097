"""What pydantic finds wrong, said in the words of the spec."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import ValidationError

from distml.spec.base import OWN, Block
from distml.spec.blocks import keys_of, locate, names_of
from distml.spec.schema import JobSpec
from distml.spec.yaml import KeyPath, dotted


@dataclass(frozen=True)
class Problem:
    """Something wrong in a spec.

    Args:
        text: what is wrong and what to do, one line.
        paths: the keys it is about; the message points at the first of them that is written.
        at: whether it points at the key or at its value.
        absent: it is about a key that is not there, so its place says little; a misspelt key goes before it.
    """

    text: str
    paths: tuple[KeyPath, ...]
    at: Literal["key", "value"] = "key"
    absent: bool = False


_MUST_BE = {
    "int_type": "an integer",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "a string",
    "string_unicode": "a string of characters that exist",
    "list_type": "a list",
    "dict_type": "a mapping",
    "finite_number": "a finite number",
}
_BOUNDS = {
    "greater_than": ("gt", "greater than"),
    "greater_than_equal": ("ge", "at least"),
    "less_than": ("lt", "less than"),
    "less_than_equal": ("le", "at most"),
}
_PATTERNS = {
    "metric": "must start with eval/, for example eval/accuracy, since only the validation split decides",
    "name": "must be 1 to 100 of the characters A-Z a-z 0-9 . _ - and begin with a letter or digit",
}


def problems_of(error: ValidationError, root: type[Block] = JobSpec) -> list[Problem]:
    """Every finding of pydantic as a problem with a path into the spec."""
    return [_problem(dict(found), root) for found in error.errors(include_url=False)]


def _problem(found: dict[str, Any], root: type[Block]) -> Problem:
    place = locate(found["loc"], root)
    path = place.path
    kind, value, context = found["type"], found["input"], found.get("ctx", {})
    name = dotted(path)
    if kind == "extra_forbidden":
        return Problem(_unknown_key(path, place.around), (path,))
    if kind == "missing":
        return Problem(f"the key {path[-1]!r} is missing{_inside(path)}; add it", (path[:-1],), "value", absent=True)
    if kind in ("union_tag_invalid", "union_tag_not_found", "model_type", "model_attributes_type"):
        return _bad_block(path, place.here, value)
    if kind == "literal_error":
        known = _quoted(context["expected"])
        if path[-1] == "name" and isinstance(value, str):
            return Problem(unknown(str(path[-2]), value, known), (path,), "value")
        return Problem(_not_one_of(name, value, known), (path,), "value")
    if kind in _BOUNDS:
        bound, words = _BOUNDS[kind]
        text = f"{name} must be {words} {context[bound]:g}, got {describe(value)}"
        if context[bound] >= 1e6:
            text = f"{name} must be {words} {context[bound]}, got {describe(value)}"
    elif kind == "string_pattern_mismatch":
        rule = _PATTERNS.get(str(path[-1]), f"must match {context['pattern']}")
        if path == ("task", "name"):
            rule = f"must be a built-in's name or '{OWN}', for example 'own_task:TwoMoons'"
        text = f"{name} {rule}; got {describe(value)}"
    elif kind in ("too_short", "too_long"):
        bound = "at least" if kind == "too_short" else "at most"
        limit = context["min_length" if kind == "too_short" else "max_length"]
        text = f"{name} must have {bound} {limit} entries, got {context['actual_length']}"
    elif kind in _MUST_BE:
        text = f"{name} must be {_MUST_BE[kind]}, got {describe(value)}"
    else:
        text = f"{name}: {found['msg']}, got {describe(value)}"
    return Problem(text, (path,), "value")


def _unknown_key(path: KeyPath, around: list[type[Block]]) -> str:
    known = keys_of(around[0]) if len(around) == 1 else []
    close = near(str(path[-1]), known)
    hint = f"did you mean {close!r}?" if close else f"known: {', '.join(known)}"
    return f"unknown key {shorten(path[-1])}{_inside(path)}; {hint}"


def _bad_block(path: KeyPath, here: list[type[Block]], value: Any) -> Problem:
    """A block that is no mapping, or whose name chooses none of those that may stand here."""
    known = [name for block in here for name in names_of(block)]
    if not isinstance(value, dict):
        what = "a name or a mapping" if known else "a mapping"
        return Problem(f"{dotted(path)} must be {what}, got {describe(value)}", (path,), "value")
    if "name" not in value:
        return Problem(f"the key 'name' is missing in {dotted(path)}; one of {', '.join(known)}", (path,), "value")
    name = value["name"]
    if not isinstance(name, str):
        return Problem(f"{dotted(path)}.name must be a string, got {describe(name)}", ((*path, "name"),), "value")
    return Problem(unknown(str(path[-1]), name, known), ((*path, "name"),), "value")


def unknown(what: str, name: str, known: Iterable[str]) -> str:
    """`unknown task 'x'; did you mean 'y'? (known: …)`."""
    known = list(known)
    close = near(name, known)
    hint = f"did you mean {close!r}? (known: {', '.join(known)})" if close else f"known: {', '.join(known)}"
    return f"unknown {what} {shorten(name)}; {hint}"


def near(word: str, known: Iterable[str]) -> str | None:
    """The most similar of the known words, if any is similar."""
    return next(iter(difflib.get_close_matches(word[:100], list(known), n=1)), None)


def describe(value: Any) -> str:
    """A value in the words of YAML, short."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, str):
        return f"the string {shorten(value)}"
    if isinstance(value, list):
        return "a list"
    return "a mapping" if isinstance(value, dict) else repr(value)


def shorten(value: object) -> str:
    """The value's repr, cut to what fits into a message."""
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:56]}…{shown[-1]}"


def _inside(path: KeyPath) -> str:
    return f" in {dotted(path[:-1])}" if len(path) > 1 else ""


def _not_one_of(name: str, value: Any, known: list[str]) -> str:
    choice = f"must be {known[0]!r}" if len(known) == 1 else f"must be one of {', '.join(known)}"
    close = near(value, known) if isinstance(value, str) and len(known) > 1 else None
    return f"{name} {choice}, got {describe(value)}" + (f"; did you mean {close!r}?" if close else "")


def _quoted(expected: str) -> list[str]:
    """pydantic's "'a', 'b' or 'c'" as a list."""
    return [part.strip().strip("'") for part in expected.replace(" or ", ", ").split(",")]
