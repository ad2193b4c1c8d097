"""What a label selector asks of a node, in Ray's syntax: `value`, `!value`, `in(a, b)`, `!in(a, b)`. No ray here."""

from __future__ import annotations

import re
from collections.abc import Mapping

_NAME = r"[a-zA-Z0-9](?:[a-zA-Z0-9_.-]{0,61}[a-zA-Z0-9])?"
_KEY = re.compile(rf"(?:{_NAME}(?:\.{_NAME})*/)?{_NAME}")
_ASKED = re.compile(rf"(?P<no>!?)(?:(?P<one>{_NAME})|in\((?P<many>{_NAME}(?:, ?{_NAME})*)\))")


def is_label_key(key: str) -> bool:
    """Whether a node's label can have this name: as in Kubernetes, with an optional prefix before a slash."""
    return _KEY.fullmatch(key) is not None


def is_label_selector(asked: str) -> bool:
    """Whether Ray takes this as what is asked of a label's value."""
    return _ASKED.fullmatch(asked) is not None


def values_of(asked: str) -> tuple[bool, tuple[str, ...]]:
    """(whether the label must have one of the values, the values); False: it must have none of them."""
    found = _ASKED.fullmatch(asked)
    if found is None:
        raise ValueError(f"{asked!r} is no label selector")
    many = found["many"]
    return not found["no"], tuple(part.strip() for part in many.split(",")) if many else (found["one"],)


def satisfies(labels: Mapping[str, str], selector: Mapping[str, str]) -> bool:
    """Whether a node with these labels is one that all of `selector` asks for; a missing label is no value."""
    return all((labels.get(key) in values) is wanted
               for key, (wanted, values) in ((key, values_of(asked)) for key, asked in selector.items()))  # fmt: skip
