"""`kind: sweep`: many variants of one training job, proposed and stopped early by Ray Tune."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from distml.spec.base import Block, Count
from distml.spec.over_jobs import OverJobs
from distml.spec.schema import BestSpec


class SamplerSpec(Block):
    """Who proposes values."""

    name: Literal["grid", "random", "optuna"] = Field(
        "random", description="grid: every combination of choices; optuna: tree-structured Parzen estimators"
    )


class SchedulerSpec(Block):
    """Who ends, pauses or copies trials early."""

    name: Literal["fifo", "asha", "hyperband", "pbt", "pb2"] = "fifo"
    grace: Count | None = Field(None, description="asha: steps that each trial has at least; null: `every`")
    reduction_factor: Annotated[int, Field(ge=2)] = Field(
        3, description="asha, hyperband: one of so many goes on from each rung"
    )


class SweepSpec(OverJobs):
    """Trials of a base, one for each proposal."""

    kind: Literal["sweep"]
    space: dict[str, Any] = Field(description="dimensions by path of the base; see distml/spec/space.py")
    sampler: SamplerSpec = SamplerSpec(name="random")
    scheduler: SchedulerSpec = SchedulerSpec(name="fifo")
    trials: Count | None = Field(None, description="how many; null with grid: every combination once")
    objective: BestSpec | list[BestSpec] = Field(description="a metric of the validation split; several: a Pareto set")
    tie_break: BestSpec | None = Field(None, description="with several objectives: which of the Pareto set is the best")
    every: Count | None = Field(None, description="steps between reports to the scheduler; null: base.evaluate.every")
    retries: Annotated[int, Field(ge=0)] = Field(1, description="of a trial that failed, before it is listed as failed")
