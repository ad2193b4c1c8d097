"""Distributions over actions against torch.distributions, scipy's quadrature and draws."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from gymnasium import spaces
from scipy.integrate import quad

from distml.errors import UsageError
from distml.rl.distributions import Categorical, Distribution, SquashedGaussian, build_distribution

D = torch.distributions
LOW, HIGH = np.array([-1.0, -2.0, 0.0], np.float32), np.array([1.0, 0.5, 3.0], np.float32)

SPACES = {
    "discrete": spaces.Discrete(4), "discrete from 3": spaces.Discrete(2, start=3),
    "multi-discrete": spaces.MultiDiscrete([3, 2, 5]),
    "multi-discrete 2d": spaces.MultiDiscrete(np.array([[2, 3], [4, 2]])),
    "multi-discrete from -1": spaces.MultiDiscrete([3, 2], start=[-1, 4]), "multi-binary": spaces.MultiBinary(3),
    "box": spaces.Box(LOW, HIGH), "box 2d": spaces.Box(-1.0, 1.0, (2, 2)), "box 0d": spaces.Box(-1.0, 1.0, ()),
    "unbounded": spaces.Box(-np.inf, np.inf, (2,)), "float64": spaces.Box(-0.1, 0.1, (2,), np.float64),
}  # fmt: skip
CONTINUOUS = {name for name, space in SPACES.items() if isinstance(space, spaces.Box)}
BOUNDED = CONTINUOUS - {"unbounded"}
CASES = [(name, False) for name in SPACES] + [(name, True) for name in sorted(BOUNDED)]


def reference(space: spaces.Space, parameters: torch.Tensor, squashed: bool) -> list[D.Distribution]:
    """One torch distribution for each number of an action."""
    if isinstance(space, spaces.Box):
        means, log_stds = parameters.chunk(2, -1)
        normals = [D.Normal(mean, log_std.exp()) for mean, log_std in zip(means.T, log_stds.T, strict=True)]
        if not squashed:
            return normals
        bounds = zip(space.low.reshape(-1), space.high.reshape(-1), strict=True)
        scales = [D.AffineTransform(float(low + high) / 2, float(high - low) / 2) for low, high in bounds]
        return [
            D.TransformedDistribution(normal, [D.TanhTransform(cache_size=1), scale])
            for normal, scale in zip(normals, scales, strict=True)
        ]
    if isinstance(space, spaces.Discrete):
        sizes = [int(space.n)]
    else:
        sizes = [2] * 3 if isinstance(space, spaces.MultiBinary) else space.nvec.reshape(-1).tolist()
    return [D.Categorical(logits=logits) for logits in parameters.split(sizes, -1)]


def drawn(distribution: Distribution, rows: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Parameters [rows, P] and actions [rows, *A] drawn under them, in float64 where they are real."""
    generator = np.random.default_rng(seed)
    parameters = generator.standard_normal((rows, distribution.num_parameters)).astype(np.float32)
    actions = torch.from_numpy(distribution.sample(parameters, generator))
    return torch.from_numpy(parameters).double(), actions.double() if actions.is_floating_point() else actions


@pytest.mark.parametrize(("name", "squashed"), CASES)
def test_probability_entropy_and_divergence_are_those_of_torch(name, squashed):
    space = SPACES[name]
    distribution = build_distribution(space, squashed)
    parameters, actions = drawn(distribution, 50)
    other = drawn(distribution, 50, seed=1)[0]
    numbers = actions.reshape(50, -1).T
    wanted = reference(space, parameters, squashed)
    if squashed:  # what torch's transforms take are the environment's actions, out of the very u they come from
        numbers = [row.transforms[1](row.transforms[0](u)) for row, u in zip(wanted, numbers, strict=True)]
    log_prob = sum(row.log_prob(number) for row, number in zip(wanted, numbers, strict=True))
    before, after = reference(space, parameters, False), reference(space, other, False)
    entropy = sum(row.entropy() for row in before)
    kl = sum(D.kl_divergence(*pair) for pair in zip(before, after, strict=True))
    torch.testing.assert_close(distribution.log_prob(parameters, actions), log_prob, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(distribution.entropy(parameters), entropy, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(distribution.kl(parameters, other), kl, rtol=1e-6, atol=1e-6)
    both = distribution.log_prob_and_entropy(parameters, actions)
    torch.testing.assert_close(both, (distribution.log_prob(parameters, actions), distribution.entropy(parameters)))


@pytest.mark.parametrize(("name", "squashed"), CASES)
def test_what_is_drawn_fits_the_space_and_the_declared_shapes(name, squashed):
    space = SPACES[name]
    distribution = build_distribution(space, squashed)
    generator = np.random.default_rng(0)
    parameters = 3 * generator.standard_normal((64, distribution.num_parameters)).astype(np.float32)
    for actions in (distribution.sample(parameters, generator), distribution.mode(parameters)):
        assert actions.shape == (64, *distribution.action_shape)
        assert torch.from_numpy(actions).dtype == distribution.action_dtype
        for action in distribution.to_environment(actions):
            assert space.contains(np.asarray(action, space.dtype)), (action, space)
    leading = torch.from_numpy(parameters).view(4, 16, -1), torch.from_numpy(actions).unflatten(0, (4, 16))
    assert distribution.log_prob(*leading).shape == distribution.entropy(leading[0]).shape == (4, 16)


@pytest.mark.parametrize("name", ["discrete", "multi-discrete", "multi-discrete 2d", "multi-binary"])
def test_classes_are_drawn_as_often_as_they_are_probable(name):
    distribution = build_distribution(SPACES[name])
    generator = np.random.default_rng(0)
    row = generator.standard_normal(distribution.num_parameters).astype(np.float32)
    rows = 40_000
    actions = distribution.sample(np.tile(row, (rows, 1)), generator).reshape(rows, -1)
    for choice, wanted in zip(actions.T, reference(SPACES[name], torch.from_numpy(row), False), strict=True):
        share = np.bincount(choice, minlength=len(wanted.probs)) / rows
        noise = (wanted.probs * (1 - wanted.probs) / rows).sqrt().numpy()
        assert (np.abs(share - wanted.probs.numpy()) < 4.5 * noise).all()
        assert np.abs(share - share[::-1]).max() > 20 * noise.max()  # control: in the wrong order they would not fit
    correlation = np.corrcoef(actions.T) if actions.shape[1] > 1 else np.eye(1)
    assert np.abs(correlation - np.eye(len(correlation))).max() < 4.5 / math.sqrt(rows)


def test_a_draw_of_exactly_zero_is_a_number():
    class Zeros:
        def standard_exponential(self, shape, dtype):
            return np.zeros(shape, dtype)

    with np.errstate(all="raise"):
        logits = np.array([[0.0, 5.0, 1.0]], np.float32)
        assert Categorical(3).sample(logits, Zeros()).tolist() == [1]


def test_a_gaussian_is_drawn_with_its_mean_and_deviation_and_clipped_only_for_the_environment():
    space = SPACES["box"]
    distribution = build_distribution(space)
    row = np.array([0.5, -2.0, 1.0, math.log(0.5), math.log(0.1), math.log(2.0)], np.float32)
    actions = distribution.sample(np.tile(row, (40_000, 1)), np.random.default_rng(0))
    deviations = np.exp(row[3:])
    assert (np.abs(actions.mean(0) - row[:3]) < 4.5 * deviations / 200).all()
    np.testing.assert_allclose(actions.std(0), deviations, rtol=4.5 / math.sqrt(2 * 40_000))
    outside = (actions < space.low) | (actions > space.high)
    assert outside.any(0).all()
    clipped = distribution.to_environment(actions)
    assert (clipped[~outside] == actions[~outside]).all()
    assert np.isin(clipped[outside], [*LOW, *HIGH]).all()


def test_the_entropy_is_the_mean_of_minus_log_prob():
    for name in ("discrete", "multi-discrete", "box"):
        distribution = build_distribution(SPACES[name])
        parameters, _ = drawn(distribution, 1)
        many = parameters.expand(40_000, -1)
        actions = torch.from_numpy(distribution.sample(many.float().numpy(), np.random.default_rng(1)))
        surprise = -distribution.log_prob(many, actions)
        assert abs(surprise.mean() - distribution.entropy(parameters)[0]) < 4.5 * surprise.std() / 200


@pytest.mark.parametrize(("mean", "log_std"), [(0.0, 0.0), (1.5, -1.0), (-2.0, 0.5)])
def test_a_squashed_density_integrates_to_one_over_the_environments_actions(mean, log_std):
    space = spaces.Box(np.array([-2.0]), np.array([5.0]), dtype=np.float64)
    distribution = build_distribution(space, squashed=True)
    parameters = torch.tensor([[mean, log_std]], dtype=torch.float64)

    def density(action: float) -> float:
        u = math.atanh((action + 2.0) / 3.5 - 1.0)
        assert distribution.to_environment(np.array([[u]]))[0, 0] == pytest.approx(action, abs=1e-9)
        return float(distribution.log_prob(parameters, torch.tensor([[u]], dtype=torch.float64)).exp())

    total, _ = quad(density, -2.0, 5.0, limit=200)
    assert total == pytest.approx(1.0, abs=1e-6)
    plain = build_distribution(space)

    def density_of_u(action: float) -> float:
        u = torch.tensor([[math.atanh((action + 2.0) / 3.5 - 1.0)]])
        return float(plain.log_prob(parameters, u).exp())

    assert (
        abs(quad(density_of_u, -2.0, 5.0, limit=200)[0] - 1.0) > 0.1
    )  # control: without the Jacobian it is no density


def test_a_squashed_probability_is_finite_far_from_zero():
    distribution = SquashedGaussian(spaces.Box(-1.0, 1.0, (1,)))
    u = torch.tensor([[-60.0], [60.0]], requires_grad=True)
    log_prob = distribution.log_prob(torch.tensor([[0.0, 2.0]]).expand(2, 2), u)
    (gradient,) = torch.autograd.grad(log_prob.sum(), u)
    assert torch.isfinite(log_prob).all()
    assert torch.isfinite(gradient).all()
    assert not torch.isfinite(torch.log(1 - torch.tanh(u) ** 2)).all()  # control: the plain formula is not


def test_divergence_is_zero_of_itself_and_its_curvature_is_the_fisher_information():
    distribution = build_distribution(SPACES["discrete"])
    parameters = torch.randn(1, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert float(distribution.kl(parameters, parameters)) == 0.0
    hessian = torch.autograd.functional.hessian(lambda new: distribution.kl(parameters, new).sum(), parameters)
    probs = parameters.softmax(-1)[0]
    torch.testing.assert_close(hessian[0, :, 0], torch.diag(probs) - probs.outer(probs))


REFUSED = {
    "text": spaces.Text(5), "tuple": spaces.Tuple([spaces.Discrete(2)]), "dict": spaces.Dict(a=spaces.Discrete(2)),
    "graph": spaces.Graph(spaces.Discrete(2), None), "sequence": spaces.Sequence(spaces.Discrete(2)),
    "whole numbers": spaces.Box(0, 3, (2,), np.int64),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_other_action_spaces_are_refused_with_what_can_be_done(name):
    space = REFUSED[name]
    with pytest.raises(UsageError, match=r"are not supported, Discrete, Mult.*wrap the") as refused:
        build_distribution(space)
    assert str(space) in str(refused.value)
    assert "\n" not in str(refused.value)


def test_squashing_is_refused_where_it_means_nothing():
    for space, why in (
        (spaces.Discrete(2), "for continuous actions, not Discrete"),
        (spaces.Box(-np.inf, 1.0, (2,)), "finite bounds, low below high, not Box"),
        (spaces.Box(1.0, 1.0, (2,)), "finite bounds, low below high"),
    ):
        with pytest.raises(UsageError, match=why):
            build_distribution(space, squashed=True)
