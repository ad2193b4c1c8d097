"""What encoder and decoder share: layers that draw their own weights, the output layer, and how a layer is called.

Every parameter is drawn inside the module that owns it, when it is built: under ZeRO-3 a module's parameters are split
among the ranks as soon as its constructor returns, so that no later pass could draw them.

Shapes: B examples, T tokens, D width, V vocabulary.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from distml.spec.language import TransformerBlock

STD = 0.02  # of weights at the start (Radford et al. 2019, Devlin et al. 2019)
HIDDEN_MULTIPLE = 64


class Linear(nn.Linear):
    """A linear layer with normal weights and zero biases at the start."""

    def __init__(self, inputs: int, outputs: int, bias: bool = True, std: float = STD) -> None:
        self.std = std  # before the constructor, which draws the weights
        super().__init__(inputs, outputs, bias)

    def reset_parameters(self) -> None:
        """Draw the weights."""
        nn.init.normal_(self.weight, 0.0, self.std)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class Embedding(nn.Embedding):
    """A table of normal vectors."""

    weight: nn.Parameter

    def reset_parameters(self) -> None:
        """Draw the vectors."""
        nn.init.normal_(self.weight, 0.0, STD)


class Output(nn.Module):
    """Features [B, T, D] -> logits [B, T, V].

    Args:
        tied: the token embedding's weights [V, D], which are then this layer's too; None: it has weights of its own.
        bias: with a bias [V].
    """

    def __init__(self, vocabulary: int, width: int, tied: nn.Parameter | None, bias: bool = False) -> None:
        super().__init__()
        if tied is None:
            self.weight = nn.Parameter(torch.empty(vocabulary, width))
            nn.init.normal_(self.weight, 0.0, STD)
        else:
            self.weight = tied
        self.bias = nn.Parameter(torch.zeros(vocabulary)) if bias else None

    def forward(self, features: Tensor) -> Tensor:
        """Logits [B, T, V]."""
        return F.linear(features, self.weight, self.bias)


def hidden_width(width: int, hidden: int | None, gated: bool) -> int:
    """Width within the MLP: as given, else 4 x width; with a gate, a third matrix, 8/3 x width, rounded up."""
    if hidden is not None:
        return hidden
    if not gated:
        return 4 * width
    return -(-8 * width // (3 * HIDDEN_MULTIPLE)) * HIDDEN_MULTIPLE


def compile_layers(layers: nn.ModuleList, spec: TransformerBlock) -> None:
    """Where the spec says so, let each layer be compiled when it is first called: one compilation serves all."""
    if spec.compile:
        for layer in layers:
            layer.compile()


def uncompiled(spec: TransformerBlock) -> contextlib.AbstractContextManager[Any]:
    """Inside, layers run as they are written: of many lengths, each would be compiled anew."""
    return torch.compiler.set_stance("force_eager") if spec.compile else contextlib.nullcontext()


def call_layer(layer: nn.Module, recompute: bool, features: Tensor, *arguments: object) -> Tensor:
    """A layer's output [B, T, D]; with `recompute` backward has its input only and computes the rest again."""
    if recompute and torch.is_grad_enabled():
        output: Tensor = checkpoint(layer, features, *arguments, use_reentrant=False)
    else:
        output = layer(features, *arguments)
    return output
