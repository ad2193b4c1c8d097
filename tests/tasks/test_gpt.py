"""The decoder against attention written by hand, against itself with a cache, and against what it must not see."""

from __future__ import annotations

import math

import pytest
import torch
from own.gradients import gradients
from torch import nn
from torch.nn import functional as F

from distml.spec.language import GPTSpec
from distml.tasks import gpt
from distml.tasks.gpt import GPT, Attention, LayerCache, rotary_tables, rotate

VOCABULARY, POSITIONS = 61, 24
LLAMA = {"positions": "rotary", "norm": "rms_norm", "activation": "swiglu", "bias": False, "tied": False}
VARIANTS = {
    "gpt2": {},
    "gelu_untied": {"activation": "gelu", "tied": False},
    "post": {"norm_place": "post"},
    "no_bias": {"bias": False, "hidden": 40},
    "llama": LLAMA | {"kv_heads": 2},
    "rotary_post": {"positions": "rotary", "norm": "rms_norm", "norm_place": "post", "kv_heads": 1},
}
every_variant = pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS.keys())


def spec_of(**settings) -> GPTSpec:
    return GPTSpec(**({"name": "gpt", "layers": 2, "heads": 4, "width": 32} | settings))


def build(seed: int = 0, longest: int = POSITIONS, **settings) -> GPT:
    torch.manual_seed(seed)
    return GPT(spec_of(**settings), VOCABULARY, longest)


def loud(model: GPT) -> GPT:
    """The model in eval mode, with weights so large that attention is far from a mean."""
    torch.manual_seed(1)
    for parameter in model.parameters():
        nn.init.normal_(parameter, 0.0, 0.3)
    return model.eval()


def draw(batch: int = 2, length: int = POSITIONS) -> torch.Tensor:
    return torch.randint(VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(2))


def count(spec: GPTSpec, vocabulary: int, positions: int) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in GPT(spec, vocabulary, positions).parameters())


# ------------------------------------------------------------------------------------------------------ shape and start
@pytest.mark.parametrize(
    ("settings", "vocabulary", "positions", "expected"),
    [
        ({"layers": 12, "heads": 12, "width": 768}, 50_257, 1024, 124_439_808),
        ({"layers": 96, "heads": 96, "width": 12_288}, 50_257, 2048, 174_604_259_328),
        (LLAMA | {"layers": 32, "heads": 32, "kv_heads": 8, "width": 4096, "hidden": 14_336, "rotary_base": 5e5},
         128_256, 8192, 8_030_261_248),
    ],
    ids=["gpt2_small", "gpt3", "llama3_8b"],
)  # fmt: skip
def test_parameters_are_as_many_as_published(settings, vocabulary, positions, expected):
    assert count(spec_of(**settings), vocabulary, positions) == expected


def test_hidden_width_of_swiglu_is_eight_thirds_up_to_a_multiple_of_64():
    assert build(width=48, activation="swiglu").layers[0].mlp.down.in_features == 128
    assert build(width=384, activation="swiglu").layers[0].mlp.down.in_features == 1024
    assert build(width=48).layers[0].mlp.down.in_features == 192


@every_variant
def test_the_loss_begins_at_the_logarithm_of_the_vocabulary(settings):
    model = build(width=64, **settings)
    tokens, targets = draw(16), draw(17)[1:]
    loss = F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())
    assert float(loss.detach()) == pytest.approx(math.log(VOCABULARY), rel=0.03)
    model.output.weight.data.mul_(20)  # the control
    loss = F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())
    assert float(loss.detach()) != pytest.approx(math.log(VOCABULARY), rel=0.03)


@every_variant
def test_weights_follow_from_the_seed_and_are_drawn_within_the_module_that_owns_them(settings, monkeypatch):
    """As ZeRO-3 needs it: what a module's parameters are when its constructor returns, they stay."""
    drawn: dict[int, torch.Tensor] = {}
    plain = build(**settings)
    kinds = {type(module) for module in plain.modules() if list(module.parameters(recurse=False))}
    assert len(kinds) >= 3
    for kind in kinds:

        def remember(self, *args, _kind=kind, _init=kind.__init__, **kwargs):
            _init(self, *args, **kwargs)
            if type(self) is _kind:
                drawn.update({id(p): p.detach().clone() for p in self.parameters(recurse=False) if id(p) not in drawn})

        monkeypatch.setattr(kind, "__init__", remember)
    model = build(**settings)
    assert len(list(model.parameters())) == len(drawn)
    for (name, parameter), other in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(parameter, drawn[id(parameter)]), name
        assert torch.equal(parameter, other), name
    assert not torch.equal(build(seed=1, **settings).tokens.weight, plain.tokens.weight)


def test_layers_that_add_to_the_residual_stream_begin_smaller():
    layer = build(layers=8, width=256).layers[3]
    assert float(layer.attention.qkv.weight.detach().std()) == pytest.approx(0.02, rel=0.02)
    for residual in (layer.attention.output, layer.mlp.down):
        assert float(residual.weight.detach().std()) == pytest.approx(0.02 / math.sqrt(16), rel=0.02)


def test_a_text_longer_than_the_positions_is_refused():
    with pytest.raises(ValueError, match="25 tokens are more than the model's 24 positions"):
        build()(draw(1, 25))


# ------------------------------------------------------------------------------------------------------------ attention
def by_hand(attention: Attention, x: torch.Tensor, causal: bool = True) -> torch.Tensor:
    """Masked self-attention, one softmax at a time: [B, T, D] -> [B, T, D]."""
    heads, width = attention.heads, attention.head_width
    shared = heads // attention.kv_heads
    mixed = torch.zeros(*x.shape)
    for b in range(x.shape[0]):
        rows = attention.qkv(x[b]).detach()
        for h in range(heads):
            q = rows[:, h * width : (h + 1) * width]
            k = rows[:, (heads + h // shared) * width :][:, :width]
            v = rows[:, (heads + attention.kv_heads + h // shared) * width :][:, :width]
            for t in range(x.shape[1]):
                seen = t + 1 if causal else x.shape[1]
                weights = torch.softmax(torch.stack([q[t] @ k[s] / math.sqrt(width) for s in range(seen)]), 0)
                mixed[b, t, h * width : (h + 1) * width] = weights @ v[:seen]
    return attention.output(mixed)


def test_norms_stand_before_the_sublayers_or_after_their_sums():
    x = torch.randn(2, 5, 32)
    for place in ("pre", "post"):
        model = loud(build(norm_place=place))
        layer = model.layers[0]
        attend, first, second = (lambda y, a=layer.attention: a(y, None)), layer.attention_norm, layer.mlp_norm
        if place == "pre":
            middle = x + attend(first(x))
            expected = middle + layer.mlp(second(middle))
        else:
            middle = first(x + attend(x))
            expected = second(middle + layer.mlp(middle))
        torch.testing.assert_close(layer(x, None), expected)
        assert isinstance(model.norm, nn.LayerNorm) == (place == "pre")


@pytest.mark.parametrize("kv_heads", [None, 2, 1])
def test_attention_is_a_softmax_over_the_tokens_before(kv_heads):
    attention = loud(build(kv_heads=kv_heads)).layers[0].attention
    x = torch.randn(2, 7, 32)
    expected = by_hand(attention, x)
    torch.testing.assert_close(attention(x, None), expected, rtol=1e-5, atol=1e-5)
    assert float((by_hand(attention, x, causal=False) - expected).detach().abs().max()) > 0.01  # the control


def test_grouped_queries_are_heads_whose_keys_and_values_repeat():
    grouped, full = loud(build(kv_heads=2)), build().eval()
    state = grouped.state_dict()
    for name in [name for name in state if "qkv" in name]:
        queries, *shared = state[name].split([32, 16, 16])  # rows: 4 heads of queries, 2 of keys, 2 of values
        repeated = [part.unflatten(0, (2, 8)).repeat_interleave(2, 0).flatten(0, 1) for part in shared]
        state[name] = torch.cat([queries, *repeated])
    full.load_state_dict(state)
    tokens = draw()
    torch.testing.assert_close(grouped(tokens), full(tokens), rtol=1e-5, atol=1e-5)


def leak(model: GPT, tokens: torch.Tensor) -> float:
    """By how much a changed token changes the logits before it."""
    with torch.no_grad():
        before = model(tokens)
        worst = 0.0
        for place in range(1, tokens.shape[1]):
            changed = tokens.clone()
            changed[:, place:] = (changed[:, place:] + 1) % VOCABULARY
            after = model(changed)
            assert not torch.equal(after[:, place], before[:, place])
            worst = max(worst, float((after - before)[:, :place].abs().max()))
    return worst


@every_variant
def test_a_later_token_never_changes_an_earlier_logit(settings, monkeypatch):
    model, tokens = loud(build(**settings)), draw()
    assert leak(model, tokens) == 0.0
    attend = F.scaled_dot_product_attention
    monkeypatch.setattr(
        gpt.F, "scaled_dot_product_attention", lambda *args, is_causal, **kwargs: attend(*args, **kwargs)
    )
    assert leak(model, tokens) > 0.01  # the control: without the mask


# -------------------------------------------------------------------------------------------------------------- rotary
def test_rotary_positions_turn_pairs_as_complex_numbers_are_turned():
    places, width, base = torch.tensor([0, 1, 5, 1000]), 8, 10_000.0
    heads = torch.randn(2, 3, 4, width)
    turned = rotate(heads, rotary_tables(places, width, base))
    for pair in range(width // 2):
        angles = places.double() * base ** (-2 * pair / width)
        numbers = torch.complex(heads[..., pair].double(), heads[..., pair + width // 2].double())
        expected = numbers * torch.polar(torch.ones(4, dtype=torch.float64), angles)
        found = torch.complex(turned[..., pair].double(), turned[..., pair + width // 2].double())
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_rotary_scores_depend_on_the_distance_alone():
    q, k = torch.randn(1, 1, 1, 16), torch.randn(1, 1, 1, 16)

    def score(query_place: int, key_place: int) -> float:
        turned = [rotate(x, rotary_tables(torch.tensor([place]), 16, 100.0))
                  for x, place in ((q, query_place), (k, key_place))]  # fmt: skip
        return float((turned[0] * turned[1]).sum())

    assert score(9, 2) == pytest.approx(score(7, 0), abs=1e-4)
    assert score(9, 2) == pytest.approx(score(107, 100), abs=1e-4)
    assert abs(score(9, 3) - score(9, 2)) > 1e-2  # the control


def test_rotary_tables_stay_exact_in_a_model_of_low_precision():
    """In bfloat16 places 4096 and 4097 are one; no cast of the model and no autocast may reach the tables."""
    model = build(**LLAMA).bfloat16()
    assert not list(model.buffers())
    places = torch.tensor([4096, 4097])
    plain = rotary_tables(places, 16, 10_000.0)
    with torch.autocast("cpu", torch.bfloat16):
        cast = rotary_tables(places, 16, 10_000.0)
    assert all(one.dtype == torch.float32 and torch.equal(one, other) for one, other in zip(cast, plain, strict=True))
    assert not torch.equal(plain[0][0], plain[0][1])
    assert torch.equal(*places.bfloat16())  # the control
    assert rotate(torch.randn(1, 1, 2, 16, dtype=torch.bfloat16), plain).dtype == torch.bfloat16


# ------------------------------------------------------------------------------------------------------------ the cache
@every_variant
@pytest.mark.parametrize("cuts", [(24,), (1,) * 24, (5, 4, 1, 1, 13)], ids=["at_once", "one_by_one", "mixed"])
def test_logits_with_a_cache_are_those_without(settings, cuts, monkeypatch):
    model, tokens = loud(build(**settings)), draw()

    def cached() -> torch.Tensor:
        cache = model.cache(2)
        parts = [model(part, cache) for part in tokens.split(cuts, dim=1)]
        assert cache.length == POSITIONS
        return torch.cat(parts, 1)

    with torch.no_grad():
        torch.testing.assert_close(cached(), model(tokens), rtol=1e-4, atol=1e-4)
        if len(cuts) > 1:  # the control: a cache that forgets
            monkeypatch.setattr(LayerCache, "append", forgetful)
            assert float((cached() - model(tokens)).abs().max()) > 0.01


def forgetful(cache: LayerCache, keys: torch.Tensor, values: torch.Tensor):
    cache.length += keys.shape[2]
    return keys, values


def test_the_cache_has_room_for_the_keys_and_values_of_each_layer_alone():
    cache = build(kv_heads=2, layers=3).bfloat16().cache(5)
    assert [tuple(layer.keys.shape) for layer in cache.layers] == [(5, 2, POSITIONS, 8)] * 3
    assert cache.layers[0].values.dtype == torch.bfloat16
    assert cache.length == 0


# ------------------------------------------------------------------------------------------------------------- training
@pytest.mark.parametrize(
    "settings", [VARIANTS["gpt2"], VARIANTS["llama"], VARIANTS["post"]], ids=["gpt2", "llama", "post"]
)
def test_it_overfits_one_batch(settings):
    model = build(**settings)
    tokens = draw(4, 12)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(80):
        loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.1


@pytest.mark.parametrize("settings", [{"dropout": 0.2}, VARIANTS["llama"]], ids=["dropout", "llama"])
def test_checkpointed_activations_give_the_same_gradients(settings):
    passes = []
    plain, checkpointed = build(**settings), build(**settings, activation_checkpointing=True)
    checkpointed.layers[1].mlp.up.register_forward_hook(lambda *_: passes.append(1))
    for one, other in zip(gradients(plain, draw()), gradients(checkpointed, draw()), strict=True):
        assert torch.equal(one, other)
    assert len(passes) == 2  # computed, and computed again


def test_dropout_acts_in_training_alone():
    model, tokens = build(dropout=0.5), draw()
    assert not torch.equal(model(tokens), model(tokens))
    model.eval()
    assert torch.equal(model(tokens), model(tokens))
    for place in (model.dropout, *(part for layer in model.layers for part in (layer.attention, layer.mlp))):
        model.eval()
        place.train()
        assert not torch.equal(model(tokens), model(tokens))


def test_dropout_drops_what_is_added_to_the_residual_stream_and_what_is_attended_to(monkeypatch):
    layer, x = loud(build(dropout=0.25)).layers[0].train(), torch.randn(4, POSITIONS, 32)
    for output in (layer.attention(x, None), layer.mlp(x)):
        assert float((output == 0.0).float().mean()) == pytest.approx(0.25, abs=0.05)
    monkeypatch.setattr(gpt.F, "dropout", lambda x, *_: x)
    assert torch.equal(layer.mlp(x), layer.mlp(x))
    assert not torch.equal(layer.attention(x, None), layer.attention(x, None))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("settings", [{}, VARIANTS["llama"]], ids=["gpt2", "llama"])
def test_masks_hold_in_low_precision(settings, dtype):
    """A constant such as -1e10 would be -inf in float16, and NaN where it meets another."""
    model = loud(build(**settings)).to(dtype)
    tokens = draw(2, 9)
    with torch.no_grad():
        cache = model.cache(2)
        cached = torch.cat([model(part, cache) for part in tokens.split((3, 3, 3), dim=1)], 1)
        assert torch.isfinite(cached).all()
        assert torch.isfinite(model(tokens)).all()
    assert leak(model, tokens) == 0.0


def test_it_trains_under_autocast():
    model, tokens = build(**VARIANTS["llama"]), draw()
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(tokens)
    loss = F.cross_entropy(logits.float().flatten(0, 1), tokens.flatten())
    loss.backward()
    assert logits.dtype == torch.bfloat16
    assert all(torch.isfinite(p.grad).all() and p.grad.dtype == torch.float32 for p in model.parameters())


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [{}, VARIANTS["llama"], {"activation_checkpointing": True}, VARIANTS["post"] | {"activation_checkpointing": True}],
    ids=["gpt2", "llama", "checkpointed", "post_checkpointed"],
)
def test_compiled_layers_compute_the_same(settings):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    plain, compiled = build(**settings), build(**settings, compile=True)
    assert plain.state_dict().keys() == compiled.state_dict().keys()
    with torch._dynamo.config.patch(error_on_recompile=True):  # one compilation serves all layers
        found = gradients(compiled, draw())
    for one, other in zip(gradients(plain, draw()), found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1
