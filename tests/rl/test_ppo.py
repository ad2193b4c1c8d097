"""PPO: what a rollout's minibatches hold, its loss against a loop over steps, and toys with their controls."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from own.oracle import job_of, train
from own.rl_jobs import acting_spec, alone, first_batches, gradient, greedy, perturbed, returns_of

from distml.errors import UsageError
from distml.rl.on_policy import estimate
from distml.rl.ppo import explained_variance, passes
from distml.tasks.base import Progress

LSTM = {"name": "lstm", "hidden": [8], "units": 8}
DROPOUT = {"name": "policies:Linear"}


def ppo(**changes):
    task = {"name": "ppo", "environment": "CartPole-v1", "envs_per_worker": 4, "n_steps": 32, "epochs": 2,
            "minibatches": 4, "policy": {"name": "mlp", "hidden": [16]}, "normalise_advantages": False}  # fmt: skip
    return task | changes


# ---------------------------------------------------------------------------------------------------------- minibatches
@pytest.mark.parametrize("policy", [{"name": "mlp"}, LSTM, DROPOUT], ids=["mlp", "lstm", "dropout"])
def test_the_first_minibatch_is_at_ratio_one_to_the_last_bit(policy):
    task, model, (first, *_) = first_batches(acting_spec(ppo(policy=policy)), 1)
    model.train()
    loss = task.loss(model, first, Progress())
    assert loss.metrics["approx_kl"].total == 0.0
    assert loss.metrics["clip_fraction"].total == 0.0
    parameters, values, _ = model(first.observations, first.state, first.resets)
    assert torch.equal(model.distribution.log_prob(parameters, first.actions), first.log_probs)
    assert torch.equal(values, first.values)
    perturbed(model, 0.1)  # control
    assert task.loss(model, first, Progress()).metrics["approx_kl"].total > 0.0


@pytest.mark.parametrize("policy", [{"name": "mlp"}, LSTM], ids=["mlp", "lstm"])
def test_every_pass_covers_the_rollout_once_in_another_order(policy):
    spec = acting_spec(ppo(policy=policy))
    _, _, batches = first_batches(spec, 9)
    _, model, stream = alone(spec)
    rollout = stream.collector.collect(model, 32, 0)

    def rows(pieces):
        found = [piece.observations[piece.valid] for piece in pieces]
        return torch.cat(found).double().numpy()

    whole = rollout.observations[:-1][rollout.valid].double().numpy()
    for one in (rows(batches[:4]), rows(batches[4:8])):
        assert one.shape == whole.shape
        assert np.array_equal(np.unique(one, axis=0), np.unique(whole, axis=0))
    assert not np.array_equal(rows(batches[:4]), rows(batches[4:8]))
    assert [batch.frames for batch in batches[:8]] == [float(rollout.num_frames), *[0.0] * 7]
    assert [batch.version for batch in batches] == [0] * 8 + [8]
    assert rollout.num_frames < 128  # there are dummy rows, and they are not counted
    sizes = [len(batch) for batch in batches[:8]]
    if policy is LSTM:
        assert sizes == [32] * 8
    else:
        assert sum(sizes) == 2 * rollout.num_frames
        assert max(sizes) - min(sizes) <= 1


def test_no_minibatch_is_without_a_valid_row():
    """Every other row is a dummy: four minibatches of four valid rows."""
    environment = {"id": "own.counting:Counting", "args": {"length": 1}}
    spec = acting_spec(ppo(environment=environment, envs_per_worker=1, n_steps=8))
    _, _, batches = first_batches(spec, 40)
    assert [int(batch.valid.sum()) for batch in batches] == [1] * 40
    assert sum(batch.frames for batch in batches) == 20.0


def test_values_of_dummy_rows_are_known_all_the_same():
    """A limit ends episodes, so that a dummy shows the last observation of its episode, which is bootstrapped with."""
    environment = {"id": "own.counting:Counting", "args": {"length": 3, "truncates": True}}
    task, model, stream = alone(acting_spec(ppo(environment=environment)))
    rollout = stream.collector.collect(model, 32, 0)
    _, values, _ = model(rollout.observations, (), rollout.resets)
    advantages, returns = estimate(model, rollout, values, task.spec.gamma, task.spec.gae_lambda)
    batches = list(passes(task.spec, model, rollout, np.random.default_rng(0)))[:4]
    for name, expected in (("advantages", advantages), ("returns", returns), ("values", values[:-1].detach())):
        found = torch.cat([getattr(batch, name)[0] for batch in batches]).sort().values
        torch.testing.assert_close(found, expected[rollout.valid].sort().values)


def test_a_step_stays_with_its_own_numbers_and_sequences_stay_whole():
    spec = acting_spec(ppo(policy=LSTM, gae_lambda=1.0, gamma=1.0))
    _, _, batches = first_batches(spec, 4)
    _, model, stream = alone(spec)
    rollout = stream.collector.collect(model, 32, 0)
    seen = []
    for batch in batches:
        assert batch.observations.shape == (32, 1, 4)
        env = next(e for e in range(4) if torch.equal(rollout.observations[:-1, e], batch.observations[:, 0]))
        seen.append(env)
        assert torch.equal(rollout.actions[:, env], batch.actions[:, 0])
        _, values, _ = model(rollout.observations, rollout.state, rollout.resets)
        torch.testing.assert_close(values[:-1, env], batch.values[:, 0])
        returns = 0.0 if rollout.ended[-1, env] else float(values[-1, env].detach())
        for step in reversed(range(32)):  # by hand: rewards to the end of each episode, else what is expected after
            if rollout.terminated[step, env]:
                returns = 0.0
            if rollout.valid[step, env]:
                returns += float(rollout.rewards[step, env])
                assert float(batch.returns[step, 0]) == pytest.approx(returns, abs=1e-3)
    assert sorted(seen) == [0, 1, 2, 3]


def test_more_minibatches_than_columns_are_refused():
    with pytest.raises(UsageError, match=r"cannot be cut into 4"):
        job_of(acting_spec(ppo(envs_per_worker=1, n_steps=1)))
    spec = acting_spec(ppo(envs_per_worker=2, n_steps=8, policy={"name": "policies:Counter"}))
    with pytest.raises(UsageError, match=r"2 environments per worker cannot be cut into 4 minibatches"):
        first_batches(spec, 1)


# ----------------------------------------------------------------------------------------------------------------- loss
def naive_loss(task, model, batch):
    """The sum over valid steps, one after the other."""
    spec, total = task.spec, 0.0
    parameters, values, _ = model(batch.observations, batch.state, batch.resets)
    for t, c in batch.valid.nonzero().tolist():
        log_probs = torch.log_softmax(parameters[t, c], -1)
        ratio = (log_probs[batch.actions[t, c]] - batch.log_probs[t, c]).exp()
        advantage, target, old = batch.advantages[t, c], batch.returns[t, c], batch.values[t, c]
        gain = min(ratio * advantage, min(max(ratio, 1 - spec.clip), 1 + spec.clip) * advantage)
        error = (target - values[t, c]) ** 2
        if spec.value_clip is not None:
            held = old + min(max(values[t, c] - old, -spec.value_clip), spec.value_clip)
            error = max(error, (target - held) ** 2)
        entropy = -(log_probs.exp() * log_probs).sum()
        total = total - gain + spec.value_coefficient * error - spec.entropy * entropy
    return total


@pytest.mark.parametrize("policy", [{"name": "mlp"}, LSTM], ids=["mlp", "lstm"])
@pytest.mark.parametrize("value_clip", [None, 0.05])
def test_the_loss_is_the_sum_over_valid_steps(value_clip, policy):
    changes = {"value_clip": value_clip, "entropy": 0.1, "minibatches": 2, "policy": policy}
    task, model, batches = first_batches(acting_spec(ppo(**changes)), 2)
    perturbed(model, 0.2)
    for batch in batches:
        loss, naive = task.loss(model, batch, Progress()), naive_loss(task, model, batch)
        assert loss.count == int(batch.valid.sum())
        assert loss.total.item() == pytest.approx(naive.item(), rel=1e-5)
        np.testing.assert_allclose(gradient(model, loss.total), gradient(model, naive), atol=2e-4)
    assert any(not batch.valid.all() for batch in batches) == (policy is LSTM)
    assert loss.metrics["clip_fraction"].total > 0


def test_what_dummy_rows_hold_has_no_part_in_it():
    task, model, (batch, *_) = first_batches(acting_spec(ppo(minibatches=1, normalise_advantages=True, policy=LSTM)), 1)
    before = gradient(model, task.loss(model, batch, Progress()).total)
    assert not batch.valid.all()
    for name in ("advantages", "returns", "log_probs", "values"):
        getattr(batch, name)[~batch.valid] = 77.0
    np.testing.assert_array_equal(gradient(model, task.loss(model, batch, Progress()).total), before)


@pytest.mark.parametrize("policy", [{"name": "mlp"}, LSTM], ids=["mlp", "lstm"])
def test_micro_batches_add_up(policy):
    task, model, (batch, *_) = first_batches(acting_spec(ppo(policy=policy, minibatches=1,
                                                             normalise_advantages=True)), 1)  # fmt: skip
    perturbed(model, 0.1)
    whole = task.loss(model, batch, Progress())
    pieces = [task.loss(model, piece, Progress()) for piece in batch.micro_batches(48)]
    assert len(pieces) > 2
    assert sum(piece.count for piece in pieces) == whole.count
    assert sum(piece.frames for piece in pieces) == whole.frames > 0
    total = sum(gradient(model, piece.total) for piece in pieces)
    np.testing.assert_allclose(total, gradient(model, whole.total), atol=1e-3)


def test_advantages_are_standardised_over_a_minibatch():
    _, _, batches = first_batches(acting_spec(ppo(normalise_advantages=True)), 2)
    for batch in batches:
        known = batch.advantages[batch.valid]
        assert float(known.mean()) == pytest.approx(0.0, abs=1e-5)
        assert float(known.std()) == pytest.approx(1.0, abs=1e-4)


def test_explained_variance():
    returns, valid = torch.tensor([[1.0, 2.0], [3.0, 99.0]]), torch.tensor([[True, True], [True, False]])
    assert explained_variance(returns, returns, valid)["explained_variance"].value == 1.0
    assert explained_variance(torch.zeros(2, 2), returns, valid)["explained_variance"].value == pytest.approx(0.0)
    half = returns / 2
    assert explained_variance(half, returns, valid)["explained_variance"].value == pytest.approx(0.75)
    assert explained_variance(returns, torch.ones(2, 2), valid) == {}


# -------------------------------------------------------------------------------------------------------------- workers
def ages(trained):
    """How old each step's minibatch was, per rank."""
    found = {0: [], 1: []}
    for report in trained.reports:
        total, count = report.means["rl/policy_age_mean"]
        found[report.rank].append(round(total / count, 6))
    return found


def test_the_divergence_over_all_workers_ends_a_rollout_for_all(monkeypatch):
    spec = acting_spec(ppo(target_kl=0.006, epochs=4), workers=2, steps=60, strategy="all_reduce",
                       optimizer={"name": "adam", "lr": 0.01}, log={"every": 1, "to": []})  # fmt: skip
    found = ages(train(spec))
    assert len(found[0]) == 60
    assert found[0] == found[1]
    assert 0.0 in found[0][1:15]  # some rollout was left before its 16 minibatches were used
    assert max(found[0]) > 1.0  # and not every one at once
    monkeypatch.setattr("distml.strategies.base.Strategy.group_mean", lambda self, tensor: tensor)  # control
    found = ages(train(spec))
    assert found[0] != found[1]


def test_without_a_target_rollouts_are_used_up():
    spec = acting_spec(ppo(epochs=2), workers=2, steps=32, strategy="all_reduce", log={"every": 1, "to": []})
    assert ages(train(spec))[1] == [float(step % 8) for step in range(32)]


def test_a_target_needs_a_group():
    asynchronous = {"name": "parameter_server", "mode": "async"}
    with pytest.raises(UsageError, match="needs group_mean"):
        job_of(acting_spec(ppo(target_kl=0.01), strategy=asynchronous, workers=2))
    job_of(acting_spec(ppo(), strategy=asynchronous, workers=2))


@pytest.mark.parametrize("strategy", ["all_reduce", {"name": "parameter_server", "mode": "async"}, "local_sgd"],
                         ids=["all_reduce", "async", "local_sgd"])  # fmt: skip
def test_two_workers_learn(strategy):
    task = ppo(environment={"id": "rl_toys:Identity"}, epochs=4, minibatches=2)
    trained = train(acting_spec(task, workers=2, steps=160, strategy=strategy, optimizer={"name": "adam", "lr": 0.01}))
    assert greedy(trained) > 7.0
    assert all(math.isfinite(total) for report in trained.reports for total, _ in report.means.values())


# ----------------------------------------------------------------------------------------------------------------- toys
def toy(environment, **changes):
    size = {"envs_per_worker": 16, "n_steps": 16, "epochs": 4, "minibatches": 2, "normalise_advantages": True}
    return ppo(environment=environment, **(size | changes))


def test_identity_is_solved_and_not_without_what_it_shows():
    steps = {"steps": 120, "optimizer": {"name": "adam", "lr": 0.01}}
    assert returns_of(toy({"id": "rl_toys:Identity"}), **steps) > 7.5
    assert returns_of(toy({"id": "rl_toys:Identity", "args": {"is_blind": True}}), **steps) < 4.0


def test_identity_is_solved_by_actor_critic_too():
    task = {"name": "actor_critic", "envs_per_worker": 16, "n_steps": 8, "gae_lambda": 0.5, "gamma": 0.5}
    steps = {"steps": 240, "optimizer": {"name": "adam", "lr": 0.01}}
    assert returns_of({**task, "environment": {"id": "rl_toys:Identity"}}, **steps) > 7.5
    blind = {"id": "rl_toys:Identity", "args": {"is_blind": True}}
    assert returns_of({**task, "environment": blind}, **steps) < 4.0


def test_a_bit_is_remembered_with_a_memory_only():
    steps = {"steps": 320, "optimizer": {"name": "adam", "lr": 0.01}}
    lstm = {"name": "lstm", "hidden": [16], "units": 16}
    assert returns_of(toy({"id": "rl_toys:Memory"}, policy=lstm), **steps) == 1.0
    assert returns_of(toy({"id": "rl_toys:Memory"}), **steps) < 0.9


def test_the_entropy_bonus_finds_what_came_later():
    def last_return(entropy):
        task = toy({"id": "rl_toys:LateArm"}, entropy=entropy, normalise_advantages=False)
        trained = train(acting_spec(task, steps=240, log={"every": 40, "to": []},
                                    optimizer={"name": "adam", "lr": 0.03}))  # fmt: skip
        total, count = trained.reports[-1].means["rl/episode_return_mean"]
        return total / count

    assert last_return(0.1) > 0.9
    assert last_return(0.0) < 0.5  # the policy has settled on the arm that was better at first


def test_the_entropy_bonus_ends_at_the_softmax_of_the_rewards():
    rewards, entropy = torch.tensor([0.0, 0.1, 0.3]), 0.2
    task = toy({"id": "rl_toys:Arms", "args": {"rewards": rewards.tolist()}}, entropy=entropy,
               normalise_advantages=False, policy={"name": "mlp", "hidden": []})  # fmt: skip
    trained = train(acting_spec(task, steps=600, optimizer={"name": "adam", "lr": 0.03, "schedule": "linear"}))
    parameters, _, _ = trained.runtime.trainers[0].model(torch.ones(1, 1, 1), (), torch.ones(1, 1, dtype=torch.bool))
    found = parameters[0, 0].softmax(-1)
    torch.testing.assert_close(found, (rewards / entropy).softmax(-1), atol=0.04, rtol=0.0)
