"""The spec as JSON schema, for editors that check YAML while it is written."""

from __future__ import annotations

from typing import Any

from pydantic.json_schema import models_json_schema

from distml.spec.base import OWN, OWN_PATTERN, Block, OwnBlock
from distml.spec.blocks import blocks_under, names_of
from distml.spec.loader import KINDS
from distml.spec.schema import BestSpec, JobSpec

DIALECT = "https://json-schema.org/draft/2020-12/schema"


def json_schema() -> dict[str, Any]:
    """Draft 2020-12 schema of a job of any kind, shorthands included; rules across keys are not in it."""
    _, schema = models_json_schema([(kind, "validation") for kind in KINDS.values()], by_alias=True)
    blocks = {block.__name__: block for kind in KINDS.values() for block in _all_blocks(kind)}
    for name, definition in schema["$defs"].items():
        if name in blocks:
            _allow_shorthands(definition["properties"], blocks[name])
    schema["$defs"]["Base"] = _base(schema["$defs"])
    # A chain, not oneOf: an editor then speaks of the kind that is written.
    chosen: dict[str, Any] = {"$ref": f"#/$defs/{JobSpec.__name__}"}
    for name, kind in KINDS.items():
        if kind is not JobSpec:
            is_kind = {"properties": {"kind": {"const": name}}, "required": ["kind"]}
            chosen = {"if": is_kind, "then": {"$ref": f"#/$defs/{kind.__name__}"}, "else": chosen}
    return {"$schema": DIALECT, **chosen, "$defs": schema["$defs"]}


def _base(definitions: dict[str, Any]) -> dict[str, Any]:
    """A base: a file or a shipped job by name, or a block, which takes over what it leaves out; every job's uses it."""
    whole = definitions[JobSpec.__name__]
    taken_over = [key for key in whole["required"] if key not in ("distml", "name")]
    for definition in definitions.values():
        if "base" in definition.get("properties", {}):
            definition["properties"]["base"] = {"$ref": "#/$defs/Base"}
    return {"anyOf": [{"type": "string"}, {**whole, "required": taken_over}]}


def _all_blocks(block: type[Block]) -> set[type[Block]]:
    found = {block}
    for name, info in block.model_fields.items():
        for inner in blocks_under(block, info.alias or name):
            found |= _all_blocks(inner)
    return found


def _allow_shorthands(properties: dict[str, Any], block: type[Block]) -> None:
    for key, whole in properties.items():
        shorthand = _shorthand(blocks_under(block, key))
        if shorthand:
            kept = {name: whole.pop(name) for name in ("default", "description", "title") if name in whole}
            properties[key] = {"anyOf": [*shorthand, whole], **kept}


def _shorthand(blocks: list[type[Block]]) -> list[dict[str, Any]]:
    """The strings that may stand for one of these blocks."""
    if BestSpec in blocks:
        return [{"type": "string", "pattern": "^eval/.+"}]
    names = [name for block in blocks for name in names_of(block) if name != OWN]
    shorthands: list[dict[str, Any]] = [{"type": "string", "enum": names}] if names else []
    if any(issubclass(block, OwnBlock) for block in blocks):
        shorthands.append({"type": "string", "pattern": OWN_PATTERN})
    for block in blocks:
        if block.shorthand is not None:
            shorthands.append(block.model_json_schema()["properties"][block.shorthand])
    return shorthands
