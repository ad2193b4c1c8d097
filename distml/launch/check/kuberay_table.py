"""Writes `kuberay_schema.json`: what a RayCluster and a RayJob may hold, read off KubeRay's own definitions.

KubeRay (Apache-2.0) publishes them as custom resource definitions, a megabyte each. Kept is the `spec` of version v1
without descriptions and defaults, what occurs several times once, and of pods not what no cluster file here needs
(affinity, ephemeral containers). A test compares the file with what `table()` says.

    python -m distml.launch.check.kuberay_table CRD CRD     rewrites the file, for another version of KubeRay

where CRD are KubeRay's ray-operator/config/crd/bases/ray.io_rayclusters.yaml and ray.io_rayjobs.yaml, also with .gz.
"""

from __future__ import annotations

import gzip
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

FILE = Path(__file__).with_name("kuberay_schema.json")
OPEN = {"affinity": {"type": "object"}, "ephemeralContainers": {"type": "array"}, "status": {}}
RULES = {"type", "enum", "minimum", "maximum", "minLength", "maxLength", "minItems", "maxItems", "pattern", "required"}
ORIGIN = "Written by python -m distml.launch.check.kuberay_table from KubeRay's definitions, Apache License 2.0."
SHARED_FROM = 300  # bytes of what is worth a name


def table(crds: list[Path]) -> dict[str, Any]:
    """A JSON schema with each kind's `spec` under `kinds`, and what they share under `$defs`."""
    kinds = {}
    for path in crds:
        definition = yaml.load(_text(path), yaml.CSafeLoader)["spec"]
        version = next(one for one in definition["versions"] if one["name"] == "v1")
        schema = version["schema"]["openAPIV3Schema"]["properties"]["spec"]
        kinds[definition["names"]["kind"]] = _shortened(schema)
    return _shared(kinds)


def _text(path: Path) -> bytes:
    raw = path.read_bytes()
    return gzip.decompress(raw) if path.suffix == ".gz" else raw


def _shortened(schema: dict[str, Any]) -> dict[str, Any]:
    """The same rules as a JSON schema: unknown keys are refused where keys are listed."""
    short: dict[str, Any] = {rule: schema[rule] for rule in sorted(RULES & set(schema))}
    if schema.get("x-kubernetes-int-or-string"):
        short = {"type": ["integer", "string"]}
    if schema.get("nullable") and "type" in short:
        short["type"] = [short["type"], "null"]
    if "required" in schema:  # what has a default is filled in before it is asked for
        short["required"] = [key for key in schema["required"] if "default" not in schema["properties"].get(key, {})]
    if "properties" in schema:
        inner = {name: OPEN.get(name) or _shortened(one) for name, one in schema["properties"].items()}
        short["properties"] = dict(sorted(inner.items()))
        short["additionalProperties"] = False
    elif isinstance(schema.get("additionalProperties"), dict):
        short["additionalProperties"] = _shortened(schema["additionalProperties"])
    if "items" in schema:
        short["items"] = _shortened(schema["items"])
    return short


def _shared(kinds: dict[str, Any]) -> dict[str, Any]:
    """What occurs several times becomes a definition, from the inside out."""
    counts: Counter[str] = Counter()

    def count(schema: dict[str, Any]) -> None:
        text = json.dumps(schema, sort_keys=True)
        counts[text] += 1
        if counts[text] == 1:
            for inner in _inner(schema).values():
                count(inner)

    for schema in kinds.values():
        count(schema)
    names = {text: f"d{index}" for index, text in enumerate(
        text for text, times in counts.items() if times > 1 and len(text) >= SHARED_FROM)}  # fmt: skip
    definitions = {name: _named(json.loads(text), names, top=True) for text, name in names.items()}
    return {
        "$comment": ORIGIN,
        "kinds": {kind: _named(schema, names) for kind, schema in kinds.items()},
        "$defs": definitions,
    }


def _inner(schema: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The schemas within one, by where they stand in it."""
    found = {f"properties/{name}": one for name, one in schema.get("properties", {}).items()}
    for key in ("items", "additionalProperties"):
        if isinstance(schema.get(key), dict):
            found[key] = schema[key]
    return found


def _named(schema: dict[str, Any], names: dict[str, str], top: bool = False) -> dict[str, Any]:
    text = json.dumps(schema, sort_keys=True)
    if text in names and not top:
        return {"$ref": f"#/$defs/{names[text]}"}
    copy = {**schema, **({"properties": dict(schema["properties"])} if "properties" in schema else {})}
    for place, inner in _inner(schema).items():
        key, _, name = place.partition("/")
        if name:
            copy[key][name] = _named(inner, names)
        else:
            copy[key] = _named(inner, names)
    return copy


def source(crds: list[Path]) -> str:
    """The file's text."""
    return json.dumps(table(crds), separators=(",", ":"), sort_keys=True) + "\n"


if __name__ == "__main__":
    FILE.write_text(source([Path(name) for name in sys.argv[1:]]), encoding="utf-8")
