"""`--set a.b=c`: values laid over a spec before it is checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from distml.spec.blocks import default_name, expand
from distml.spec.yaml import Document, KeyPath, Position, dotted, parse, plain


def apply_overrides(document: Document, overrides: Mapping[str, object] | Sequence[str]) -> None:
    """Lay overrides over a document whose shorthands are written out, in their order; the last one wins.

    Args:
        document: changed in place.
        overrides: `KEY=VALUE` texts, whose values are YAML, or a mapping of dotted keys to Python values.

    Raises:
        UsageError: an override that cannot be read or has no place, located at itself.
    """
    if isinstance(overrides, str):
        overrides = [overrides]
    if isinstance(overrides, Mapping):
        for key, value in overrides.items():
            start = Position(f"override {key}={value!r}", numbered=False)
            inner = Document(plain(value, start, _path(str(key), start)), start)
            _lay(document, _path(str(key), start), inner)
    else:
        for text in overrides:
            start = Position(f"--set {text}", numbered=False)
            key, equals, value = str(text).partition("=")
            if not equals:
                raise start.error("must be KEY=VALUE, for example --set optimizer.lr=0.01")
            _lay(document, _path(key, start), parse(value, start.source, numbered=False))


def _path(key: str, start: Position) -> KeyPath:
    parts = key.strip().split(".")
    if not all(parts):
        raise start.error(f"the key {key!r} must be names joined by dots, for example optimizer.lr")
    return tuple(int(part) if part.isascii() and part.isdigit() and len(part) < 9 else part for part in parts)


def _lay(document: Document, path: KeyPath, value: Document) -> None:
    """Put `value` at `path`, making the blocks on the way there."""
    holder: Any = document.data
    for depth, part in enumerate(path[:-1]):
        holder = _enter(document, holder, path[: depth + 1], value.start)
    _check_entry(holder, path, value.start)
    holder[path[-1]] = value.data
    document.forget(path)
    for places, inner in ((document.keys, value.keys), (document.values, value.values)):
        places[path] = value.start
        places.update({(*path, *below): position for below, position in inner.items()})
    document.data = expand(document.data)


def _enter(document: Document, holder: Any, path: KeyPath, start: Position) -> Any:
    """The block or list at `path`; one that is missing or null begins as its default's name alone."""
    _check_entry(holder, path, start)
    part = path[-1]
    if isinstance(holder, dict) and holder.get(part) is None:
        name = default_name(path, document.data)
        holder[part] = {} if name is None else {"name": name}
        document.keys.setdefault(path, start)
        document.values[path] = start
    return holder[part]


def _check_entry(holder: Any, path: KeyPath, start: Position) -> None:
    """Refuse a part of a path that `holder` cannot have."""
    part, around = path[-1], dotted(path[:-1])
    if isinstance(holder, list):
        if not isinstance(part, int):
            raise start.error(f"{around} is a list; name an entry by its index, as in {around}.0")
        if part >= len(holder):
            raise start.error(f"{around} has {len(holder)} entries, counted from 0; there is no entry {part}")
    elif not isinstance(holder, dict):
        raise start.error(f"{around} is the value {holder!r}, not a block; it has no key {part!r}")
