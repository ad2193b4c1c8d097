"""What a collector brings back is what the environments did, row by row."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from own.counting import LIFE

from distml.errors import UsageError
from distml.rl.actor_critic import ActorCritic
from distml.rl.environments import EnvironmentFailed, spaces_of, training_seeds
from distml.rl.episodes import EpisodeCollector
from distml.rl.policies import build_policy
from distml.rl.reinforce import Reinforce
from distml.rl.restarts import Restarts
from distml.rl.rollout import Collector
from distml.spec.rl import (
    ActorCriticSpec,
    EnvironmentSpec,
    MLPPolicySpec,
    NormaliseSpec,
    RecurrentPolicySpec,
    ReinforceSpec,
)
from distml.tasks.base import Part, Progress
from distml.tasks.data import mix


def spec_of(environment="CartPole-v1", envs=4, policy=None, **changes):
    if isinstance(environment, str):
        environment = EnvironmentSpec(id=environment)
    return ActorCriticSpec(name="actor_critic", environment=environment, envs_per_worker=envs, n_steps=8,
                           policy=policy or MLPPolicySpec(name="mlp", hidden=[8]), **changes)  # fmt: skip


def counting(autoreset=None, **args):
    return EnvironmentSpec(id="own.counting:Counting", args=args, autoreset=autoreset)


def collector_of(spec, seed=1, failures=0):
    torch.manual_seed(0)
    policy = build_policy(spec.policy, *spaces_of(spec.environment), spec.normalise)
    return Collector(spec, Part(0, 1, seed, "train"), Restarts(failures)), policy


def collect(spec, steps=8, times=1):
    collector, policy = collector_of(spec)
    return [collector.collect(policy, steps, version) for version in range(times)]


def test_rows_follow_each_other_also_over_rollouts():
    first, second = collect(spec_of(counting(length=3), envs=2), steps=5, times=2)
    times = torch.cat((first.observations[:-1], second.observations))[:, 0, 0]
    assert times.tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2]
    assert torch.cat((first.valid, second.valid))[:, 0].tolist() == [True, True, True, False] * 2 + [True, True]
    assert torch.equal(first.observations[-1], second.observations[0])
    resets = torch.cat((first.resets[:-1], second.resets))[:, 0]
    assert resets.tolist() == [True, False, False, False] * 2 + [True, False, False]
    assert (first.num_frames, second.num_frames, len(first)) == (8, 8, 10)
    assert (first.version, second.version) == (0, 1)


@pytest.mark.parametrize("reuses", [False, True])
def test_an_environment_may_overwrite_its_last_observations(reuses):
    """It is recorded what was acted on, not what came of it."""
    environment = EnvironmentSpec(id="own.vectors:Alike", args={"length": 3, "reuses": reuses})
    first, second = collect(spec_of(environment, envs=2), steps=5, times=2)
    times = torch.cat((first.observations[:-1], second.observations))[:, 0, 0]
    assert times.tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2]


@pytest.mark.parametrize("reuses", [False, True])
def test_whole_episodes_may_overwrite_their_last_observations(monkeypatch, reuses):
    monkeypatch.setattr("distml.rl.episodes.episode_limit", lambda spec: 10)
    environment = EnvironmentSpec(id="own.vectors:Alike", args={"length": 3, "reuses": reuses})
    spec = ReinforceSpec(name="reinforce", environment=environment, envs_per_worker=2)
    policy = build_policy(spec.policy, *spaces_of(environment), spec.normalise)
    collector = EpisodeCollector(spec, Part(0, 1, 1, "train"), Restarts())
    for version in range(2):
        assert collector.episodes_of(policy, version).observations[:, 0, 0].tolist() == [0, 1, 2, 3]


def test_with_same_step_the_last_observation_is_kept_and_the_state_is_reset():
    (rollout,) = collect(spec_of(counting("same_step", length=3, truncates=True), envs=2), steps=7)
    assert rollout.observations[:, 0, 0].tolist() == [0, 1, 2, 0, 1, 2, 0, 1]
    assert rollout.resets[:, 0].tolist() == [True, False, False, True, False, False, True, False]
    assert rollout.valid.all()
    assert rollout.final[2, :, 0].tolist() == [3, 3]
    assert rollout.truncated[:, 0].tolist() == [False, False, True, False, False, True, False]


def test_episodes_returns_and_lengths_are_the_environments_own():
    (rollout,) = collect(spec_of(counting(length=3), envs=2), steps=9)
    returns, lengths = rollout.metrics["rl/episode_return_mean"], rollout.metrics["rl/episode_length_mean"]
    assert (returns.value, returns.count) == (6.0, 4)  # 1 + 2 + 3, twice in each of two environments
    assert (lengths.value, lengths.count) == (3.0, 4)


def test_actions_are_drawn_from_the_parameters_that_are_kept():
    (rollout,) = collect(spec_of(envs=64), steps=64)
    spec = spec_of(envs=64)
    _, policy = collector_of(spec)
    with torch.no_grad():
        parameters, _, _ = policy(rollout.observations, rollout.state, rollout.resets)
    torch.testing.assert_close(rollout.parameters, parameters[:-1], atol=1e-5, rtol=1e-5)
    probability = rollout.parameters.softmax(-1)[..., 1]
    difference = (rollout.actions.float() - probability).mean()
    assert abs(difference) < 4 * 0.5 / 64  # four standard errors of 4,096 draws


def test_a_random_policy_balances_the_pole_for_20_to_25_steps():
    rollouts = collect(spec_of(envs=64), steps=100, times=4)
    means = [rollout.metrics["rl/episode_return_mean"] for rollout in rollouts]
    assert 20 <= sum(mean.total for mean in means) / sum(mean.count for mean in means) <= 25


def test_the_seed_decides_all():
    one, same = collect(spec_of(), times=2)[1], collect(spec_of(), times=2)[1]
    assert torch.equal(one.observations, same.observations)
    assert torch.equal(one.actions, same.actions)
    collector, policy = collector_of(spec_of(), seed=2)
    assert not torch.equal(collector.collect(policy, 8, 0).observations, collect(spec_of())[0].observations)


def test_the_recurrent_state_goes_on_between_rollouts():
    spec = spec_of("Pendulum-v1", policy=RecurrentPolicySpec(name="lstm", hidden=[4], units=5))
    collector, policy = collector_of(spec)
    first, second = collector.collect(policy, 4, 0), collector.collect(policy, 4, 1)
    assert [tuple(part.shape) for part in second.state] == [(4, 5)] * len(second.state)
    with torch.no_grad():
        _, _, after = policy(first.observations[:-1], first.state, first.resets[:-1])
    for mine, theirs in zip(after, second.state, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)
    assert not any(part.any() for part in first.state)


def test_pieces_of_a_rollout_cover_it_once():
    (rollout,) = collect(spec_of(envs=5, policy=RecurrentPolicySpec(name="gru", hidden=[4], units=3)))
    pieces = list(rollout.micro_batches(16))  # two environments of eight steps
    assert [piece.rewards.shape[1] for piece in pieces] == [2, 2, 1]
    assert sum(piece.num_frames for piece in pieces) == rollout.num_frames
    assert torch.equal(torch.cat([piece.observations for piece in pieces], 1), rollout.observations)
    assert torch.equal(torch.cat([piece.state[0] for piece in pieces]), rollout.state[0])
    assert [bool(piece.metrics) for piece in pieces] == [bool(rollout.metrics), False, False]


def test_statistics_are_frozen_inside_a_rollout_and_do_not_see_dummy_rows():
    spec = spec_of(counting(length=3), envs=2, normalise=NormaliseSpec(observations=True, rewards=True))
    collector, policy = collector_of(spec)
    collector.collect(policy, 4, 0)
    before = policy.observation_moments.frozen_mean.clone()
    assert not before.any()  # nothing was known when the first rollout began
    collector.collect(policy, 4, 1)
    assert policy.observation_moments.frozen_mean[0] == pytest.approx(1.0)  # of 0, 1, 2; with the dummy's 3: 1.5
    count, mean, _ = policy.observation_moments.merged()
    assert (float(count), float(mean[0])) == (12.0, 1.0)
    assert float(policy.reward_moments.merged()[0]) == 12.0


def test_an_environment_that_fails_is_begun_anew_within_the_limit():
    LIFE["failures"] = 0
    spec = spec_of(counting(length=50, raises_at=3, failures=2), envs=2)
    collector, policy = collector_of(spec, failures=2)
    with pytest.warns(UserWarning, match=r"worker 0: .*the motor is hot; its environments begin anew \(1 of 2\)"):
        rollout = collector.collect(policy, 8, 0)
    assert rollout.observations[:, 0, 0].tolist() == list(range(9))  # nothing of the failed attempts is left
    assert (LIFE["failures"], collector.failures) == (2, 2)
    LIFE["failures"] = 0
    collector, policy = collector_of(spec, failures=1)
    with (
        pytest.warns(UserWarning, match="anew"),
        pytest.raises(EnvironmentFailed, match=r"worker 0: .*seed \d+.*max_restarts: 1"),
    ):
        collector.collect(policy, 8, 0)


def test_one_that_fails_to_begin_is_begun_anew_within_the_same_limit():
    LIFE["failures"] = 0
    spec = spec_of(counting(length=50, fails_to_begin=True, failures=2), envs=2)
    with pytest.warns(UserWarning, match=r"worker 0: .*in reset.*the motor is cold; .*begin anew \(2 of 2\)"):
        collector, policy = collector_of(spec, failures=2)
    assert collector.collect(policy, 8, 0).num_frames == 16
    assert collector.environments.seeds == training_seeds(mix(1, 2), 2)  # others than those that failed
    LIFE["failures"] = 0
    with (
        pytest.warns(UserWarning, match="anew"),
        pytest.raises(EnvironmentFailed, match=r"worker 0: .*in reset.*seed \d+.*max_restarts: 1"),
    ):
        collector_of(spec, failures=1)


def test_failures_are_counted_over_all_of_a_worker_s_streams():
    """Streams begin anew at each checkpoint, and the limit is the whole run's."""
    spec = spec_of(counting(length=50, raises_at=3), envs=2)
    task = ActorCritic(spec, max_failures=2)
    policy = task.build_model()
    LIFE["failures"] = 10**9 - 1  # the next failure is the last
    with pytest.warns(UserWarning, match=r"\(1 of 2\)"):
        task.stream(Part(3, 4, 1, "train")).next(policy, Progress())
    LIFE["failures"] = 0
    with (
        pytest.warns(UserWarning, match=r"\(2 of 2\)"),
        pytest.raises(EnvironmentFailed, match=r"worker 3: .*max_restarts: 2"),
    ):
        task.stream(Part(3, 4, 2, "train")).next(policy, Progress())
    assert LIFE["failures"] == 2  # control: a limit of each stream's own would have let a third one happen


def test_a_memory_does_not_go_with_environments_that_begin_anew_in_the_same_step():
    """Refused before the first step, also where only the class itself knows its mode."""
    policy = RecurrentPolicySpec(name="lstm", hidden=[4], units=5)
    for environment in (counting("same_step"), EnvironmentSpec(id="own.vectors:Alike", args={"same_step": True})):
        with pytest.raises(UsageError, match=r"own.*begins anew in the same step.*a policy with a memory"):
            ActorCritic(spec_of(environment, policy=policy)).build_model()
        ActorCritic(spec_of(environment)).build_model()
    ActorCritic(spec_of("Pendulum-v1", policy=policy)).build_model()
    whole = ReinforceSpec(name="reinforce", environment=counting("same_step"), policy=policy)
    Reinforce(whole).build_model()  # whole episodes end with their last observation


def test_a_reward_that_is_not_a_number_does_not_reach_the_loss():
    collector, policy = collector_of(spec_of(counting(length=50, nan_at=3), envs=2))
    with pytest.raises(
        EnvironmentFailed, match=r"worker 0: .*a reward that is not finite \(environment 0, seed \d+, step 2"
    ):
        collector.collect(policy, 8, 0)


def test_big_observations_stay_bytes():
    pytest.importorskip("ale_py", reason="needs the extra 'atari'")
    spec = spec_of(EnvironmentSpec(id="ALE/Pong-v5"), envs=2, policy={"name": "cnn", "hidden": 16})
    (rollout,) = collect(spec, steps=3)
    assert rollout.observations.dtype == torch.uint8
    assert tuple(rollout.observations.shape) == (4, 2, 4, 84, 84)
    assert np.isin(rollout.actions.numpy(), range(6)).all()
