"""`strategy: zero`: what distml itself says of DeepSpeed's ZeRO; everything else passes through `deepspeed`."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from distml.spec.base import ALL_OFFERS, Offers, StrategyBlock


class ZeroSpec(StrategyBlock):
    """DeepSpeed's ZeRO (Rajbhandari et al. 2020): each rank keeps 1/W of what all would hold.

    Stage 1 cuts the optimiser's state, 2 the gradients too, 3 the weights too.
    """

    name: Literal["zero"]
    stage: Literal[1, 2, 3] = Field(2, description="what is cut: 1 optimiser, 2 and gradients, 3 and weights")
    offload: list[Literal["optimizer", "parameters"]] = Field(
        [], description="what stays in the host's memory; parameters with stage 3 only"
    )
    deepspeed: dict[str, Any] = Field(
        {}, description="further settings of DeepSpeed, by its own names; all are checked"
    )

    @property
    def offers(self) -> Offers:
        return ALL_OFFERS if self.stage < 3 else frozenset({"group_mean", "one_version"})

    @property
    def max_phases(self) -> int | None:
        return 1

    @property
    def keeps_parts(self) -> bool:
        return True

    @property
    def label(self) -> str:
        return f"{self.name}/{self.stage}"
