"""TRPO: conjugate gradients against inverses, the bound on the KL, one step for all workers."""

from __future__ import annotations

import dataclasses
import math
import threading

import numpy as np
import pytest
import torch
from own.oracle import distance, job_of, train
from own.rl_jobs import acting_spec, first_batches, gradient, greedy, perturbed

from distml.errors import UsageError
from distml.rl.conjugate_gradient import Surface, conjugate_gradient, curvature_of
from distml.rl.on_policy import estimate
from distml.rl.trpo import Critic, MeansOverWorkers, Surrogate, matching
from distml.strategies.base import seed_everything
from distml.tasks.base import Progress
from distml.tasks.build import build_task

SGD = {"name": "sgd", "lr": 1.0}
EXACT = {"name": "rl_policies:Exact", "args": {}}
EXACT_MLP = {"name": "rl_policies:Exact", "args": {"hidden": 8}}


def trpo(**changes):
    task = {"name": "trpo", "environment": "CartPole-v1", "envs_per_worker": 4, "n_steps": 32,
            "policy": {"name": "mlp", "hidden": [16], "trunk": "separate"}}  # fmt: skip
    return task | changes


def spec(task, **changes):
    return acting_spec(task, optimizer=SGD, **changes)


def ready(scale=0.3, **changes):
    """A task, a model off its start, and a batch that it acted out."""
    task, model, (batch,) = first_batches(spec(trpo(**changes)), 1)
    perturbed(model, scale)
    with torch.no_grad():  # the weights that acted are those that were moved
        batch.parameters = model(batch.observations, batch.state, batch.resets)[0][:-1]
    return task, model, batch


def take_step(model, loss):
    """What plain SGD at rate 1 does."""
    grads = gradient(model, loss.total) / loss.count
    start = 0
    with torch.no_grad():
        for parameter in model.parameters():
            part = torch.from_numpy(grads[start : start + parameter.numel()])
            parameter -= part.view_as(parameter).to(parameter.dtype)
            start += parameter.numel()


def divergence(model, batch, old):
    parameters, _, _ = model(batch.observations, batch.state, batch.resets)
    return float(model.distribution.kl(old, parameters[:-1])[batch.valid].mean().detach())


# -------------------------------------------------------------------------------------------------- conjugate gradients
def test_conjugate_gradients_solve():
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(12, 12, generator=generator, dtype=torch.float64)
    matrix, target = root @ root.T + 0.5 * torch.eye(12), torch.randn(12, generator=generator, dtype=torch.float64)
    solution = torch.linalg.solve(matrix, target)
    torch.testing.assert_close(conjugate_gradient(lambda v: matrix @ v, target, 100), solution, rtol=0, atol=1e-8)
    rough = conjugate_gradient(lambda v: matrix @ v, target, 3)
    assert float((rough - solution).abs().max()) > 1e-3  # control
    assert not conjugate_gradient(lambda v: matrix @ v, torch.zeros(12, dtype=torch.float64), 5).any()


def explicit_fisher(model, batch, surface):
    """The mean over steps of sum_a pi(a) s_a s_a', s_a the score of action a [N, N]."""
    names, rows = list(surface.parameters), batch.valid.nonzero().tolist()
    total = torch.zeros(surface.size, surface.size, dtype=torch.float64)
    for step, env in rows:
        shown = batch.observations[step : step + 1, env : env + 1]
        log_probs = model(shown, (), torch.ones(1, 1, dtype=torch.bool))[0][0, 0].log_softmax(-1)
        for log_prob in log_probs:
            grads = torch.autograd.grad(log_prob, [surface.parameters[name] for name in names], retain_graph=True)
            score = torch.cat([one.reshape(-1) for one in grads])
            total += log_prob.exp().detach() * torch.outer(score, score)
    return total / len(rows)


@pytest.mark.parametrize("policy", [EXACT, EXACT_MLP], ids=["linear", "tanh"])
def test_the_natural_step_is_that_of_the_explicit_inverse(policy):
    task, model, batch = ready(policy=policy, step="natural", cg_iterations=200, damping=0.05, n_steps=16)
    surface, means = Surface(matching(model, is_actor=True)), MeansOverWorkers(task, batch)
    fisher = explicit_fisher(model, batch, surface)
    advantages = task._advantages(model, batch, means)
    objective = Surrogate(model, batch, advantages, 0.0)
    parameters, _, _ = model(batch.observations, batch.state, batch.resets)
    log_probs = model.distribution.log_prob(parameters[:-1], batch.actions)
    mean_gain = (log_probs * advantages)[batch.valid].mean()
    uphill = torch.cat([g.reshape(-1) for g in torch.autograd.grad(mean_gain, list(surface.parameters.values()))])
    direction = torch.linalg.solve(fisher + 0.05 * torch.eye(surface.size), uphill)
    expected = math.sqrt(2 * task.spec.max_kl / float(direction @ fisher @ direction)) * direction
    torch.testing.assert_close(task._policy_step(objective, surface, means), expected, rtol=0, atol=1e-8)
    product = curvature_of(objective(point := surface.at())[1], point)
    vector = torch.randn(surface.size, dtype=torch.float64)
    torch.testing.assert_close(means(product(vector)), fisher @ vector, rtol=0, atol=1e-8)


# ------------------------------------------------------------------------------------------------------------ the bound
@pytest.mark.parametrize("max_kl", [0.01, 0.5])
def test_a_step_obeys_the_bound_and_improves(max_kl):
    task, model, batch = ready(max_kl=max_kl, damping=1e-3)
    old = batch.parameters
    loss = task.policy_loss(model, batch, Progress())
    take_step(model, loss)
    moved = divergence(model, batch, old)
    assert 0.1 * max_kl < moved <= max_kl * (1 + 1e-3)
    assert moved == pytest.approx(loss.metrics["approx_kl"].value, rel=1e-3)
    assert loss.metrics["surrogate_gain"].value > 0


def test_a_large_natural_step_breaks_the_bound():
    task, model, batch = ready(max_kl=0.5, damping=1e-3, step="natural")
    old = batch.parameters
    take_step(model, task.policy_loss(model, batch, Progress()))
    assert divergence(model, batch, old) > 0.5 * (1 + 1e-3)


def test_no_step_is_taken_where_none_fits():
    task, model, batch = ready(max_kl=5.0, damping=1e-6, line_search_steps=1)
    monotone = Surrogate.__call__

    def never_better(self, point):
        gain, moved = monotone(self, point)
        return gain, moved + 1e9 * (moved > 1e-12)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Surrogate, "__call__", never_better)
        loss = task.policy_loss(model, batch, Progress())
    assert loss.metrics["step_taken"].value == 0.0
    assert not gradient(model, loss.total).any()


def test_the_search_leaves_the_model_as_it_is():
    task, model, batch = ready()
    before = {name: one.clone() for name, one in model.state_dict().items()}
    for method in (task.policy_loss, task.value_loss):
        method(model, batch, Progress())
    assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())
    assert all(one.grad is None for one in model.parameters())


def test_dummy_rows_have_no_part_in_it():
    task, model, batch = ready()
    assert not batch.valid.all()
    before = [gradient(model, method(model, batch, Progress()).total) for method in (task.policy_loss, task.value_loss)]
    batch.actions[~batch.valid] = 1 - batch.actions[~batch.valid]
    after = [gradient(model, method(model, batch, Progress()).total) for method in (task.policy_loss, task.value_loss)]
    np.testing.assert_array_equal(before, after)
    assert all(one.any() for one in before)


# --------------------------------------------------------------------------------------------------------------- critic
def normal_equations(model, batch, task, damping):
    """(step, values, returns) of damped least squares, for values that are linear in the observation."""
    _, values, _ = model(batch.observations, batch.state, batch.resets)
    _, returns = estimate(model, batch, values, task.spec.gamma, task.spec.gae_lambda)
    shown = batch.observations[:-1][batch.valid].double()
    inputs = torch.cat((shown, torch.ones(len(shown), 1)), 1)
    residuals = (returns - values[:-1].detach())[batch.valid]
    matrix = inputs.T @ inputs / len(inputs) + damping * torch.eye(5)
    return torch.linalg.solve(matrix, inputs.T @ residuals / len(inputs)), inputs, residuals


def test_a_linear_critic_solves_the_normal_equations_at_once():
    task, model, batch = ready(policy=EXACT, value_step=1e9, value_iterations=1, cg_iterations=50, damping=0.01)
    expected, _, _ = normal_equations(model, batch, task, 0.01)
    step = -gradient(model, (loss := task.value_loss(model, batch, Progress())).total) / loss.count
    np.testing.assert_allclose(step[-5:], expected.numpy(), atol=1e-8)  # the value's weight [1, 4] and bias [1]


def test_values_stay_in_their_region():
    task, model, batch = ready(policy=EXACT, value_step=0.01, value_iterations=1, cg_iterations=50, damping=0.01)
    whole, inputs, residuals = normal_equations(model, batch, task, 0.01)
    step = -gradient(model, (loss := task.value_loss(model, batch, Progress())).total)[-5:] / loss.count
    moved = float((inputs @ torch.from_numpy(step)).square().mean() / (2 * residuals.square().mean()))
    assert moved == pytest.approx(0.01, rel=1e-6)
    assert float((inputs @ whole).square().mean() / (2 * residuals.square().mean())) > 0.02  # control: held back


def test_more_iterations_fit_better():
    errors = []
    for iterations in (1, 5):
        task, model, batch = ready(value_iterations=iterations)
        with torch.no_grad():
            values = model(batch.observations, batch.state, batch.resets)[1]
        _, returns = estimate(model, batch, values, task.spec.gamma, task.spec.gae_lambda)
        critic = Critic(model, batch, returns)
        before = float(critic.error(values[:-1]))
        take_step(model, task.value_loss(model, batch, Progress()))
        errors.append(float(critic.error(critic({})).detach()) / before)
    assert errors[1] < 0.9 * errors[0] < 0.9


# -------------------------------------------------------------------------------------------------------------- workers
class Meeting:
    """The mean over threads, in rank order."""

    def __init__(self, size):
        self.size, self.barrier, self.parts = size, threading.Barrier(size, timeout=20.0), [None] * size

    def mean_for(self, rank):
        def group_mean(tensor):
            self.parts[rank] = tensor.detach().clone()
            self.barrier.wait()
            total = sum(self.parts[1:], start=self.parts[0].clone())
            self.barrier.wait()
            return total / self.size

        return group_mean


@pytest.mark.parametrize("method", ["policy_loss", "value_loss"])
def test_two_workers_find_the_step_of_one_with_both_halves(method):
    changes = {"policy": EXACT_MLP, "damping": 0.01, "entropy": 0.01, "cg_iterations": 100, "value_iterations": 2}
    task, model, batch = ready(**changes)  # conjugate gradients that stop early would enlarge what rounds otherwise
    whole = getattr(task, method)(model, batch, Progress())
    expected = gradient(model, whole.total) / whole.count
    halves = [batch.environments(torch.tensor(which), with_metrics=False) for which in ([0], [1, 2, 3])]
    assert sum(half.num_frames for half in halves) == batch.num_frames
    meeting, losses, workers = Meeting(2), [None, None], [ready(**changes)[:2] for _ in halves]

    def work(rank):
        own, replica = workers[rank]
        own.group_mean = meeting.mean_for(rank)
        loss = getattr(own, method)(replica, halves[rank], Progress())
        losses[rank] = (gradient(replica, loss.total), loss.count)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (first, count), (second, other) = losses
    np.testing.assert_allclose(first / count, second / other, atol=1e-12)
    np.testing.assert_allclose((first + second) / (count + other), expected, atol=1e-9)
    own, replica, _ = ready(**changes)  # control: a worker by itself finds another step
    alone = getattr(own, method)(replica, halves[0], Progress())
    assert np.abs(gradient(replica, alone.total) / alone.count - expected).max() > 1e-4


def test_strategies_that_offer_a_group_take_the_same_steps():
    task = trpo(policy=EXACT_MLP)
    found = [
        train(spec(task, workers=2, steps=4, strategy=strategy)).named
        for strategy in ("all_reduce", {"name": "parameter_server", "mode": "sync", "servers": 2})
    ]
    assert distance(*found) < 1e-12
    still = train(spec(task, workers=2, steps=1, strategy="all_reduce")).named
    assert distance(found[0], still) > 1e-3


# ----------------------------------------------------------------------------------------------------------- what works
def test_identity_is_solved_and_not_with_steps_of_no_length():
    task = trpo(environment={"id": "rl_toys:Identity"}, envs_per_worker=8)
    assert greedy(train(spec(task, steps=25))) > 7.5
    assert greedy(train(spec(task | {"max_kl": 1e-12}, steps=25))) < 6.0


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_a_memory_is_trained(cell):
    task, model, batch = ready(policy={"name": cell, "hidden": [8], "units": 8, "trunk": "separate"}, damping=1e-3)
    old = batch.parameters
    for method in (task.policy_loss, task.value_loss):
        loss = method(model, batch, Progress())
        take_step(model, loss)
    assert 0.0 < divergence(model, batch, old) <= 0.01 * (1 + 1e-3)


def test_continuous_actions_are_trained():
    task, model, batch = ready(scale=0.1, environment="Pendulum-v1", damping=1e-3)
    old = batch.parameters
    loss = task.policy_loss(model, batch, Progress())
    assert dict(zip((name for name, _ in model.named_parameters()), torch.autograd.grad(
        loss.total, list(model.parameters()), allow_unused=True, retain_graph=True), strict=True))[
        "policy.log_std"].abs().max() > 0  # fmt: skip
    take_step(model, loss)
    assert 0.0 < divergence(model, batch, old) <= 0.01 * (1 + 1e-3)


def test_frames_are_counted_once():
    task, model, batch = ready()
    assert task.policy_loss(model, batch, Progress()).frames == 0.0
    assert task.value_loss(model, batch, Progress()).frames == batch.num_frames
    empty = dataclasses.replace(batch, valid=torch.zeros_like(batch.valid), num_frames=0)
    loss = task.policy_loss(model, empty, Progress())
    assert (float(loss.total.detach()), loss.count) == (0.0, 0.0)


GROUPS = [("single", 1), ("all_reduce", 2), ({"name": "parameter_server", "mode": "sync"}, 2)]


@pytest.mark.parametrize(("strategy", "workers"), GROUPS, ids=["single", "all_reduce", "sync"])
@pytest.mark.parametrize("frozen", ["policy", "value"])
def test_a_half_that_is_frozen_stays_and_the_other_is_trained(frozen, strategy, workers):
    keys = {"strategy": strategy, "workers": workers, "init": {"freeze": [f"{frozen}.*"]}, "steps": 3}
    trained = train(spec(trpo(n_steps=8), **keys))
    seed_everything(trained.runtime.job.seed)
    fresh = dict(build_task(trained.runtime.job).build_model().named_parameters())
    model = trained.runtime.trainers[0].model
    changed = {name for name, one in model.named_parameters() if not torch.equal(one, fresh[name])}
    assert changed
    assert not [name for name in changed if name.startswith(frozen)]
    assert trained.strategies[0].progress.frames > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer": {"name": "adam", "lr": 1.0}}, "optimizer: {name: sgd, lr: 1.0}"),
        ({"optimizer": SGD | {"momentum": 0.9}}, "optimizer: {name: sgd, lr: 1.0}"),
        ({"micro_batch_size": 8}, "micro_batch_size"),
        ({"workers": 2, "strategy": {"name": "all_reduce", "compression": "bf16"}}, "remove strategy.compression"),
        ({"workers": 2, "strategy": {"name": "parameter_server", "mode": "async"}}, "needs group_mean"),
        ({"task": trpo(policy={"name": "mlp", "trunk": "shared"})}, "trunk: separate"),
    ],
)
def test_what_would_change_its_steps_is_refused(changes, message):
    job_of(spec(trpo()))
    with pytest.raises(UsageError, match=message):
        job_of(acting_spec(**({"task": trpo(), "optimizer": SGD} | changes)))


def test_own_policies_must_have_two_parts():
    with pytest.raises(UsageError, match=r"parameter module\.trunk\.weight is in neither"):
        first_batches(spec(trpo(policy={"name": "rl_policies:Entangled"})), 1)
