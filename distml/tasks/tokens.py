"""Text as tokens on disk: one folder, written once and mapped into memory by everyone who reads it. No torch.

    FOLDER/meta.json        what is in it: `Meta`
    FOLDER/tokenizer.json   see tokenizers.py
    FOLDER/train.bin  validation.bin  test.bin      little-endian uint16 or uint32; each document ends with the end
    FOLDER/verified         of many bytes: which files, by size and times, were last found to be those of meta.json

A folder appears under its name when it is complete: it is written beside it and renamed. `build_once` sees to it that
of many processes which want the same folder one writes it, and that the next takes over from one that was killed.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import mmap
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import Field, ValidationError

from distml.errors import UsageError
from distml.spec.base import Block, Count
from distml.spec.language import TOKENS_FORMAT
from distml.tasks.corpus import SPLITS
from distml.tasks.tokenizers import Tokenizer, Tokens, read_tokenizer

META, TOKENIZER, VERIFIED = "meta.json", "tokenizer.json", "verified"
VERIFIED_BYTES = 64 * 2**20  # of tokens that are held against their digest each time they are opened
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Number = Annotated[int, Field(ge=0)]
LOCK_PAUSE_S = 0.05


class SplitMeta(Block):
    """A split: its tokens (ends included), documents, bytes of text, and the SHA-256 of its file."""

    tokens: Count
    documents: Count
    bytes: Count
    sha256: Digest


class Meta(Block):
    """What a folder of tokens says of itself; `tokenizer` is the SHA-256 of the tokeniser's file."""

    format: Literal["distml-tokens"] = TOKENS_FORMAT
    version: Literal[1] = 1
    dtype: Literal["uint16", "uint32"]
    vocabulary: Count
    end: Number
    mask: Number | None
    tokenizer: Digest
    splits: dict[Literal["train", "validation", "test"], SplitMeta]

    @property
    def digest(self) -> str:
        """SHA-256 over the digests of tokeniser and splits: the same text, told apart in the same tokens."""
        parts = [self.tokenizer, *(self.splits[name].sha256 for name in SPLITS)]  # type: ignore[index]
        return hashlib.sha256("".join(parts).encode()).hexdigest()


class TokenFolder:
    """A complete folder, whose files are those that its digest stands for.

    Raises:
        UsageError: it is damaged, or of a form that this version does not know.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.meta = Meta.model_validate_json((path / META).read_bytes())
            for name in SPLITS:
                self._check_size(name)
            self._verify()
        except OSError as error:
            raise UsageError(f"{error.filename}: cannot be read: {error.strerror}; {REPAIR}") from None
        except ValidationError as error:
            found = error.errors()[0]
            where = ".".join(map(str, found["loc"]))
            raise UsageError(f"{path / META}: {where}: {found['msg']}; {REPAIR}") from None

    def _check_size(self, name: str) -> None:
        file, split = self.path / f"{name}.bin", self.meta.splits.get(name)  # type: ignore[call-overload]
        if split is None:
            raise UsageError(f"{self.path / META} knows no split {name}; {REPAIR}")
        wanted, found = split.tokens * np.dtype(self.meta.dtype).itemsize, file.stat().st_size
        if found != wanted:
            raise UsageError(f"{file} has {found} bytes, its {META} says {wanted}; {REPAIR}")

    def _verify(self) -> None:
        """Hold every file against its digest; many bytes only where they have changed since this was last done."""
        names = [f"{name}.bin" for name in SPLITS]
        states = [(self.path / name).stat() for name in names]
        # Taken before reading: what changes meanwhile is another state. The time of change cannot be set back.
        seen = [[state.st_size, state.st_mtime_ns, state.st_ctime_ns] for state in states]
        stamp, noted = hashlib.sha256(f"{self.meta.digest} {seen}".encode()).digest(), self.path / VERIFIED
        large = sum(state.st_size for state in states) > VERIFIED_BYTES
        self._check_digest(TOKENIZER, self.meta.tokenizer)
        if large and noted.is_file() and noted.read_bytes() == stamp:
            return
        for name, file in zip(SPLITS, names, strict=True):
            self._check_digest(file, self.meta.splits[name].sha256)  # type: ignore[index]
        if large:
            with contextlib.suppress(OSError):  # read only: then it is done each time
                noted.write_bytes(stamp)

    def _check_digest(self, name: str, wanted: str) -> None:
        file = self.path / name
        with open(file, "rb") as opened:
            mapped = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) if file.stat().st_size else b""
            found = hashlib.sha256(mapped).hexdigest()
        if found != wanted:
            raise UsageError(f"{file} is not the file that {META} names: what it holds has changed; {REPAIR}")

    def tokens(self, split: str) -> Tokens:
        """A split's tokens (uint16 or uint32 [T], read-only, read from disk as they are used)."""
        dtype = np.dtype(self.meta.dtype).newbyteorder("<")
        mapped = np.memmap(self.path / f"{split}.bin", dtype, "r")
        return np.asarray(mapped)  # a plain array over the same memory: indexing a memmap is several times slower

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokeniser that made the tokens."""
        return read_tokenizer(self.path / TOKENIZER)


REPAIR = "write the folder anew with `distml tokenize`, or remove it where it is a cache"


def write_folder(folder: Path, tokenizer: Tokenizer, splits: Mapping[str, Iterable[str]]) -> None:
    """Write a folder that is not there yet; it appears when it is complete.

    Args:
        splits: the documents' texts of each.

    Raises:
        OSError: it cannot be written.
    """
    partial = folder.with_name(f"{folder.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        dtype = np.dtype("<u2" if tokenizer.vocabulary <= 2**16 else "<u4")
        found = {name: _write_split(partial / f"{name}.bin", tokenizer, splits[name], dtype) for name in SPLITS}
        raw = tokenizer.to_json().encode()
        (partial / TOKENIZER).write_bytes(raw)
        meta = {"dtype": dtype.name, "vocabulary": tokenizer.vocabulary, "end": tokenizer.end, "mask": tokenizer.mask,
                "tokenizer": hashlib.sha256(raw).hexdigest(), "splits": found}  # fmt: skip
        (partial / META).write_text(json.dumps(Meta.model_validate(meta).model_dump(), indent=2))
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_split(file: Path, tokenizer: Tokenizer, texts: Iterable[str], dtype: np.dtype) -> dict[str, int | str]:  # type: ignore[type-arg]
    count = documents = num_bytes = 0
    digest = hashlib.sha256()

    def counted() -> Iterator[str]:
        nonlocal num_bytes
        for text in texts:
            num_bytes += len(text.encode())
            yield text

    with open(file, "wb") as out:
        for tokens in tokenizer.encode_all(counted()):
            raw = np.append(tokens, tokenizer.end).astype(dtype).tobytes()
            out.write(raw)
            digest.update(raw)
            count, documents = count + len(tokens) + 1, documents + 1
        out.flush()
        os.fsync(out.fileno())
    return {"tokens": count, "documents": documents, "bytes": num_bytes, "sha256": digest.hexdigest()}


def build_once(folder: Path, build: Callable[[], None], wait_s: float) -> None:
    """Call `build`, which makes `folder`, unless it is there; only one process of this machine does at a time.

    Raises:
        UsageError: another one has not finished within `wait_s`, or the folder's place cannot be written.
    """
    if folder.exists():
        return
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _locked(folder.with_name(f"{folder.name}.lock"), wait_s):
            if folder.exists():
                return
            for left in folder.parent.glob(f"{folder.name}.partial-*"):  # by one that was killed
                shutil.rmtree(left, ignore_errors=True)
            build()
    except OSError as error:
        place = error.filename or folder
        raise UsageError(f"{place}: cannot be written: {error.strerror}; set DISTML_CACHE to another folder") from None


@contextlib.contextmanager
def _locked(path: Path, wait_s: float) -> Iterator[None]:
    """Hold the flock of a file; the kernel gives it back when its holder dies."""
    deadline = time.monotonic() + wait_s
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise UsageError(
                        f"another process has been tokenising the same text for {wait_s:g} s (it holds {path}); wait "
                        "until it has finished, or tokenise once beforehand with `distml tokenize`"
                    ) from None
                time.sleep(LOCK_PAUSE_S)
        yield
    finally:
        os.close(handle)
