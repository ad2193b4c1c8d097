"""Tune's schedulers, set up for a sweep: time is counted in reports, values stay inside their dimensions.

FIFO, ASHA (Li et al. 2020), HyperBand (Li et al. 2018), PBT (Jaderberg et al. 2017), PB2 (Parker-Holder et al. 2020)
are Ray Tune's. With Tune's population-based ones a copying trial goes on from the donor's whole state, its step
included; `kind: population` keeps each member's own budget.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Mapping
from types import SimpleNamespace
from typing import Any

from ray.tune.schedulers import (
    ASHAScheduler,
    FIFOScheduler,
    HyperBandScheduler,
    PopulationBasedTraining,
    TrialScheduler,
)

from distml.adapters.tune_book import TrialBook
from distml.adapters.tune_trainable import OBJECTIVE, ordered
from distml.population.explore import explore
from distml.spec.population import PerturbSpec
from distml.spec.search_rules import objectives_of, steps_of
from distml.spec.space import Space
from distml.spec.sweep import SweepSpec

REPORTS = "training_iteration"
TOGETHER = ("hyperband", "pbt", "pb2")  # these compare trials that are all there from the start


def build_scheduler(job: SweepSpec, space: Space) -> TrialScheduler:
    """The scheduler of a sweep."""
    name = job.scheduler.name
    if name == "fifo":
        return FIFOScheduler()
    common: dict[str, Any] = {"time_attr": REPORTS, "metric": OBJECTIVE, "mode": objectives_of(job)[0].mode}
    if name in ("asha", "hyperband"):
        common |= {"max_t": num_reports(job), "reduction_factor": job.scheduler.reduction_factor}
    if name == "asha":
        return ASHAScheduler(grace_period=grace_reports(job), **common)
    if name == "hyperband":
        return HyperBandScheduler(**common)
    generator = random.Random(f"{job.seed}:explore")
    if name == "pbt":

        def perturbed(values: dict[str, Any]) -> dict[str, Any]:
            return explore(PerturbSpec(name="perturb"), space, values, generator)

        return PopulationBasedTraining(perturbation_interval=1, custom_explore_fn=perturbed, log_config=False, **common)
    from ray.tune.schedulers.pb2 import PB2

    def inside(values: dict[str, Any]) -> dict[str, Any]:
        return {dimension.path: dimension.clip(values[dimension.path]) for dimension in space}

    bounds = {dimension.path: list(dimension.ends) for dimension in space}
    return PB2(perturbation_interval=1, hyperparam_bounds=bounds, custom_explore_fn=inside, log_config=False, **common)


def every(job: SweepSpec) -> int:
    """Steps between two reports."""
    return job.every or job.base.evaluate.every


def num_reports(job: SweepSpec) -> int:
    """Reports of a trial that runs to its end."""
    steps = steps_of(job.base)
    assert steps is not None
    return math.ceil(steps / every(job))


def grace_reports(job: SweepSpec) -> int:
    """Reports that ASHA grants every trial."""
    return math.ceil((job.scheduler.grace or every(job)) / every(job))


def replay(scheduler: TrialScheduler, book: TrialBook, job: SweepSpec) -> None:
    """Show ASHA what an earlier process's trials have reported, so that its rungs know them."""
    if not isinstance(scheduler, ASHAScheduler):
        return
    goal, step = objectives_of(job)[0], every(job)
    for record in book.ended("finished", "stopped", "diverged"):
        trial = SimpleNamespace(trial_id=f"earlier-{record.name}")
        scheduler.on_trial_add(None, trial)
        for row in _reports(book.rows(record), goal.metric):
            metrics = {goal.metric: math.nan if row[goal.metric] is None else float(row[goal.metric])}
            result = {REPORTS: math.ceil(row["step"] / step), OBJECTIVE: ordered(metrics, goal)}
            scheduler.on_trial_result(None, trial, result)
        scheduler.on_trial_remove(None, trial)


def _reports(rows: Iterable[Mapping[str, Any]], metric: str) -> Iterable[Mapping[str, Any]]:
    return (row for row in rows if metric in row)
