"""Estimators of the policy's gradient against the gradient itself, enumerated; what a baseline does to their variance.

A mean over many batches is held against the exact value in units of its own standard error.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from own.rl_jobs import acting_spec, alone, gradient, perturbed
from own.rl_toys import Arms, TwoPulls

from distml.rl.reinforce import prepared, ratio_of_others, remember, squared_scores
from distml.tasks.base import Progress

ARMS = {"id": "rl_toys:Arms", "max_episode_steps": 1}
PULLS = {"id": "rl_toys:TwoPulls", "max_episode_steps": 2}
BASELINES = ("none", "moving_average", "learned", "optimal")


def made(environment, episodes=16, **changes):
    """A task whose policy is logits and values, both linear in what is shown, with weights that are not zero."""
    task = {"name": "reinforce", "environment": environment, "envs_per_worker": episodes, "gamma": 1.0,
            "policy": {"name": "mlp", "hidden": [], "trunk": "separate"}}  # fmt: skip
    if changes.get("baseline", "learned") == "learned":
        task["value_coefficient"] = 0.0
    task, model, stream = alone(acting_spec(task | changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.policy.output.bias += torch.linspace(1.0, -1.0, len(model.policy.output.bias))
        model.value.output.bias += 1.0
    if "return_total" in dict(model.named_buffers()):  # as after some batches
        model.return_total.fill_(1.5)
        model.return_weight.fill_(1.0)
    return task, model, stream


def exact_gradient(model, environment):
    """Of the expected return, over every course that an episode can take."""

    def probabilities(place, size):
        shown = torch.ones(1, 1, 1) if size is None else torch.tensor([[place]])
        parameters, _, _ = model(shown, (), torch.ones(1, 1, dtype=torch.bool))
        return parameters[0, 0].softmax(-1)

    if environment is ARMS:
        return gradient(model, probabilities(0, None) @ torch.tensor(Arms().rewards))
    start = probabilities(0, 3)
    after = torch.stack([probabilities(1 + arm, 3) for arm in (0, 1)])
    rewards = torch.from_numpy(TwoPulls.first[:, None] + TwoPulls.second).float()
    return gradient(model, (start[:, None] * after * rewards).sum())


def estimates(task, model, collect, batches):
    """The estimated gradient of each batch, in rows."""
    found = []
    for _ in range(batches):
        loss = task.loss(model, prepared(task.spec, model, collect()), Progress())
        found.append(-gradient(model, loss.total) / loss.count)
    return np.stack(found)


def deviations(rows, exact):
    """How many standard errors the mean is off, in the worst direction."""
    errors = np.abs(rows.mean(0) - exact)
    standard = rows.std(0, ddof=1) / np.sqrt(len(rows))
    return float((errors / np.maximum(standard, 1e-9))[(errors > 1e-6) | (standard > 1e-9)].max())


@pytest.mark.parametrize("environment", [ARMS, PULLS], ids=["arms", "pulls"])
@pytest.mark.parametrize("baseline", BASELINES)
def test_the_mean_is_the_exact_gradient(baseline, environment):
    task, model, stream = made(environment, baseline=baseline)
    rows = estimates(task, model, lambda: stream.collector.episodes_of(model, 0), 250)
    exact = exact_gradient(model, environment)
    assert np.abs(exact).max() > 0.1
    assert deviations(rows, exact) < 3.0
    assert deviations(rows, 1.5 * exact) > 5.0  # control


def test_baselines_lower_the_variance_and_the_optimal_one_most():
    variances = {}
    for baseline in BASELINES:
        task, model, stream = made(ARMS, episodes=64, baseline=baseline)
        rows = estimates(task, model, lambda stream=stream, model=model: stream.collector.episodes_of(model, 0), 250)
        variances[baseline] = float(rows.var(0).sum())
    assert variances["optimal"] < 0.9 * min(variances["moving_average"], variances["learned"])
    assert max(variances["moving_average"], variances["learned"]) < 0.6 * variances["none"]


def test_an_episode_held_against_itself_is_biased():
    """Why the optimal baseline leaves an episode's own return out: with it in, the same test fails."""
    task, model, stream = made(ARMS, episodes=4, baseline="optimal")
    exact = exact_gradient(model, ARMS)

    def biased(rollout):
        batch = prepared(task.spec, model, rollout)
        squares = squared_scores(model, rollout)
        whole = (squares * batch.returns).sum(1, keepdim=True) / squares.sum(1, keepdim=True)
        batch.baseline = whole.expand_as(batch.returns)
        loss = task.loss(model, batch, Progress())
        return -gradient(model, loss.total) / loss.count

    rows = np.stack([biased(stream.collector.episodes_of(model, 0)) for _ in range(250)])
    assert deviations(rows, exact) > 5.0
    assert deviations(estimates(task, model, lambda: stream.collector.episodes_of(model, 0), 250), exact) < 3.0


@pytest.mark.parametrize("baseline", BASELINES)
def test_episodes_of_another_policy_give_the_same_gradient_when_weighted(baseline):
    weighted = {"importance_weighting": True, "max_weight": 1e6, "baseline": baseline}
    task, model, stream = made(PULLS, **weighted)
    _, other, _ = made(PULLS, **weighted)
    perturbed(other, 0.4)
    rows = estimates(task, model, lambda: stream.collector.episodes_of(other, 0), 400)
    exact = exact_gradient(model, PULLS)
    assert deviations(rows, exact) < 3.0
    control, _, _ = made(PULLS, baseline=baseline)
    rows = estimates(control, model, lambda: stream.collector.episodes_of(other, 0), 400)
    assert deviations(rows, exact) > 5.0


def test_weights_are_products_of_ratios_and_cut_off():
    task, model, stream = made(PULLS, importance_weighting=True, max_weight=1.2)
    _, other, _ = made(PULLS)
    perturbed(other, 0.4)
    rollout = stream.collector.episodes_of(other, 0)
    batch = prepared(task.spec, model, rollout)
    ones = torch.ones(2, 16, dtype=torch.bool)
    new, old = (policy(rollout.observations[:-1], (), ones)[0].log_softmax(-1) for policy in (model, other))
    for episode in range(16):
        product, weights = 1.0, []
        for step in range(2):
            action = rollout.actions[step, episode]
            product *= (new[step, episode, action] - old[step, episode, action]).exp().item()
            weights.append(min(product, 1.2))
        assert batch.weights[:, episode].tolist() == pytest.approx(weights, rel=1e-4)
        rewards = (batch.weights[:, episode] * rollout.rewards[:, episode]).tolist()
        assert batch.returns[:, episode].tolist() == pytest.approx([sum(rewards), rewards[1]], rel=1e-4)
    assert 0 < int((batch.weights == np.float32(1.2)).sum()) < 32


def test_squared_scores_are_those_of_single_steps():
    _, model, stream = made({"id": "CartPole-v1"}, episodes=3, policy={"name": "mlp", "hidden": [5]})
    perturbed(model, 0.3)
    rollout = stream.collector.episodes_of(model, 0)
    squares = squared_scores(model, rollout)
    assert not rollout.valid.all()
    assert (squares[~rollout.valid] == 0).all()
    for step, episode in rollout.valid.nonzero().tolist()[::7]:
        shown = rollout.observations[step : step + 1, episode : episode + 1]
        parameters, _, _ = model(shown, (), torch.ones(1, 1, dtype=torch.bool))
        score = gradient(model, parameters[0, 0].log_softmax(-1)[rollout.actions[step, episode]])
        assert float(squares[step, episode]) == pytest.approx((score**2).sum(), rel=1e-4)


def test_the_optimal_baseline_off_policy_by_hand():
    """b = sum w g^2 G / sum w^2 g^2 over the other episodes, for each step."""
    task, model, stream = made(PULLS, episodes=5, baseline="optimal", importance_weighting=True)
    _, other, _ = made(PULLS)
    perturbed(other, 0.4)
    rollout = stream.collector.episodes_of(other, 0)
    batch, squares = prepared(task.spec, model, rollout), squared_scores(model, rollout)
    for step in range(2):
        for episode in range(5):
            above = below = 0.0
            for j in set(range(5)) - {episode}:
                weight, square = float(batch.weights[step, j]), float(squares[step, j])
                above += weight * square * float(batch.returns[step, j])
                below += weight**2 * square
            assert float(batch.baseline[step, episode]) == pytest.approx(above / below, rel=1e-4)
    assert float((batch.weights - 1.0).abs().max()) > 0.05


def test_ratios_of_others():
    above, below = torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([[1.0, 0.0, 1.0]])
    assert ratio_of_others(above, below).tolist() == [[6.0, 2.5, 3.0]]
    assert ratio_of_others(torch.ones(2, 1), torch.ones(2, 1)).tolist() == [[0.0], [0.0]]


def test_the_moving_average_is_that_of_earlier_batches():
    _, model, stream = made(PULLS, baseline="moving_average", decay=0.8)
    model.return_total.zero_()
    model.return_weight.zero_()
    means, seen = [], []
    for _ in range(4):
        batch = stream.next(model, Progress())
        seen.append(float(batch.baseline[0, 0]))
        means.append(float(batch.targets.mean()))
    expected = [0.0]
    for last in range(1, 4):
        shares = 0.8 ** np.arange(last - 1, -1, -1)
        expected.append(float((shares * means[:last]).sum() / shares.sum()))
    assert seen == pytest.approx(expected, rel=1e-5)
    before = model.return_weight.item()
    remember(model, 1.0, batch)  # a decay of 1 takes nothing in
    assert model.return_weight.item() == before
