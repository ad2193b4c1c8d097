"""Rules of groups whose number of workers changes while they train."""

from __future__ import annotations

from collections.abc import Iterator

from distml.spec.messages import Problem
from distml.spec.rl_rules import follows_workers
from distml.spec.schema import JobSpec

WORKERS = ("resources", "workers")
PLACEMENTS = ("pack", "spread")


def check_elastic(job: JobSpec) -> Iterator[Problem]:
    """Every rule that `resources.workers: {min, max}` breaks."""
    elastic = job.resources.elastic
    if elastic is None:
        return
    if elastic.min > elastic.max:
        yield Problem(f"resources.workers: min {elastic.min} is larger than max {elastic.max}; swap them", (WORKERS,))
    if follows_workers(job):
        yield Problem(
            f"task {job.task.name} has a batch that follows from the number of workers, so that each change of it "
            "would be another training; give resources.workers as one number",
            (WORKERS,),
        )
    if job.resources.placement not in PLACEMENTS:
        yield Problem(
            f"workers that come and go take what room there is, and placement {job.resources.placement} allows no "
            f"other; set placement: {' or '.join(PLACEMENTS)}, or give resources.workers as one number",
            (("resources", "placement"), WORKERS),
        )


def refuse_elastic(job: JobSpec, kind: str) -> Iterator[Problem]:
    """The base of a job over jobs keeps its size: its members are placed together."""
    if job.resources.elastic is not None:
        yield Problem(
            f"base.resources.workers is a range, and a {kind}'s members are all of one size; give one number",
            (("base", *WORKERS), ("base",)),
        )
