"""An encoder: each token is predicted from all others (Devlin et al. 2019).

    tokens [B, T] -> embeddings (token + position + segment) -> norm -> layers -> head -> output -> logits [B, T, V]

    layer:   norm(x + attention(x)),   then norm(x + mlp(x))

Shapes: B examples, T tokens, D width, H heads, C width of a head, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distml.spec.language import BERTSpec
from distml.tasks.transformer import Embedding, Linear, Output, call_layer, compile_layers, hidden_width


class BERT(nn.Module):
    """The encoder that a spec describes.

    Args:
        vocabulary: tokens, V.
        max_positions: the longest text.
    """

    def __init__(self, spec: BERTSpec, vocabulary: int, max_positions: int) -> None:
        super().__init__()
        self.spec, self.vocabulary, self.max_positions = spec, vocabulary, max_positions
        self.tokens = Embedding(vocabulary, spec.width)
        self.positions = Embedding(max_positions, spec.width)
        self.segments = Embedding(spec.segments, spec.width)
        self.norm = nn.LayerNorm(spec.width, spec.norm_eps)
        self.dropout = nn.Dropout(spec.dropout)
        self.layers = nn.ModuleList(Layer(spec) for _ in range(spec.layers))
        self.pooler = Linear(spec.width, spec.width) if spec.pooler else None
        transforms = spec.head == "transform"
        self.head = Head(spec) if transforms else nn.Identity()
        self.output = Output(vocabulary, spec.width, self.tokens.weight, bias=transforms)
        compile_layers(self.layers, spec)

    def forward(self, tokens: Tensor, attended: Tensor | None = None, segments: Tensor | None = None) -> Tensor:
        """Logits [B, T, V] of the tokens that belong at the places of int64 tokens [B, T]; see `encode`."""
        logits: Tensor = self.output(self.head(self.encode(tokens, attended, segments)))
        return logits

    def encode(self, tokens: Tensor, attended: Tensor | None = None, segments: Tensor | None = None) -> Tensor:
        """Features [B, T, D].

        Args:
            attended: bool [B, T], False for padding, at which nobody looks; None: there is none.
            segments: int64 [B, T], which segment a token belongs to; None: all to the first.

        Raises:
            ValueError: the text is longer than `max_positions`.
        """
        length = tokens.shape[1]
        if length > self.max_positions:
            raise ValueError(f"{length} tokens are more than the model's {self.max_positions} positions")
        places = torch.arange(length, device=tokens.device)
        segments = torch.zeros_like(places) if segments is None else segments
        features: Tensor = self.tokens(tokens) + self.positions(places) + self.segments(segments)
        features = self.dropout(self.norm(features))
        mask = None if attended is None else attended[:, None, None, :]
        for layer in self.layers:
            features = call_layer(layer, self.spec.activation_checkpointing, features, mask)
        return features

    def pool(self, features: Tensor) -> Tensor:
        """The first token's features [B, D], through the pooler."""
        if self.pooler is None:
            raise ValueError("this model has no pooler (model.pooler: true)")
        return torch.tanh(self.pooler(features[:, 0]))


class Layer(nn.Module):
    """Attention and MLP, each added to its input and normalised: [B, T, D] -> [B, T, D]."""

    def __init__(self, spec: BERTSpec) -> None:
        super().__init__()
        hidden = hidden_width(spec.width, spec.hidden, gated=False)
        self.attention = Attention(spec)
        self.attention_norm = nn.LayerNorm(spec.width, spec.norm_eps)
        self.up, self.down = Linear(spec.width, hidden), Linear(hidden, spec.width)
        self.mlp_norm = nn.LayerNorm(spec.width, spec.norm_eps)
        self.dropout = nn.Dropout(spec.dropout)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        x = self.attention_norm(x + self.dropout(self.attention(x, mask)))
        normalised: Tensor = self.mlp_norm(x + self.dropout(self.down(F.gelu(self.up(x)))))
        return normalised


class Attention(nn.Module):
    """Self-attention (Vaswani et al. 2017)."""

    def __init__(self, spec: BERTSpec) -> None:
        super().__init__()
        self.heads, self.dropout = spec.heads, spec.dropout
        self.qkv, self.output = Linear(spec.width, 3 * spec.width), Linear(spec.width, spec.width)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """[B, T, D] -> [B, T, D]; every token sees those that the mask, bool [B, 1, 1, T], allows."""
        batch, length, width = x.shape
        heads = self.qkv(x).view(batch, length, 3 * self.heads, width // self.heads)  # [B, T, 3 H, C]
        q, k, v = (part.transpose(1, 2) for part in heads.chunk(3, dim=2))
        attended = F.scaled_dot_product_attention(q, k, v, mask, self.dropout if self.training else 0.0)
        output: Tensor = self.output(attended.transpose(1, 2).reshape(batch, length, width))
        return output


class Head(nn.Module):
    """What stands before the output layer: [B, T, D] -> [B, T, D]."""

    def __init__(self, spec: BERTSpec) -> None:
        super().__init__()
        self.dense = Linear(spec.width, spec.width)
        self.norm = nn.LayerNorm(spec.width, spec.norm_eps)

    def forward(self, features: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        normalised: Tensor = self.norm(F.gelu(self.dense(features)))
        return normalised
