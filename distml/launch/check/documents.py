"""YAML as Ray's launcher and Kubernetes read it, in which every key and every value knows its line and column.

Unlike a spec, such a file may hold several documents, merge keys, numbers as keys, and YAML 1.1's words for booleans.
As for a spec nothing is built from tags.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from distml.errors import UsageError
from distml.spec.messages import Problem, shorten
from distml.spec.yaml import MAX_BYTES, MAX_DEPTH, MAX_NODES, Document, KeyPath, Position

PLAIN = ("tag:yaml.org,2002:map", "tag:yaml.org,2002:seq")


def read_documents(path: Path) -> tuple[list[Document], list[tuple[Position, Problem]]]:
    """All documents of a file, the empty ones left out, and the keys that are written twice.

    Raises:
        UsageError: one line: it cannot be read, or is not YAML.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not UTF-8 at byte {error.start}; save the file as UTF-8") from None
    if len(text) > MAX_BYTES:
        raise UsageError(f"{path}: larger than {MAX_BYTES} bytes; a cluster file is a few pages of YAML")
    return _documents(text, str(path))


def _documents(text: str, source: str) -> tuple[list[Document], list[tuple[Position, Problem]]]:
    found, doubled = [], []
    loader = yaml.SafeLoader(text)
    try:
        while loader.check_node():  # type: ignore[no-untyped-call]
            node: yaml.Node = loader.get_node()  # type: ignore[no-untyped-call,assignment]
            reader = _Reader(loader, source, Document(None, _at(node.start_mark, source)))
            reader.document.data = reader.of(node, (), ())
            doubled += reader.doubled
            if reader.document.data is not None:
                found.append(reader.document)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        start = Position(source) if mark is None else _at(mark, source)
        raise start.error(f"not YAML: {error.problem or error.context}; check indentation and quotes") from None
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:
        raise Position(source).error(f"not readable as YAML: {error}; write it in another way") from None
    finally:
        loader.dispose()  # type: ignore[no-untyped-call]
    return found, doubled


def _at(mark: yaml.Mark, source: str) -> Position:
    return Position(source, mark.line + 1, mark.column + 1)


class _Reader:
    """Turns the nodes of one document into plain values and notes where they stand."""

    def __init__(self, loader: yaml.SafeLoader, source: str, document: Document) -> None:
        self.loader, self.source, self.document = loader, source, document
        self.doubled: list[tuple[Position, Problem]] = []
        self.nodes = 0

    def of(self, node: yaml.Node, path: KeyPath, around: tuple[int, ...]) -> Any:
        """The value of a node; `around` are the nodes that it is in."""
        start = _at(node.start_mark, self.source)
        self.document.values[path] = start
        self.nodes += 1
        if id(node) in around:
            raise start.error("the anchor contains itself; write the values out")
        if self.nodes > MAX_NODES or len(path) > MAX_DEPTH:
            raise start.error(f"over {MAX_NODES} values or {MAX_DEPTH} levels; write a smaller file")
        inner = (*around, id(node))
        if isinstance(node, yaml.CollectionNode) and node.tag not in PLAIN:
            raise start.error(f"the tag {shorten(node.tag)} is not allowed; remove it")
        if isinstance(node, yaml.MappingNode):
            return dict(self._entries(node, path, inner))
        if isinstance(node, yaml.SequenceNode):
            return [self.of(item, (*path, index), inner) for index, item in enumerate(node.value)]
        return self.loader.construct_object(node)  # type: ignore[no-untyped-call]

    def _entries(self, node: yaml.MappingNode, path: KeyPath, inner: tuple[int, ...]) -> Iterator[tuple[str, Any]]:
        own = {id(key) for key, _ in node.value}  # what a merge key brings may be written again
        self.loader.flatten_mapping(node)
        seen: dict[str, bool] = {}
        for key_node, value_node in node.value:
            start = _at(key_node.start_mark, self.source)
            if not isinstance(key_node, yaml.ScalarNode):
                raise start.error("a key must be a word, got a list or mapping; quote it")
            key, mine = str(key_node.value), id(key_node) in own
            if seen.get(key) and mine:
                first = self.document.keys[(*path, key)].line
                text = f"duplicate key {shorten(key)}, first on line {first}; keep one of them"
                self.doubled.append((start, Problem(text, ())))
            seen[key] = seen.get(key, False) or mine
            self.document.keys[(*path, key)] = start
            yield key, self.of(value_node, (*path, key), inner)
