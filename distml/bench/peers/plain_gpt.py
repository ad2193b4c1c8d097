"""The plain peer of `distml bench transformer`: a GPT and its training loop as one would write them in torch alone.

Shapes: B examples, T tokens of each, D width, H heads, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


class Layer(nn.Module):
    """Attention and MLP, each after a LayerNorm and added to the residual stream."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        size, length, width = x.shape
        q, k, v = (part.view(size, length, self.heads, -1).transpose(1, 2)
                   for part in self.qkv(self.norm_1(x)).split(width, dim=2))  # fmt: skip
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(size, length, width))
        added: Tensor = x + self.down(functional.gelu(self.up(self.norm_2(x)), approximate="tanh"))
        return added


class PlainGPT(nn.Module):
    """GPT-2's shape: learned positions, pre-LayerNorm, the output layer tied to the embedding."""

    def __init__(self, vocabulary: int, positions: int, layers: int, heads: int, width: int) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(positions, width)
        self.layers = nn.ModuleList(Layer(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                deep = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * layers) if deep else 0.02)
        self.head.weight = self.tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, T] -> logits [B, T, V]."""
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1], device=tokens.device))
        for layer in self.layers:
            x = layer(x)
        logits: Tensor = self.head(self.norm(x))
        return logits


def train(
    model: nn.Module, batches: Callable[[int], tuple[Tensor, Tensor]], steps: int, lr: Callable[[int], float],
    logged: Callable[[int, float], None], every: int = 10, autocast: torch.dtype | None = None, **adamw: Any,
) -> None:  # fmt: skip
    """The ten lines: AdamW under a schedule, gradients clipped at norm 1, the mean loss every `every` steps.

    Args:
        batches: step -> inputs and targets [B, T].
        lr: step -> learning rate.
        logged: called with the step and the mean loss since the last call.
        autocast: type of the forward pass.
        adamw: arguments of `torch.optim.AdamW`.
    """
    optimizer = torch.optim.AdamW(model.parameters(), fused=True, **adamw)
    total: Any = 0.0
    for step in range(steps):
        inputs, targets = batches(step)
        with torch.autocast(inputs.device.type, autocast, enabled=autocast is not None):
            logits = model(inputs)
            loss = functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = lr(step)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        total = total + loss.detach()
        if (step + 1) % every == 0:
            logged(step + 1, float(total) / every)
            total = 0.0
