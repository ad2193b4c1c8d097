"""actor_critic: its gradient against a loop by hand, one worker against a serial actor-critic, and what it learns."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from own.advantages import by_hand
from own.oracle import job_of, spec_of, train
from own.rl_jobs import acting_spec

from distml.exchange.flat import to_numpy
from distml.rl.environments import EnvironmentFailed, Environments, training_seeds
from distml.runtime.inline import InlineRuntime
from distml.strategies.base import seed_everything
from distml.tasks.base import Part, Progress
from distml.tasks.build import build_task
from distml.tasks.data import mix
from distml.tasks.sources import SourceTree

ASYNC = {"name": "parameter_server", "mode": "async"}


def task_of(**changes):
    environment = changes.pop("environment", "CartPole-v1")
    return {"name": "actor_critic", "environment": environment, "envs_per_worker": 4, "n_steps": 6,
            "policy": {"name": "mlp", "hidden": [8]}, **changes}  # fmt: skip


def a3c(workers=1, steps=12, task=None, strategy=None, **changes):
    spec = spec_of(task or task_of(), workers=workers, steps=steps, strategy=strategy or ASYNC,
                   optimizer={"name": "adam", "lr": 0.01}, **changes)  # fmt: skip
    del spec["batch_size"]
    return spec


def built(**changes):
    job = job_of(a3c(task=task_of(**changes)))
    task = build_task(job)
    torch.manual_seed(0)
    model = task.build_model()
    return job, task, model, task.stream(Part(0, 1, 5, "train"))


def test_batch_size_follows_from_environments_and_steps():
    assert job_of(a3c(workers=3)).batch_size == 3 * 4 * 6


@pytest.mark.parametrize("gae_lambda", [1.0, 0.6])
def test_the_loss_is_that_of_a_loop_over_rows(gae_lambda):
    """In float64, term by term; dummy rows and ends of both kinds occur."""
    environment = {"id": "own.counting:Counting", "args": {"length": 3}}
    _, task, model, stream = built(environment=environment, gae_lambda=gae_lambda, entropy=0.1, value_coefficient=0.3)
    batch = stream.next(model, Progress())
    batch.rewards[2, 0], batch.truncated[2, 0], batch.terminated[2, 0] = 7.0, True, False
    with torch.no_grad():
        parameters, values, _ = model(batch.observations, batch.state, batch.resets)
    rewards, known = batch.rewards.double().numpy(), values.double().numpy()
    advantages = by_hand(rewards, known, batch.terminated.numpy(), batch.truncated.numpy(), 0.99, gae_lambda)
    total, count = 0.0, 0
    for e in range(4):
        for t in range(6):
            if not batch.valid[t, e]:
                continue
            log_probs = parameters[t, e].double().log_softmax(-1)
            advantage = advantages[t, e]
            total -= float(log_probs[batch.actions[t, e]]) * advantage
            total += 0.1 * float((log_probs.exp() * log_probs).sum()) + 0.3 * advantage**2
            count += 1
    loss = task.loss(model, batch, Progress())
    assert (loss.count, loss.frames) == (count, count)
    assert 0 < count < 24
    assert float(loss.total) == pytest.approx(total, rel=1e-5)


def test_final_observations_are_bootstrapped_where_environments_begin_anew_in_the_same_step():
    """The same episodes in both modes give the same gradient, up to the dummy rows that only one of them has."""
    gradients = {}
    for mode, steps in (("next_step", 7), ("same_step", 6)):
        environment = {"id": "own.counting:Counting", "args": {"length": 3, "truncates": True}, "autoreset": mode}
        _, task, model, stream = built(environment=environment, n_steps=steps, entropy=0.0)
        batch = stream.next(model, Progress())
        batch.actions.zero_()
        loss = task.loss(model, batch, Progress())
        assert loss.count == 24
        (loss.total / loss.count).backward()
        gradients[mode] = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    torch.testing.assert_close(gradients["next_step"], gradients["same_step"], atol=1e-5, rtol=1e-4)


def test_without_the_final_value_a_truncated_episode_looks_worse():
    environment = {"id": "own.counting:Counting", "args": {"length": 3, "truncates": True}, "autoreset": "same_step"}
    _, task, model, stream = built(environment=environment)
    batch = stream.next(model, Progress())
    with_final = float(task.loss(model, batch, Progress()).total)
    batch.final = torch.zeros_like(batch.final) + 1000.0
    assert float(task.loss(model, batch, Progress()).total) != pytest.approx(with_final, rel=1e-3)


def test_what_dummy_rows_hold_does_not_matter():
    environment = {"id": "own.counting:Counting", "args": {"length": 3}}
    _, task, model, stream = built(environment=environment)
    batch = stream.next(model, Progress())
    before = float(task.loss(model, batch, Progress()).total)
    batch.rewards[~batch.valid] = 1e6
    batch.actions[~batch.valid] = 0
    assert float(task.loss(model, batch, Progress()).total) == before
    batch.rewards[0, 0] = 1e6  # a valid row does matter
    assert float(task.loss(model, batch, Progress()).total) != before


@pytest.mark.parametrize("name", ["actor_critic", "trpo"])
def test_every_update_learns_from_something(name):
    """One environment whose every other row is a dummy, one step at a time."""
    optimizer = {"name": "sgd", "lr": 1.0} if name == "trpo" else {"name": "adam", "lr": 0.01}
    task = task_of(environment={"id": "own.counting:Counting", "args": {"length": 1}}, envs_per_worker=1, n_steps=1)
    trained = train(acting_spec(task | {"name": name}, steps=6, optimizer=optimizer))
    progress = trained.strategies[0].progress
    assert (progress.version, progress.frames) == (6, 6)


def test_a3c_with_one_worker_is_a_serial_actor_critic_bitwise():
    """Acting, loss and Adam in one plain loop, with torch's own optimiser."""
    trained = train(a3c(steps=8))
    job = trained.runtime.job
    task = build_task(job)
    seed_everything(job.seed)
    model = task.build_model()
    stream = task.stream(Part(0, 1, mix(job.seed, 0, 0), "train"))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, fused=True)
    for version in range(8):
        loss = task.loss(model, stream.next(model, Progress(version)), Progress(version))
        loss.total.backward()
        for parameter in model.parameters():
            parameter.grad /= loss.count
        optimizer.step()
        optimizer.zero_grad()
    for name, parameter in model.named_parameters():
        assert np.array_equal(trained.named[name], to_numpy(parameter)), name


def test_two_synchronous_workers_take_the_mean_over_all_valid_frames():
    """A2C of two workers: gradients of sums over the sum of counts, not the mean of two means."""
    environment = {"id": "own.counting:Counting", "args": {"length": 3}}
    trained = train(a3c(workers=2, steps=1, task=task_of(environment=environment), strategy={"name": "all_reduce"}))
    job = trained.runtime.job
    total, model = None, None
    counts = []
    for rank in range(2):
        task = build_task(job)
        seed_everything(job.seed)
        model = task.build_model()
        loss = task.loss(model, task.stream(Part(rank, 2, mix(job.seed, rank, 0), "train")).next(model, Progress()),
                         Progress())  # fmt: skip
        loss.total.backward()
        counts.append(loss.count)
        grads = [parameter.grad for parameter in model.parameters()]
        total = grads if total is None else [a + b for a, b in zip(total, grads, strict=True)]
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, fused=True)
    for parameter, grad in zip(model.parameters(), total, strict=True):
        parameter.grad = grad / sum(counts)
    optimizer.step()
    for name, parameter in model.named_parameters():
        np.testing.assert_allclose(trained.named[name], to_numpy(parameter), atol=1e-6)
    assert max(strategy.progress.frames for strategy in trained.strategies) == sum(counts)


def test_a_policys_age_is_how_stale_its_gradient_was():
    trained = train(a3c(workers=3, steps=30, inline={"speeds": [1, 1, 0.2]}, log={"every": 1, "to": []}))
    ages = [report.means["rl/policy_age_mean"] for report in trained.reports if "rl/policy_age_mean" in report.means]
    assert all(total == 0 for total, _ in ages)  # a gradient is of the weights that acted; staleness is the servers'


def test_workers_act_in_different_environments():
    runtime = InlineRuntime(job_of(a3c(workers=2)), SourceTree())
    runtime.build(None)
    first, second = (trainer.stream.collector.environments for trainer in runtime.trainers)
    assert not set(first.seeds) & set(second.seeds)
    assert not np.array_equal(first.reset(), second.reset())


def test_evaluation_does_not_depend_on_how_many_share_it():
    _, task, model, _ = built(evaluation={"episodes": 7, "modes": ["greedy"]})
    whole = task.evaluate(model, Part(0, 1, 3, "validation"), Progress())
    parts = [task.evaluate(model, Part(index, 3, 3, "validation"), Progress()) for index in range(3)]
    mean = whole["return_greedy_mean"]
    assert (mean.total, mean.count) == (sum(p["return_greedy_mean"].total for p in parts), 7)
    assert sum(p["return_greedy_mean"].count for p in parts) == 7
    test = task.evaluate(model, Part(0, 1, 3, "test"), Progress())
    assert test["return_greedy_mean"].total != mean.total  # other seeds


def test_each_evaluated_episode_is_a_whole_one():
    environment = {"id": "own.counting:Counting", "args": {"length": 4}}
    for mode in ("next_step", "same_step"):
        _, task, model, _ = built(environment={**environment, "autoreset": mode}, evaluation={"episodes": 5})
        found = task.evaluate(model, Part(0, 1, 3, "validation"), Progress())
        assert found["return_greedy_mean"].value == found["return_sampled_mean"].value == 1 + 2 + 3 + 4
        assert found["episode_length_greedy_mean"].value == 4
    _, task, model, _ = built(environment=environment, evaluation={"episodes": 5, "max_frames": 2})
    found = task.evaluate(model, Part(0, 1, 3, "validation"), Progress())
    assert found["return_greedy_mean"].value == 1 + 2


def test_a_score_that_is_no_number_says_whose_it_is():
    _, task, model, _ = built(environment={"id": "own.counting:Counting", "args": {"nan_at": 2}})
    with pytest.raises(EnvironmentFailed, match=r"gave a reward that is not finite \(environment 0, seed 0, step 1\)"):
        task.evaluate(model, Part(0, 1, 3, "validation"), Progress())


def test_training_seeds_of_a_stream_are_not_those_of_an_evaluation():
    _, _, _, stream = built()
    assert min(stream.collector.environments.seeds) >= 2**30


def test_a_stream_begins_anew_with_the_versions_seed():
    spec = a3c(steps=10, strategy={"name": "single"}, checkpoint={"every": 5})
    trained = train(spec)
    resumed = copy.deepcopy(spec)
    snapshot = next(event for event in trained.snapshots if event.version == 5)
    assert snapshot.own["stream"] == "begins anew"
    seeds = trained.runtime.trainers[0].stream.collector.environments.seeds
    last = mix(job_of(resumed).seed, 0, 5)  # after the end nothing begins
    assert seeds == training_seeds(mix(last, 0), 4)
    assert Environments(job_of(resumed).task.environment, seeds).num_envs == 4
