"""REINFORCE: whole episodes, its loss against a loop over them, and that it learns."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from own.oracle import job_of, train
from own.rl_jobs import acting_spec, alone, first_batches, gradient, greedy, perturbed, returns_of

from distml.errors import UsageError
from distml.tasks.base import Progress

BASELINES = ("none", "moving_average", "learned", "optimal")


def reinforce(**changes):
    task = {"name": "reinforce", "environment": "CartPole-v1", "envs_per_worker": 6,
            "policy": {"name": "mlp", "hidden": [16]}}  # fmt: skip
    return task | changes


@pytest.mark.parametrize(
    "environment",
    [
        {"id": "CartPole-v1"},
        {"id": "CartPole-v1", "vectorization": "sync", "max_episode_steps": 20},
        {"id": "CartPole-v1", "vectorization": "sync", "autoreset": "same_step"},
    ],
    ids=["vector", "sync", "same_step"],
)
def test_every_environment_plays_exactly_one_episode_from_its_start(environment):
    _, _, batches = first_batches(acting_spec(reinforce(environment=environment)), 3)
    starts = []
    for batch in batches:
        rollout = batch.rollout
        steps, episodes = rollout.valid.shape
        assert (len(batch), episodes) == (6, 6)
        lengths = rollout.valid.sum(0)
        assert int(lengths.max()) == steps
        for episode, length in enumerate(lengths.tolist()):
            assert rollout.valid[:length, episode].all()  # without a gap
            assert rollout.ended[:, episode].nonzero().flatten().tolist() == [length - 1]
            assert rollout.rewards[:, episode].tolist() == [1.0] * length + [0.0] * (steps - length)
        assert int(lengths.min()) < steps
        assert rollout.resets[0].all()
        assert not rollout.resets[1:].any()
        assert float(rollout.observations[0].abs().max()) <= 0.05  # where CartPole begins
        assert batch.frames == rollout.num_frames == int(lengths.sum())
        assert batch.metrics["rl/episode_return_mean"].total == int(lengths.sum())
        assert batch.metrics["rl/episode_return_mean"].count == 6
        starts.append(rollout.observations[0])
    assert not torch.equal(starts[0], starts[1])  # other episodes each time
    if "max_episode_steps" in environment:
        assert any(batch.rollout.truncated.any() for batch in batches)


@pytest.mark.parametrize("baseline", BASELINES)
@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
def test_the_loss_is_the_sum_over_episodes(baseline, weighted):
    changes = {"gamma": 0.9, "entropy": 0.1} | ({"value_coefficient": 0.7} if baseline == "learned" else {})
    spec = acting_spec(reinforce(baseline=baseline, importance_weighting=weighted, **changes))
    task, model, (batch,) = first_batches(spec, 1)
    perturbed(model, 0.1)
    loss, rollout, naive = task.loss(model, batch, Progress()), batch.rollout, 0.0
    parameters, values, _ = model(rollout.observations[:-1], (), rollout.resets[:-1])
    for episode in range(6):
        returns = plain = 0.0
        for step in reversed(range(int(rollout.valid[:, episode].sum()))):
            reward, weight = float(rollout.rewards[step, episode]), float(batch.weights[step, episode])
            returns, plain = weight * reward + 0.9 * returns, reward + 0.9 * plain
            value = values[step, episode]
            against = float(value.detach()) if batch.baseline is None else float(batch.baseline[step, episode])
            log_probs = parameters[step, episode].log_softmax(-1)
            naive = naive - log_probs[rollout.actions[step, episode]] * (returns - weight * against)
            naive = naive + 0.1 * (log_probs.exp() * log_probs).sum()
            if baseline == "learned":
                naive = naive + 0.7 * (plain - value) ** 2
    assert loss.count == 6.0
    assert loss.total.item() == pytest.approx(naive.item(), rel=1e-4)
    np.testing.assert_allclose(gradient(model, loss.total), gradient(model, naive), rtol=1e-3, atol=1e-2)


def test_micro_batches_add_up():
    task, model, (batch,) = first_batches(acting_spec(reinforce(baseline="optimal")), 1)
    whole = task.loss(model, batch, Progress())
    pieces = [task.loss(model, piece, Progress()) for piece in batch.micro_batches(4)]
    assert [piece.count for piece in pieces] == [4.0, 2.0]
    assert [piece.frames for piece in pieces] == [whole.frames, 0.0]
    total = sum(gradient(model, piece.total) for piece in pieces)
    np.testing.assert_allclose(total, gradient(model, whole.total), rtol=1e-3, atol=1e-2)


def test_epochs_use_the_same_episodes_with_weights_of_their_own():
    spec = acting_spec(reinforce(epochs=3, importance_weighting=True))
    task, model, stream = alone(spec)
    batches = []
    for step in range(4):
        batches.append(stream.next(model, Progress(version=step)))
        perturbed(model, 0.05, seed=step)
    assert batches[0].rollout is batches[1].rollout is batches[2].rollout is not batches[3].rollout
    assert [bool(batch.frames) for batch in batches] == [True, False, False, True]
    torch.testing.assert_close(batches[0].weights, torch.ones_like(batches[0].weights), rtol=0, atol=1e-4)
    assert float((batches[1].weights - 1.0).abs().max()) > 0.01
    assert not torch.equal(batches[1].weights, batches[2].weights)
    assert task.loss(model, batches[2], Progress(version=2)).metrics["rl/policy_age_mean"].value == 2.0


def test_a_moving_average_is_that_of_before_a_batch_in_all_its_uses():
    changes = {"epochs": 2, "importance_weighting": True, "baseline": "moving_average", "gamma": 1.0}
    _, model, stream = alone(acting_spec(reinforce(**changes)))
    batches = [stream.next(model, Progress(version=step)) for step in range(5)]
    held = [float(batch.baseline.unique()) for batch in batches]
    first = float(batches[0].targets[batches[0].rollout.valid].mean())
    assert held[:4] == pytest.approx([0.0, 0.0, first, first])
    assert held[4] != pytest.approx(first)


@pytest.mark.parametrize("baseline", BASELINES)
def test_every_baseline_learns(baseline):
    task = reinforce(environment={"id": "rl_toys:Identity", "max_episode_steps": 8}, envs_per_worker=16, gamma=0.5,
                     baseline=baseline)  # fmt: skip
    changes = {"steps": 100, "optimizer": {"name": "adam", "lr": 0.01}}
    assert returns_of(task, **changes) > 7.0
    if baseline == "learned":  # control
        task["environment"]["args"] = {"is_blind": True}
        assert returns_of(task, **changes) < 4.0


def test_episodes_are_used_again_and_again():
    task = reinforce(environment={"id": "rl_toys:Identity", "max_episode_steps": 8}, envs_per_worker=16, gamma=0.5,
                     epochs=4, importance_weighting=True, max_weight=3.0)  # fmt: skip
    trained = train(acting_spec(task, steps=120, optimizer={"name": "adam", "lr": 0.01}))
    assert greedy(trained) > 7.0
    assert trained.strategies[0].progress.frames == 30 * 16 * 8  # of 120 updates


@pytest.mark.parametrize("strategy", ["all_reduce", {"name": "parameter_server", "mode": "async"}, "local_sgd"],
                         ids=["all_reduce", "async", "local_sgd"])  # fmt: skip
@pytest.mark.parametrize("baseline", ["moving_average", "optimal"])
def test_two_workers_learn(strategy, baseline):
    task = reinforce(environment={"id": "rl_toys:Identity", "max_episode_steps": 8}, gamma=0.5, baseline=baseline)
    trained = train(acting_spec(task, workers=2, steps=200, strategy=strategy, evaluate={"every": 100},
                                optimizer={"name": "adam", "lr": 0.01}))  # fmt: skip
    assert greedy(trained) > 6.0


def test_a_memory_remembers_over_whole_episodes():
    task = reinforce(environment={"id": "rl_toys:Memory", "max_episode_steps": 9}, envs_per_worker=32, gamma=1.0,
                     policy={"name": "gru", "hidden": [16], "units": 16})  # fmt: skip
    assert returns_of(task, steps=150, optimizer={"name": "adam", "lr": 0.01}) == 1.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 2}, "importance_weighting: true or epochs: 1"),
        ({"baseline": "optimal", "policy": {"name": "lstm"}}, "take baseline: learned"),
    ],
)
def test_what_cannot_work_is_refused(changes, message):
    with pytest.raises(UsageError, match=message):
        job_of(acting_spec(reinforce(**changes)))


def test_what_is_seen_only_when_it_is_built_is_refused_then():
    with pytest.raises(UsageError, match=r"rl_toys:Identity has no limit of its own.*max_episode_steps"):
        first_batches(acting_spec(reinforce(environment={"id": "rl_toys:Identity"})), 1)
    with pytest.raises(UsageError, match="take baseline: learned"):
        alone(acting_spec(reinforce(baseline="optimal", policy={"name": "policies:Counter"})))
