"""Strict YAML in which every key and every value knows its line and column.

The dialect is YAML 1.2's core schema: `1e-3` is a number, `yes` and `on` are strings. Tags, merge keys, duplicate keys,
keys that are not strings and anchors that contain themselves are refused, each with one line saying where.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from os import PathLike, fspath
from typing import Any, Literal, TypeAlias

import yaml

from distml.errors import UsageError

KeyPath: TypeAlias = tuple[str | int, ...]

MAX_DEPTH = 64
MAX_NODES = 100_000  # what aliases expand to: a short file can otherwise spell out gigabytes
MAX_BYTES = 1_000_000

_PREFIX = "tag:yaml.org,2002:"
_SCALARS = (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", "-+.0123456789"),
    ("float", r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", "-+."),
    ("null", r"~|null|Null|NULL|", ("~", "n", "N", "")),
    ("merge", r"<<", "<"),
)
_BREAKS = re.compile("\r\n|[\r\n\x85\u2028\u2029]")


@dataclass(frozen=True)
class Position:
    """Where something was written: a file with line and column (from 1), or an override, which has neither."""

    source: str
    line: int = 1
    column: int = 1
    numbered: bool = True

    def __str__(self) -> str:
        source = one_line(self.source)
        return f"{source}:{self.line}:{self.column}" if self.numbered else source

    def error(self, text: str) -> UsageError:
        """The one-line error that points here."""
        return UsageError(f"{self}: {one_line(text)}")


@dataclass
class Document:
    """A spec as written: plain values, and where each key and value stands."""

    data: Any
    start: Position
    keys: dict[KeyPath, Position] = field(default_factory=dict)
    values: dict[KeyPath, Position] = field(default_factory=dict)

    def where(self, path: KeyPath, at: Literal["key", "value"] = "value") -> Position:
        """Position of the key or value at `path`, else that of the nearest block around it."""
        places = self.keys if at == "key" else self.values
        while path:
            found = places.get(path)
            if found is not None:
                return found
            path = path[:-1]
        return self.start

    def below(self, key: str) -> Document:
        """The block at a top-level key as a document of its own."""
        start = self.where((key,))
        keys, values = ({path[1:]: place for path, place in places.items() if path[0] == key and len(path) > 1}
                        for places in (self.keys, self.values))  # fmt: skip
        return Document(self.data[key], start, keys, values)

    def forget(self, path: KeyPath) -> None:
        """Drop the positions at and below `path`, whose value is being replaced."""
        for places in (self.keys, self.values):
            for known in [known for known in places if known[: len(path)] == path]:
                del places[known]


def one_line(text: str) -> str:
    """`text` with everything that would break a line or cannot be printed written as an escape."""
    return "".join(
        char if char.isprintable() and not "\ud800" <= char <= "\udfff" else repr(char)[1:-1] for char in text
    )


def parse(raw: bytes | str, source: str, *, numbered: bool = True) -> Document:
    """Read one YAML document.

    Args:
        raw: the bytes of a file (UTF-8), or text.
        source: what messages call it, usually the file's path.
        numbered: whether positions carry line and column; false for an override's value.

    Raises:
        UsageError: anything that is not one well-formed document of plain values.
    """
    if len(raw) > MAX_BYTES:
        raise Position(source, numbered=numbered).error(f"larger than {MAX_BYTES} bytes; a spec is a page of YAML")
    text = raw if isinstance(raw, str) else _decode(raw, source)
    loader: _StrictLoader | None = None
    try:
        loader = _StrictLoader(text)
        node = loader.get_single_node()
    except yaml.reader.ReaderError as error:
        start = _position_of_index(text, error.position, source, numbered)
        raise start.error(f"the character {text[error.position]!r} is not allowed in YAML; remove it") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        start = Position(source, numbered=numbered) if mark is None else _at_mark(mark, source, numbered)
        raise start.error(_explain(error)) from None
    except (ValueError, OverflowError, RecursionError) as error:  # "\UFFFFFFFF", "%YAML 99…9.1"
        start = Position(source, numbered=numbered)
        if loader is not None:
            start = _at_mark(loader.get_mark(), source, numbered)
        raise start.error(f"not readable as YAML: {error}; write it in another way") from None
    start = Position(source, numbered=numbered)
    if node is None:
        return Document(None, start)
    document = Document(None, _at_mark(node.start_mark, source, numbered))
    document.data = _Values(document, source, numbered).of(node, (), ())
    return document


def plain(value: Any, start: Position, path: KeyPath = ()) -> Any:
    """A copy of a Python value as YAML would give it: mappings, lists, strings, numbers, true, false, null.

    Tuples become lists and paths become strings, as they would be written.

    Raises:
        UsageError: a value that YAML cannot hold, located at `start`.
    """
    if len(path) > MAX_DEPTH:
        raise start.error(f"{dotted(path[:3])}… is nested deeper than {MAX_DEPTH} levels; does it contain itself?")
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise start.error(f"the key {_short(key)} of {dotted(path)} must be a string")
            _check_scalar(key, start)
        return {str(key): plain(item, start, (*path, key)) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item, start, (*path, index)) for index, item in enumerate(value)]
    if isinstance(value, PathLike):
        value = fspath(value)
    if value is None or isinstance(value, bool):
        return value
    for kind in (str, int, float):
        if isinstance(value, kind):
            _check_scalar(value, start)
            return kind(value)
    raise start.error(
        f"{dotted(path)} must be a value that YAML can hold, got an object of class {type(value).__name__}"
    )


def dump(data: Mapping[str, Any]) -> str:
    """YAML that `parse` reads back to an equal value."""
    return str(
        yaml.dump(dict(data), Dumper=_StrictDumper, sort_keys=False, default_flow_style=None, width=120, indent=2)
    )


def dotted(path: KeyPath) -> str:
    """A path as users write it in `--set`."""
    return ".".join(str(part) for part in path) or "the spec"


# ------------------------------------------------------------------------------------------------- loading and dumping
class _Refused(yaml.MarkedYAMLError):
    """Well-formed YAML that a spec may not hold; the problem is said in full."""


def _tag_as_written(tag: str) -> str:
    return f"!!{tag.removeprefix(_PREFIX)}" if tag.startswith(_PREFIX) else tag


class _StrictLoader(yaml.SafeLoader):
    """Composes nodes only; nothing is ever constructed from a tag."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}
    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if getattr(event, "tag", None) is not None:
            raise _Refused(
                None, None, f"{_tag_as_written(event.tag)}: tags are not allowed; remove it", event.start_mark
            )
        if self.depth >= MAX_DEPTH:
            raise _Refused(None, None, f"nested deeper than {MAX_DEPTH} levels; flatten it", event.start_mark)
        self.depth += 1
        try:
            node: yaml.Node | None = super().compose_node(parent, index)  # type: ignore[no-untyped-call]
        finally:
            self.depth -= 1
        return node


class _StrictDumper(yaml.SafeDumper):
    """Quotes exactly what the strict loader would otherwise read as something else than a string."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _tag, _pattern, _first in _SCALARS:
    for _class in (_StrictLoader, _StrictDumper):
        _class.add_implicit_resolver(_PREFIX + _tag, re.compile(rf"^(?:{_pattern})$"), list(_first))


class _Values:
    """Turns nodes into plain values and records where they stand."""

    def __init__(self, document: Document, source: str, numbered: bool) -> None:
        self.document, self.source, self.numbered = document, source, numbered
        self.nodes = 0

    def of(self, node: yaml.Node, path: KeyPath, ancestors: tuple[int, ...]) -> Any:
        start = _at_mark(node.start_mark, self.source, self.numbered)
        if path:
            self.document.values[path] = start
        self.nodes += 1
        if id(node) in ancestors:
            raise start.error("the anchor contains itself; write the values out")
        if self.nodes > MAX_NODES or len(path) > MAX_DEPTH:
            start = self.document.where(path[:1])
            raise start.error(f"the aliases expand to over {MAX_NODES} values or {MAX_DEPTH} levels; write them out")
        if isinstance(node, yaml.MappingNode):
            return self.mapping(node, path, (*ancestors, id(node)))
        if isinstance(node, yaml.SequenceNode):
            inner = (*ancestors, id(node))
            return [self.of(item, (*path, index), inner) for index, item in enumerate(node.value)]
        return _scalar(node, start)

    def mapping(self, node: yaml.MappingNode, path: KeyPath, ancestors: tuple[int, ...]) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for key_node, value_node in node.value:
            start = _at_mark(key_node.start_mark, self.source, self.numbered)
            key = _key(key_node, start)
            inside = (*path, key)
            if key in values:
                first = self.document.keys[inside].line
                raise start.error(f"duplicate key {_short(key)}, first on line {first}; keep one of them")
            self.document.keys[inside] = start
            values[key] = self.of(value_node, inside, ancestors)
        return values


def _key(node: yaml.Node, start: Position) -> str:
    if node.tag == _PREFIX + "merge":
        raise start.error("merge keys (<<) are not part of YAML 1.2; write the keys out")
    if not isinstance(node, yaml.ScalarNode) or node.tag != _PREFIX + "str":
        shown = _short(node.value) if isinstance(node, yaml.ScalarNode) else "a list or mapping"
        raise start.error(f"a key must be a string, got {shown}; quote it")
    _check_scalar(node.value, start)
    return str(node.value)


def _scalar(node: yaml.Node, start: Position) -> Any:
    text, tag = str(node.value), node.tag.removeprefix(_PREFIX)
    if tag == "null":
        return None
    if tag == "bool":
        return text.lower() == "true"
    value: str | int | float = text
    try:
        if tag == "int":
            value = int(text, 0) if text[:2] in ("0o", "0x") else int(text)
        elif tag == "float":
            value = float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
    except ValueError:  # thousands of digits
        raise start.error(f"the number {_short(text)} has too many digits; shorten it") from None
    _check_scalar(value, start)
    return value


def _check_scalar(value: str | int | float, start: Position) -> None:
    """Refuse what cannot be written to a file and read back equal."""
    if isinstance(value, str) and any("\ud800" <= char <= "\udfff" for char in value):
        raise start.error(f"{_short(value)} holds half of a surrogate pair; write the character itself")
    if isinstance(value, float) and math.isnan(value):
        raise start.error("nan is not a value of any key; give a number")
    if isinstance(value, int) and value.bit_length() > 64:
        raise start.error("the integer does not fit into 64 bits; give a smaller one")


# ---------------------------------------------------------------------------------------------------------- positions
def _at_mark(mark: yaml.Mark, source: str, numbered: bool) -> Position:
    return Position(source, mark.line + 1, mark.column + 1, numbered)


def _position_of_index(text: str, index: int, source: str, numbered: bool) -> Position:
    breaks = list(_BREAKS.finditer(text, 0, index))
    last = breaks[-1].end() if breaks else 0
    return Position(source, len(breaks) + 1, index - last + 1, numbered)


def _decode(raw: bytes, source: str) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = raw[: error.start].decode("utf-8-sig", "replace")
        start = _position_of_index(before + "?", len(before), source, True)
        raise start.error(f"the byte 0x{raw[error.start]:02x} is not UTF-8; save the file as UTF-8") from None


def _explain(error: yaml.MarkedYAMLError) -> str:
    """PyYAML's finding in one line, with what to do for the usual ones."""
    problem = str(error.problem or "not readable as YAML")
    if isinstance(error, _Refused):
        return problem
    if r"'\t'" in problem or "\t" in problem:
        return "a tab stands here; indent with spaces"
    if "expected a single document" in str(error.context):
        return "a second document begins here; a spec is one document, remove what follows '---'"
    if "undefined alias" in problem:
        return f"{problem}; define it with & before, or write the value out"
    context = f" {error.context}" if error.context else ""
    return f"not YAML: {problem}{context}; check indentation, quotes and brackets"


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:56]}…{shown[-1]}"
