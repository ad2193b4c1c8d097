"""What a language model's parameters are moved by, with the same masks of dropout each time."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F


def gradients(model: nn.Module, tokens: torch.Tensor) -> list[torch.Tensor]:
    torch.manual_seed(3)  # dropout's masks
    loss = F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())
    return list(torch.autograd.grad(loss, list(model.parameters())))
