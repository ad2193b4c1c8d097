"""`kind: population`: population-based training (Jaderberg et al. 2017) over any training job."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from distml.spec.base import Block, Count, Positive, Share
from distml.spec.over_jobs import OverJobs
from distml.spec.schema import BestSpec, GoalSpec


class TruncationSpec(Block):
    """A member of the worst `fraction` copies one drawn from the best `fraction`."""

    name: Literal["truncation"]
    fraction: Annotated[float, Field(gt=0.0, le=0.5)] = Field(0.2, description="of the members; at least one of each")


class TournamentSpec(Block):
    """A member meets one drawn at random, and copies it where that one is better (binary tournament)."""

    name: Literal["tournament"]


class NoExploitSpec(Block):
    """Nobody copies anybody: a member explores by itself at every decision. With `explore: none`: random search."""

    name: Literal["none"]


class PerturbSpec(Block):
    """After a copy each value is multiplied by one of `factors`, or drawn anew with probability `resample`."""

    name: Literal["perturb"]
    factors: Annotated[list[Positive], Field(min_length=1)] = [0.8, 1.2]
    resample: Share = Field(0.25, description="probability that a value is drawn anew from its whole dimension")


class ResampleSpec(Block):
    """After a copy every value is drawn anew."""

    name: Literal["resample"]


class NoExploreSpec(Block):
    """After a copy the values are the donor's."""

    name: Literal["none"]


ExploitSpec = Annotated[TruncationSpec | TournamentSpec | NoExploitSpec, Field(discriminator="name")]
ExploreSpec = Annotated[PerturbSpec | ResampleSpec | NoExploreSpec, Field(discriminator="name")]


class PopulationStopSpec(Block):
    """When the whole population ends: the first that is reached; else when every member's own `base.stop` is.

    At `steps` intervals that have begun still end, so that it may be some steps more; at `seconds` and `goal` none do.
    """

    steps: Count | None = Field(None, description="of all members together")
    seconds: Positive | None = Field(None, description="since the start, counted over resumes")
    goal: GoalSpec | None = Field(None, description="that one member reaches")


class PopulationCheckpointSpec(Block):
    every: Count = Field(1, description="decisions of a member between two checkpoints of it")
    keep: Count = Field(2, description="newest checkpoints of each member that stay")


class PopulationSpec(OverJobs):
    """Members train at the same time; now and then the worse copy the better and change their hyperparameters."""

    kind: Literal["population"]
    members: Annotated[int, Field(ge=2)]
    every: Count = Field(description="steps of a member between two decisions about it")
    space: dict[str, Any] = Field(description="dimensions by path of the base; see distml/spec/space.py")
    objective: BestSpec = Field(description="a metric of the validation split")
    exploit: ExploitSpec = TruncationSpec(name="truncation")
    explore: ExploreSpec = PerturbSpec(name="perturb")
    synchronous: bool = Field(False, description="true: all decide together after every `every` steps")
    stop: PopulationStopSpec = PopulationStopSpec()
    checkpoint: PopulationCheckpointSpec = PopulationCheckpointSpec()
