"""Actor and critic in one module: from observations to the parameters of a distribution over actions, and to values.

    observations [T, E, *O] -> (normalised) -> encoding -> trunk -> policy: parameters [T, E, P]
                                                                 -> value:  values [T, E]

With `trunk: separate` the trunk is empty and both branches have hidden layers of their own. Parameters are named
`trunk.*`, `policy.*` and `value.*`; a Gaussian's deviations are `policy.log_std`.

Shapes: T time, E environments, O observation, P distribution parameters, F features.
"""

from __future__ import annotations

import copy
import importlib
import inspect
from typing import Any, Protocol, Self, runtime_checkable

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor, nn

from distml.errors import UsageError
from distml.rl.distributions import Distribution, Gaussian, build_distribution
from distml.rl.networks import (
    ActionBranch,
    Convolutions,
    Dense,
    ImageEncoding,
    Memory,
    State,
    ValueBranch,
    VectorLike,
    build_vector_encoding,
)
from distml.rl.normalise import RunningMoments
from distml.spec.rl import (
    CNNPolicySpec,
    MLPPolicySpec,
    NormaliseSpec,
    OwnPolicySpec,
    PolicyBlock,
    PolicySpec,
    RecurrentPolicySpec,
)
from distml.tasks.build import describe

DEFAULT_LOG_STD = PolicyBlock.model_fields["log_std"].default


class Policy(nn.Module):
    """What acts and what is trained.

    It is always in evaluation mode, see `train`.

    Attributes:
        distribution: over actions.
        is_recurrent: whether its state matters.
        observation_moments: what observations are normalised with; None: they are not.
        reward_moments: of discounted returns, for a `RewardScaler`; None: rewards stay as they are.
    """

    is_recurrent = False

    def __init__(self, distribution: Distribution) -> None:
        super().__init__()
        self.distribution = distribution
        self.observation_moments: RunningMoments | None = None
        self.reward_moments: RunningMoments | None = None

    def initial_state(self, num_envs: int) -> State:
        """The state at an episode's start: each tensor [E, ...]; none for a feed-forward policy."""
        return ()

    def train(self, mode: bool = True) -> Self:
        """Stay in evaluation mode, whatever is asked for: dropout is off, and statistics of batches are those known.

        What acted, what its log-probabilities are held against and what learns must be one and the same policy, not
        three that differ by what dropout drew. Recurrent layers without dropout compute the same in both modes, but
        can be trained on a GPU in training mode only, so they are in that.
        """
        super().train(False)
        for module in self.modules():
            if isinstance(module, nn.RNNBase) and not module.dropout:
                module.training = True
        return self

    def forward(self, observations: Tensor, state: State, resets: Tensor) -> tuple[Tensor, Tensor, State]:
        """Parameters [T, E, P], values [T, E] and the state after them.

        Args:
            observations: [T, E, *O] as the environment gives them.
            state: before the first of them.
            resets: [T, E]; where true, the state is the initial one before that observation is read.
        """
        raise NotImplementedError

    def act(self, observations: Tensor, state: State, resets: Tensor) -> tuple[Tensor, State]:
        """Parameters [E, P] for observations [E, *O], and the state after them: no more than acting needs."""
        parameters, _, state = self(observations.unsqueeze(0), state, resets.unsqueeze(0))
        return parameters[0], state

    def normalised(self, observations: Tensor) -> Tensor:
        """Observations [..., *O] as they are read."""
        moments = self.observation_moments
        return observations if moments is None else moments.normalise(observations)


class FeedForwardPolicy(Policy):
    """An encoding, a trunk (or none) and two branches."""

    def __init__(
        self, encoding: VectorLike | ImageEncoding, trunk: nn.Module, policy: ActionBranch, value: ValueBranch,
        distribution: Distribution,
    ) -> None:  # fmt: skip
        super().__init__(distribution)
        self.encoding, self.trunk, self.policy, self.value = encoding, trunk, policy, value

    def features(self, observations: Tensor) -> Tensor:
        """[B, F] of observations [B, *O]."""
        encoded = self.encoding.tensor(self.normalised(observations)).to(self.policy.output.weight.dtype)
        features: Tensor = self.trunk(encoded)
        return features

    def forward(self, observations: Tensor, state: State, resets: Tensor) -> tuple[Tensor, Tensor, State]:
        rows = observations.shape[:2]
        features = self.features(observations.flatten(0, 1))
        return self.policy(features).unflatten(0, rows), self.value(features).unflatten(0, rows), ()

    def act(self, observations: Tensor, state: State, resets: Tensor) -> tuple[Tensor, State]:
        return self.policy(self.features(observations)), ()


class RecurrentPolicy(Policy):
    """A memory that actor and critic share, or one for each; with two, the actor's state comes first."""

    is_recurrent = True

    def __init__(
        self, encoding: VectorLike, trunk: nn.Module, policy: ActionBranch, value: ValueBranch,
        distribution: Distribution,
    ) -> None:  # fmt: skip
        super().__init__(distribution)
        self.encoding, self.trunk, self.policy, self.value = encoding, trunk, policy, value

    @property
    def memories(self) -> list[Memory]:
        """The shared memory, or the actor's and the critic's."""
        return [module for module in (self.trunk, self.policy.body, self.value.body) if isinstance(module, Memory)]

    def initial_state(self, num_envs: int) -> State:
        return tuple(part for memory in self.memories for part in memory.initial_state(num_envs))

    def remember(self, observations: Tensor, state: State, resets: Tensor) -> tuple[list[Tensor], State]:
        """Each memory's features [T, E, F] of observations [T, E, *O], and the state after them."""
        rows = observations.shape[:2]
        encoded = self.encoding.tensor(self.normalised(observations.flatten(0, 1))).unflatten(0, rows)
        encoded = encoded.to(self.policy.output.weight.dtype)
        features, after, first = [], (), 0
        for memory in self.memories:
            own = state[first : first + memory.num_states]
            first += memory.num_states
            out, own = memory(encoded, own, resets)
            features.append(out)
            after += own
        return features, after

    def forward(self, observations: Tensor, state: State, resets: Tensor) -> tuple[Tensor, Tensor, State]:
        features, state = self.remember(observations, state, resets)
        return self.policy.head(features[0]), self.value.head(features[-1]), state

    def act(self, observations: Tensor, state: State, resets: Tensor) -> tuple[Tensor, State]:
        features, state = self.remember(observations.unsqueeze(0), state, resets.unsqueeze(0))
        return self.policy.head(features[0][0]), state


@runtime_checkable
class OwnRecurrent(Protocol):
    """A user's module with a state; its forward takes (observations [T, E, *O], state, resets) and gives three."""

    def initial_state(self, num_envs: int) -> State: ...


class OwnPolicy(Policy):
    """A user's own module: forward(observations [B, *O]) -> (parameters [B, P], values [B]), or `OwnRecurrent`.

    It reads observations as the space gives them, floating ones as float32 (and normalised, where that is asked for).
    """

    def __init__(self, module: nn.Module, distribution: Distribution) -> None:
        super().__init__(distribution)
        self.module = module
        self.is_recurrent = isinstance(module, OwnRecurrent)

    def initial_state(self, num_envs: int) -> State:
        return tuple(self.module.initial_state(num_envs)) if isinstance(self.module, OwnRecurrent) else ()

    def outputs(self, observations: Tensor, state: State, resets: Tensor) -> Any:
        """What the module itself returns for observations [T, E, *O]."""
        observations = self.normalised(observations)
        if observations.dtype == torch.float64:
            observations = observations.float()
        if self.is_recurrent:
            return self.module(observations, state, resets)
        return self.module(observations.flatten(0, 1))

    def forward(self, observations: Tensor, state: State, resets: Tensor) -> tuple[Tensor, Tensor, State]:
        if self.is_recurrent:
            parameters, values, after = self.outputs(observations, state, resets)
            return parameters, values, tuple(after)
        parameters, values = self.outputs(observations, state, resets)
        rows = observations.shape[:2]
        return parameters.unflatten(0, rows), values.unflatten(0, rows), ()


def build_policy(
    spec: PolicySpec,
    observation_space: spaces.Space[Any],
    action_space: spaces.Space[Any],
    normalise: NormaliseSpec = NormaliseSpec(),
) -> Policy:
    """The policy that a spec names for one environment's spaces; its weights are drawn from torch's random state.

    Raises:
        UsageError: a space or a pair that is not supported, or an own module that does not give what it must.
    """
    distribution = build_distribution(action_space, not isinstance(spec, OwnPolicySpec) and spec.squashed)
    if (
        not isinstance(spec, OwnPolicySpec)
        and spec.log_std != DEFAULT_LOG_STD
        and not isinstance(distribution, Gaussian)
    ):
        raise UsageError(f"policy.log_std {spec.log_std:g} is for continuous actions, not {action_space}; leave it out")
    policy: Policy
    if isinstance(spec, OwnPolicySpec):
        policy = OwnPolicy(build_own_module(spec, observation_space, action_space), distribution)
    elif isinstance(spec, CNNPolicySpec):
        policy = _build_cnn(spec, observation_space, distribution)
    else:
        policy = _build_dense(spec, observation_space, distribution)
    if normalise.observations:
        _check_normalised(spec, observation_space)
        policy.observation_moments = RunningMoments(tuple(observation_space.shape or ()), normalise.clip)
    if normalise.rewards:
        policy.reward_moments = RunningMoments((), normalise.clip)
    policy.eval()
    if isinstance(policy, OwnPolicy):
        check_outputs(policy, spec.name, observation_space)
    return policy


def _build_dense(
    spec: MLPPolicySpec | RecurrentPolicySpec, space: spaces.Space[Any], distribution: Distribution
) -> Policy:
    encoding = build_vector_encoding(space)

    def body() -> Dense | Memory:
        if isinstance(spec, MLPPolicySpec):
            return Dense(encoding.size, spec.hidden, spec.activation)
        return Memory(encoding.size, spec.hidden, spec.activation, spec.name, spec.units)

    shared = body() if spec.trunk == "shared" else None
    policy, value = (body(), body()) if shared is None else (_nothing(shared.size), _nothing(shared.size))
    parts = (
        encoding, shared or _nothing(encoding.size), ActionBranch(policy, policy.size, distribution, spec.log_std),
        ValueBranch(value, value.size), distribution,
    )  # fmt: skip
    return FeedForwardPolicy(*parts) if isinstance(spec, MLPPolicySpec) else RecurrentPolicy(*parts)


def _build_cnn(spec: CNNPolicySpec, space: spaces.Space[Any], distribution: Distribution) -> Policy:
    encoding = ImageEncoding(space)

    def body() -> Convolutions:
        return Convolutions(encoding, spec.channels, spec.kernels, spec.strides, spec.hidden)

    size = spec.hidden
    trunk, policy, value = (
        (body(), _nothing(size), _nothing(size)) if spec.trunk == "shared" else (_nothing(size), body(), body())
    )
    branch = ActionBranch(policy, size, distribution, spec.log_std)
    return FeedForwardPolicy(encoding, trunk, branch, ValueBranch(value, size), distribution)


def _nothing(size: int) -> Dense:
    return Dense(size, [], "tanh")


def _check_normalised(spec: PolicySpec, space: spaces.Space[Any]) -> None:
    if isinstance(spec, CNNPolicySpec):
        raise UsageError("policy cnn scales images by itself; set normalise.observations: false")
    if not isinstance(space, spaces.Box):
        raise UsageError(
            f"only a Box of observations can be normalised, not {space}; set normalise.observations: false"
        )


# ---------------------------------------------------------------------------------------------------------- own modules
def build_own_module(
    spec: OwnPolicySpec, observation_space: spaces.Space[Any], action_space: spaces.Space[Any]
) -> nn.Module:
    """Import a user's class and construct it as Class(observation_space, action_space, **args).

    Raises:
        UsageError: one line with the file and line of the cause.
    """
    module_name, class_name = spec.name.split(":")
    build_vector_encoding(observation_space)  # refuses spaces whose observations are no arrays
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise UsageError(f"policy {spec.name!r} cannot be imported: {describe(error)}") from error
    own_class = vars(module).get(class_name)
    if not (isinstance(own_class, type) and issubclass(own_class, nn.Module)):
        raise UsageError(f"policy {spec.name!r}: {class_name} in {module_name} is not a subclass of torch.nn.Module")
    try:
        inspect.signature(own_class).bind(observation_space, action_space, **spec.args)
        return own_class(observation_space, action_space, **spec.args)
    except Exception as error:
        raise UsageError(f"policy {spec.name!r} cannot be constructed: {describe(error)}") from error


def check_outputs(policy: OwnPolicy, name: str, space: spaces.Space[Any]) -> None:
    """Hold what an own module gives for two steps of three environments against what is wanted.

    Raises:
        UsageError: the shapes got and wanted, or why it gave nothing.
    """
    num_steps, num_envs, size = 2, 3, policy.distribution.num_parameters
    probe = copy.deepcopy(space)
    probe.seed(0)
    rows = np.stack([np.asarray(probe.sample()) for _ in range(num_steps * num_envs)])
    observations = torch.as_tensor(rows).unflatten(0, (num_steps, num_envs))
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):  # a look must not change the random state
            state = policy.initial_state(num_envs)
            got = policy.outputs(observations, state, torch.zeros(num_steps, num_envs, dtype=torch.bool))
    except Exception as error:
        raise UsageError(f"policy {name!r} fails on observations of {space}: {describe(error)}") from error
    if policy.is_recurrent:
        what = f"(parameters, values, state) of [T, E] = [{num_steps}, {num_envs}] observations"
        wanted: Any = ((num_steps, num_envs, size), (num_steps, num_envs), shapes(state))
        if any(part[:1] != (num_envs,) for part in wanted[2]):
            raise UsageError(f"policy {name!r}: initial_state({num_envs}) must give tensors [{num_envs}, ...], not "
                             f"{wanted[2]}")  # fmt: skip
    else:
        what, wanted = f"(parameters, values) of {len(rows)} observations", ((len(rows), size), (len(rows),))
    if shapes(got) != wanted:
        raise UsageError(f"policy {name!r} must return {what} with the shapes {wanted}, not {shapes(got)}")


def shapes(value: Any) -> Any:
    """The shapes of tensors in (nested) tuples and lists; of anything else the name of its type."""
    if isinstance(value, Tensor):
        return tuple(value.shape)
    return tuple(shapes(part) for part in value) if isinstance(value, tuple | list) else type(value).__name__
