"""The fast actor against the policy itself, where it may be used, and that it follows weights and statistics."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import nn
from torch.nn.utils import parametrizations

from distml.exchange.flat import FlatModel
from distml.rl.acting import Actor, NumpyActor, TorchActor, build_actor
from distml.rl.networks import Dense
from distml.rl.policies import FeedForwardPolicy, Policy, build_policy
from distml.spec.rl import CNNPolicySpec, MLPPolicySpec, NormaliseSpec, OwnPolicySpec, PolicySpec, RecurrentPolicySpec

CPU, E = torch.device("cpu"), 7
VECTOR, TWO = spaces.Box(-np.inf, np.inf, (4,)), spaces.Discrete(2)
IMAGE = spaces.Box(0, 255, (1, 9, 9), np.uint8)
OBSERVATIONS = {
    "vector": VECTOR, "matrix": spaces.Box(-1.0, 1.0, (2, 3)), "float64": spaces.Box(-1.0, 1.0, (3,), np.float64),
    "bytes": spaces.Box(0, 255, (6,), np.uint8), "discrete": spaces.Discrete(5), "from 2": spaces.Discrete(3, start=2),
    "multi-discrete": spaces.MultiDiscrete([3, 2]), "multi-binary": spaces.MultiBinary(4),
}  # fmt: skip
ACTIONS = {"discrete": TWO, "box": spaces.Box(-1.0, 1.0, (3,)), "multi": spaces.MultiDiscrete([2, 3])}


def mlp(**keys) -> MLPPolicySpec:
    return MLPPolicySpec(**{"name": "mlp", "hidden": [16, 8], "trunk": "shared"} | keys)


def built(spec: PolicySpec, space: spaces.Space = VECTOR, actions: spaces.Space = TWO, **normalise) -> Policy:
    """A policy whose actions depend visibly on what it observes."""
    torch.manual_seed(0)
    policy = build_policy(spec, space, actions, NormaliseSpec(**normalise))
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return policy


def observed(space: spaces.Space, num_envs: int = E) -> np.ndarray:
    space.seed(0)
    return np.stack([np.asarray(space.sample()) for _ in range(num_envs)])


def acted(actor: Actor, observations: np.ndarray) -> np.ndarray:
    return actor.act(observations, actor.initial_state(len(observations)), np.zeros(len(observations), bool))[0]


def assert_equal(policy: Policy, actor: Actor, observations: np.ndarray) -> None:
    got = acted(actor, observations)
    assert got.dtype == np.float32
    with torch.no_grad():
        whole, _, _ = policy(torch.as_tensor(observations)[None], (), torch.zeros(1, len(observations)).bool())
    allowed = 1e-5 * max(1.0, float(whole.abs().max()))
    np.testing.assert_allclose(got, whole[0].numpy(), rtol=0, atol=allowed)
    np.testing.assert_allclose(got, acted(TorchActor(policy, CPU), observations), rtol=0, atol=allowed)


@pytest.mark.parametrize("spec", [
    mlp(), mlp(activation="relu"), mlp(trunk="separate"), mlp(hidden=[]), mlp(hidden=[5], activation="relu"),
], ids=["tanh", "relu", "separate", "linear", "one layer"])  # fmt: skip
@pytest.mark.parametrize("actions", ACTIONS)
@pytest.mark.parametrize("observations", OBSERVATIONS)
def test_numpy_gives_what_the_policy_gives(spec, observations, actions):
    policy = built(spec, OBSERVATIONS[observations], ACTIONS[actions])
    actor = build_actor(policy, CPU)
    assert type(actor) is NumpyActor
    rows = observed(OBSERVATIONS[observations])
    assert_equal(policy, actor, rows)
    assert_equal(policy, actor, rows[:3])  # another number of environments


def test_every_answer_is_the_callers_own():
    actor = build_actor(built(mlp()), CPU)
    rows = observed(VECTOR)
    first = acted(actor, rows)
    kept = first.copy()
    second = acted(actor, -rows)
    assert np.array_equal(first, kept)
    assert not np.allclose(first, second)


@pytest.mark.parametrize("squashed", [False, True])
def test_squashed_or_not_the_parameters_are_the_same(squashed):
    policy = built(mlp(squashed=squashed), actions=ACTIONS["box"])
    actor = build_actor(policy, CPU)
    assert type(actor) is NumpyActor
    assert_equal(policy, actor, observed(VECTOR))


# ----------------------------------------------------------------------------------------------------- which of the two
class OwnDense(Dense):
    def forward(self, inputs):
        return super().forward(inputs) + 1.0


class OwnLinear(nn.Linear):
    def forward(self, inputs):
        return super().forward(inputs) + 1.0


class Doubled(FeedForwardPolicy):
    def features(self, observations):
        return 2.0 * super().features(observations)


def subclass(policy: Policy) -> None:
    policy.__class__ = Doubled


def dense_subclass(policy: Policy) -> None:
    policy.trunk.__class__ = OwnDense


def linear_subclass(policy: Policy) -> None:
    policy.trunk.layers[0].__class__ = OwnLinear


def other_layer(policy: Policy) -> None:
    policy.trunk.layers.append(nn.LayerNorm(8))


def forward_hook(policy: Policy) -> None:
    policy.trunk.register_forward_hook(lambda module, inputs, output: output + 1.0)


def pre_hook(policy: Policy) -> None:
    policy.policy.output.register_forward_pre_hook(lambda module, inputs: (inputs[0] + 1.0,))


def parametrized(policy: Policy) -> None:
    parametrizations.weight_norm(policy.trunk.layers[0])
    with torch.no_grad():
        policy.trunk.layers[0].parametrizations.weight.original0.mul_(2.0)


def replaced_forward(policy: Policy) -> None:
    policy.policy.output.forward = lambda inputs: torch.ones(len(inputs), 2)


def in_double(policy: Policy) -> None:
    policy.double()


ALTERED = [
    subclass, dense_subclass, linear_subclass, other_layer, forward_hook, pre_hook, parametrized, replaced_forward,
    in_double,
]  # fmt: skip


@pytest.mark.parametrize("alter", ALTERED, ids=lambda function: function.__name__)
def test_what_is_not_exactly_ours_acts_in_torch(alter):
    policy, rows = built(mlp()), observed(VECTOR)
    assert type(build_actor(policy, CPU)) is NumpyActor
    blind = NumpyActor(policy)
    before = acted(blind, rows)
    alter(policy)
    actor = build_actor(policy, CPU)
    assert type(actor) is TorchActor
    with torch.no_grad():
        wanted, _, _ = policy(torch.from_numpy(rows)[None], (), torch.zeros(1, E).bool())
    np.testing.assert_allclose(acted(actor, rows), wanted[0].float().numpy(), atol=1e-6)
    if alter is not in_double:  # control: what it computes is not what plain layers would
        assert np.abs(acted(actor, rows) - before).max() > 1e-2


@pytest.mark.parametrize(("spec", "space"), [
    (CNNPolicySpec(name="cnn", channels=[4], kernels=[3], strides=[2], hidden=8), IMAGE),
    (RecurrentPolicySpec(name="gru"), VECTOR), (OwnPolicySpec(name="own.policies:Linear"), VECTOR),
], ids=["cnn", "gru", "own"])  # fmt: skip
def test_other_policies_act_in_torch(spec, space):
    actor = build_actor(built(spec, space).eval(), CPU)
    assert type(actor) is TorchActor
    parameters = acted(actor, observed(space))
    assert parameters.shape == (E, 2)
    assert parameters.dtype == np.float32


def test_another_device_acts_in_torch():
    assert type(build_actor(built(mlp()), torch.device("meta"))) is TorchActor


# ----------------------------------------------------------------------------------------------- weights and statistics
def test_weights_are_seen_where_they_are_and_where_they_go():
    policy, rows = built(mlp(trunk="separate"), actions=ACTIONS["box"]), observed(VECTOR)
    flat = FlatModel(policy, ["*"])
    flat.bind(flat.weights.clone(), flat.gradients.clone())
    actor = build_actor(policy, CPU)
    before = acted(actor, rows)
    flat.weights.mul_(0.5)  # in place: seen at once, nothing was copied
    assert_equal(policy, actor, rows)
    in_place = acted(actor, rows)
    assert np.abs(in_place - before).max() > 1e-2
    flat.point_to(flat.weights * -1.0)
    assert np.array_equal(acted(actor, rows), in_place)  # control: not before it looks
    actor.refresh()
    assert_equal(policy, actor, rows)
    assert np.abs(acted(actor, rows) - in_place).max() > 1e-2


def test_a_shared_memory_vector_from_elsewhere_is_followed():
    policy, rows = built(mlp()), observed(VECTOR)
    for parameter in policy.parameters():
        parameter.data = torch.from_numpy(np.full(parameter.shape, 0.1, np.float32))
    actor = build_actor(policy, CPU)
    assert_equal(policy, actor, rows)


@pytest.mark.parametrize(
    "space", [VECTOR, OBSERVATIONS["float64"], OBSERVATIONS["bytes"], OBSERVATIONS["matrix"]], ids=str
)
def test_observations_are_normalised_as_the_policy_does(space):
    policy, rows = built(mlp(), space, observations=True, clip=2.0), observed(space)
    actor = build_actor(policy, CPU)
    assert type(actor) is NumpyActor
    assert_equal(policy, actor, rows)
    before = acted(actor, rows)
    policy.observation_moments.update(observed(space, 100) * 3.0 + 5.0)
    actor.refresh()
    assert np.array_equal(acted(actor, rows), before)  # frozen
    policy.observation_moments.freeze()
    actor.refresh()
    assert_equal(policy, actor, rows)
    assert np.abs(acted(actor, rows) - before).max() > 1e-2
    assert policy.observation_moments.merged()[0] == 100  # acting counts nothing


def test_large_observations_keep_their_differences():
    """Subtracted in float64: 1e6 and 1e6 + 1 differ by one deviation, not by what float32 leaves of them."""
    policy = built(mlp(), spaces.Box(-np.inf, np.inf, (4,), np.float64), observations=True)
    rows = 1e9 + np.arange(4.0 * E).reshape(E, 4)
    policy.observation_moments.update(rows)
    policy.observation_moments.absorb()
    policy.observation_moments.update(rows)
    policy.observation_moments.freeze()
    actor = build_actor(policy, CPU)
    assert_equal(policy, actor, rows)
    assert len({row.tobytes() for row in acted(actor, rows)}) == E
    assert len({row.tobytes() for row in acted(actor, rows.astype(np.float32))}) < E  # control


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_a_recurrent_actor_carries_its_state_and_forgets_at_resets(cell):
    policy = built(RecurrentPolicySpec(name=cell, hidden=[8], units=6))
    actor, rows = build_actor(policy, CPU), observed(VECTOR)
    never, first = np.zeros(E, bool), np.arange(E) == 2
    begun = actor.initial_state(E)
    fresh, state = actor.act(rows, begun, never)
    assert not any(part.requires_grad for part in state)
    later, _ = actor.act(rows, state, first)
    assert np.allclose(later[2], fresh[2])
    assert (np.abs(later - fresh)[~first].max(-1) > 1e-4).all()  # control: the others remember
