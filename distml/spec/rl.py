"""The blocks of reinforcement learning: environments, policies, and the tasks that act.

`batch_size` counts what one round of all workers consumes: for tasks that act it is
workers x envs_per_worker x n_steps / minibatches, so of `batch_size` and `n_steps` one is given and the other follows
(`complete`); `reinforce` counts whole episodes, one per environment.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, Tag

from distml.spec.base import (
    OWN,
    Block,
    Count,
    Fraction,
    NonNegative,
    Offers,
    OwnBlock,
    Positive,
    Share,
    TaskBlock,
    own_or_name,
)


# --------------------------------------------------------------------------------------------------------- environments
class WrapperSpec(Block):
    """A wrapper of `gymnasium.wrappers` by name, applied to each environment."""

    shorthand: ClassVar[str | None] = "name"

    name: Annotated[str, Field(pattern=r"^[A-Za-z]\w*$")]
    args: dict[str, Any] = Field({}, description="keyword arguments of the wrapper")


class EnvironmentSpec(Block):
    """What is acted in.

    A user's own gymnasium.vector.VectorEnv is constructed with `num_envs` and `args`, and seeded once for all of its
    environments, with the first one's seed; it wraps, limits and begins anew by itself.
    """

    shorthand: ClassVar[str | None] = "id"

    id: Annotated[str, Field(pattern=r"^[A-Za-z_][\w./:-]*$")] = Field(
        description="an id of Gymnasium's registry, or 'module:Class', a user's own gymnasium.Env or vector.VectorEnv"
    )
    args: dict[str, Any] = Field({}, description="keyword arguments of the environment")
    wrappers: list[WrapperSpec] = Field(
        [], description="in the order of application; evaluations leave out those of rewards, as ClipReward"
    )
    max_episode_steps: Count | None = Field(None, description="where an episode is truncated; null: its own limit")
    vectorization: Literal["auto", "sync"] = Field(
        "auto", description="auto: the environment's own vector entry point where it has one; sync: one after the other"
    )
    autoreset: Literal["next_step", "same_step"] | None = Field(
        None, description="how a finished environment begins anew; null: as its vector form does by itself"
    )


class NormaliseSpec(Block):
    """Running moments over all that was seen, frozen inside a rollout."""

    observations: bool = Field(False, description="to mean 0 and variance 1")
    rewards: bool = Field(False, description="divided by the standard deviation of the discounted return")
    clip: Positive = Field(10.0, description="largest normalised value")


class EvaluationSpec(Block):
    """Episodes on seeds that training never sees."""

    episodes: Count = Field(20, description="per mode, over all workers")
    modes: list[Literal["greedy", "sampled"]] = Field(["greedy", "sampled"], min_length=1)
    max_frames: Count = Field(27_000, description="of an episode: a longer one counts as it is then")


# ------------------------------------------------------------------------------------------------------------- policies
class PolicyBlock(Block):
    """What built-in policies have in common; the last two are for continuous actions only."""

    trunk: Literal["shared", "separate"] = Field("separate", description="whether actor and critic share hidden layers")
    log_std: Annotated[float, Field(ge=-20.0, le=2.0)] = Field(0.0, description="of the Gaussian, at the start")
    squashed: bool = Field(False, description="tanh into the bounds, instead of clipping to them")


class MLPPolicySpec(PolicyBlock):
    """Fully connected layers."""

    name: Literal["mlp"]
    hidden: list[Count] = Field([64, 64], description="width of each hidden layer")
    activation: Literal["tanh", "relu"] = "tanh"


class CNNPolicySpec(PolicyBlock):
    """Convolutions over uint8 images [C, H, W], then one hidden layer (Mnih et al. 2015)."""

    name: Literal["cnn"]
    trunk: Literal["shared", "separate"] = Field("shared", description="whether actor and critic share hidden layers")
    channels: list[Count] = Field([32, 64, 64], min_length=1)
    kernels: list[Count] = Field([8, 4, 3], min_length=1)
    strides: list[Count] = Field([4, 2, 1], min_length=1)
    hidden: Count = 512


class RecurrentPolicySpec(PolicyBlock):
    """An encoder of fully connected layers, then a recurrent cell; its state is zero at an episode's start."""

    name: Literal["lstm", "gru"]
    hidden: list[Count] = Field([64], description="width of each encoder layer")
    units: Count = Field(64, description="width of the cell's state")
    activation: Literal["tanh", "relu"] = "tanh"


class OwnPolicySpec(OwnBlock):
    """A user's own nn.Module: Class(observation_space, action_space, **args); always in evaluation mode."""


PolicySpec = Annotated[
    Annotated[MLPPolicySpec, Tag("mlp")]
    | Annotated[CNNPolicySpec, Tag("cnn")]
    | Annotated[RecurrentPolicySpec, Tag("lstm")]
    | Annotated[RecurrentPolicySpec, Tag("gru")]
    | Annotated[OwnPolicySpec, Tag(OWN)],
    Discriminator(own_or_name),
]


# ---------------------------------------------------------------------------------------------------------------- tasks
class ActingBlock(TaskBlock):
    """What every task that acts in environments has."""

    counts_frames: ClassVar[bool] = True
    needs: ClassVar[Offers] = frozenset({"whole_weights"})

    environment: EnvironmentSpec
    envs_per_worker: Count = Field(16, description="environments that each worker steps together")
    gamma: Share = Field(0.99, description="discount per step")
    evaluation: EvaluationSpec = EvaluationSpec()


class OnPolicyBlock(ActingBlock):
    """Tasks that learn from what the current policy has just done."""

    policy: PolicySpec = MLPPolicySpec(name="mlp")
    normalise: NormaliseSpec = NormaliseSpec()
    entropy: NonNegative = Field(0.0, description="coefficient of the entropy bonus")


class RolloutBlock(OnPolicyBlock):
    """Tasks whose batches are rollouts of a fixed length."""

    default_n_steps: ClassVar[int]

    n_steps: Count | None = Field(
        None, description="steps per environment and rollout; null: what batch_size gives, else the task's default"
    )
    gae_lambda: Share = Field(0.95, description="of generalised advantages; 1: n-step returns, 0: the TD error")

    @property
    def num_minibatches(self) -> int:
        """Pieces of a rollout, each of which is one update."""
        return 1


class ActorCriticSpec(RolloutBlock):
    """Advantage actor-critic (Mnih et al. 2016): A3C with asynchronous parameter servers, A2C with synchronous ones."""

    summary: ClassVar[str] = "advantage actor-critic: A3C with async, A2C with sync strategies (Mnih et al. 2016)"
    default_n_steps: ClassVar[int] = 8

    name: Literal["actor_critic"]
    gae_lambda: Share = Field(1.0, description="of generalised advantages; 1: n-step returns, 0: the TD error")
    entropy: NonNegative = Field(0.01, description="coefficient of the entropy bonus")
    value_coefficient: NonNegative = Field(0.5, description="of the squared error of the values")
    normalise_advantages: bool = Field(False, description="to mean 0 and variance 1 over a worker's rollout")


class ReinforceSpec(OnPolicyBlock):
    """REINFORCE with reward-to-go over whole episodes (Williams 1992); `batch_size` counts episodes."""

    summary: ClassVar[str] = "REINFORCE over whole episodes, with a choice of baselines (Williams 1992)"

    name: Literal["reinforce"]
    baseline: Literal["none", "moving_average", "learned", "optimal"] = Field(
        "learned",
        description="what is subtracted from the reward-to-go; optimal: b* = E[g^2 G] / E[g^2] of the other episodes",
    )
    decay: Fraction = Field(0.9, description="moving_average: weight of the past")
    value_coefficient: NonNegative = Field(0.5, description="learned: of the squared error of the values")
    epochs: Count = Field(1, description="updates per batch of episodes; later ones are off-policy")
    importance_weighting: bool = Field(
        False, description="weigh by the ratio of the new policy's probability to the acting one's, per decision"
    )
    max_weight: Positive = Field(10.0, description="largest importance weight")

    @property
    def uses_per_frame(self) -> float | None:
        return None


class PPOSpec(RolloutBlock):
    """Proximal policy optimisation (Schulman et al. 2017); DD-PPO under all_reduce."""

    summary: ClassVar[str] = "proximal policy optimisation; DD-PPO under all_reduce (Schulman et al. 2017)"
    default_n_steps: ClassVar[int] = 128

    name: Literal["ppo"]
    epochs: Count = Field(4, description="passes over each rollout")
    minibatches: Count = Field(4, description="updates per pass")
    clip: Positive = Field(0.2, description="how far the ratio of probabilities may leave 1")
    value_clip: Positive | None = Field(None, description="how far a value may move from the old one; null: anywhere")
    value_coefficient: NonNegative = Field(0.5, description="of the squared error of the values")
    normalise_advantages: bool = Field(True, description="to mean 0 and variance 1 over a worker's minibatch")
    target_kl: Positive | None = Field(
        None, description="a rollout is left after an update whose mean KL over all workers was larger"
    )

    @property
    def num_minibatches(self) -> int:
        return self.minibatches

    @property
    def uses_per_frame(self) -> float | None:
        return float(self.epochs)

    @property
    def all_needs(self) -> Offers:
        return self.needs | {"group_mean"} if self.target_kl is not None else self.needs


class TRPOSpec(RolloutBlock):
    """Trust region policy optimisation (Schulman et al. 2015); `step: natural`: the natural gradient (Kakade 2001)."""

    summary: ClassVar[str] = "trust region policy optimisation, natural gradient (Schulman et al. 2015)"
    needs: ClassVar[Offers] = frozenset({"whole_weights", "group_mean"})
    num_phases: ClassVar[int] = 2
    default_n_steps: ClassVar[int] = 64

    name: Literal["trpo"]
    policy: PolicySpec = MLPPolicySpec(name="mlp", trunk="separate")
    gae_lambda: Share = Field(0.97, description="of generalised advantages; 1: n-step returns, 0: the TD error")
    step: Literal["trust_region", "natural"] = Field("trust_region", description="natural: without the line search")
    max_kl: Positive = Field(0.01, description="largest mean KL of an update")
    damping: NonNegative = Field(
        0.1, description="multiple of the identity added to the Fisher and Gauss-Newton matrices"
    )
    cg_iterations: Count = Field(10, description="of conjugate gradients, for policy and values")
    line_search_steps: Count = Field(10, description="halvings of a step that would break the bound")
    value_step: Positive = Field(0.1, description="how far values go at once: their squared change, in squared errors")
    value_iterations: Count = Field(5, description="such steps per update")
    normalise_advantages: bool = Field(True, description="to mean 0 and variance 1 over all workers' rollouts")


ActingTaskSpecs = ActorCriticSpec | ReinforceSpec | PPOSpec | TRPOSpec
