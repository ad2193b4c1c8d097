"""Jobs that act, and what a task makes of its first batches without a strategy."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from own.oracle import OWN, Trained, job_of, spec_of, train

from distml.tasks.base import Part, Progress, Stream
from distml.tasks.build import build_task
from distml.tasks.sources import SourceTree


def acting_spec(task: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A job that acts: Adam; its batch follows from its environments, and checkpoints from its rollouts."""
    spec = spec_of(task, **({"optimizer": {"name": "adam", "lr": 0.003}} | changes))
    return {key: value for key, value in spec.items() if key in changes or key not in ("batch_size", "checkpoint")}


def greedy(trained: Trained) -> float:
    """The mean return of the greedy policy at the end."""
    return trained.evaluated[-1].metrics["eval/return_greedy_mean"]


def returns_of(task: dict[str, Any], **changes: Any) -> float:
    """The greedy policy's mean return after training."""
    return greedy(train(acting_spec(task, **changes)))


def alone(spec: dict[str, Any], seed: int = 0) -> tuple[Any, Any, Stream]:
    """A job's task, model and stream, as one worker has them."""
    job = job_of(spec)
    SourceTree.collect(job.task, OWN).install()
    task = build_task(job)
    torch.manual_seed(seed)
    model = task.build_model()
    return task, model, task.stream(Part(0, 1, seed, "train", job.batch_size))


def first_batches(spec: dict[str, Any], count: int, seed: int = 0) -> tuple[Any, Any, list[Any]]:
    """A job's task and model, and the batches of its first steps, were the weights to stay as they are."""
    task, model, stream = alone(spec, seed)
    return task, model, [stream.next(model, Progress(version=step)) for step in range(count)]


def perturbed(model: torch.nn.Module, scale: float, seed: int = 1) -> None:
    """Move all weights at random."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += scale * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)


def gradient(model: torch.nn.Module, total: torch.Tensor) -> np.ndarray:
    """Of a scalar with respect to all weights, end to end."""
    grads = torch.autograd.grad(total, list(model.parameters()), allow_unused=True, retain_graph=True)
    pieces = [torch.zeros_like(p) if g is None else g for p, g in zip(model.parameters(), grads, strict=True)]
    return torch.cat([piece.reshape(-1) for piece in pieces]).double().numpy()
