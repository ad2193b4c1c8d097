"""Rules of sweeps that come from how Ray Tune runs them."""

from __future__ import annotations

from collections.abc import Iterator

from distml.spec.messages import Problem
from distml.spec.space import Space
from distml.spec.sweep import SchedulerSpec, SweepSpec

BY_REPORTS = ("asha", "hyperband")  # these count a trial's reports from its beginning to its known end
COPYING = ("pbt", "pb2")


def sweep_rules(job: SweepSpec, space: Space, steps: int | None) -> Iterator[Problem]:
    """What a sweep breaks of them.

    Args:
        steps: at which the base ends by its own budget; None: not known.
    """
    name = job.scheduler.name
    if job.base.strategy.keeps_parts:
        yield Problem(f"base.strategy: {job.base.strategy.label} keeps each rank's part of the state on disk, and a "
                      "trial of a sweep has its state in one place; use strategy: all_reduce",
                      (("base", "strategy", "name"), ("base", "strategy"), ("base",)), "value")  # fmt: skip
    for dimension in space:
        if dimension.path.split(".")[0] == "resources":
            yield Problem(f"space.{dimension.path} may not be searched: all trials take turns in the same processes; "
                          "remove it", (("space", dimension.path),))  # fmt: skip
        if name == "pb2" and dimension.is_integer:
            yield Problem(f"space.{dimension.path}: scheduler pb2 models numbers without steps; use uniform or "
                          "loguniform, or scheduler: pbt", (("space", dimension.path),), "value")  # fmt: skip
        if name in BY_REPORTS and _is_of_its_end(dimension.path, job):
            yield Problem(f"space.{dimension.path} may not be searched with scheduler {name}, which compares trials by "
                          "their number of reports, the same for all; remove it, or use scheduler: fifo",
                          (("space", dimension.path),))  # fmt: skip
    if name in BY_REPORTS and steps is None:
        yield Problem(f"scheduler {name} needs to know how many steps a trial has; set base.stop.steps",
                      (("base", "stop"), ("base",)), "value")  # fmt: skip
    usual = SchedulerSpec(name="fifo").reduction_factor
    if name not in BY_REPORTS and job.scheduler.reduction_factor != usual:
        yield Problem(f"scheduler.reduction_factor is for {' and '.join(BY_REPORTS)}, the scheduler is {name}; remove "
                      "it", (("scheduler", "reduction_factor"),))  # fmt: skip
    if name == "fifo" and job.every is not None:
        yield Problem("every says when a scheduler looks at a trial, and scheduler fifo never does; remove it, or set "
                      "scheduler", (("every",),))  # fmt: skip
    if name in COPYING and job.sampler.name == "grid":
        yield Problem(f"scheduler {name} changes values while trials train, and a grid compares them as they "
                      "are; use sampler: random", (("sampler",), ("scheduler",)), "value")  # fmt: skip
    if name in COPYING and job.trials is not None and job.trials < 2:
        yield Problem(f"scheduler {name} copies trials, and trials is {job.trials}; raise it", (("trials",),), "value")


def _is_of_its_end(path: str, job: SweepSpec) -> bool:
    """Whether a dimension decides how many reports a trial has."""
    by_examples = path == "batch_size" and job.base.stop.steps is None
    return by_examples or path.split(".")[0] in ("stop", "evaluate")
