"""Where text comes from: files, cut into documents, dealt out to the three splits. No torch.

    spec/corpus_files.py ──▶ files ── documents_of ──▶ documents ── deal ──▶ three splits ── read ──▶ texts

The standard library and a folder: each file is a document. A single file: its documents end at blank lines, which
belong to none; a file with hardly any of them is cut into pieces of equal length, each up to the end of a line. A
document is in one split as a whole. Which one is drawn from the seed; within a split the files' order stays.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from distml.errors import UsageError
from distml.spec.corpus_files import File, root_of
from distml.spec.language import CorpusSpec

SPLITS = ("train", "validation", "test")
BLANK_LINES = re.compile(rb"\n(?:[ \t\r]*\n)+")
FEW_DOCUMENTS, PIECES = 20, 100
HASHED_BYTES = 64 * 2**20  # of a corpus that is known by what it holds; reading these takes a fraction of a second


@dataclass(frozen=True, slots=True)
class Document:
    """The bytes [start, stop) of a file."""

    file: File
    start: int
    stop: int


# ---------------------------------------------------------------------------------------------------------------- files
def fingerprint(spec: CorpusSpec, files: Sequence[File]) -> dict[str, object]:
    """What tells these files from all others, as JSON: where they are, their names, and what they hold.

    Of more than `HASHED_BYTES`, sizes and times stand for what they hold.

    Raises:
        UsageError: a file cannot be read.
    """
    small = sum(file.size for file in files) <= HASHED_BYTES
    held = [[file.name, _sha256(file)] if small else [file.name, file.size, file.modified] for file in files]
    return {"root": os.path.realpath(root_of(spec)), "files": held}


def _sha256(file: File) -> str:
    with _contents(file) as data:
        return hashlib.sha256(data).hexdigest()


# ------------------------------------------------------------------------------------------------------------ documents
def documents_of(files: Sequence[File], max_bytes: int | None = None) -> list[Document]:
    """The documents, in the order of the files, up to the first that would exceed `max_bytes`.

    Raises:
        UsageError: a file cannot be read.
    """
    if len(files) == 1:
        documents = _paragraphs(files[0])
        if len(documents) < FEW_DOCUMENTS:
            documents = _pieces(files[0])
    else:
        documents = [Document(file, 0, file.size) for file in files]
    if max_bytes is None:
        return documents
    sizes = np.cumsum([document.stop - document.start for document in documents])
    return documents[: int(np.searchsorted(sizes, max_bytes, side="right"))]


def _paragraphs(file: File) -> list[Document]:
    """What stands between blank lines."""
    with _contents(file) as data:
        gaps = [match.span() for match in BLANK_LINES.finditer(data)]
        starts, stops = [0, *(stop for _, stop in gaps)], [*(start for start, _ in gaps), file.size]
        pairs = zip(starts, stops, strict=True)
        return [Document(file, start, stop) for start, stop in pairs if data[start:stop].strip()]


def _pieces(file: File) -> list[Document]:
    """Nearly equal pieces, each up to the end of a line where there is one."""
    with _contents(file) as data:
        cuts = [0]
        for index in range(1, PIECES):
            target, limit = file.size * index // PIECES, file.size * (index + 1) // PIECES
            line = data.find(b"\n", max(target, cuts[-1]), limit)
            cuts.append(line + 1 if line >= 0 else _character(data, target))
    cuts.append(file.size)
    return [Document(file, start, stop) for start, stop in pairwise(cuts) if start < stop]


def _character(data: mmap.mmap, place: int) -> int:
    """The first place from `place` on at which a character of UTF-8 begins."""
    while place < len(data) and data[place] & 0xC0 == 0x80:
        place += 1
    return place


def _contents(file: File) -> mmap.mmap:
    try:
        with open(file.path, "rb") as opened:
            return mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        raise UsageError(f"{file.path}: cannot be read: {getattr(error, 'strerror', error)}") from None


def read(documents: Iterable[Document]) -> Iterator[str]:
    """The documents' texts; a file stays open for as long as its documents follow each other.

    Raises:
        UsageError: a file cannot be read, or is no UTF-8 text.
    """
    current: File | None = None
    for document in documents:
        if document.file is not current:
            current = document.file
            data = _contents(current)
        raw = data[document.start : document.stop]
        try:
            text = raw.decode()
        except UnicodeDecodeError as error:
            raise _no_text(document, error.start) from None
        if "\0" in text:
            raise _no_text(document, raw.index(0))
        yield text


def _no_text(document: Document, place: int) -> UsageError:
    return UsageError(
        f"{document.file.path} is not text in UTF-8 (byte {document.start + place}); "
        "convert it, take it out of the corpus, or leave it out by task.data.pattern"
    )


# --------------------------------------------------------------------------------------------------------------- splits
def deal(documents: Sequence[Document], spec: CorpusSpec, seed: int) -> dict[str, list[Document]]:
    """Whole documents for each split, drawn from the seed; at least one for each.

    Raises:
        UsageError: there are too few.
    """
    count = len(documents)
    validation, test = (max(1, round(share * count)) for share in (spec.validation, spec.test))
    if count - validation - test < 1:
        raise UsageError(
            f"corpus {spec.path} has {count} document{'' if count == 1 else 's'}, of which validation takes "
            f"{validation} and test {test}, so that none is left to train on; add text, lower task.data.validation "
            "and task.data.test, or raise task.data.max_bytes"
        )
    # RandomState's stream is frozen: the same splits with every version of numpy.
    order = np.random.RandomState(seed).permutation(count)
    chosen = {"validation": order[:validation], "test": order[validation : validation + test],
              "train": order[validation + test :]}  # fmt: skip
    return {name: [documents[index] for index in np.sort(chosen[name])] for name in SPLITS}
