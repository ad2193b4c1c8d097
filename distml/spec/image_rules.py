"""What a classification of images must be completed with, and the rules that it must keep. No file is read."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from distml.spec.architectures import NasNetSpec
from distml.spec.language_rules import absolute
from distml.spec.messages import Problem
from distml.spec.schema import ClassificationSpec, JobSpec
from distml.spec.yaml import KeyPath

MODEL: KeyPath = ("task", "model")


def complete_images(job: JobSpec, directory: Path) -> JobSpec:
    """The job with an absolute path of its images, so that the run directory's spec finds the same ones."""
    task = job.task
    if not isinstance(task, ClassificationSpec) or task.path is None:
        return job
    return job.model_copy(update={"task": task.model_copy(update={"path": absolute(task.path, directory)})})


def check_images(task: ClassificationSpec) -> Iterator[Problem]:
    """Every rule that a classification's block breaks."""
    if task.data == "cifar10" and task.path is None:
        yield Problem("data cifar10 is read from a folder of its binary version; add task.path, for example "
                      "path: cifar-10-batches-bin", (("task", "data"), ("task",)))  # fmt: skip
    if task.data != "cifar10" and task.path is not None:
        yield Problem(f"task.path is for data cifar10, the data is {task.data}; remove it", (("task", "path"),))
    if isinstance(task.model, NasNetSpec):
        yield from _cells(task.model)


def _cells(model: NasNetSpec) -> Iterator[Problem]:
    """The inputs of a cell's blocks must be there already."""
    for name, cell in (("normal", model.normal), ("reduction", model.reduction)):
        for index, block in enumerate(cell):
            for position, source in enumerate(block.inputs):
                if source >= index + 2:
                    yield Problem(
                        f"task.model.{name}.{index}.inputs.{position} is {source}, but block {index} can take only "
                        f"0 and 1 (the two previous cells) and the {index} blocks before it; set 0 to {index + 1}",
                        ((*MODEL, name, index, "inputs", position),), "value",
                    )  # fmt: skip
