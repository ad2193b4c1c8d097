"""The blocks of tasks whose model is a table: Q-learning, SARSA, and the bandit testbed."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from distml.spec.base import Block, Count, Offers, Share, TaskBlock
from distml.spec.rl import ActingBlock


class EpsilonSpec(Block):
    """How often a random action is taken: falls linearly from `start` to `end`, then stays."""

    start: Share = 1.0
    end: Share = Field(0.05, description="equal to start: constant")
    fraction: Share = Field(0.5, description="share of the budget after which it is at its end")


class TabularBlock(ActingBlock):
    """Tasks that learn one value per state and action, both discrete.

    The loss is 1/2 (target - Q[s, a])^2 with the target held, so with `optimizer: {name: sgd, lr: alpha}` and one
    environment a step is the textbook's Q[s, a] += alpha (target - Q[s, a]). With several environments, workers or
    steps the gradient is the mean over their transitions: an entry that is visited n times in a batch of B moves by
    alpha n / B of its mean error, so alpha grows with B.
    """

    default_n_steps: ClassVar[int] = 1
    num_minibatches: ClassVar[int] = 1

    envs_per_worker: Count = Field(1, description="environments that each worker steps together")
    n_steps: Count | None = Field(
        None, description="transitions per environment and step; null: what batch_size gives, else 1"
    )
    epsilon: EpsilonSpec = EpsilonSpec()


class QLearningSpec(TabularBlock):
    """Tabular Q-learning (Watkins 1989)."""

    summary: ClassVar[str] = "tabular Q-learning on discrete states and actions (Watkins 1989)"

    name: Literal["q_learning"]


class SarsaSpec(TabularBlock):
    """Tabular SARSA: on-policy, its target uses the action that is really taken next (Rummery & Niranjan 1994)."""

    summary: ClassVar[str] = "tabular SARSA, the on-policy twin of Q-learning (Rummery & Niranjan 1994)"

    name: Literal["sarsa"]


class BanditSpec(TaskBlock):
    """The testbed of k-armed bandits with sample averages (Sutton & Barto 2018, 2.3); a step is one play of all runs.

    `batch_size` counts runs. Each run is in one worker's hands, whose gradient the others do not have: only where an
    update is the sum over all workers of one version is it the average of the rewards.
    """

    summary: ClassVar[str] = "k-armed bandits, epsilon-greedy with sample averages (Sutton & Barto 2018, 2.3)"
    needs: ClassVar[Offers] = frozenset({"whole_weights", "one_version"})

    name: Literal["bandit"]
    arms: Annotated[int, Field(ge=2)] = Field(10, description="actions; their values are drawn from N(0, 1)")
    runs: Count = Field(1000, description="bandits that are played side by side, each with a seed of its own")
    epsilons: list[Share] = Field(
        [0.0, 0.01, 0.1], min_length=1, description="one learner per entry in every run: how often it explores"
    )
