"""A job's model and activations by tracing its task: what a plan, and a worker that builds it, want to know.

Of a language model's equal layers two and three are traced; each further one adds what the third did. So 96 layers
take as long as two. Other tasks are traced whole, on the first examples of their own data.
"""

from __future__ import annotations

import contextlib
import textwrap
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from distml.spec.schema import JobSpec
from distml.spec.zero import ZeroSpec
from distml.tasks.base import Progress, Task, as_loss
from distml.tasks.data import Batch, DatasetStream, map_tensors
from distml.tasks.footprint import Activations, footprint, norms_in_float32, without_memory
from distml.tasks.language_model import TextTask, cross_entropy

FEW, MORE = 2, 3  # layers that are traced


class NotTracedError(Exception):
    """Why a task's activations cannot be known beforehand."""


@contextlib.contextmanager
def built_as(job: JobSpec) -> Iterator[None]:
    """Inside, models are built in the type that they compute in: zero's weights have the run's precision themselves."""
    before = torch.get_default_dtype()
    low = isinstance(job.strategy, ZeroSpec) and job.precision != "fp32"
    torch.set_default_dtype(torch.bfloat16 if low else before)  # fp16 takes as many bytes
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def trace_activations(job: JobSpec, task: Task, rows: int) -> Activations:
    """Bytes of a micro-batch of `rows` examples.

    Raises:
        NotTracedError: the task acts, or its code cannot be run without values.
    """
    if isinstance(task, TextTask):
        return _of_text(job, task, rows)
    if type(task).data is Task.data:
        raise NotTracedError("its batches come from acting")
    try:
        return _of_dataset(job, task, rows)
    except Exception as error:  # a user's own code may do anything
        reason = textwrap.shorten(str(error), 300, placeholder=" …")
        raise NotTracedError(f"its loss cannot be traced ({type(error).__name__}: {reason})") from error


def _of_text(job: JobSpec, task: TextTask, rows: int) -> Activations:  # type: ignore[type-arg]
    layers = task.spec.model.layers
    if layers <= MORE:
        return _layers(job, task, layers, rows)
    few, more = _layers(job, task, FEW, rows), _layers(job, task, MORE, rows)
    return few.line(more, (layers - FEW) / (MORE - FEW))


def _layers(job: JobSpec, task: TextTask, layers: int, rows: int) -> Activations:  # type: ignore[type-arg]
    """The same task with so many layers."""
    shape = task.spec.model.model_copy(update={"layers": layers, "compile": False})
    small = type(task)(task.spec.model_copy(update={"model": shape}), task.seed, task.directory)
    with without_memory() as fakes:
        with built_as(job):
            model = _as_on_device(job, small.build_model().train())
        tokens = fakes.from_tensor(torch.zeros(rows, task.spec.block, dtype=torch.int64))
        targets = torch.zeros_like(tokens)

        def forward() -> Tensor:
            with _autocast(job):
                return cross_entropy(model(tokens), targets)

        return footprint(model, [tokens, targets], forward)


def _of_dataset(job: JobSpec, task: Task, rows: int) -> Activations:
    stream = DatasetStream(task.data("train"), job.seed, rows, 0, 1)
    progress, traced = Progress(), []
    batch = stream.next(nn.Identity(), progress)
    with without_memory() as fakes:
        with built_as(job):
            model = _as_on_device(job, task.build_model().train())
        fake: Batch = map_tensors(batch, fakes.from_tensor)
        inputs = [leaf for leaf in tree_leaves(fake) if isinstance(leaf, Tensor)]
        for method, _ in task.phases:

            def forward(method: str = method) -> Tensor:
                with _autocast(job):
                    return as_loss(getattr(task, method)(model, fake, progress), fake, method).total

            traced.append(footprint(model, inputs, forward))
    return max(traced, key=lambda one: one.peak)


def _autocast(job: JobSpec) -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16, enabled=job.precision != "fp32")


def _as_on_device(job: JobSpec, model: nn.Module) -> nn.Module:
    if job.resources.gpus_per_worker and job.precision != "fp32":
        norms_in_float32(model)
    return model


def model_without_memory(task: Task) -> nn.Module:
    """The whole model, with shapes and types only.

    Raises:
        NotTracedError: its code needs values.
    """
    try:
        with without_memory():
            model = task.build_model()
    except Exception as error:
        reason = textwrap.shorten(str(error), 300, placeholder=" …")
        raise NotTracedError(f"its model cannot be built without values ({type(error).__name__}: {reason})") from error
    return model


def rows_of(job: JobSpec) -> int:
    """Examples of one worker's micro-batch: the largest of any rank."""
    share = -(-job.batch_size // job.resources.workers)
    return min(share, job.micro_batch_size or share)


def plan_facts(job: JobSpec, task: Task) -> dict[str, Any]:
    """What a run's plan wants to know of a rank: a language model's activations, and its card (name, bytes).

    Other tasks are not traced here: their runs are to start within milliseconds.
    """
    facts: dict[str, Any] = {"saved": 0.0, "peak": 0.0, "unknown": "distml plan traces them", "card": None}
    if torch.cuda.is_available() and job.resources.gpus_per_worker:
        found = torch.cuda.get_device_properties(0)
        facts["card"] = str(found.name), int(found.total_memory)
    if isinstance(task, TextTask):
        traced = trace_activations(job, task, rows_of(job))
        facts |= {"saved": traced.saved, "peak": traced.peak, "unknown": None}
    return facts
