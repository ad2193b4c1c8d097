"""What jobs over jobs have in common: a base, and how many of its variants run at the same time."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from distml.spec.base import Block, Count
from distml.spec.schema import JobSpec, LimitsSpec
from distml.spec.storage import Storage


class OverJobs(Block):
    """A job over training jobs.

    `base` is written as a block, a file (relative to the spec's own) or a shipped job's name; the resolved spec holds
    the block. Where the block leaves out `distml`, `kind` or `name`, it has those of a training job of this name.
    """

    distml: Literal["v1"]
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]
    base: JobSpec = Field(description="a training job: a block, a file or a shipped job's name")
    max_concurrent: Count | None = Field(None, description="how many run at the same time; null: as many as fit")
    limits: LimitsSpec = Field(
        LimitsSpec(), description="of all processes; a key that has its default here is taken from base.limits"
    )
    storage: Storage = None
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0

    def with_limits(self) -> OverJobs:
        """The same with one set of limits, here and in the base: those written here, then those of the base."""
        own, usual = self.limits.model_dump(), LimitsSpec().model_dump()
        limits = self.base.limits.model_copy(update={key: one for key, one in own.items() if one != usual[key]})
        return self.model_copy(update={"limits": limits, "base": self.base.model_copy(update={"limits": limits})})
