"""Text from a decoder: token after token, each drawn from what the model expects behind those before it.

    tokens so far ── window ──▶ those that the model sees ──▶ its logits [V] ── Sampler ──▶ the next token

With a cache only the newest token goes through the model; without one all that it sees do, every time. Both see the
same, so that both give the same tokens. A text that outgrows the model's positions is seen through a window, which
moves on by half its length when it is full: so the cache is filled anew once in so many tokens, not at every one.

Shapes: S tokens that the model sees, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from distml.tasks.gpt import GPT, Cache
from distml.tasks.tokenizers import Tokenizer
from distml.tasks.transformer import uncompiled

INCOMPLETE = "\ufffd"  # what some bytes of a longer character decode to


class Sampler:
    """Draws a token from logits [V].

    Args:
        temperature: logits are divided by it; 0: the likeliest token.
        top_k: only the k likeliest tokens; None: all.
        allowed: only tokens below this: an embedding may have more rows than the tokeniser has tokens.
        seed: of the draws.
    """

    def __init__(self, temperature: float, top_k: int | None, allowed: int, seed: int) -> None:
        self.temperature, self.top_k, self.allowed = temperature, top_k, allowed
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, logits: Tensor) -> int:
        logits = logits[: self.allowed].double().cpu()
        if self.temperature == 0.0:
            return int(logits.argmax())
        likeliest, tokens = logits.topk(min(self.top_k or self.allowed, self.allowed))
        cumulative = (likeliest / self.temperature).softmax(0).cumsum(0)
        draw = torch.rand((), generator=self.generator, dtype=torch.float64)
        place = int(torch.searchsorted(cumulative, draw, right=True))
        return int(tokens[min(place, len(tokens) - 1)])  # a draw of almost 1 may lie above the rounded sum


def window_start(length: int, max_positions: int) -> int:
    """How many of `length` tokens the model does not see any more: the fewest multiple of half a window."""
    step = max(1, max_positions // 2)
    return max(0, -(-(length - max_positions) // step)) * step


def generate(model: GPT, prompt: Sequence[int], choose: Callable[[Tensor], int], cached: bool = True) -> Iterator[int]:
    """Tokens behind a prompt of at least one, without end; the model is in eval mode."""
    tokens = list(prompt)
    next_logits = CachedLogits(model) if cached else all_anew(model)
    while True:
        token = choose(next_logits(tokens))
        tokens.append(token)
        yield token


def all_anew(model: GPT) -> Callable[[list[int]], Tensor]:
    """From all tokens so far to the next one's logits [V], by one forward over all that the model sees."""

    @torch.inference_mode()
    def next_logits(tokens: list[int]) -> Tensor:
        seen = tokens[window_start(len(tokens), model.max_positions) :]
        with uncompiled(model.spec):
            logits: Tensor = model(torch.tensor([seen], device=model.tokens.weight.device))
        return logits[0, -1]

    return next_logits


class CachedLogits:
    """The same; of tokens whose keys and values are known already nothing is computed again."""

    def __init__(self, model: GPT) -> None:
        self.model = model
        self.start, self.cache = 0, Cache([])

    @torch.inference_mode()
    def __call__(self, tokens: list[int]) -> Tensor:
        start = window_start(len(tokens), self.model.max_positions)
        if not self.cache.layers or start != self.start:
            self.start, self.cache = start, self.model.cache()
        new = tokens[self.start + self.cache.length :]
        logits: Tensor = self.model(torch.tensor([new], device=self.model.tokens.weight.device), self.cache)
        return logits[0, -1]


class TextStream:
    """Tokens that come one by one, as text that can be shown at once.

    A token's text may depend on the one before it, and a character may take several tokens: it is shown when it is
    whole.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int]) -> None:
        self.tokenizer = tokenizer
        self._shown, self._waiting = list(prompt[-1:]), list[int]()

    def add(self, token: int) -> str:
        """What can be shown now."""
        self._waiting.append(token)
        text = self._text()
        return "" if text.endswith(INCOMPLETE) else self._show(text)

    def end(self) -> str:
        """What is left, characters that were never completed included."""
        return self._show(self._text())

    def _text(self) -> str:
        before = self.tokenizer.decode(self._shown)
        return self.tokenizer.decode(self._shown + self._waiting)[len(before) :]

    def _show(self, text: str) -> str:
        self._shown, self._waiting = self._waiting or self._shown, []
        return text
