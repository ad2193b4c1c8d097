"""Any tokeniser as one of the `tokenizers` library that gives the same tokens: to export it, and to compare two."""

from __future__ import annotations

from typing import TYPE_CHECKING

from distml.tasks.tokenizers import END, MASK, ByteTokenizer, CharacterTokenizer, LibraryTokenizer, Tokenizer

if TYPE_CHECKING:
    import tokenizers

OTHER = "<|other|>"  # what stands for characters that a character tokeniser does not know


def same_tokens(one: Tokenizer, other: Tokenizer) -> bool:
    """Whether two tokenisers, each in whatever form, stand for the same."""
    return bool(as_library(one).to_str() == as_library(other).to_str())


def as_library(tokenizer: Tokenizer) -> tokenizers.Tokenizer:
    """The tokeniser in the library's form."""
    if isinstance(tokenizer, LibraryTokenizer):
        return tokenizer.library
    assert isinstance(tokenizer, ByteTokenizer | CharacterTokenizer)
    library = _bytes() if isinstance(tokenizer, ByteTokenizer) else _characters(tokenizer.characters)
    library.add_special_tokens([END] if tokenizer.mask is None else [END, MASK])
    return library


def _bytes() -> tokenizers.Tokenizer:
    """Byte-pair encoding without a pair.

    The library writes a byte as a character: that of its code if it can be seen, the others as those from 256 on.
    """
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, models, pre_tokenizers

    seen = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    unseen = [byte for byte in range(256) if byte not in seen]
    vocabulary = {chr(byte): byte for byte in seen} | {chr(256 + i): byte for i, byte in enumerate(unseen)}
    library = Library(models.BPE(vocab=vocabulary, merges=[]))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    library.decoder = decoders.ByteLevel()
    return library


def _characters(characters: list[str]) -> tokenizers.Tokenizer:
    """A word of its own for each character."""
    from tokenizers import Regex, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Library

    vocabulary = {character: index for index, character in enumerate([*characters, OTHER])}
    library = Library(models.WordLevel(vocab=vocabulary, unk_token=OTHER))
    library.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    library.decoder = decoders.Fuse()
    return library
