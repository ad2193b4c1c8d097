"""`task: masked_language_model`: some tokens from those around them, by an encoder (Devlin et al. 2019).

    TokenRows ──▶ some tokens are chosen: 80 % are masked, 10 % drawn anew, 10 % left ──▶ logits ──▶ cross-entropy

What is drawn for an example follows from the seed, from its place in the order of training and from the token's place
in it alone: not from the number of workers, not from what was drawn before. So a resumed run draws the same, and ranks
have different numbers of chosen tokens: sum and count travel together. Held-out examples are always masked alike.

Shapes: B examples, T tokens of an example, V vocabulary; tokens and labels [B, T] int64, logits [B, T, V].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from distml.spec.language import MaskedLanguageModelSpec
from distml.tasks.base import Loss, Mean, Part, Progress
from distml.tasks.bert import BERT
from distml.tasks.corpus import SPLITS
from distml.tasks.data import mix
from distml.tasks.language_model import Batch, TextTask, cross_entropy, num_targets
from distml.tasks.text import IGNORED, TokenRows

MASKED, REDRAWN = 0.8, 0.1  # shares of the chosen tokens; the others stay as they are
Array = NDArray[Any]


class MaskedLanguageModel(TextTask[MaskedLanguageModelSpec]):
    """Prediction of chosen tokens, most of which are masked."""

    def build_model(self) -> BERT:
        return BERT(self.spec.model, self.vocabulary, self.max_positions)

    def data(self, split: str) -> MaskedTokens:
        meta = self.text.meta
        rows = TokenRows(self.text.tokens(split), self.spec.block, 0, meta.vocabulary)
        mask = self.text.tokenizer.mask
        assert mask is not None  # made so, or refused
        return MaskedTokens(rows, Masking(self.spec.mask, mask, meta.end, meta.vocabulary),
                            mix(self.seed, SPLITS.index(split)))  # fmt: skip

    def loss(self, model: nn.Module, batch: Batch, progress: Progress) -> Loss:
        tokens, labels = batch
        return Loss(cross_entropy(model(tokens), labels), num_targets(labels))

    def evaluate(self, model: nn.Module, part: Part, progress: Progress) -> dict[str, Mean]:
        loss, correct = 0.0, 0.0
        chosen = 0
        for tokens, labels in part.batches():
            logits = model(tokens)
            loss += float(cross_entropy(logits, labels))
            correct += float((logits.argmax(-1) == labels).sum())
            chosen += num_targets(labels)
        return {"loss": Mean(loss, chosen), "accuracy": Mean(correct, chosen)}


class MaskedTokens:
    """A split's rows as (tokens, labels): `IGNORED` where a token is not chosen."""

    def __init__(self, rows: TokenRows, masking: Masking, seed: int) -> None:
        self.rows, self.masking, self.seed = rows, masking, seed

    def __len__(self) -> int:
        return len(self.rows)

    def batch_at(self, indices: Tensor, place: int) -> Batch:
        """The examples at `indices`, which have the places from `place` on in the data order."""
        rows = self.rows.take(indices.numpy())
        tokens, labels = self.masking(rows, np.arange(place, place + len(rows)), self.seed)
        return torch.from_numpy(tokens), torch.from_numpy(labels)


class Masking:
    """Which tokens are chosen, and what stands in their place.

    Args:
        share: of the tokens that are chosen.
        mask: the token that stands for a masked one.
        end: the token that ends a document; like what is behind the text it is never chosen.
        vocabulary: tokens to draw from, mask and end aside.
    """

    def __init__(self, share: float, mask: int, end: int, vocabulary: int) -> None:
        self.share, self.mask, self.end, self.vocabulary = share, mask, end, vocabulary

    def __call__(self, rows: Array, places: Array, seed: int) -> tuple[Array, Array]:
        """(tokens, labels), both int64 [B, T].

        Args:
            rows: int64 [B, T].
            places: of the examples in the data order [B].
        """
        chance, kind, other = uniforms(seed, places, rows.shape[1], 3)
        chosen = (chance < self.share) & (rows != self.end) & (rows != IGNORED)
        tokens = np.where(rows == IGNORED, self.end, rows)
        tokens = np.where(chosen & (kind < MASKED), self.mask, tokens)
        redrawn = chosen & (kind >= MASKED) & (kind < MASKED + REDRAWN)
        return np.where(redrawn, self._ordinary(other), tokens), np.where(chosen, rows, IGNORED)

    def _ordinary(self, uniform: Array) -> Array:
        """Tokens that are neither mask nor end, from numbers in [0, 1)."""
        drawn = (uniform * (self.vocabulary - 2)).astype(np.int64)
        for special in sorted((self.mask, self.end)):
            drawn += drawn >= special
        return drawn


def uniforms(seed: int, places: Array, columns: int, count: int) -> Sequence[Array]:
    """`count` arrays [B, T] of independent numbers in [0, 1): each a hash of seed, its place, column and array.

    The hash is splitmix64's; a generator per example would take a hundred times as long.
    """
    with np.errstate(over="ignore"):
        rows = _splitmix(places.astype(np.uint64) + np.uint64(seed))
        counters = np.arange(count * columns, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        hashed = _splitmix(rows[:, None] + counters)
    numbers = (hashed >> np.uint64(11)) * 2.0**-53
    return [numbers[:, index * columns : (index + 1) * columns] for index in range(count)]


def _splitmix(state: Array) -> Array:
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: Array = state ^ (state >> np.uint64(31))
    return mixed
