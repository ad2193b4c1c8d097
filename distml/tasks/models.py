"""The models of the built-in supervised tasks, in plain PyTorch.

Shapes: B examples, D inputs, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn


class MLP(nn.Module):
    """Fully connected layers with ReLU between them: [B, ...] -> [B, K]."""

    def __init__(self, inputs: int, hidden: Sequence[int], outputs: int, dropout: float = 0.0) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Flatten()]
        for width in hidden:
            layers += [nn.Linear(inputs, width), nn.ReLU()] + ([nn.Dropout(dropout)] if dropout else [])
            inputs = width
        self.layers = nn.Sequential(*layers, nn.Linear(inputs, outputs))

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits [B, K]."""
        logits: Tensor = self.layers(inputs)
        return logits


def with_channels(images: Tensor) -> Tensor:
    """[B, C, height, width]; images without a dimension of channels have one."""
    return images if images.dim() == 4 else images.unsqueeze(1)


class CNN(nn.Module):
    """3 x 3 convolutions, each halving the image, then one hidden layer: [B, (C,) height, width] -> [B, K]."""

    def __init__(
        self, image: tuple[int, int, int], channels: Sequence[int], hidden: int, outputs: int, dropout: float = 0.0
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        before = image[0]
        for after in channels:
            layers += [nn.Conv2d(before, after, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
            before = after
        self.features = nn.Sequential(*layers)
        area = math.prod(side // 2 ** len(channels) for side in image[1:])
        self.head = MLP(before * area, [hidden], outputs, dropout)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, K]."""
        logits: Tensor = self.head(self.features(with_channels(images)))
        return logits
