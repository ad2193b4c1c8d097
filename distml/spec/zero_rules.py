"""What `strategy: zero` adds to the rules: offload, precision, equal micro-batches, and the three batch sizes.

DeepSpeed's users know three numbers, `train_batch_size = train_micro_batch_size_per_gpu x gradient_accumulation_steps x
workers`, and here as elsewhere two of them are enough. They may stand in the spec's own keys (batch_size,
micro_batch_size) or, for whoever brings a configuration along, in `strategy.deepspeed`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from distml.spec.deepspeed import HERE, check_deepspeed, in_integers, parameters_need_stage_3
from distml.spec.messages import Problem
from distml.spec.schema import JobSpec
from distml.spec.yaml import KeyPath, Position
from distml.spec.zero import ZeroSpec

Find = Callable[[KeyPath], Position | None]

BATCH: tuple[KeyPath, ...] = (("batch_size",), (*HERE, "train_batch_size"))
MICRO: tuple[KeyPath, ...] = (("micro_batch_size",), (*HERE, "train_micro_batch_size_per_gpu"))
STEPS: tuple[KeyPath, ...] = ((*HERE, "gradient_accumulation_steps"),)


@dataclass(frozen=True)
class Given:
    """A number that was written: under which key, and where."""

    path: KeyPath
    value: int
    position: Position

    def __str__(self) -> str:
        place = f"line {self.position.line}" if self.position.numbered else str(self.position)
        return f"{self.path[-1]} {self.value} ({place})"


def complete(job: JobSpec, find: Find) -> tuple[JobSpec, list[Problem]]:
    """The job with `batch_size` and `micro_batch_size` as two of the three numbers have them.

    Args:
        job: valid key by key.
        find: where a key was written; None: it was not.

    Returns:
        The job, whose `strategy.deepspeed` has none of the three any more unless it is no such number, and what is
        wrong with it.
    """
    if not isinstance(job.strategy, ZeroSpec):
        return job, []
    strategy = job.strategy.model_copy(update={"deepspeed": in_integers(job.strategy.deepspeed)})
    found: list[Given | None] = []
    for paths in (BATCH, MICRO, STEPS):
        number, problem = _one(job, strategy, paths, find)
        if problem is not None:
            return job, [problem]
        found.append(number)
    moved = {path[-1] for path in (*BATCH, *MICRO, *STEPS) if len(path) > 1}
    rest = {key: value for key, value in strategy.deepspeed.items() if key not in moved or not _is_count(value)}
    completed, problems = _solve(job, *found)
    return completed.model_copy(update={"strategy": strategy.model_copy(update={"deepspeed": rest})}), problems


def _is_count(value: Any) -> bool:
    """Whether it is right for one of the three, where null is as good as nothing."""
    return value is None or (type(value) is int and value > 0)


def _one(
    job: JobSpec, strategy: ZeroSpec, paths: tuple[KeyPath, ...], find: Find
) -> tuple[Given | None, Problem | None]:
    """A number that may stand under two keys, and then must be the same."""
    given = []
    for path in paths:
        value = strategy.deepspeed.get(str(path[-1])) if len(path) > 1 else getattr(job, str(path[0]))
        position = find(path)
        if position is not None and value is not None and _is_count(value):
            given.append(Given(path, value, position))
    if len({one.value for one in given}) > 1:
        return None, Problem(f"{given[0]} and {given[1]} are two names of the same number; remove one of them",
                             tuple(one.path for one in given))  # fmt: skip
    return (given[0] if given else None), None


def _solve(
    job: JobSpec, batch: Given | None, micro: Given | None, steps: Given | None
) -> tuple[JobSpec, list[Problem]]:
    """The third number of two; of all three, whether they are one another's."""
    workers, changes = job.resources.workers, {}
    if batch is not None:
        changes["batch_size"] = batch.value
    elif micro is not None and steps is not None:
        changes["batch_size"] = micro.value * steps.value * workers
    share = math.ceil(changes.get("batch_size", job.batch_size) / workers)
    if micro is not None:
        changes["micro_batch_size"] = micro.value
    elif steps is not None:
        changes["micro_batch_size"] = math.ceil(share / steps.value)
    size = changes.get("micro_batch_size")
    if steps is None or size is None or math.ceil(share / size) == steps.value:
        return job.model_copy(update=changes), []
    if batch is not None and micro is not None:
        whole = micro.value * steps.value * workers
        plural = "s" if workers > 1 else ""
        text = (f"{batch} is not {micro} x {steps} x {workers} worker{plural} = {whole}; leave one of the three out, "
                f"or set {batch.path[-1]} to {whole}")  # fmt: skip
        return job, [Problem(text, (batch.path, micro.path, steps.path))]
    text = f"{steps} cannot cut a worker's share of the batch, {share} examples, into so many pieces of equal size"
    return job, [Problem(f"{text}; change it or batch_size", (steps.path,))]


def check_zero(job: JobSpec, strategy: ZeroSpec) -> Iterator[Problem]:
    """Every rule that a job under zero breaks."""
    yield from check_deepspeed(job, strategy)
    if "parameters" in strategy.offload and strategy.stage < 3:
        yield Problem(parameters_need_stage_3(strategy), (("strategy", "offload"), ("strategy",)))
    twice = [name for index, name in enumerate(strategy.offload) if name in strategy.offload[:index]]
    if twice:
        yield Problem(f"strategy.offload has {twice[0]} twice; keep one", (("strategy", "offload"),))


def check_precision(job: JobSpec) -> Iterator[Problem]:
    """fp16 needs loss scaling, which only zero has, and a device that computes in it."""
    if job.precision != "fp16":
        return
    if not isinstance(job.strategy, ZeroSpec):
        yield Problem(f"precision fp16 needs loss scaling, which strategy {job.strategy.label} does not have; set bf16 "
                      "or strategy: zero", (("precision",),))  # fmt: skip
    elif not job.resources.gpus_per_worker:
        yield Problem("precision fp16 is for GPUs, resources.gpus_per_worker is 0; set bf16, or gpus_per_worker: 1",
                      (("precision",),))  # fmt: skip
