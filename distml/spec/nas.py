"""`kind: nas`: architecture search by a controller (Zoph & Le 2017), evolution (Real et al. 2019) or chance."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from distml.spec.base import Block, Count, Fraction, NonNegative, Positive
from distml.spec.over_jobs import OverJobs


class ReinforceControllerSpec(Block):
    """An LSTM that proposes one decision after the other, trained by REINFORCE with a moving baseline."""

    name: Literal["reinforce"]
    lr: Positive = 0.005
    hidden: Count = Field(64, description="width of the LSTM")
    baseline_decay: Fraction = Field(0.9, description="of the moving average of rewards")
    entropy: NonNegative = Field(0.01, description="weight of the entropy bonus, per decision")
    batch: Count = Field(4, description="rewards per update of the controller")


class EvolutionSpec(Block):
    """Regularised evolution: a mutation of the best of a sample joins the population, the oldest leaves it."""

    name: Literal["evolution"]
    population: Count = 20
    sample: Count = 5


class RandomControllerSpec(Block):
    """Every proposal is drawn uniformly."""

    name: Literal["random"]


ControllerSpec = Annotated[ReinforceControllerSpec | EvolutionSpec | RandomControllerSpec, Field(discriminator="name")]


class RewardSpec(Block):
    """`metric` · (cost / target)^w with w = -log2(1 + doubling_is_worth) (Tan & Le 2019, with their w fixed)."""

    metric: str = Field("eval/accuracy", pattern=r"^eval/.+")
    cost: Literal["flops", "parameters"] | None = Field(None, description="of one example's forward, or of the model")
    target: Positive | None = Field(None, description="the cost at which the reward is the metric itself")
    doubling_is_worth: Positive = Field(
        0.05, description="relative gain of the metric that makes up for twice the cost"
    )


class NasSpec(OverJobs):
    """Children of a base, one for each proposed architecture."""

    kind: Literal["nas"]
    space: dict[str, Any] = Field(
        description="dimensions by path of the base, or a structured space: {name: nasnet | stages, ...}"
    )
    controller: ControllerSpec = ReinforceControllerSpec(name="reinforce")
    reward: RewardSpec = RewardSpec()
    trials: Count
    retries: Annotated[int, Field(ge=0)] = Field(1, description="of a child that failed, before it is listed as failed")
