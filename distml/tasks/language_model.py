"""`task: language_model`: each token from those before it, by a decoder.

    TokenRows ──▶ batch (inputs, targets): targets are the tokens one further on ──▶ logits ──▶ cross-entropy

Shapes: B examples, T tokens of an example, V vocabulary; inputs and targets [B, T] int64, logits [B, T, V].
"""

from __future__ import annotations

import math
from functools import cached_property
from pathlib import Path
from typing import ClassVar, Generic, TypeVar

import torch
from torch import Tensor, nn

from distml.errors import UsageError
from distml.spec.language import LanguageModelSpec
from distml.spec.language_rules import RUN_TOKENIZER, TextTaskSpecs, known_vocabulary
from distml.tasks.base import Loss, Mean, Part, Progress, Task
from distml.tasks.gpt import GPT
from distml.tasks.text import IGNORED, TokenRows, open_text
from distml.tasks.tokenizers import Tokenizer, read_tokenizer
from distml.tasks.tokens import TokenFolder

Batch = tuple[Tensor, Tensor]
S = TypeVar("S", bound=TextTaskSpecs)


class TextTask(Task, Generic[S]):
    """What both language models have: text, tokeniser, and a loss that is a sum over tokens.

    Args:
        seed: of the run; it deals out the documents.
        directory: where a run keeps its tokeniser; None: the tokeniser comes with the text.
    """

    builds_in_pieces: ClassVar[bool] = True

    def __init__(self, spec: S, seed: int, directory: Path | None = None) -> None:
        self.spec, self.seed, self.directory = spec, seed, directory

    @cached_property
    def text(self) -> TokenFolder:
        """The text's tokens."""
        return open_text(self.spec, self.seed)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The run's own, where there is one: the text may be gone."""
        kept = None if self.directory is None else self.directory / RUN_TOKENIZER
        return read_tokenizer(kept) if kept is not None and kept.is_file() else self.text.tokenizer

    @property
    def vocabulary(self) -> int:
        """Rows of the embedding.

        Raises:
            UsageError: the spec's are fewer than the tokens.
        """
        known, given = known_vocabulary(self.spec), self.spec.model.vocabulary
        tokens = self.tokenizer.vocabulary if known is None else known
        if given is not None and given < tokens:
            raise UsageError(
                f"task.model.vocabulary {given} is smaller than the tokeniser's {tokens} tokens; leave it out"
            )
        return tokens if given is None else given

    @property
    def max_positions(self) -> int:
        """The longest text that the model takes."""
        return self.spec.model.max_positions or self.spec.block


class LanguageModel(TextTask[LanguageModelSpec]):
    """Next-token prediction."""

    def build_model(self) -> GPT:
        return GPT(self.spec.model, self.vocabulary, self.max_positions)

    def data(self, split: str) -> NextTokens:
        rows = TokenRows(self.text.tokens(split), self.spec.block, 1, self.text.meta.vocabulary)
        return NextTokens(rows, self.text.meta.end)

    def loss(self, model: nn.Module, batch: Batch, progress: Progress) -> Loss:
        inputs, targets = batch
        return Loss(cross_entropy(model(inputs), targets), num_targets(targets))

    def evaluate(self, model: nn.Module, part: Part, progress: Progress) -> dict[str, Mean]:
        loss = Mean(0.0, 0.0)
        for batch in part.batches():
            one = self.loss(model, batch, progress)
            loss += Mean(float(one.total), one.count)
        split = self.text.meta.splits[part.split]  # type: ignore[index]
        text = loss.count * split.bytes / split.tokens  # the bytes behind these tokens
        return {"loss": loss, "bits_per_byte": Mean(loss.total / math.log(2), text)}


class NextTokens:
    """A split's rows as (inputs, targets); targets behind the end of the text are `IGNORED`."""

    def __init__(self, rows: TokenRows, end: int) -> None:
        self.rows, self.end = rows, end

    def __len__(self) -> int:
        return len(self.rows)

    def batch_at(self, indices: Tensor, place: int) -> Batch:
        """The examples at `indices`; where in the data order does not matter."""
        rows = torch.from_numpy(self.rows.take(indices.numpy()))
        inputs, targets = rows[:, :-1], rows[:, 1:]
        return inputs.masked_fill(inputs == IGNORED, self.end), targets.contiguous()


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """The sum of the targets' cross-entropies, in float32 whatever the logits are."""
    return nn.functional.cross_entropy(
        logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum"
    )


def num_targets(targets: Tensor) -> int:
    """How many tokens there are to predict."""
    return int((targets != IGNORED).sum())
