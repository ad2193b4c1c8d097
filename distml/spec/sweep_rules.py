"""Rules of sweeps that come from how Ray Tune runs them."""

from __future__ import annotations

from collections.abc import Iterator

from distml.spec.messages import Problem
from distml.spec.space import Space
from distml.spec.sweep import SweepSpec

BY_REPORTS = ("asha", "hyperband")  # these count a trial's reports from its beginning to its known end
COPYING = ("pbt", "pb2")


def sweep_rules(job: SweepSpec, space: Space, steps: int | None) -> Iterator[Problem]:
    """What a sweep breaks of them.

    Args:
        steps: at which the base ends by its own budget; None: not known.
    """
    name, workers = job.scheduler.name, job.base.resources.workers
    if workers > 1:
        yield Problem(f"base.resources.workers is {workers}, and a trial of a sweep is one process; set it to 1, or "
                      "use kind: population", (("base", "resources", "workers"), ("base",)), "value")  # fmt: skip
    for dimension in space:
        if dimension.path.split(".")[0] == "resources":
            yield Problem(f"space.{dimension.path} may not be searched: all trials take turns in the same processes; "
                          "remove it", (("space", dimension.path),))  # fmt: skip
        if name == "pb2" and dimension.is_integer:
            yield Problem(f"space.{dimension.path}: scheduler pb2 models numbers without steps; use uniform or "
                          "loguniform, or scheduler: pbt", (("space", dimension.path),), "value")  # fmt: skip
    if name in BY_REPORTS and steps is None:
        yield Problem(f"scheduler {name} needs to know how many steps a trial has; set base.stop.steps",
                      (("base", "stop"), ("base",)), "value")  # fmt: skip
    if name in COPYING and job.sampler.name == "grid":
        yield Problem(f"scheduler {name} changes values while trials train, and a grid compares them as they "
                      "are; use sampler: random", (("sampler",), ("scheduler",)), "value")  # fmt: skip
    if name in COPYING and job.trials is not None and job.trials < 2:
        yield Problem(f"scheduler {name} copies trials, and trials is {job.trials}; raise it", (("trials",),), "value")
