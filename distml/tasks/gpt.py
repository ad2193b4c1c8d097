"""A decoder: each token is predicted from those before it (Radford et al. 2019), in GPT-2's shape, Llama's or between.

    tokens [B, T] -> embedding (+ positions) -> layers -> norm -> output -> logits [B, T, V]

    layer, norm before:   x + attention(norm(x)),   then x + mlp(norm(x))      a norm behind the last layer
    layer, norm after:    norm(x + attention(x)),   then norm(x + mlp(x))

With a `Cache` the same forward takes only the tokens that are new, and keeps their keys and values for the next call.

Shapes: B examples, T tokens of this call, S tokens so far (T and those in the cache), D width, H heads,
K heads of keys and values, C width of a head, F hidden width, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distml.spec.language import GPTSpec
from distml.tasks.transformer import STD, Embedding, Linear, Output, call_layer, compile_layers, hidden_width

Rotation = tuple[Tensor, Tensor]  # cosines and sines, float32 [T, C]


class GPT(nn.Module):
    """The decoder that a spec describes.

    Args:
        vocabulary: tokens, V.
        max_positions: the longest text.
    """

    def __init__(self, spec: GPTSpec, vocabulary: int, max_positions: int) -> None:
        super().__init__()
        self.spec, self.vocabulary, self.max_positions = spec, vocabulary, max_positions
        self.tokens = Embedding(vocabulary, spec.width)
        self.positions = Embedding(max_positions, spec.width) if spec.positions == "learned" else None
        self.dropout = nn.Dropout(spec.dropout)
        self.layers = nn.ModuleList(Layer(spec) for _ in range(spec.layers))
        self.norm = build_norm(spec) if spec.norm_place == "pre" else nn.Identity()
        self.output = Output(vocabulary, spec.width, self.tokens.weight if spec.tied else None)
        compile_layers(self.layers, spec)

    def forward(self, tokens: Tensor, cache: Cache | None = None) -> Tensor:
        """Logits [B, T, V] of the next token behind each of int64 tokens [B, T], which continue those in the cache.

        Raises:
            ValueError: the text is longer than `max_positions`.
        """
        before = 0 if cache is None else cache.length
        stop = before + tokens.shape[1]
        if stop > self.max_positions:
            raise ValueError(f"{stop} tokens are more than the model's {self.max_positions} positions")
        places = torch.arange(before, stop, device=tokens.device)
        features = self.tokens(tokens)
        rotation = None
        if self.positions is not None:
            features = features + self.positions(places)
        else:
            rotation = rotary_tables(places, self.spec.width // self.spec.heads, self.spec.rotary_base)
        features = self.dropout(features)
        for index, layer in enumerate(self.layers):
            if cache is None:
                features = call_layer(layer, self.spec.activation_checkpointing, features, rotation)
            else:  # past what is compiled: every length would be compiled anew
                features = layer.forward(features, rotation, cache.layers[index])
        logits: Tensor = self.output(self.norm(features))
        return logits

    def cache(self, batch: int = 1) -> Cache:
        """An empty cache for texts of up to `max_positions` tokens."""
        spec, weight = self.spec, self.tokens.weight
        shape = (batch, spec.kv_heads or spec.heads, self.max_positions, spec.width // spec.heads)
        return Cache([LayerCache(weight.new_empty(shape), weight.new_empty(shape)) for _ in range(spec.layers)])


class Layer(nn.Module):
    """Attention and MLP, each added to its input: [B, T, D] -> [B, T, D]."""

    def __init__(self, spec: GPTSpec) -> None:
        super().__init__()
        self.norm_first = spec.norm_place == "pre"
        self.attention_norm = build_norm(spec)
        self.attention = Attention(spec)
        self.mlp_norm = build_norm(spec)
        self.mlp = MLP(spec)

    def forward(self, x: Tensor, rotation: Rotation | None, cache: LayerCache | None = None) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        if self.norm_first:
            x = x + self.attention(self.attention_norm(x), rotation, cache)
            x = x + self.mlp(self.mlp_norm(x))
        else:
            x = self.attention_norm(x + self.attention(x, rotation, cache))
            x = self.mlp_norm(x + self.mlp(x))
        return x


class Attention(nn.Module):
    """Masked self-attention (Vaswani et al. 2017); K < H: heads share keys and values (Ainslie et al. 2023)."""

    def __init__(self, spec: GPTSpec) -> None:
        super().__init__()
        self.heads, self.kv_heads = spec.heads, spec.kv_heads or spec.heads
        self.head_width = spec.width // spec.heads
        self.dropout = spec.dropout
        inner = (self.heads + 2 * self.kv_heads) * self.head_width
        self.qkv = Linear(spec.width, inner, spec.bias)
        self.output = Linear(spec.width, spec.width, spec.bias, residual_std(spec))

    def forward(self, x: Tensor, rotation: Rotation | None, cache: LayerCache | None = None) -> Tensor:
        """[B, T, D] -> [B, T, D]; a token sees itself and those before it."""
        batch, length, width = x.shape
        heads = self.qkv(x).view(batch, length, self.heads + 2 * self.kv_heads, self.head_width)  # [B, T, H + 2 K, C]
        parts = heads.split((self.heads, self.kv_heads, self.kv_heads), dim=2)
        q, k, v = (part.transpose(1, 2) for part in parts)
        if rotation is not None:
            q, k = rotate(q, rotation), rotate(k, rotation)
        mask = None
        if cache is not None:
            k, v = cache.append(k, v)
            mask = causal_mask(length, k.shape[2], x.device)
        attended = F.scaled_dot_product_attention(
            q, k, v, mask, self.dropout if self.training else 0.0, is_causal=cache is None,
            enable_gqa=self.kv_heads < self.heads,
        )  # fmt: skip
        output: Tensor = self.output(attended.transpose(1, 2).reshape(batch, length, width))
        return F.dropout(output, self.dropout, self.training)


class MLP(nn.Module):
    """D -> F -> D; SwiGLU (Shazeer 2020) has a second D -> F, fused with the first: the gate's half comes first."""

    def __init__(self, spec: GPTSpec) -> None:
        super().__init__()
        self.activation, self.dropout = spec.activation, spec.dropout
        gated = spec.activation == "swiglu"
        hidden = hidden_width(spec.width, spec.hidden, gated)
        self.up = Linear(spec.width, 2 * hidden if gated else hidden, spec.bias)
        self.down = Linear(hidden, spec.width, spec.bias, residual_std(spec))

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        hidden = self.up(x)
        if self.activation == "swiglu":
            gate, value = hidden.chunk(2, dim=-1)
            hidden = F.silu(gate) * value
        else:
            hidden = F.gelu(hidden, approximate="tanh" if self.activation == "gelu_tanh" else "none")
        return F.dropout(self.down(hidden), self.dropout, self.training)


def build_norm(spec: GPTSpec) -> nn.Module:
    """LayerNorm or RMSNorm (Zhang and Sennrich 2019)."""
    if spec.norm == "rms_norm":
        return nn.RMSNorm(spec.width, spec.norm_eps)
    return nn.LayerNorm(spec.width, spec.norm_eps, bias=spec.bias)


def residual_std(spec: GPTSpec) -> float:
    """Of layers that add to the residual stream: 2 x layers such sums then leave its scale as it is."""
    return STD / math.sqrt(2 * spec.layers)


# ------------------------------------------------------------------------------------------------------------ positions
def rotary_tables(places: Tensor, head_width: int, base: float) -> Rotation:
    """Cosines and sines float32 [T, C] of rotary positions (Su et al. 2021) at int64 places [T].

    They are computed in every call: as buffers they would lose digits with a model that is cast to bfloat16. And by
    elementwise products, which autocast leaves in float32.
    """
    exponents = torch.arange(0, head_width, 2, device=places.device, dtype=torch.float32) / head_width
    angles = places.float()[:, None] * base**-exponents
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def rotate(heads: Tensor, rotation: Rotation) -> Tensor:
    """Turn each pair (element i, element i + C/2) of [B, H, T, C] by its position's angle, in float32."""
    cosines, sines = rotation
    first, second = heads.chunk(2, dim=-1)
    return (heads * cosines + torch.cat((-second, first), dim=-1) * sines).type_as(heads)


# ------------------------------------------------------------------------------------------------- cached keys, values
@dataclass
class LayerCache:
    """Keys and values [B, K, max_positions, C] of one layer, of which the first `length` places are filled."""

    keys: Tensor
    values: Tensor
    length: int = 0

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add those of the newest tokens [B, K, T, C]; all so far [B, K, S, C]."""
        before, self.length = self.length, self.length + keys.shape[2]
        self.keys[:, :, before : self.length] = keys
        self.values[:, :, before : self.length] = values
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]


@dataclass
class Cache:
    """What a decoder remembers of the tokens it has seen."""

    layers: list[LayerCache]

    @property
    def length(self) -> int:
        """Tokens so far."""
        return self.layers[0].length


def causal_mask(length: int, total: int, device: torch.device) -> Tensor | None:
    """Bool [T, S], True where one of the T newest tokens may look; None: one token, which may look everywhere."""
    if length == 1:
        return None
    return torch.ones(length, total, dtype=torch.bool, device=device).tril(total - length)
