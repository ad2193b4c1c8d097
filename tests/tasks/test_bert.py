"""The encoder against attention written by hand, and against what padding must not change."""

from __future__ import annotations

import math

import pytest
import torch
from own.gradients import gradients
from torch import nn
from torch.nn import functional as F

from distml.spec.language import BERTSpec
from distml.tasks.bert import BERT, Attention

VOCABULARY, POSITIONS = 61, 24
IGNORED = -100


def spec_of(**settings) -> BERTSpec:
    return BERTSpec(**({"name": "bert", "layers": 2, "heads": 4, "width": 32} | settings))


def build(**settings) -> BERT:
    torch.manual_seed(0)
    return BERT(spec_of(**settings), VOCABULARY, POSITIONS)


def loud(model: BERT) -> BERT:
    """The model in eval mode, with weights so large that attention is far from a mean."""
    torch.manual_seed(1)
    for parameter in model.parameters():
        nn.init.normal_(parameter, 0.0, 0.3)
    return model.eval()


def draw(batch: int = 2, length: int = POSITIONS, seed: int = 2) -> torch.Tensor:
    return torch.randint(VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).detach().abs().max())


# ------------------------------------------------------------------------------------------------------ shape and start
def test_parameters_of_bert_large_with_a_vocabulary_of_30_000():
    """24 layers of 16 heads, 1024 wide, 4096 within; 512 positions, 2 segments, a pooler, the output the embedding."""
    spec = spec_of(layers=24, heads=16, width=1024, hidden=4096, segments=2, pooler=True, head="tied")
    with torch.device("meta"):
        model = BERT(spec, 30_000, 512)
    counts = {name: sum(p.numel() for p in module.parameters()) for name, module in model.named_children()}
    layer = 4 * (1024 * 1024 + 1024) + 2 * 1024 * 4096 + 4096 + 1024 + 2 * 2 * 1024
    assert counts["tokens"] == counts["output"] == 30_000 * 1024
    assert counts["layers"] == 24 * layer
    assert counts["pooler"] == 1024 * 1024 + 1024
    assert counts["head"] == 0
    assert sum(parameter.numel() for parameter in model.parameters()) == 334_607_360


@pytest.mark.parametrize("head", ["transform", "tied"])
def test_the_loss_begins_at_the_logarithm_of_the_vocabulary(head):
    model = build(width=64, head=head)
    tokens, targets = draw(16), draw(16, seed=3)
    loss = F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())
    assert float(loss.detach()) == pytest.approx(math.log(VOCABULARY), rel=0.03)
    model.output.weight.data.mul_(20)  # the control
    loss = F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())
    assert float(loss.detach()) != pytest.approx(math.log(VOCABULARY), rel=0.03)


def test_the_output_layer_is_the_embedding_also_behind_a_transform():
    for head, extra in (("tied", 0), ("transform", 32 * 32 + 32 + 2 * 32 + VOCABULARY)):
        model = build(head=head)
        assert model.output.weight is model.tokens.weight
        trunk = sum(p.numel() for name, p in model.named_parameters() if not name.startswith(("head", "output")))
        assert sum(p.numel() for p in model.parameters()) == trunk + extra


def test_a_text_longer_than_the_positions_is_refused():
    with pytest.raises(ValueError, match="25 tokens are more than the model's 24 positions"):
        build()(draw(1, 25))


# ------------------------------------------------------------------------------------------------------------ attention
def by_hand(attention: Attention, x: torch.Tensor, seen: list[int]) -> torch.Tensor:
    """Self-attention to the places in `seen`, one softmax at a time: [B, T, D] -> [B, T, D]."""
    width = x.shape[2] // attention.heads
    mixed = torch.zeros(*x.shape)
    for b in range(x.shape[0]):
        rows = attention.qkv(x[b]).detach()
        for h in range(attention.heads):
            q, k, v = (part[:, h * width : (h + 1) * width] for part in rows.chunk(3, dim=1))
            for t in range(x.shape[1]):
                weights = torch.softmax(torch.stack([q[t] @ k[s] / math.sqrt(width) for s in seen]), 0)
                mixed[b, t, h * width : (h + 1) * width] = weights @ v[seen]
    return attention.output(mixed)


@pytest.mark.parametrize("padded", [False, True])
def test_attention_is_a_softmax_over_the_tokens_that_are_not_padding(padded):
    attention = loud(build()).layers[0].attention
    x = torch.randn(2, 7, 32)
    seen = [0, 1, 2, 5] if padded else list(range(7))
    mask = torch.tensor([place in seen for place in range(7)]).expand(2, 1, 1, 7) if padded else None
    torch.testing.assert_close(attention(x, mask), by_hand(attention, x, seen), rtol=1e-5, atol=1e-5)
    assert difference(attention(x, mask), by_hand(attention, x, seen[:-1])) > 0.01  # the control


def test_every_token_sees_every_other():
    model, tokens = loud(build()), draw(1)
    with torch.no_grad():
        before = model(tokens)
        for place in (0, POSITIONS - 1):
            changed = tokens.clone()
            changed[0, place] = (changed[0, place] + 1) % VOCABULARY
            assert all(difference(model(changed)[0, t], before[0, t]) > 1e-3 for t in range(POSITIONS))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_padding_changes_nothing(dtype):
    """Also in float16, where a constant such as -1e10 would be -inf, and NaN in a row of padding alone."""
    model, tokens = loud(build()).to(dtype), draw(3)
    attended = torch.arange(POSITIONS) < torch.tensor([[10], [POSITIONS], [0]])
    changed = torch.where(attended, tokens, (tokens + 1) % VOCABULARY)
    with torch.no_grad():
        logits, other = model(tokens, attended), model(changed, attended)
        assert torch.isfinite(logits).all()
        assert torch.equal(logits[0, :10], other[0, :10])
        assert torch.equal(logits[1], other[1])
        assert difference(model(tokens)[0, :10], model(changed)[0, :10]) > 0.01  # the control: without the mask
        if dtype == torch.float32:
            torch.testing.assert_close(logits[:1, :10], model(tokens[:1, :10]), rtol=1e-4, atol=1e-4)


def test_a_token_belongs_to_the_first_segment_unless_told_otherwise():
    model, tokens = loud(build()), draw()
    segments = torch.zeros_like(tokens)
    assert torch.equal(model(tokens, segments=segments), model(tokens))
    segments[:, 12:] = 1
    assert difference(model(tokens, segments=segments), model(tokens)) > 0.01


def test_the_pooler_sees_the_first_token():
    model, tokens = loud(build(pooler=True)), draw()
    features = model.encode(tokens)
    expected = torch.tanh(features[:, 0] @ model.pooler.weight.T + model.pooler.bias)
    torch.testing.assert_close(model.pool(features), expected)
    with pytest.raises(ValueError, match="no pooler"):
        build().pool(features)


# ------------------------------------------------------------------------------------------------------------- training
def test_it_overfits_one_batch():
    """A quarter of the tokens are hidden, and told from the others."""
    model, tokens = build(), draw(4, 12)
    hidden = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(4)) < 0.25
    inputs, labels = tokens.masked_fill(hidden, VOCABULARY - 1), tokens.masked_fill(~hidden, IGNORED)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(80):
        loss = F.cross_entropy(model(inputs).flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.1


def test_checkpointed_activations_give_the_same_gradients():
    passes = []
    plain, checkpointed = build(dropout=0.2), build(dropout=0.2, activation_checkpointing=True)
    checkpointed.layers[1].up.register_forward_hook(lambda *_: passes.append(1))
    for one, other in zip(gradients(plain, draw()), gradients(checkpointed, draw()), strict=True):
        assert torch.equal(one, other)
    assert len(passes) == 2  # computed, and computed again


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"activation_checkpointing": True}], ids=["plain", "checkpointed"])
def test_compiled_layers_compute_the_same(settings):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    plain, compiled = build(**settings), build(**settings, compile=True)
    with torch._dynamo.config.patch(error_on_recompile=True):  # one compilation serves all layers
        found = gradients(compiled, draw())
    for one, other in zip(gradients(plain, draw()), found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1
