"""The peer of `distml bench loop`: digits in plain PyTorch, in as few lines and as fast as one would write it.

Shapes: B examples, K classes; images [B, 8, 8], labels [B].
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn


def train(images: Tensor, labels: Tensor, order: Tensor, steps: int, log: Path, logged: Callable[[int], None]) -> float:
    """Train an MLP with AdamW for `steps` steps of 64, writing the mean loss to `log` every 10.

    Args:
        order: indices of the examples in the order of training, at least 64 * steps of them.
        logged: called with the step after each line of the log.

    Returns:
        The last mean loss.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.0, fused=True)
    total = 0.0
    with open(log, "w", encoding="utf-8") as file:
        for step in range(1, steps + 1):
            batch = order[(step - 1) * 64 : step * 64]
            loss = nn.functional.cross_entropy(model(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            total += loss.item()
            if step % 10 == 0:
                mean, total = total / 10, 0.0
                print(json.dumps({"step": step, "loss": mean}), file=file, flush=True)
                logged(step)
    return mean
