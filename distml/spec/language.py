"""The blocks of language modelling: text, tokenisers, transformers, and the two tasks.

A transformer's vocabulary follows from the tokeniser and its positions from `block`, unless they are given. So what a
plan needs is in the spec: no text is read for it, except to count the characters of a character tokeniser.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from distml.spec.base import Block, Count, Fraction, Positive, Share, TaskBlock

STDLIB = "stdlib"
TOKENS_FORMAT: Literal["distml-tokens"] = "distml-tokens"  # as `distml tokenize` writes it into meta.json


# ----------------------------------------------------------------------------------------------------------------- text
class CorpusSpec(Block):
    """Where text comes from: every file is one document, held out as a whole or not at all."""

    shorthand: ClassVar[str | None] = "path"

    path: str = Field(
        STDLIB, min_length=1,
        description="stdlib: the installed Python's own source; else a text file (documents end at blank lines), a "
        "folder of text files, or a folder that `distml tokenize` wrote; relative to the spec, else to where one is",
    )  # fmt: skip
    pattern: str = Field("*", description="shell pattern of the files in a folder, by relative path")
    validation: Share = Field(0.05, description="share of the documents held out for eval/...")
    test: Share = Field(0.05, description="share of the documents held out for test/...")
    max_bytes: Count | None = Field(None, description="documents are left out beyond this; null: all of them")
    digest: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = Field(
        None, description="of the tokens; a run writes it down, and whoever finds other tokens refuses to train"
    )


class BytesSpec(Block):
    """One token per byte of UTF-8, and one that ends a document: 257."""

    name: Literal["bytes"]


class CharactersSpec(Block):
    """One token per character that the training split has, one for all others, and one that ends a document."""

    name: Literal["characters"]


class BPESpec(Block):
    """Byte-pair encoding over bytes (Sennrich et al. 2016), learned from the training split."""

    name: Literal["bpe"]
    vocabulary: Annotated[int, Field(ge=258)] = Field(4096, description="tokens, the 256 bytes and the end included")


class TokenizerFileSpec(Block):
    """A tokeniser of the `tokenizers` library, as `distml tokenize` or the library saves it."""

    name: Literal["file"]
    path: str = Field(description="its tokenizer.json; relative to the spec")


TokenizerSpec = Annotated[BytesSpec | CharactersSpec | BPESpec | TokenizerFileSpec, Field(discriminator="name")]


# --------------------------------------------------------------------------------------------------------- transformers
class TransformerBlock(Block):
    """What encoder and decoder have."""

    layers: Count = 4
    heads: Count = Field(4, description="of attention; they divide the width")
    width: Count = Field(128, description="of the residual stream")
    hidden: Count | None = Field(
        None, description="width within the MLP; null: 4 x width, of swiglu 8/3 x width, up to the next multiple of 64"
    )
    dropout: Fraction = 0.0
    vocabulary: Count | None = Field(None, description="rows of the embedding; null: the tokeniser's tokens")
    max_positions: Count | None = Field(None, description="longest text; null: the task's block")
    activation_checkpointing: bool = Field(False, description="keep each layer's input only, and compute it again")
    compile: bool = Field(False, description="torch.compile each layer")


class GPTSpec(TransformerBlock):
    """A decoder (Radford et al. 2019); with rotary, rms_norm, swiglu, kv_heads and without biases Llama's shape."""

    name: Literal["gpt"]
    kv_heads: Count | None = Field(None, description="heads of keys and values (grouped queries); null: as many")
    positions: Literal["learned", "rotary"] = "learned"
    rotary_base: Positive = Field(10_000.0, description="rotary: the longest wavelength / 2 pi")
    norm: Literal["layer_norm", "rms_norm"] = "layer_norm"
    norm_place: Literal["pre", "post"] = Field("pre", description="before each sublayer, or after its sum")
    norm_eps: Positive = 1.0e-5
    activation: Literal["gelu", "gelu_tanh", "swiglu"] = "gelu_tanh"
    bias: bool = Field(True, description="biases in linear layers and LayerNorm")
    tied: bool = Field(True, description="the output layer is the token embedding")


class BERTSpec(TransformerBlock):
    """An encoder (Devlin et al. 2019): post-LayerNorm, learned positions, biases, GELU."""

    name: Literal["bert"]
    segments: Count = Field(2, description="rows of the segment embedding; training uses the first")
    pooler: bool = Field(False, description="the first token's dense layer, which masked tokens do not need")
    head: Literal["transform", "tied"] = Field(
        "transform", description="before the tied output: dense, GELU, LayerNorm and a bias; or nothing"
    )
    norm_eps: Positive = 1.0e-12


# ---------------------------------------------------------------------------------------------------------------- tasks
class TextBlock(TaskBlock):
    """What both tasks have. An example is a block of tokens; the sums are over tokens."""

    data: CorpusSpec = CorpusSpec()
    block: Count = Field(128, description="tokens of an example")

    @property
    def tokens_per_example(self) -> int:
        return self.block


class LanguageModelSpec(TextBlock):
    """Next-token prediction by a decoder."""

    summary: ClassVar[str] = "next-token prediction (data: the Python library's source, or your text)"

    name: Literal["language_model"]
    tokenizer: TokenizerSpec = BytesSpec(name="bytes")
    model: GPTSpec = GPTSpec(name="gpt")


class MaskedLanguageModelSpec(TextBlock):
    """Masked tokens by an encoder: of those chosen, 80 % are masked, 10 % drawn anew, 10 % left as they are."""

    summary: ClassVar[str] = "masked-token prediction by an encoder (data: the Python library's source, or your text)"

    name: Literal["masked_language_model"]
    tokenizer: TokenizerSpec = BPESpec(name="bpe")
    model: BERTSpec = BERTSpec(name="bert")
    mask: Annotated[float, Field(gt=0.0, lt=1.0)] = Field(0.15, description="share of the tokens that are chosen")
