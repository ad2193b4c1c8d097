"""The files of a corpus: listed, not read. The spec's rules look for one, the text's tasks for all of them."""

from __future__ import annotations

import fnmatch
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from distml.errors import UsageError
from distml.spec.language import STDLIB, CorpusSpec

NOT_THE_LIBRARY = frozenset({"__pycache__", "site-packages", "dist-packages", "test", "tests", "idle_test"})


@dataclass(frozen=True)
class File:
    """A text file.

    Attributes:
        name: its path within the corpus.
        modified: when, in nanoseconds.
    """

    name: str
    path: Path
    size: int
    modified: int


def find_files(spec: CorpusSpec) -> list[File]:
    """The corpus's files by their names, without those that are empty.

    Raises:
        UsageError: there are none, or they cannot be listed.
    """
    return sorted(iterate_files(spec), key=lambda file: file.name)


def iterate_files(spec: CorpusSpec) -> Iterator[File]:
    """The same in no order, each as it is found: so the first one tells whether there are any.

    Raises:
        UsageError: see `find_files`.
    """
    root, found = root_of(spec), False
    try:
        for file in _matching(spec, root):
            if file.size:
                found = True
                yield file
    except OSError as error:
        raise UsageError(f"{error.filename or root}: cannot be read: {error.strerror}; name another corpus") from None
    if not found:
        what = "is empty" if root.is_file() else f"has no file that matches {spec.pattern!r} and is not empty"
        raise UsageError(f"corpus {root} {what}; set task.data.path to a text file, or to a folder of them")


def root_of(spec: CorpusSpec) -> Path:
    """The file or folder that a corpus is."""
    return Path(sysconfig.get_path("stdlib")) if spec.path == STDLIB else Path(spec.path)


def _matching(spec: CorpusSpec, root: Path) -> Iterator[File]:
    if root.is_file():
        yield _file(root, root.name)
    elif spec.path == STDLIB:
        yield from (file for file in _walk(root, NOT_THE_LIBRARY) if file.name.endswith(".py"))
    else:
        yield from (file for file in _walk(root) if fnmatch.fnmatchcase(file.name, spec.pattern))


def _walk(root: Path, left_out: frozenset[str] = frozenset()) -> Iterator[File]:
    """The files under a folder; hidden ones are left out, links to folders not followed."""

    def fail(error: OSError) -> None:
        raise error

    for folder, below, names in os.walk(root, onerror=fail):
        below[:] = [name for name in below if name not in left_out and not name.startswith(".")]
        for name in names:
            path = Path(folder, name)
            if not name.startswith(".") and path.is_file():
                yield _file(path, path.relative_to(root).as_posix())


def _file(path: Path, name: str) -> File:
    status = path.stat()
    return File(name, path, status.st_size, status.st_mtime_ns)
