"""One transition for every vector form and autoreset mode: which rows are real, and what an episode's last one is."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest

from distml.errors import UsageError
from distml.rl.environments import (
    TRAINING_SEEDS,
    EnvironmentFailed,
    Environments,
    check_finite,
    evaluation_seeds,
    make_one,
    training_seeds,
)
from distml.spec.rl import EnvironmentSpec, WrapperSpec


def counting(**args):
    more = {key: args.pop(key) for key in ("autoreset", "max_episode_steps", "wrappers") if key in args}
    return EnvironmentSpec(id="own.counting:Counting", args=args, **more)


def run(environments, steps):
    first = environments.reset()
    return first, [environments.step(np.zeros(environments.num_envs, np.int64)) for _ in range(steps)]


def test_next_step_marks_the_dummy_row_and_shows_the_last_observation_before_it():
    environments = Environments(counting(length=3), [5, 6])
    first, rows = run(environments, 8)
    assert first.tolist() == [[0, 5], [0, 6]]
    assert [row.observations[0, 0] for row in rows] == [1, 2, 3, 0, 1, 2, 3, 0]
    assert [bool(row.valid[0]) for row in rows] == [True, True, True, False, True, True, True, False]
    assert [row.rewards[0] for row in rows] == [1, 2, 3, 0, 1, 2, 3, 0]
    assert [bool(row.terminated[0]) for row in rows] == [False, False, True, False, False, False, True, False]
    assert all(row.final is None for row in rows)
    assert not environments.resets_in_same_step


def test_same_step_has_no_dummy_rows_and_keeps_the_last_observation_aside():
    environments = Environments(counting(length=3, truncates=True, autoreset="same_step"), [5, 6])
    _, rows = run(environments, 6)
    assert [row.observations[0, 0] for row in rows] == [1, 2, 0, 1, 2, 0]
    assert all(row.valid.all() for row in rows)
    assert [row.rewards[0] for row in rows] == [1, 2, 3, 1, 2, 3]
    assert [bool(row.truncated[0]) for row in rows] == [False, False, True, False, False, True]
    assert rows[2].final.tolist() == [[3, 5], [3, 6]]
    assert rows[1].final is None


@pytest.mark.parametrize("vectorization", ["auto", "sync"])
def test_real_rows_of_cartpole_are_its_episodes(vectorization):
    """The rows between dummies are whole episodes, also in its own vector form: lengths are what the limits say."""
    spec = EnvironmentSpec(id="CartPole-v1", vectorization=vectorization)
    environments = Environments(spec, training_seeds(1, 4))
    environments.reset()
    lengths, running = [], np.zeros(4, int)
    ended_before = np.zeros(4, bool)
    for _ in range(200):
        row = environments.step(np.ones(4, np.int64))
        assert (row.valid == ~ended_before).all()
        assert (row.rewards == row.valid).all()  # CartPole pays 1 per step
        running += row.valid
        ended_before = row.terminated | row.truncated
        lengths += running[ended_before].tolist()
        running[ended_before] = 0
    assert type(environments.vector).__name__ == ("CartPoleVectorEnv" if vectorization == "auto" else "SyncVectorEnv")
    assert 8 <= np.mean(lengths) <= 11  # pushing one way only: 9 to 10 steps


def test_what_a_vector_form_cannot_do_is_done_by_single_environments():
    for more in ({"max_episode_steps": 7}, {"wrappers": [WrapperSpec(name="FlattenObservation")]},
                 {"autoreset": "same_step"}):  # fmt: skip
        environments = Environments(EnvironmentSpec(id="CartPole-v1", **more), [1, 2])
        assert type(environments.vector).__name__ == "SyncVectorEnv"
    limited = Environments(counting(length=100, max_episode_steps=4), [1])
    assert [bool(row.truncated[0]) for row in run(limited, 5)[1]] == [False, False, False, True, False]


def test_each_environment_has_its_own_seed_and_evaluations_have_others():
    seeds = training_seeds(3, 64)
    assert len(set(seeds)) == 64
    assert all(TRAINING_SEEDS <= seed < 2 * TRAINING_SEEDS for seed in seeds)
    validation, test = evaluation_seeds("validation", range(64)), evaluation_seeds("test", range(64))
    assert not {*seeds} & {*validation}
    assert not {*validation} & {*test}
    assert max(*validation, *test) < TRAINING_SEEDS
    first = Environments(EnvironmentSpec(id="Pendulum-v1"), [4, 5]).reset()
    again = Environments(EnvironmentSpec(id="Pendulum-v1"), [5, 4]).reset()
    assert np.array_equal(first, again[::-1])
    assert not np.array_equal(first[0], first[1])


def test_wrappers_are_applied_in_order():
    spec = EnvironmentSpec(id="CartPole-v1", wrappers=[WrapperSpec(name="RescaleAction", args={})])
    with pytest.raises(UsageError, match=r"CartPole-v1 cannot be made"):
        make_one(spec)
    wrappers = [WrapperSpec(name="FlattenObservation"),
                WrapperSpec(name="FrameStackObservation", args={"stack_size": 3})]  # fmt: skip
    flat = EnvironmentSpec(id="CartPole-v1", wrappers=wrappers)
    assert make_one(flat).observation_space.shape == (3, 4)
    with pytest.raises(UsageError, match=r"gymnasium\.wrappers has no wrapper 'Flaten'"):
        make_one(EnvironmentSpec(id="CartPole-v1", wrappers=[WrapperSpec(name="Flaten")]))


def test_one_that_raises_is_named_with_its_seed_and_step():
    environments = Environments(counting(length=100, raises_at=4), [11, 12])
    environments.reset()
    for _ in range(3):
        environments.step(np.zeros(2, np.int64))
    with pytest.raises(
        EnvironmentFailed, match=r"own.counting:Counting raised in step \(environment 0, seed 11, after 4 st"
    ):
        environments.step(np.zeros(2, np.int64))


def test_what_is_not_a_number_is_named_with_its_seed_and_step():
    observations, rewards = np.zeros((4, 2, 3)), np.zeros((3, 2))
    check_finite("Mine", observations, rewards, [7, 8], 10)
    rewards[1, 1] = np.inf
    with pytest.raises(
        EnvironmentFailed, match=r"Mine gave a reward that is not finite \(environment 1, seed 8, step 11"
    ):
        check_finite("Mine", observations, rewards, [7, 8], 10)
    observations[2, 0, 1] = np.nan
    with pytest.raises(EnvironmentFailed, match=r"an observation.*environment 0, seed 7, step 12"):
        check_finite("Mine", observations, rewards, [7, 8], 10)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("wrappers", [{"name": "ClipReward"}]),
        ("max_episode_steps", 4),
        ("vectorization", "sync"),
        ("autoreset", "same_step"),
    ],
)
def test_what_has_no_effect_on_a_users_own_vector_environment_is_refused(key, value):
    spec = EnvironmentSpec.model_validate({"id": "own.vectors:Alike", key: value})
    with pytest.raises(UsageError, match=rf"own.vectors:Alike is a VectorEnv, on which task.environment.{key} has no"):
        Environments(spec, [1, 2])


def test_beginning_anew_in_the_same_step_needs_the_last_observations():
    args = {"length": 2, "same_step": True}
    _, rows = run(Environments(EnvironmentSpec(id="own.vectors:Alike", args=args), [1, 2]), 3)
    assert rows[1].final.tolist() == [[2], [2]]
    lacking = Environments(EnvironmentSpec(id="own.vectors:Alike", args={**args, "gives_final": False}), [1, 2])
    run(lacking, 1)
    with pytest.raises(UsageError, match=r"own.vectors:Alike .* in the same step without infos\['final_obs'\]"):
        lacking.step(np.zeros(2, np.int64))


class Vectors(gym.vector.VectorEnv):
    """A vector environment of a user's own."""

    metadata = {"autoreset_mode": gym.vector.AutoresetMode.NEXT_STEP}

    def __init__(self, num_envs, start=0.0):
        self.num_envs, self.start = num_envs, start
        self.single_observation_space, self.single_action_space = gym.spaces.Box(0, 1, (1,)), gym.spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        return np.full((self.num_envs, 1), self.start, np.float32), {}


def test_a_users_own_vector_environment_is_taken_as_it_is():
    environments = Environments(EnvironmentSpec(id=f"{__name__}:Vectors", args={"start": 0.5}), [1, 2, 3])
    assert environments.reset().tolist() == [[0.5]] * 3


def test_bad_names_say_what_to_do():
    for name, phrase in (("CartPole-v7", "CartPole-v1"), ("nowhere:Env", "cannot be imported"),
                         ("own.counting:LIFE", "not a subclass")):  # fmt: skip
        with pytest.raises(UsageError, match=phrase):
            Environments(EnvironmentSpec(id=name), [1])
    with pytest.raises(UsageError, match=r"own.counting:Counting cannot be made: TypeError.*lenth"):
        Environments(counting(lenth=3), [1])
