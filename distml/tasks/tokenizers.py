"""From text to tokens and back: bytes, characters, and what the `tokenizers` library learns or reads. No torch.

A tokeniser is one JSON file: the library's own format, or for bytes and characters

    {"format": "distml-tokenizer", "version": 1, "name": "bytes", "characters": "", "mask": false}

Tokens are numbered 0 to `vocabulary` - 1. One of them ends a document; one stands for a masked token where the task
masks some. Neither ever comes out of a text, even one that spells its name.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from distml.errors import UsageError
from distml.spec.base import Block
from distml.spec.language import BPESpec, BytesSpec, CharactersSpec, TokenizerFileSpec

if TYPE_CHECKING:
    import tokenizers

Tokens: TypeAlias = NDArray[Any]  # unsigned integers [T]

END, MASK = "<|endoftext|>", "[MASK]"
KNOWN_ENDS = (END, "</s>", "[SEP]", "<eos>", "[EOS]", "<|end_of_text|>", "<|im_end|>")
KNOWN_MASKS = (MASK, "<mask>")
BATCH = 256  # documents that the library encodes at a time, on all cores


class Tokenizer(Protocol):
    """What text and tokens are to each other.

    Attributes:
        vocabulary: how many tokens there are.
        end: the token that ends a document.
        mask: the token that stands for a masked one, or None.
    """

    vocabulary: int
    end: int
    mask: int | None

    def encode(self, text: str) -> list[int]:
        """The text's tokens, without an end."""
        ...

    def encode_all(self, texts: Iterable[str]) -> Iterator[Tokens]:
        """Each text's tokens: for many at a time."""
        ...

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of some tokens; end and mask have none."""
        ...

    def to_json(self) -> str:
        """What `from_json` makes the same tokeniser of."""
        ...


class OwnFile(Block):
    """The file of a byte or character tokeniser."""

    format: Literal["distml-tokenizer"] = "distml-tokenizer"
    version: Literal[1] = 1
    name: Literal["bytes", "characters"]
    characters: str = ""
    mask: bool = False


class ByteTokenizer:
    """One token per byte of UTF-8."""

    def __init__(self, mask: bool = False) -> None:
        self.end, self.mask = 256, 257 if mask else None
        self.vocabulary = 257 + mask

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def encode_all(self, texts: Iterable[str]) -> Iterator[Tokens]:
        return (np.frombuffer(text.encode(), np.uint8) for text in texts)

    def decode(self, tokens: Sequence[int]) -> str:
        return bytes(token for token in tokens if 0 <= token < 256).decode(errors="replace")

    def to_json(self) -> str:
        return OwnFile(name="bytes", mask=self.mask is not None).model_dump_json()


class CharacterTokenizer:
    """One token per known character, by code point, then one for all others.

    Args:
        characters: those that are known, at least one.
    """

    def __init__(self, characters: Iterable[str], mask: bool = False) -> None:
        self.characters = sorted(set(characters))
        self.codes = np.array([ord(character) for character in self.characters], np.uint32)
        self.other = len(self.characters)
        self.end, self.mask = self.other + 1, self.other + 2 if mask else None
        self.vocabulary = self.other + 2 + mask

    def encode(self, text: str) -> list[int]:
        return [int(token) for token in next(self.encode_all([text]))]

    def encode_all(self, texts: Iterable[str]) -> Iterator[Tokens]:
        for text in texts:
            codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
            places = np.searchsorted(self.codes, codes)
            known = self.codes[np.minimum(places, self.other - 1)] == codes
            yield np.where(known, places, self.other)

    def decode(self, tokens: Sequence[int]) -> str:
        known = [*self.characters, "\ufffd"]
        return "".join(known[token] for token in tokens if 0 <= token <= self.other)

    def to_json(self) -> str:
        return OwnFile(name="characters", characters="".join(self.characters),
                       mask=self.mask is not None).model_dump_json()  # fmt: skip


class LibraryTokenizer:
    """One of the `tokenizers` library.

    Args:
        library: of which every token that is special there is ordinary text where a text spells it.

    Raises:
        ValueError: it has no token that ends a document.
    """

    def __init__(self, library: tokenizers.Tokenizer) -> None:
        self.library = library
        library.no_padding()
        library.no_truncation()
        library.encode_special_tokens = True
        numbers: dict[str, int] = library.get_vocab()
        self.vocabulary = max(numbers.values(), default=-1) + 1
        end = next((numbers[name] for name in KNOWN_ENDS if name in numbers), None)
        if end is None:
            raise ValueError(f"has no token that ends a document (one of {', '.join(KNOWN_ENDS)})")
        self.end = end
        self.mask = next((numbers[name] for name in KNOWN_MASKS if name in numbers), None)

    def encode(self, text: str) -> list[int]:
        return list(self.library.encode(text, add_special_tokens=False).ids)

    def encode_all(self, texts: Iterable[str]) -> Iterator[Tokens]:
        waiting = iter(texts)
        while batch := list(islice(waiting, BATCH)):
            for encoding in self.library.encode_batch(batch, add_special_tokens=False):
                yield np.array(encoding.ids, np.uint32)

    def decode(self, tokens: Sequence[int]) -> str:
        return str(self.library.decode([token for token in tokens if token not in (self.end, self.mask)]))

    def to_json(self) -> str:
        return str(self.library.to_str())


# ------------------------------------------------------------------------------------------------------ making, reading
def make_tokenizer(
    spec: BytesSpec | CharactersSpec | BPESpec | TokenizerFileSpec, texts: Iterable[str], mask: bool
) -> Tokenizer:
    """The tokeniser that a spec describes.

    Args:
        texts: those of the training split, from which it may learn.
        mask: whether it needs a token that stands for a masked one.

    Raises:
        UsageError: its file cannot be used.
    """
    if isinstance(spec, BytesSpec):
        return ByteTokenizer(mask)
    if isinstance(spec, CharactersSpec):
        return CharacterTokenizer(set().union(*texts), mask)
    if isinstance(spec, BPESpec):
        return learn_bpe(texts, spec.vocabulary, mask)
    return read_tokenizer(Path(spec.path), mask)


def learn_bpe(texts: Iterable[str], vocabulary: int, mask: bool) -> LibraryTokenizer:
    """Byte-level byte-pair encoding; fewer tokens than `vocabulary` where the texts have no more pairs."""
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, models, pre_tokenizers, trainers

    library = Library(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[END, MASK] if mask else [END], show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )  # fmt: skip
    library.train_from_iterator(texts, trainer)
    return LibraryTokenizer(library)


def read_tokenizer(path: Path, mask: bool = False) -> Tokenizer:
    """A tokeniser's file.

    Raises:
        UsageError: it cannot be read, is none, or has no mask where one is needed.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise UsageError(f"tokeniser {path}: cannot be read: {reason}; name a tokenizer.json") from None
    try:
        tokenizer = from_json(text)
    except ValueError as error:
        raise UsageError(f"tokeniser {path}: {error}; name a tokenizer.json of the `tokenizers` library") from None
    if mask and tokenizer.mask is None:
        raise UsageError(
            f"tokeniser {path} has no token for masked ones ({' or '.join(KNOWN_MASKS)}), which task "
            "masked_language_model needs; add one, or choose another tokenizer"
        )
    return tokenizer


def from_json(text: str) -> Tokenizer:
    """The tokeniser of which `to_json` made this.

    Raises:
        ValueError: what is wrong with it.
    """
    try:
        parsed = json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError("is not JSON") from None
    if isinstance(parsed, dict) and parsed.get("format") == OwnFile.model_fields["format"].default:
        try:
            own = OwnFile.model_validate(parsed)
        except ValidationError as error:
            raise ValueError(f"is no tokeniser: {error.errors()[0]['msg']}") from None
        if own.name == "bytes":
            return ByteTokenizer(own.mask)
        if not own.characters:
            raise ValueError("is no tokeniser: it knows no characters")
        return CharacterTokenizer(own.characters, own.mask)
    from tokenizers import Tokenizer as Library

    try:
        library = Library.from_str(text)
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(f"is no tokeniser: {error}") from None
    return LibraryTokenizer(library)
