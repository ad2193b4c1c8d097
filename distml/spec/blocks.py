"""What the schema says about itself: which blocks exist, how they are chosen by name, which keys they have.

Shorthands, overrides, messages and the JSON schema are all derived from here, so a new block needs no second list.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from distml.spec.base import NUMBER, OWN, RANGE, Block, OwnBlock
from distml.spec.schema import BestSpec, JobSpec
from distml.spec.yaml import KeyPath

_CONTAINERS: tuple[Any, ...] = (Union, types.UnionType, list)


def keys_of(block: type[Block]) -> list[str]:
    """The block's keys as they are written."""
    return [info.alias or name for name, info in block.model_fields.items()]


def blocks_under(block: type[Block], key: str) -> list[type[Block]]:
    """The blocks that may stand under a key (or in the list under it); several where `name` chooses."""
    return list(_blocks_under(block, key))


@functools.cache  # a search checks a spec for each thing that it tries
def _blocks_under(block: type[Block], key: str) -> tuple[type[Block], ...]:
    for name, info in block.model_fields.items():
        if key == (info.alias or name):
            return tuple(_blocks_in(info.annotation))
    return ()


def _blocks_in(annotation: Any) -> Iterator[type[Block]]:
    origin: Any = get_origin(annotation)
    if isinstance(annotation, type) and issubclass(annotation, Block):
        yield annotation
    elif origin is Annotated:
        yield from _blocks_in(get_args(annotation)[0])
    elif origin in _CONTAINERS:
        for inner in get_args(annotation):
            yield from _blocks_in(inner)


def names_of(block: type[Block]) -> list[str]:
    """The values that the block's `name` may have; `module:Class` stands for a user's own."""
    if issubclass(block, OwnBlock):
        return [OWN]
    info = block.model_fields.get("name")
    annotation: Any = None if info is None else info.annotation
    return [str(name) for name in get_args(annotation)] if get_origin(annotation) is Literal else []


def choose(blocks: list[type[Block]], value: Any) -> type[Block] | None:
    """The block that `value` is written for, or None where its name does not say."""
    if len(blocks) == 1:
        return blocks[0]
    name = value.get("name") if isinstance(value, dict) else None
    if isinstance(name, str) and ":" in name:
        return next((block for block in blocks if issubclass(block, OwnBlock)), None)
    return next((block for block in blocks if name in names_of(block)), None)


def expand(data: dict[str, Any], block: type[Block] = JobSpec) -> dict[str, Any]:
    """A copy with every shorthand written out: `strategy: all_reduce` becomes `strategy: {name: all_reduce}`."""
    result: dict[str, Any] = {}
    for key, value in data.items():
        blocks = blocks_under(block, key)
        if isinstance(value, list):
            result[key] = [_expand_value(item, blocks) for item in value]
        else:
            result[key] = _expand_value(value, blocks)
    return result


def _expand_value(value: Any, blocks: list[type[Block]]) -> Any:
    if isinstance(value, str) and BestSpec in blocks:
        return {"metric": value, "mode": best_mode(value)}
    if isinstance(value, str) and (key := short_key(blocks)) is not None:
        return {key: value}
    chosen = choose(blocks, value)
    return expand(value, chosen) if chosen is not None and isinstance(value, dict) else value


def short_key(blocks: list[type[Block]]) -> str | None:
    """The key that a plain string in the place of these blocks stands for; None: it stands for none."""
    if any(names_of(block) for block in blocks):
        return "name"
    return next((block.shorthand for block in blocks if block.shorthand is not None), None)


def best_mode(metric: str) -> str:
    """Which way a metric is better, told from the last part of its name."""
    last = metric.rpartition("/")[2]
    return "min" if any(word in last for word in ("loss", "error", "perplexity", "bits")) else "max"


def rename(data: dict[str, Any], path: str, name: Any, root: type[Block] = JobSpec) -> None:
    """Leave of the block at a dotted path, where there is one, what the block of another name has too; in place.

    Its own keys would be unknown in the other one, and whoever changes a name alone does not mean them.
    """
    around: type[Block] | None = root
    holder: Any = data
    *above, last = path.split(".")
    for part in above:
        holder = holder.get(part) if isinstance(holder, dict) else None
        around = choose(blocks_under(around, part), holder) if around is not None else None
    block = holder.get(last) if isinstance(holder, dict) else None
    if not isinstance(block, dict) or around is None or block.get("name") == name:
        return
    before, after = (choose(blocks_under(around, last), {"name": one}) for one in (block.get("name"), name))
    if before is None or after is None or before is after:
        return
    both = {key: info.annotation for key, info in before.model_fields.items() if key in after.model_fields}
    same = {key for key, annotation in both.items() if after.model_fields[key].annotation == annotation}
    holder[last] = {key: value for key, value in block.items() if key in same}


def default_at(path: KeyPath, data: dict[str, Any], root: type[Block] = JobSpec) -> dict[str, Any] | list[Any]:
    """What an override that goes below `path` begins with where the spec has nothing there.

    The default's name for a block that is chosen by name, an empty list for a list, else an empty block.
    """
    block: type[Block] | None = root
    value: Any = data
    for part in path[:-1]:
        value = value.get(part) if isinstance(value, dict) else None
        block = None if block is None else choose(blocks_under(block, str(part)), value)
    info = None if block is None else block.model_fields.get(str(path[-1]))
    if info is not None and isinstance(info.default, list):
        return []
    name = None if info is None else getattr(info.default, "name", None)
    return {} if name is None else {"name": name}


@dataclass(frozen=True)
class Place:
    """Where pydantic found something: the path of keys, the blocks around the last key and those that may stand at it.

    `around` has one entry, and `here` several where a name chooses among them.
    """

    path: KeyPath
    around: list[type[Block]]
    here: list[type[Block]]


def locate(loc: tuple[str | int, ...], root: type[Block] = JobSpec) -> Place:
    """The place of a pydantic location, which also holds the names and tags that chose a union's member."""
    path: list[str | int] = []
    around: list[type[Block]] = []
    here: list[type[Block]] = [root]
    for part in loc:
        if len(here) > 1 and isinstance(part, str):
            here = [block for block in here if part in names_of(block)]
            continue
        if part in (NUMBER, RANGE):
            continue
        path.append(part)
        if isinstance(part, str):
            around, here = here, blocks_under(here[0], part) if here else []
    return Place(tuple(path), around, here)
