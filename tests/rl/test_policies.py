"""Policies: shapes over spaces, names of parameters, memory against a loop step by step, users' own modules."""

from __future__ import annotations

import fnmatch
import math

import numpy as np
import pytest
import torch
from gymnasium import spaces

from distml.errors import UsageError
from distml.exchange.flat import FlatModel
from distml.rl.networks import Memory
from distml.rl.policies import Policy, build_policy
from distml.spec.rl import CNNPolicySpec, MLPPolicySpec, NormaliseSpec, OwnPolicySpec, RecurrentPolicySpec

T, E = 5, 3
VECTOR = spaces.Box(-np.inf, np.inf, (4,))
IMAGE = spaces.Box(0, 255, (2, 20, 24), np.uint8)
OBSERVATIONS = {
    "vector": VECTOR, "matrix": spaces.Box(-1.0, 1.0, (2, 3)), "float64": spaces.Box(-1.0, 1.0, (3,), np.float64),
    "bytes": spaces.Box(0, 255, (6,), np.uint8), "discrete": spaces.Discrete(5), "from 2": spaces.Discrete(3, start=2),
    "multi-discrete": spaces.MultiDiscrete([3, 2]), "multi-binary": spaces.MultiBinary(4),
}  # fmt: skip
ACTIONS = {
    "discrete": spaces.Discrete(3), "box": spaces.Box(-1.0, 1.0, (2,)), "multi": spaces.MultiDiscrete([2, 3]),
}  # fmt: skip
SMALL_CNN = {"name": "cnn", "trunk": "shared", "channels": [4, 8], "kernels": [4, 3], "strides": [2, 2], "hidden": 16}


def mlp(**keys) -> MLPPolicySpec:
    return MLPPolicySpec(**{"name": "mlp", "hidden": [16, 8], "trunk": "shared"} | keys)


def recurrent(**keys) -> RecurrentPolicySpec:
    return RecurrentPolicySpec(**{"name": "lstm", "hidden": [8], "units": 6, "trunk": "shared"} | keys)


def own(name: str, **args) -> OwnPolicySpec:
    return OwnPolicySpec(name=f"own.policies:{name}", args=args)


def observations_of(space: spaces.Space, seed: int = 0) -> torch.Tensor:
    """Draws [T, E, *O]."""
    space.seed(seed)
    return torch.as_tensor(np.stack([np.asarray(space.sample()) for _ in range(T * E)])).unflatten(0, (T, E))


def run(policy: Policy, observations: torch.Tensor, resets: torch.Tensor | None = None):
    resets = torch.zeros(observations.shape[:2], dtype=torch.bool) if resets is None else resets
    return policy(observations, policy.initial_state(observations.shape[1]), resets)


# ----------------------------------------------------------------------------------------------------- shapes and names
@pytest.mark.parametrize("spec", [mlp(), mlp(hidden=[]), recurrent(), recurrent(name="gru", trunk="separate")], ids=str)
@pytest.mark.parametrize("actions", ACTIONS)
@pytest.mark.parametrize("observations", OBSERVATIONS)
def test_every_supported_space_gives_parameters_and_values(spec, observations, actions):
    policy = build_policy(spec, OBSERVATIONS[observations], ACTIONS[actions])
    rows = observations_of(OBSERVATIONS[observations])
    parameters, values, state = run(policy, rows)
    assert parameters.shape == (T, E, policy.distribution.num_parameters)
    assert values.shape == (T, E)
    assert parameters.dtype == values.dtype == torch.float32
    assert [part.shape for part in state] == [part.shape for part in policy.initial_state(E)]
    acted, _ = policy.act(rows[0], policy.initial_state(E), torch.zeros(E, dtype=torch.bool))
    torch.testing.assert_close(acted, parameters[0])


def test_classes_are_one_hot():
    policy = build_policy(mlp(hidden=[]), spaces.MultiDiscrete([3, 2], start=[1, -1]), ACTIONS["discrete"])
    encoded = policy.encoding.tensor(torch.tensor([[1, -1], [3, 0], [2, -1]]))
    assert encoded.tolist() == [[1, 0, 0, 1, 0], [0, 0, 1, 0, 1], [0, 1, 0, 1, 0]]


SPECS = {"mlp": (mlp, VECTOR), "lstm": (recurrent, VECTOR), "cnn": (lambda **k: CNNPolicySpec(**SMALL_CNN | k), IMAGE)}


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("trunk", ["shared", "separate"])
def test_a_separate_trunk_leaves_actor_and_critic_apart(name, trunk):
    make, space = SPECS[name]
    policy = build_policy(make(trunk=trunk), space, ACTIONS["box"])
    names = [parameter for parameter, _ in policy.named_parameters()]
    assert "policy.log_std" in names
    apart = all(fnmatch.fnmatchcase(name, "policy.*") or fnmatch.fnmatchcase(name, "value.*") for name in names)
    assert apart == (trunk == "separate")
    parameters, values, _ = run(policy, observations_of(space))
    values.square().sum().backward(retain_graph=True)
    touched = {name.split(".")[0] for name, p in policy.named_parameters() if p.grad is not None and p.grad.any()}
    assert touched == ({"value"} if trunk == "separate" else {"trunk", "value"})
    policy.zero_grad()
    parameters.square().sum().backward()
    touched = {name.split(".")[0] for name, p in policy.named_parameters() if p.grad is not None and p.grad.any()}
    assert touched == ({"policy"} if trunk == "separate" else {"trunk", "policy"})


def test_weights_begin_orthogonal_with_small_actions_and_zero_biases():
    torch.manual_seed(0)
    policy = build_policy(mlp(hidden=[8, 8], log_std=-0.5), VECTOR, ACTIONS["box"])
    gains = {
        "trunk.layers.0": math.sqrt(2), "trunk.layers.1": math.sqrt(2), "policy.output": 0.01, "value.output": 1.0,
    }  # fmt: skip
    for name, gain in gains.items():
        weight = policy.get_parameter(f"{name}.weight").detach()
        small = weight if len(weight) <= weight.shape[1] else weight.T
        torch.testing.assert_close(small @ small.T, gain**2 * torch.eye(len(small)), rtol=1e-4, atol=1e-6)
        assert not policy.get_parameter(f"{name}.bias").any()
    assert policy.policy.log_std.tolist() == [-0.5, -0.5]
    again = build_policy(mlp(hidden=[8, 8]), VECTOR, ACTIONS["box"])
    torch.manual_seed(0)
    same = build_policy(mlp(hidden=[8, 8]), VECTOR, ACTIONS["box"])
    name = "trunk.layers.0.weight"
    assert torch.equal(policy.get_parameter(name), same.get_parameter(name))
    assert not torch.equal(policy.get_parameter(name), again.get_parameter(name))


def test_deviations_of_a_gaussian_do_not_depend_on_the_observation_and_are_trained():
    policy = build_policy(mlp(log_std=-1.0), VECTOR, ACTIONS["box"])
    parameters, _, _ = run(policy, observations_of(VECTOR))
    assert torch.equal(parameters[..., 2:], torch.full((T, E, 2), -1.0))
    assert parameters[..., :2].std() > 0
    policy.distribution.entropy(parameters).sum().backward()
    assert policy.policy.log_std.grad.tolist() == [T * E, T * E]


# --------------------------------------------------------------------------------------------------------------- images
def test_images_are_scaled_and_their_channels_found():
    image = np.random.default_rng(0).integers(0, 256, (E, 3, 20, 24), dtype=np.uint8)
    layouts = {(3, 20, 24): image, (20, 24, 3): image.transpose(0, 2, 3, 1)}
    outputs = []
    for shape, pixels in layouts.items():
        torch.manual_seed(0)
        policy = build_policy(CNNPolicySpec(**SMALL_CNN), spaces.Box(0, 255, shape, np.uint8), ACTIONS["discrete"])
        outputs.append(run(policy, torch.as_tensor(pixels.copy())[None])[1])
    torch.testing.assert_close(*outputs)
    torch.manual_seed(0)
    floats = build_policy(CNNPolicySpec(**SMALL_CNN), spaces.Box(0.0, 1.0, (3, 20, 24)), ACTIONS["discrete"])
    torch.testing.assert_close(run(floats, torch.as_tensor(image / np.float32(255))[None])[1], outputs[0])
    gray = build_policy(CNNPolicySpec(**SMALL_CNN), spaces.Box(0, 255, (20, 24), np.uint8), ACTIONS["discrete"])
    assert run(gray, torch.as_tensor(image[:, 0])[None])[1].shape == (1, E)


def test_the_default_is_the_nature_network():
    space = spaces.Box(0, 255, (4, 84, 84), np.uint8)
    policy = build_policy(CNNPolicySpec(name="cnn", trunk="shared"), space, spaces.Discrete(6))
    assert policy.trunk.hidden.weight.shape == (512, 64 * 7 * 7)
    assert sum(p.numel() for p in policy.trunk.parameters()) == 1_684_128  # 8,224 + 32,832 + 36,928 + 1,606,144


@pytest.mark.parametrize(("space", "keys", "why"), [
    (VECTOR, {}, "needs images, a Box of .* not Box.*; take mlp"),
    (spaces.Discrete(3), {}, "needs images, .* not Discrete"),
    (spaces.Box(0, 255, (4, 20, 20, 3), np.uint8), {}, "needs images"),
    (spaces.Box(0, 9, (3, 20, 20), np.int32), {}, "uint8 or floats"),
    (spaces.Box(0, 255, (3, 20, 20), np.uint8), {"name": "cnn"}, r"layer 3's kernel 3 .* 1 x 1 \(.* 20 x 20\)"),
])  # fmt: skip
def test_what_is_no_image_is_refused(space, keys, why):
    spec = CNNPolicySpec(**keys) if keys else CNNPolicySpec(**SMALL_CNN)
    with pytest.raises(UsageError, match=why) as refused:
        build_policy(spec, space, ACTIONS["discrete"])
    assert "\n" not in str(refused.value)


# --------------------------------------------------------------------------------------------------------------- memory
def step_by_step(policy: Policy, observations: torch.Tensor, resets: torch.Tensor, cut: bool = True):
    """Parameters, values and state, one step at a time, the state replaced by the initial one at each reset."""
    state, parameters, values = policy.initial_state(E), [], []
    never = torch.zeros(1, E, dtype=torch.bool)
    for row, reset in zip(observations, resets, strict=True):
        if cut:
            fresh = policy.initial_state(E)
            state = tuple(torch.where(reset[:, None], new, old) for new, old in zip(fresh, state, strict=True))
        out, value, state = policy(row[None], state, never)
        parameters.append(out[0])
        values.append(value[0])
    return torch.stack(parameters), torch.stack(values), state


RESETS = {
    "none": [], "first": [(0, 0), (0, 1), (0, 2)], "middle": [(2, 1)], "several": [(1, 0), (2, 0), (2, 2), (4, 1)],
}  # fmt: skip


@pytest.mark.parametrize("resets", RESETS)
@pytest.mark.parametrize("trunk", ["shared", "separate"])
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_time_in_pieces_is_time_step_by_step(cell, trunk, resets):
    torch.manual_seed(0)
    policy = build_policy(recurrent(name=cell, trunk=trunk), VECTOR, ACTIONS["discrete"])
    mask = torch.zeros(T, E, dtype=torch.bool)
    for place in RESETS[resets]:
        mask[place] = True
    start = tuple(torch.randn(part.shape) for part in policy.initial_state(E))
    observations = observations_of(VECTOR)
    got = run(policy, observations, mask)
    wanted = step_by_step(policy, observations, mask)
    torch.testing.assert_close(got, wanted)
    if resets not in ("none", "first"):  # control: without the resets it is something else
        other = step_by_step(policy, observations, mask, cut=False)
        assert (other[1] - got[1]).abs().max() > 1e-3
    one, other = policy(observations, start, mask), policy(observations, policy.initial_state(E), mask)
    since = mask.float().cummax(0).values.bool()  # what comes after a reset has forgotten the state at the start
    torch.testing.assert_close(one[1][since], other[1][since])
    assert not torch.isclose(one[1][~since], other[1][~since]).any()


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_acting_step_by_step_is_what_is_learned_from(cell):
    policy = build_policy(recurrent(name=cell, trunk="separate"), VECTOR, ACTIONS["box"])
    mask = torch.zeros(T, E, dtype=torch.bool)
    mask[0], mask[3, 1] = True, True
    observations, state = observations_of(VECTOR), policy.initial_state(E)
    parameters, _, last = run(policy, observations, mask)
    for step in range(T):
        out, state = policy.act(observations[step], state, mask[step])
        torch.testing.assert_close(out, parameters[step])
    torch.testing.assert_close(state, last)


@pytest.mark.parametrize("is_reset", [True, False])
def test_no_gradient_flows_over_a_reset(is_reset):
    policy = build_policy(recurrent(), VECTOR, ACTIONS["discrete"])
    observations = observations_of(VECTOR).requires_grad_()
    mask = torch.zeros(T, E, dtype=torch.bool)
    mask[2, 1] = is_reset
    _, values, _ = run(policy, observations, mask)
    values[4].sum().backward()
    reached = observations.grad.abs().sum(-1) > 0
    assert reached[:, [0, 2]].all()
    assert reached[:, 1].tolist() == [not is_reset, not is_reset, True, True, True]  # control: without it, it flows


def test_a_state_that_is_not_a_number_ends_with_its_episode():
    memory = Memory(4, [], "tanh", "lstm", 6)
    state = tuple(torch.full((E, 6), math.nan) for _ in range(2))
    features, _ = memory(observations_of(VECTOR), state, torch.ones(T, E, dtype=torch.bool))
    assert torch.isfinite(features).all()


def test_weights_that_move_are_followed():
    for spec in (mlp(), recurrent()):
        policy = build_policy(spec, VECTOR, ACTIONS["discrete"])
        flat, observations = FlatModel(policy, ["*"]), observations_of(VECTOR)
        flat.bind(flat.weights.clone(), flat.gradients.clone())
        before = run(policy, observations)[1]
        flat.point_to(torch.zeros_like(flat.weights))
        assert not run(policy, observations)[1].any()
        assert before.any()


@pytest.mark.parametrize("spec", [mlp(), recurrent()], ids=["mlp", "lstm"])
def test_in_float64_it_computes_the_same_with_more_digits(spec):
    policy = build_policy(spec, VECTOR, ACTIONS["box"])
    observations = observations_of(VECTOR)
    single = run(policy, observations)
    policy.double()
    double = run(policy, observations)
    assert double[1].dtype == torch.float64
    torch.testing.assert_close(double[1].float(), single[1])


# -------------------------------------------------------------------------------------------------------- normalisation
@pytest.mark.parametrize("spec", [mlp(), recurrent()], ids=["mlp", "lstm"])
def test_observations_are_normalised_with_what_is_frozen(spec):
    space = spaces.Box(-np.inf, np.inf, (2, 2))
    torch.manual_seed(0)
    policy = build_policy(spec, space, ACTIONS["discrete"], NormaliseSpec(observations=True, rewards=True, clip=1.0))
    torch.manual_seed(0)
    plain = build_policy(spec, space, ACTIONS["discrete"])
    assert plain.observation_moments is plain.reward_moments is None
    assert policy.reward_moments.shape == ()
    assert policy.observation_moments.shape == (2, 2)
    observations = 50 + 7 * observations_of(space)
    policy.observation_moments.update(observations)
    policy.observation_moments.freeze()
    by_hand = (observations - observations.mean((0, 1))) / observations.std((0, 1), correction=0)
    torch.testing.assert_close(run(policy, observations)[1], run(plain, by_hand.clamp(-1, 1))[1], rtol=1e-4, atol=1e-5)
    assert (run(plain, observations)[1] - run(policy, observations)[1]).abs().max() > 0.1  # control
    assert {name for name in policy.state_dict() if "moments" in name} == {
        f"{kind}_moments.{name}" for kind in ("observation", "reward")
        for name in ("count", "mean", "m2", "new_count", "new_total", "new_squares")
    }  # fmt: skip


def test_what_cannot_be_normalised_is_refused():
    on = NormaliseSpec(observations=True)
    with pytest.raises(UsageError, match=r"only a Box .* not Discrete\(5\)"):
        build_policy(mlp(), OBSERVATIONS["discrete"], ACTIONS["discrete"], on)
    with pytest.raises(UsageError, match="scales images by itself"):
        build_policy(CNNPolicySpec(**SMALL_CNN), IMAGE, ACTIONS["discrete"], on)


@pytest.mark.parametrize("space", [
    spaces.Dict(a=spaces.Discrete(2)), spaces.Tuple([VECTOR]), spaces.Text(4), spaces.Sequence(VECTOR),
    spaces.Graph(VECTOR, None),
], ids=lambda space: type(space).__name__)  # fmt: skip
@pytest.mark.parametrize("spec", [mlp(), recurrent(), own("Linear")], ids=["mlp", "lstm", "own"])
def test_other_observation_spaces_are_refused_with_a_way_out(spec, space):
    with pytest.raises(UsageError, match=r"are not supported, Box, Discrete.*FlattenObs") as refused:
        build_policy(spec, space, ACTIONS["discrete"])
    assert str(space) in str(refused.value)
    assert "\n" not in str(refused.value)


# ------------------------------------------------------------------------------------------------------------------ own
def test_an_own_module_is_flattened_over_time_and_left_as_it_was():
    policy = build_policy(own("Linear", scale=2.0), spaces.Box(-1.0, 1.0, (4,), np.float64), ACTIONS["discrete"])
    module = type(policy.module)(VECTOR, ACTIONS["discrete"], scale=2.0)
    module.load_state_dict(policy.module.state_dict())
    assert not policy.module.norm.num_batches_tracked
    module.eval()
    observations = observations_of(VECTOR).double()
    parameters, values, state = run(policy, observations)
    wanted = module(observations.flatten(0, 1).float())
    torch.testing.assert_close((parameters.flatten(0, 1), values.flatten(0, 1)), wanted)
    assert state == ()
    assert not policy.is_recurrent


def test_looking_at_what_an_own_module_gives_draws_nothing():
    torch.manual_seed(0)
    policy = build_policy(own("Noisy"), VECTOR, ACTIONS["discrete"])
    drawn = torch.rand(3)
    torch.manual_seed(0)
    module = type(policy.module)(VECTOR, ACTIONS["discrete"])
    assert torch.equal(torch.rand(3), drawn)
    torch.manual_seed(0)
    module(observations_of(VECTOR).flatten(0, 1))
    assert not torch.equal(torch.rand(3), drawn)  # control


def test_a_policy_is_the_same_whenever_it_is_asked():
    observations = observations_of(VECTOR)
    policy = build_policy(own("Linear"), VECTOR, ACTIONS["discrete"])
    assert not any(module.training for module in policy.modules())
    policy.train()
    first, second = (run(policy, observations)[0] for _ in range(2))
    assert torch.equal(first, second)
    assert not policy.module.norm.num_batches_tracked
    torch.nn.Module.train(policy)  # control: dropout draws
    assert not torch.equal(*(run(policy, observations)[0] for _ in range(2)))


def test_recurrent_layers_stay_as_a_gpu_needs_them_to_be_trained():
    policy = build_policy(recurrent(), VECTOR, ACTIONS["discrete"])
    for mode in (True, False):
        policy.train(mode)
        assert [module for module in policy.modules() if module.training] == [each.cell for each in policy.memories]
    policy.memories[0].cell.dropout = 0.5
    assert policy.memories[0].cell not in [module for module in policy.train().modules() if module.training]


@pytest.mark.parametrize("action", ["discrete", "multi"])
def test_deviations_of_actions_that_have_none_are_refused(action):
    with pytest.raises(UsageError, match=r"policy\.log_std -1 is for continuous actions, not .*Discrete"):
        build_policy(mlp(log_std=-1.0), VECTOR, ACTIONS[action])
    build_policy(mlp(log_std=0.0), VECTOR, ACTIONS[action])


def test_an_own_module_with_a_state_counts_the_steps_of_its_episode():
    policy = build_policy(own("Counter"), VECTOR, ACTIONS["discrete"])
    assert policy.is_recurrent
    mask = torch.zeros(T, E, dtype=torch.bool)
    mask[3, 1] = True
    _, values, state = run(policy, observations_of(VECTOR), mask)
    assert values.T.tolist() == [[1, 2, 3, 4, 5], [1, 2, 3, 1, 2], [1, 2, 3, 4, 5]]
    _, state = policy.act(observations_of(VECTOR)[0], state, torch.zeros(E, dtype=torch.bool))
    assert state[0].tolist() == [[6], [3], [6]]


@pytest.mark.parametrize(("spec", "why"), [
    (own("ValueColumn"), r"must return .* of 6 observations with the shapes \(\(6, 3\), \(6,\)\), "
                         r"not \(\(6, 3\), \(6, 1\)\)"),
    (own("OneThing"), r"with the shapes \(\(6, 3\), \(6,\)\), not \(6, 3\)"),
    (own("Raises"), r"fails on observations of Box.*: RuntimeError: .*\(policies.py:\d+\)"),
    (own("LostState"), r"initial_state\(3\) must give tensors \[3, ...\], not \(\(1, 4\),\)"),
    (own("OddState"), r"the shapes \(\(2, 3, 3\), \(2, 3\), \(\(3, 1\),\)\), not .*\(\(3,\),\)"),
    (own("NoModule"), "NoModule in own.policies is not a subclass of torch.nn.Module"),
    (own("Absent"), "Absent in own.policies is not"),
    (own("Linear", width=3), "cannot be constructed: TypeError: .*width"),
    (OwnPolicySpec(name="own.nowhere:Linear"), "'own.nowhere:Linear' cannot be imported"),
])  # fmt: skip
def test_an_own_module_that_does_not_fit_is_refused_in_one_line(spec, why):
    with pytest.raises(UsageError, match=why) as refused:
        build_policy(spec, VECTOR, ACTIONS["discrete"])
    assert "\n" not in str(refused.value)
