"""The spec as JSON schema, for editors that check YAML while it is written."""

from __future__ import annotations

from typing import Any

from distml.spec.base import OWN, OWN_PATTERN, Block, OwnBlock
from distml.spec.blocks import blocks_under, names_of
from distml.spec.schema import BestSpec, JobSpec

DIALECT = "https://json-schema.org/draft/2020-12/schema"


def json_schema() -> dict[str, Any]:
    """Draft 2020-12 schema of a training job, shorthands included; rules across keys are not in it."""
    schema = JobSpec.model_json_schema(by_alias=True)
    blocks = {block.__name__: block for block in _all_blocks(JobSpec)}
    for name, definition in [("JobSpec", schema), *schema["$defs"].items()]:
        if name in blocks:
            _allow_shorthands(definition["properties"], blocks[name])
    return {"$schema": DIALECT, **schema}


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
