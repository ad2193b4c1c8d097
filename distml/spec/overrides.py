"""`--set a.b=c`: values laid over a spec before it is checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from distml.spec.base import Block
from distml.spec.blocks import default_at, expand
from distml.spec.messages import describe, shorten
from distml.spec.schema import JobSpec
from distml.spec.yaml import Document, KeyPath, Position, dotted, parse, plain


def apply_overrides(
    document: Document, overrides: Mapping[str, object] | Sequence[str], root: type[Block] = JobSpec
) -> None:
    """Lay overrides over a document whose shorthands are written out, in their order; the last one wins.

    Args:
        document: changed in place.
        overrides: `KEY=VALUE` texts, whose values are YAML, or a mapping of dotted keys to Python values.
        root: the block of the spec's kind.

    Raises:
        UsageError: an override that cannot be read or has no place, located at itself.
    """
    if isinstance(overrides, str):
        overrides = [overrides]
    if isinstance(overrides, Mapping):
        for key, value in overrides.items():
            start = Position(f"override {key}={shorten(value)}", numbered=False)
            keys = _keys(str(key), start)
            _lay(document, keys, Document(plain(value, start, tuple(keys)), start), root)
    else:
        for text in overrides:
            start = Position(f"--set {text}", numbered=False)
            key, equals, value = str(text).partition("=")
            if not equals:
                raise start.error("must be KEY=VALUE, for example --set optimizer.lr=0.01")
            _lay(document, _keys(key, start), parse(value, start.source, numbered=False), root)


def _keys(key: str, start: Position) -> list[str]:
    parts = key.strip().split(".")
    if not all(parts):
        raise start.error(f"the key {key!r} must be names joined by dots, for example optimizer.lr")
    return parts


def _lay(document: Document, keys: list[str], value: Document, root: type[Block]) -> None:
    """Put `value` where `keys` lead, making the blocks on the way there."""
    holder: Any = document.data
    path: KeyPath = ()
    for key in keys[:-1]:
        path = (*path, _entry(holder, key, path, value.start))
        holder = _enter(document, holder, path, value.start, root)
    path = (*path, _entry(holder, keys[-1], path, value.start))
    holder[path[-1]] = value.data
    document.forget(path)
    for places, inner in ((document.keys, value.keys), (document.values, value.values)):
        places[path] = value.start
        places.update({(*path, *below): position for below, position in inner.items()})
    document.data = expand(document.data, root)


def _enter(document: Document, holder: Any, path: KeyPath, start: Position, root: type[Block]) -> Any:
    """The block or list at `path`; one that is missing or null begins as its default's name alone."""
    part = path[-1]
    if isinstance(holder, dict) and holder.get(part) is None:
        holder[part] = default_at(path, document.data, root)
        document.keys.setdefault(path, start)
        document.values[path] = start
    return holder[part]


def _entry(holder: Any, key: str, around: KeyPath, start: Position) -> str | int:
    """The key as `holder` has it: an index in a list, a string in a block."""
    if isinstance(holder, dict):
        return key
    if not isinstance(holder, list):
        raise start.error(f"{dotted(around)} is {describe(holder)}, not a block; it has no key {key!r}")
    if not (key.isascii() and key.isdigit()):
        raise start.error(f"{dotted(around)} is a list; name an entry by its index, as in {dotted(around)}.0")
    if len(key) > 8 or int(key) >= len(holder):
        raise start.error(f"{dotted(around)} has {len(holder)} entries, counted from 0; there is no entry {key}")
    return int(key)
