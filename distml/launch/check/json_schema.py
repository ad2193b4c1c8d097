"""What a JSON schema finds, said in the words that a spec's mistakes are said in."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from jsonschema.exceptions import ValidationError
from jsonschema.protocols import Validator

from distml.spec.messages import Problem, describe, near, shorten
from distml.spec.yaml import KeyPath, dotted

WORDS = {
    "integer": "a whole number", "number": "a number", "string": "a string", "boolean": "true or false",
    "array": "a list", "object": "a mapping", "null": "null",
}  # fmt: skip


def schema_problems(data: Any, validator: Validator) -> Iterator[Problem]:
    """Every place where the data is not what the schema has."""
    for error in validator.iter_errors(data):
        yield from _of(error)


def _of(error: ValidationError) -> Iterator[Problem]:
    path: KeyPath = tuple(error.absolute_path)
    name, rule, value = (dotted(path) if path else "the file"), error.validator, error.validator_value
    if rule == "additionalProperties":
        yield from _unknown_keys(error, path, name)
    elif rule == "required":
        for key in (key for key in value if key not in error.instance):
            yield Problem(f"the key {key!r} is missing in {name}; add it", (path,))
    elif rule == "type":
        kinds = [value] if isinstance(value, str) else value
        wanted = " or ".join(WORDS[kind] for kind in kinds)
        yield Problem(f"{name} must be {wanted}, got {describe(error.instance)}; write it so", (path,), "value")
    elif rule in ("enum", "const"):
        choices = [str(one) for one in (value if rule == "enum" else [value])]
        close = near(str(error.instance), choices)
        hint = f"did you mean {close!r}?" if close else "choose one"
        text = f"{name} must be one of {', '.join(choices)}, got {describe(error.instance)}; {hint}"
        yield Problem(text, (path,), "value")
    else:
        text = f"{name} breaks the rule {rule}: {shorten(value)}, got {describe(error.instance)}; change it"
        yield Problem(text, (path,), "value")


def _unknown_keys(error: ValidationError, path: KeyPath, name: str) -> Iterator[Problem]:
    schema: Mapping[str, Any] = error.schema
    known = list(schema.get("properties", {}))
    for key in (key for key in error.instance if key not in known):
        close = near(key, known)
        hint = f"did you mean {close!r}?" if close else f"known: {', '.join(sorted(known))}"
        yield Problem(f"unknown key {shorten(key)} in {name}; {hint}", ((*path, key),))
