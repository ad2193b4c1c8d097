"""What a model costs, counted without computing: its parameters, or the operations of one example's forward.

A multiply-add counts as two operations; only products count (convolutions, matrices, attention), as in
`torch.utils.flop_counter`. EfficientNet's papers count multiply-adds: half as many.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from distml.errors import UsageError
from distml.spec.schema import JobSpec
from distml.tasks.base import Progress, Task, as_loss
from distml.tasks.build import build_task, describe
from distml.tasks.classification import Classification
from distml.tasks.data import Batch, DatasetStream, map_tensors
from distml.tasks.footprint import without_memory
from distml.tasks.language_model import TextTask

Cost = Literal["flops", "parameters"]


def cost_of(job: JobSpec, cost: Cost) -> int:
    """The cost of a job's model.

    Raises:
        UsageError: the task cannot be built, or its loss cannot be run without values.
    """
    task = build_task(job)
    try:
        return parameters(task) if cost == "parameters" else flops(job, task)
    except UsageError:
        raise
    except Exception as error:  # a user's own code may do anything
        raise UsageError(f"the model's {cost} cannot be counted: {describe(error)}") from error


def parameters(task: Task) -> int:
    """Trained elements."""
    with without_memory():
        model = task.build_model()
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def flops(job: JobSpec, task: Task) -> int:
    """Operations of the forward of one example, in evaluation.

    Where a model takes nothing but a tensor of known shape it is given zeros; else the task's own losses are run on its
    first example.
    """
    inputs = one_input(task)
    batch = first_example(job, task) if inputs is None else None
    with without_memory() as fakes, torch.no_grad():
        model = task.build_model().eval()
        with FlopCounterMode(display=False) as counter:
            if inputs is not None:
                model(fakes.from_tensor(inputs))
            else:
                fake = map_tensors(batch, fakes.from_tensor)
                for method, _ in task.phases:
                    as_loss(getattr(task, method)(model, fake, Progress()), fake, method)
    return int(counter.get_total_flops())


def one_input(task: Task) -> Tensor | None:
    """What a model is given of one example, where its shape is known; None: the data must be asked."""
    if isinstance(task, Classification):
        return torch.zeros(1, *task.image)
    return torch.zeros(1, task.spec.block, dtype=torch.int64) if isinstance(task, TextTask) else None


def first_example(job: JobSpec, task: Task) -> Batch:
    """A batch of one training example."""
    return DatasetStream(task.data("train"), job.seed, 1, 0, 1).next(nn.Identity(), Progress())
