"""Text from a decoder: cached and uncached alike, beyond its positions too; draws; characters of several tokens."""

from __future__ import annotations

import functools
from itertools import islice

import pytest
import torch
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, pre_tokenizers
from torch import nn

from distml.spec.language import GPTSpec
from distml.tasks.generation import Sampler, TextStream, generate, window_start
from distml.tasks.gpt import GPT, LayerCache
from distml.tasks.tokenizers import END, ByteTokenizer, CharacterTokenizer, LibraryTokenizer, learn_bpe

VOCABULARY, POSITIONS = 61, 10
VARIANTS = {
    "gpt2": {},
    "llama": {"positions": "rotary", "norm": "rms_norm", "activation": "swiglu", "bias": False, "kv_heads": 2},
    "post": {"norm_place": "post", "tied": False},
}


@functools.cache
def trained(variant: str) -> GPT:
    """A model that knows a text of few different tokens by heart: what follows depends on several before it."""
    torch.manual_seed(0)
    spec = GPTSpec(name="gpt", layers=2, heads=4, width=32, **VARIANTS[variant])
    model = GPT(spec, VOCABULARY, POSITIONS)
    text = torch.randint(4, (16,), generator=torch.Generator().manual_seed(1)).repeat(2)
    rows = text.unfold(0, POSITIONS + 1, 1)[:16]
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(600):
        loss = nn.functional.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
        if float(loss.detach()) < 0.35:  # of a row's first tokens nothing can be known
            return model.eval()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    raise AssertionError(f"{variant} does not learn {text[:16].tolist()}")


def written(model: GPT, temperature: float, cached: bool, prompt: list[int], count: int = 40) -> list[int]:
    sampler = Sampler(temperature, top_k=None, allowed=VOCABULARY, seed=5)
    return list(islice(generate(model, prompt, sampler, cached), count))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("temperature", [0.0, 2.0], ids=["greedy", "sampled"])
@pytest.mark.parametrize(
    "prompt", [[3], [1, 2, 3], [0, 1, 2, 3, 1] * 7], ids=["one", "three", "longer_than_the_positions"]
)
def test_a_cache_changes_no_token(variant, temperature, prompt, monkeypatch):
    model = trained(variant)
    expected = written(model, temperature, False, prompt)
    assert len(set(expected)) > 2
    assert written(model, temperature, True, prompt) == expected
    monkeypatch.setattr(LayerCache, "append", forgetful)  # the control
    assert written(model, temperature, True, prompt) != expected


def forgetful(cache: LayerCache, keys: torch.Tensor, values: torch.Tensor):
    cache.length += keys.shape[2]
    return keys, values


def test_a_cache_lets_each_token_through_the_model_once():
    seen: dict[bool, list[int]] = {True: [], False: []}
    for cached, lengths in seen.items():
        model = trained("gpt2")
        hook = model.tokens.register_forward_hook(lambda _, inputs, __, seen=lengths: seen.append(inputs[0].shape[1]))
        written(model, 0.0, cached, [1, 2, 3], count=12)
        hook.remove()
    assert seen[False] == [3, 4, 5, 6, 7, 8, 9, 10, 6, 7, 8, 9]
    assert seen[True] == [3, 1, 1, 1, 1, 1, 1, 1, 6, 1, 1, 1]


@pytest.mark.slow  # the compiler takes seconds to import
def test_nothing_is_compiled_for_a_text():
    torch.manual_seed(0)
    model = GPT(GPTSpec(name="gpt", layers=1, heads=4, width=32, compile=True), VOCABULARY, POSITIONS).eval()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    assert written(model, 1.0, False, [1], count=4) == written(model, 1.0, True, [1], count=4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 0
    model(torch.tensor([[1, 2]]))  # the control
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("positions", [1, 2, 3, 8, 9])
def test_the_window_moves_by_half_its_length_when_it_is_full(positions):
    start = 0
    for length in range(1, 50):
        while length - start > positions:
            start += max(1, positions // 2)
        assert window_start(length, positions) == start


# ---------------------------------------------------------------------------------------------------------------- draws
def frequencies(sampler: Sampler, logits: torch.Tensor, draws: int = 4000) -> torch.Tensor:
    return torch.bincount(torch.tensor([sampler(logits) for _ in range(draws)]), minlength=len(logits)) / draws


def test_tokens_are_drawn_as_often_as_the_model_expects_them():
    logits = torch.tensor([0.0, 2.0, -1.0, 1.0, 3.0])
    for temperature in (1.0, 0.5, 3.0):
        found = frequencies(Sampler(temperature, None, 5, seed=1), logits)
        assert float((found - (logits / temperature).softmax(0)).abs().max()) < 0.03  # four standard errors
    sharp = frequencies(Sampler(0.5, None, 5, seed=1), logits)
    assert float((sharp - logits.softmax(0)).abs().max()) > 0.1  # the control: another temperature


def test_only_the_likeliest_tokens_that_exist_are_drawn():
    logits = torch.tensor([0.0, 2.0, -1.0, 1.0, 9.0])
    assert frequencies(Sampler(5.0, 2, 4, seed=1), logits).nonzero().flatten().tolist() == [1, 3]
    assert frequencies(Sampler(5.0, 50, 4, seed=1), logits).nonzero().flatten().tolist() == [0, 1, 2, 3]
    assert Sampler(0.0, None, 4, seed=1)(logits) == 1
    assert Sampler(0.0, None, 5, seed=1)(logits) == 4


def test_draws_follow_from_the_seed():
    logits = torch.zeros(50)
    first, same, other = (Sampler(1.0, None, 50, seed) for seed in (1, 1, 2))
    tokens = [first(logits) for _ in range(20)]
    assert tokens == [same(logits) for _ in range(20)]
    assert tokens != [other(logits) for _ in range(20)]


# ----------------------------------------------------------------------------------------------------- text as it comes
def streamed(tokenizer, prompt: list[int], tokens: list[int]) -> list[str]:
    stream = TextStream(tokenizer, prompt)
    return [*(stream.add(token) for token in tokens), stream.end()]


TEXT = "naïve “cats”, 猫 and 🐈\n\tend "


@pytest.mark.parametrize(
    "tokenizer",
    [ByteTokenizer(), CharacterTokenizer(TEXT), learn_bpe([TEXT * 3], 270, mask=False)],
    ids=["bytes", "characters", "bpe"],
)
def test_streamed_text_is_the_decoded_text_in_whole_characters(tokenizer):
    tokens = tokenizer.encode(TEXT)
    pieces = streamed(tokenizer, tokenizer.encode("a cat"), tokens)
    assert "".join(pieces) == TEXT
    assert "\ufffd" not in "".join(pieces)
    assert sum(map(bool, pieces)) > 15  # as it comes


def test_a_token_whose_text_depends_on_the_one_before_is_shown_as_behind_it():
    """Such a decoder leaves out a text's first space."""
    library = Library(models.WordLevel({END: 0, "\u2581a": 1, "\u2581cat": 2}, unk_token=END))
    library.pre_tokenizer, library.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer = LibraryTokenizer(library)
    assert tokenizer.decode([1, 2, 1]) == "a cat a"
    assert streamed(tokenizer, [1], [2, 1]) == [" cat", " a", ""]


def test_a_character_that_is_never_completed_is_shown_at_the_end():
    assert streamed(ByteTokenizer(), [65], [66, 0xF0, 0x9F]) == ["B", "", "", "\ufffd"]
