"""The floor of `distml bench exchange`: a worker's step without any exchange, on flat vectors, in plain PyTorch.

Usage: python -m distml.bench.peers.compute CONFIG, one process per worker; they begin together.

Shapes: N parameters.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adam import adam
from torch.optim.sgd import sgd

from distml.bench.peers.blocks import LEARNING_RATE, Batches, StepClock, build_model, configuration

PATIENCE_S = 60.0


def flat_views(model: nn.Module) -> tuple[Tensor, Tensor]:
    """Weights [N] and gradients [N], of which the model's parameters and their `.grad` become views."""
    parameters = list(model.parameters())
    weights = torch.cat([parameter.detach().flatten() for parameter in parameters])
    gradients = torch.zeros_like(weights)
    offset = 0
    for parameter in parameters:
        part = slice(offset, offset + parameter.numel())
        parameter.data = weights[part].view_as(parameter)
        parameter.grad = gradients[part].view_as(parameter)
        offset += parameter.numel()
    return weights, gradients


def fused_update(name: str, weights: Tensor, gradients: Tensor) -> Callable[[], None]:
    """torch's fused rule on the whole vectors."""
    lr = LEARNING_RATE[name]
    if name == "sgd":
        return lambda: sgd([weights], [gradients], [None], fused=True, foreach=False, momentum=0.0, dampening=0.0,
                           nesterov=False, maximize=False, lr=lr, weight_decay=0.0)  # fmt: skip
    first, second, step = torch.zeros_like(weights), torch.zeros_like(weights), torch.tensor(0.0)
    return lambda: adam([weights], [gradients], [first], [second], [], [step], fused=True, foreach=False,
                        amsgrad=False, beta1=0.9, beta2=0.999, eps=1e-8, maximize=False, lr=lr,
                        weight_decay=0.0)  # fmt: skip


def begin_together(folder: Path, rank: int, workers: int) -> None:
    """Wait until every worker is here."""
    (folder / f"ready-{rank}").touch()
    deadline = time.monotonic() + PATIENCE_S
    while len(list(folder.glob("ready-*"))) < workers:
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {PATIENCE_S:g} s for {workers} workers to be ready")
        time.sleep(0.002)


def main(config: dict[str, Any]) -> None:
    """One worker's training."""
    model = build_model(config["width"])
    weights, gradients = flat_views(model)
    update = fused_update(config["optimizer"], weights, gradients)
    batches, clock = (
        Batches(config["width"], config["rank"], config["batch"]),
        StepClock(config["folder"], config["rank"]),
    )
    begin_together(Path(config["folder"]), config["rank"], config["workers"])
    for _ in range(config["steps"]):
        clock.tick()
        inputs, targets = next(batches)
        nn.functional.mse_loss(model(inputs), targets).backward()  # type: ignore[no-untyped-call]
        with torch.no_grad():
            update()
            gradients.zero_()
    clock.flush()


if __name__ == "__main__":
    main(configuration())
