"""The job spec, key by key: every default stands here and nowhere else.

The models are strict (no silent conversion), closed (an unknown key is an error) and frozen. Rules across keys stand in
`rules.py`; `load_spec` applies them and names file, line and column.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Discriminator, Field, Tag

from distml.spec.accelerators import canonical_accelerator
from distml.spec.architectures import NasNetSpec, StagesSpec
from distml.spec.base import (
    ALL_OFFERS,
    NUMBER,
    OWN,
    RANGE,
    Block,
    Count,
    Fraction,
    NonNegative,
    Offers,
    OwnBlock,
    Positive,
    Share,
    StrategyBlock,
    TaskBlock,
    own_or_name,
)
from distml.spec.language import LanguageModelSpec, MaskedLanguageModelSpec
from distml.spec.rl import ActorCriticSpec, PPOSpec, ReinforceSpec, TRPOSpec
from distml.spec.storage import Storage
from distml.spec.tabular import BanditSpec, QLearningSpec, SarsaSpec
from distml.spec.zero import ZeroSpec


# ---------------------------------------------------------------------------------------------------------------- tasks
class MLPSpec(Block):
    """Fully connected layers with ReLU between them."""

    name: Literal["mlp"]
    hidden: list[Count] = Field([128], description="width of each hidden layer")
    dropout: Fraction = Field(0.0, description="share of hidden units dropped in training")


class CNNSpec(Block):
    """3 x 3 convolutions, each halving the image by max-pooling, then one hidden layer."""

    name: Literal["cnn"]
    channels: list[Count] = Field([16, 32], min_length=1, max_length=3, description="channels of each convolution")
    hidden: Count = Field(64, description="width of the hidden layer")
    dropout: Fraction = Field(0.0, description="share of hidden units dropped in training")


ImageModelSpec = Annotated[MLPSpec | CNNSpec | NasNetSpec | StagesSpec, Field(discriminator="name")]


class ClassificationSpec(TaskBlock):
    """Cross-entropy on labelled images."""

    summary: ClassVar[str] = "cross-entropy on labelled images (data: digits, cifar10)"

    name: Literal["classification"]
    data: Literal["digits", "cifar10"] = Field(
        "digits",
        description="digits: scikit-learn's 1,797 scans of 8 x 8, 10 classes; cifar10: 60,000 photographs of 32 x 32",
    )
    path: str | None = Field(None, description="cifar10: the folder of its binary version; relative to the spec")
    model: ImageModelSpec = MLPSpec(name="mlp")
    label_noise: Share = Field(0.0, description="share of the training labels that are replaced by wrong ones")


class RegressionSpec(TaskBlock):
    """Linear least squares on generated data, whose minimum has a closed form."""

    summary: ClassVar[str] = "linear least squares on generated data, with a closed form to compare with"

    name: Literal["regression"]
    features: Count = Field(8, description="inputs per example")
    rows: Annotated[int, Field(ge=10)] = Field(640, description="examples generated, over all three splits")
    noise: NonNegative = Field(0.1, description="standard deviation of the targets' noise")


class OwnTaskSpec(OwnBlock):
    """A user's own subclass of `distml.Task`, by import path; its file lies beside the spec or is installed."""

    uses_per_frame: ClassVar[float | None] = 1.0


TaskSpec = Annotated[
    Annotated[ClassificationSpec, Tag("classification")]
    | Annotated[RegressionSpec, Tag("regression")]
    | Annotated[LanguageModelSpec, Tag("language_model")]
    | Annotated[MaskedLanguageModelSpec, Tag("masked_language_model")]
    | Annotated[ActorCriticSpec, Tag("actor_critic")]
    | Annotated[ReinforceSpec, Tag("reinforce")]
    | Annotated[PPOSpec, Tag("ppo")]
    | Annotated[TRPOSpec, Tag("trpo")]
    | Annotated[QLearningSpec, Tag("q_learning")]
    | Annotated[SarsaSpec, Tag("sarsa")]
    | Annotated[BanditSpec, Tag("bandit")]
    | Annotated[OwnTaskSpec, Tag(OWN)],
    Discriminator(own_or_name),
]


# ----------------------------------------------------------------------------------------------------------- strategies
class SingleSpec(StrategyBlock):
    """One worker, no exchange."""

    name: Literal["single"]


class CompressionBlock(Block):
    """What goes over the wire instead of float32 gradients; what is left out is added to the next ones."""

    error_feedback: bool = Field(True, description="add what was not sent to the next gradient; false: it is lost")


class BF16Spec(CompressionBlock):
    """The upper half of every float32: 2 x fewer bytes."""

    name: Literal["bf16"]


class Int8Spec(CompressionBlock):
    """Eight bits per element and one scale per 1,024 elements: almost 4 x fewer bytes."""

    name: Literal["int8"]


class TopKSpec(CompressionBlock):
    """The largest elements with their places, with momentum correction (Lin et al. 2018)."""

    name: Literal["topk"]
    fraction: Annotated[float, Field(gt=0.0, le=1.0)] = Field(
        0.01, description="share of each block's elements that is sent, at least one"
    )


class PowerSGDSpec(CompressionBlock):
    """Low-rank factors of each weight matrix's gradient (Vogels et al. 2019)."""

    name: Literal["powersgd"]
    rank: Count = Field(2, description="rank of the factors")


CompressionSpec = Annotated[BF16Spec | Int8Spec | TopKSpec | PowerSGDSpec, Field(discriminator="name")]


class AllReduceSpec(StrategyBlock):
    """Every worker sums the gradients of all: in shared memory on one host, by torch.distributed between hosts."""

    name: Literal["all_reduce"]
    compression: CompressionSpec | None = Field(None, description="bf16, int8, topk or powersgd: of what is sent")


class ParameterServerSpec(StrategyBlock):
    """Servers hold the weights and optimiser; workers push gradients and pull weights."""

    name: Literal["parameter_server"]
    mode: Literal["sync", "async", "ssp"] = Field("sync", description="barrier, no wait, or bounded staleness")
    max_staleness: Annotated[int, Field(ge=0)] | None = Field(None, description="ssp only: the bound, in versions")
    servers: Count = Field(1, description="processes that the weights are cut over; none are started in shared memory")
    server_placement: Literal["spread", "colocated", "apart"] = Field(
        "spread", description="servers over all nodes in turn, on the workers' nodes only, or on nodes without workers"
    )
    server_labels: dict[str, str] = Field({}, description="labels of the servers' nodes, as resources.labels has them")
    compression: CompressionSpec | None = Field(None, description="bf16, int8, topk or powersgd: of what is pushed")
    prefetch: bool = Field(False, description="async, ssp: pull while the next gradient is computed; costs one version")
    staleness_scaling: bool = Field(False, description="async, ssp: a gradient's step is divided by max(1, staleness)")

    @property
    def offers(self) -> Offers:
        return ALL_OFFERS if self.mode == "sync" else frozenset({"whole_weights"})

    @property
    def is_synchronous(self) -> bool:
        return self.mode == "sync"

    @property
    def label(self) -> str:
        return f"{self.name}/{self.mode}"

    @property
    def places_servers(self) -> bool:
        """Whether it says where servers are, so that there must be some."""
        return self.server_placement == "apart" or bool(self.server_labels)


class AverageSpec(Block):
    """The outer update: the mean of the workers' weights."""

    name: Literal["average"]


class NesterovSpec(Block):
    """The outer update of DiLoCo (Douillard et al. 2023): Nesterov's momentum on the mean difference of a round."""

    name: Literal["nesterov"]
    lr: Positive = 0.7
    momentum: Fraction = 0.9


class LocalSGDSpec(StrategyBlock):
    """Every worker takes `inner_steps` steps of its own, then all take one outer update together."""

    name: Literal["local_sgd"]
    inner_steps: Count = Field(8, description="steps between two outer updates (a round)")
    outer: Annotated[AverageSpec | NesterovSpec, Field(discriminator="name")] = AverageSpec(name="average")

    @property
    def offers(self) -> Offers:
        return frozenset({"whole_weights"})


StrategySpec = Annotated[
    SingleSpec | AllReduceSpec | ParameterServerSpec | LocalSGDSpec | ZeroSpec, Field(discriminator="name")
]


# ----------------------------------------------------------------------------------------------------------- optimisers
class ScheduleSpec(Block):
    """The learning rate's factor as a function of the version of the weights."""

    name: Literal["constant", "linear", "cosine", "step"] = "constant"
    warmup: Annotated[int, Field(ge=0)] = Field(0, description="steps over which the factor rises linearly to 1")
    steps: Count | None = Field(None, description="linear, cosine: where they end; null: the budget in `stop`")
    final: Annotated[float, Field(ge=0.0, le=1.0)] = Field(0.0, description="linear, cosine: the last factor")
    every: Count | None = Field(None, description="step: steps between two falls")
    factor: Annotated[float, Field(gt=0.0, le=1.0)] = Field(0.1, description="step: what each fall multiplies by")


class GroupSpec(Block):
    """Parameters that have settings of their own; the first group that matches a parameter wins."""

    match: str = Field(description="shell pattern over parameter names, for example '*.bias'")
    lr: NonNegative | None = None
    weight_decay: NonNegative | None = None


class OptimizerBlock(Block):
    """What all optimisers have."""

    lr: NonNegative = Field(1.0e-3, description="learning rate before the schedule")
    weight_decay: NonNegative = 0.0
    clip_norm: Positive | None = Field(None, description="largest global norm of the mean gradient")
    schedule: ScheduleSpec = ScheduleSpec()
    groups: list[GroupSpec] = []


class SGDSpec(OptimizerBlock):
    """Stochastic gradient descent."""

    name: Literal["sgd"]
    momentum: Fraction = 0.0
    nesterov: bool = False


class AdamSpec(OptimizerBlock):
    """Adam (Kingma & Ba 2015); weight decay is an L2 term."""

    name: Literal["adam"]
    betas: Annotated[list[Fraction], Field(min_length=2, max_length=2)] = [0.9, 0.999]
    eps: Positive = 1.0e-8


class AdamWSpec(OptimizerBlock):
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019)."""

    name: Literal["adamw"]
    betas: Annotated[list[Fraction], Field(min_length=2, max_length=2)] = [0.9, 0.999]
    eps: Positive = 1.0e-8


class RMSpropSpec(OptimizerBlock):
    """RMSprop (Tieleman & Hinton 2012)."""

    name: Literal["rmsprop"]
    alpha: Fraction = Field(0.99, description="smoothing of the squared gradient")
    eps: Positive = 1.0e-8
    momentum: Fraction = 0.0


OptimizerSpec = Annotated[SGDSpec | AdamSpec | AdamWSpec | RMSpropSpec, Field(discriminator="name")]


# -------------------------------------------------------------------------------------------------------- the whole job
class InitSpec(Block):
    """Start weights (not a resume)."""

    source: str | None = Field(
        None, alias="from",
        description="a run directory, a checkpoint, a .safetensors file, or a folder of a GPT-2, Llama or BERT that "
        "`transformers` saved",
    )  # fmt: skip
    only: list[str] = Field(["*"], description="patterns of the tensors that are taken")
    freeze: list[str] = Field([], description="patterns of the parameters that are never trained")


class GoalSpec(Block):
    """A metric's value that ends the run as `goal_met`; exactly one bound."""

    metric: str = Field(pattern=r"^eval/.+")
    at_least: Annotated[float, Field(allow_inf_nan=False)] | None = None
    at_most: Annotated[float, Field(allow_inf_nan=False)] | None = None


class StopSpec(Block):
    """When the run ends: the first that is reached. At least one budget."""

    steps: Count | None = None
    examples: Count | None = None
    epochs: Positive | None = None
    frames: Count | None = Field(None, description="environment steps of tasks that act, over all workers")
    tokens: Count | None = Field(None, description="of language models, over all workers")
    seconds: Positive | None = Field(None, description="of training, counted over resumes")
    goal: GoalSpec | None = None
    patience: Count | None = Field(
        None,
        description="evaluations in a row without a better value of the goal's metric,"
        " else of `checkpoint.best`, else of eval/loss",
    )


class EvaluateSpec(Block):
    every: Count = Field(100, description="steps between evaluations; there is always one at the end")


class BestSpec(Block):
    metric: str = Field(pattern=r"^eval/.+")
    mode: Literal["max", "min"]


class CheckpointSpec(Block):
    every: Count = Field(
        100,
        description="steps between checkpoints; there is always one at the end; tasks that act, whose environments"
        " begin anew at each: 10,000 or the next multiple of a rollout's updates",
    )
    keep: Count = Field(2, description="newest checkpoints that stay")
    best: BestSpec | None = Field(None, description="the checkpoint that is kept besides, and that is tested")


class LogSpec(Block):
    every: Count = Field(10, description="steps between reports")
    to: list[Literal["tensorboard"]] = ["tensorboard"]


class WorkersSpec(Block):
    """As many workers as there is room for: fewer when a node is lost, more when one comes."""

    min: Count
    max: Count


def _number_or_range(value: Any) -> str:
    return RANGE if isinstance(value, (dict, WorkersSpec)) else NUMBER


class ResourcesSpec(Block):
    size: Annotated[
        Annotated[Count, Tag(NUMBER)] | Annotated[WorkersSpec, Tag(RANGE)], Discriminator(_number_or_range)
    ] = Field(1, alias="workers", description="a number, or {min, max} for a group that shrinks and grows")
    cpus_per_worker: Count = Field(1, description="logical CPUs and torch threads of each worker")
    gpus_per_worker: Annotated[int, Field(ge=0)] = 0
    placement: Literal["pack", "spread", "strict_pack", "strict_spread"] = Field(
        "pack", description="workers on few nodes or on many; strict_: on one node, or each on a node of its own"
    )
    accelerator: Annotated[str, AfterValidator(canonical_accelerator)] | None = Field(
        None, description="what the workers' nodes must have, as Ray names it: L4, A100, H100, ..."
    )
    labels: dict[str, str] = Field(
        {}, description="labels that the workers' nodes must have, such as zone: us-west-2a; also !value, in(a, b)"
    )

    @property
    def workers(self) -> int:
        """How many there are; of an elastic group the most."""
        return self.size.max if isinstance(self.size, WorkersSpec) else self.size

    @property
    def elastic(self) -> WorkersSpec | None:
        """The range of a group that shrinks and grows; None: it does neither."""
        return self.size if isinstance(self.size, WorkersSpec) else None


class LimitsSpec(Block):
    start_s: Positive = Field(120.0, description="until all processes are placed and have built the task")
    queue: bool | None = Field(
        None,
        description="what no node has is waited for (true) or refused at once (false); null: waited for where an "
        "autoscaler can add it. What others use is always waited for",
    )
    heartbeat_s: Positive = Field(2.0, description="between two looks at each process")
    lost_after_s: Positive = Field(30.0, description="without an answer: the process is taken for dead")
    max_restarts: Annotated[int, Field(ge=0)] = Field(3, description="recoveries before the run fails")


class InlineSpec(Block):
    speeds: list[Positive] | None = Field(None, description="async, ssp: relative speed of each inline worker")


class JobSpec(Block):
    """A training job: task x strategy x optimiser x stop x resources."""

    distml: Literal["v1"]
    kind: Literal["train"] = "train"
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]
    task: TaskSpec
    strategy: StrategySpec = AllReduceSpec(name="all_reduce")
    optimizer: OptimizerSpec = AdamWSpec(name="adamw")
    batch_size: Count = Field(
        64, description="examples per round over all workers; of tasks that act: frames, see n_steps"
    )
    micro_batch_size: Count | None = Field(None, description="examples per worker and backward; null: all at once")
    precision: Literal["fp32", "bf16", "fp16"] = Field(
        "fp32", description="bf16: autocast, the weights stay float32; under zero they are bf16 with a float32 copy; "
        "fp16: zero on GPUs only, with loss scaling",
    )  # fmt: skip
    init: InitSpec | None = None
    stop: StopSpec
    evaluate: EvaluateSpec = EvaluateSpec()
    checkpoint: CheckpointSpec = CheckpointSpec()
    log: LogSpec = LogSpec()
    resources: ResourcesSpec = ResourcesSpec()
    limits: LimitsSpec = LimitsSpec()
    inline: InlineSpec = InlineSpec()
    transport: Literal["auto", "shared_memory", "object_store", "process_group"] = Field(
        "auto",
        description="auto: shared_memory where workers share a host; else process_group, "
        "or object_store for parameter_server",
    )
    storage: Storage = None
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0

    @property
    def rows_at_once(self) -> int:
        """Examples of a worker's largest micro-batch: so many its memory has room for."""
        return self.micro_batch_size or -(-self.batch_size // self.resources.workers)

    def with_workers(self, number: int) -> JobSpec:
        """The job of a group that has so many workers now."""
        return self.model_copy(update={"resources": self.resources.model_copy(update={"size": number})})
