"""Q-learning and SARSA: the textbook's updates bit by bit, what ends an episode, and exact optima."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from own.counting import LIFE
from own.oracle import Trained, job_of, saved, spec_of, train

import distml
from distml.errors import UsageError
from distml.rl.environments import EnvironmentFailed
from distml.rl.solvers import mdp_of, policy_values, value_iteration
from distml.rl.tabular import QLearning, Sarsa, TabularStream, Transitions, epsilon_at, epsilon_greedy
from distml.runs.display import SilentDisplay
from distml.spec.tabular import EpsilonSpec
from distml.tasks.base import Part, Progress
from distml.tasks.build import build_task

LAKE, CLIFF = "FrozenLake-v1", {"id": "CliffWalking-v1", "max_episode_steps": 60}
ALGORITHMS = {"q_learning": QLearning, "sarsa": Sarsa}


def tabular_spec(name: str, world: Any, steps: int = 60, strategy: Any = "all_reduce", workers: int = 1,
                 lr: float = 0.5, optimizer: Any = None, every: int = 10_000, **task: Any) -> dict:  # fmt: skip
    task = {"name": name, "environment": world, "gamma": 0.9,
            "evaluation": {"episodes": 4, "max_frames": 100}} | task  # fmt: skip
    spec = spec_of(task, steps=steps, strategy=strategy, workers=workers, evaluate={"every": every},
                   checkpoint={"every": every}, log={"every": steps, "to": []},
                   optimizer=optimizer or {"name": "sgd", "lr": lr})  # fmt: skip
    del spec["batch_size"]
    return spec


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[Transitions]:
    """The batches that streams give from here on."""
    batches: list[Transitions] = []
    original = TabularStream.next

    def recording(self: TabularStream, model: torch.nn.Module, progress: Progress) -> Transitions:
        batches.append(original(self, model, progress))
        return batches[-1]

    monkeypatch.setattr(TabularStream, "next", recording)
    return batches


def textbook(name: str, batches: list[Transitions], shape: tuple[int, int], alpha: float, gamma: float) -> np.ndarray:
    """Sutton & Barto 2018, (6.7) and (6.8), on transitions in their order."""
    q = np.zeros(shape, np.float32)
    for batch in batches:
        for s, a, r, s2, a2, on in zip(*(column.numpy() for column in batch[:6]), strict=True):
            after = q[s2].max() if name == "q_learning" else q[s2, a2]
            q[s, a] += np.float32(alpha) * (r + np.float32(gamma) * on * after - q[s, a])
    return q


def table(trained: Trained, shape: tuple[int, int]) -> np.ndarray:
    return trained.named["values"].reshape(shape)


# ------------------------------------------------------------------------------------------------------------- updates
@pytest.mark.parametrize("name", ALGORITHMS)
@pytest.mark.parametrize(("environment", "shape"), [(LAKE, (16, 4)), (CLIFF, (48, 4))])
def test_a_step_is_the_textbook_s_bit_by_bit(seen, name, environment, shape):
    """With a learning rate of 1/2, whose products are exact: the optimiser may fuse multiply and add."""
    trained = train(tabular_spec(name, environment, steps=300))
    assert all(len(batch.states) == 1 for batch in seen)
    assert table(trained, shape).tobytes() == textbook(name, seen, shape, 0.5, 0.9).tobytes()
    other = next(one for one in ALGORITHMS if one != name)
    if environment == CLIFF:  # control; on the lake nothing is found yet
        assert table(trained, shape).tobytes() != textbook(other, seen, shape, 0.5, 0.9).tobytes()


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_batch_s_update_is_the_mean(seen, name):
    trained = train(tabular_spec(name, CLIFF, steps=1, envs_per_worker=3, n_steps=5, lr=0.5))
    q = np.zeros((48, 4))
    for s, a, r in zip(*(column.tolist() for column in seen[0][:3]), strict=True):
        q[s, a] += 0.5 * r / len(seen[0].states)
    np.testing.assert_allclose(table(trained, (48, 4)), q, atol=1e-6)


@pytest.mark.parametrize("name", ALGORITHMS)
@pytest.mark.parametrize("mode", ["async", "ssp"])
def test_asynchronous_with_one_worker_is_serial_bit_by_bit(name, mode):
    lag = {"max_staleness": 3} if mode == "ssp" else {}
    serial = train(tabular_spec(name, CLIFF, steps=80, lr=0.3, every=30))
    server = train(tabular_spec(name, CLIFF, steps=80, lr=0.3, every=30,
                                strategy={"name": "parameter_server", "mode": mode, **lag}))  # fmt: skip
    assert serial.weights.numpy().tobytes() == server.weights.numpy().tobytes()
    other = train(tabular_spec(name, CLIFF, steps=80, lr=0.3, every=30) | {"seed": 1})
    assert serial.weights.numpy().tobytes() != other.weights.numpy().tobytes()  # control


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_run_in_two_parts_is_the_run_in_one(tmp_path, name):
    """Environments begin anew at every checkpoint, also where nothing was interrupted."""

    def run(out: str, steps: int, every: int = 20) -> bytes:
        spec = tabular_spec(name, CLIFF, steps=steps, every=every, epsilon={"start": 0.5, "end": 0.5})
        distml.run(spec, out=tmp_path / out, runtime="inline", display=SilentDisplay())
        return bytes(saved(tmp_path / out)["model"]["values"].tobytes())

    whole = run("whole", 80)
    assert run("parts", 40) != whole
    assert run("parts", 80) == whole
    assert run("rarely", 80, every=80) != whole  # control: other checkpoints are other episodes


STRATEGIES = ["all_reduce", "parameter_server", {"name": "parameter_server", "mode": "async"},
              {"name": "parameter_server", "mode": "ssp", "max_staleness": 1},
              {"name": "local_sgd", "inner_steps": 4}]  # fmt: skip


@pytest.mark.parametrize("name", ALGORITHMS)
@pytest.mark.parametrize("strategy", STRATEGIES, ids=str)
def test_every_strategy_carries_it(name, strategy):
    """Two workers in the corridor: the way right is worth gamma^(steps left), the optimum by hand."""
    trained = train(tabular_spec(name, "corridor:Corridor", steps=300, workers=2, strategy=strategy, envs_per_worker=2,
                                 n_steps=4, lr=3.0, epsilon={"start": 1.0, "end": 0.0, "fraction": 0.8}))  # fmt: skip
    right = table(trained, (5, 2))[:4, 1]
    np.testing.assert_allclose(right, [0.9**3, 0.9**2, 0.9, 1.0], atol=0.05)
    assert trained.evaluated[-1].metrics["eval/return_greedy_mean"] == 1.0
    assert trained.evaluated[-1].metrics["eval/episode_length_greedy_mean"] == 4.0


def test_synchronous_strategies_agree_bit_by_bit():
    found = [train(tabular_spec("sarsa", CLIFF, workers=2, strategy=strategy)).weights.numpy().tobytes()
             for strategy in STRATEGIES[:2]]  # fmt: skip
    assert found[0] == found[1]


# ---------------------------------------------------------------------------------------------------------- transitions
def stream_of(name: str, environment: Any, num_envs: int = 1, **task: Any) -> tuple[TabularStream, Any]:
    task = build_task(job_of(tabular_spec(name, environment, envs_per_worker=num_envs, **task)))
    return task.stream(Part(0, 1, 5, "train")), task.build_model()


@pytest.mark.parametrize("autoreset", ["next_step", "same_step"])
def test_sarsa_takes_the_action_that_its_target_counted_on(autoreset):
    environment = {"id": "CliffWalking-v1", "max_episode_steps": 7, "autoreset": autoreset}
    stream, model = stream_of("sarsa", environment, epsilon={"start": 1.0, "end": 1.0})
    batches = [stream.next(model, Progress()) for _ in range(60)]
    assert sum(float(batch.ended.sum()) for batch in batches) == 8
    for before, after in pairwise(batches):
        if before.ended[-1]:
            assert after.states[0] == 36  # the start
        else:
            assert (after.states[0], after.actions[0]) == (before.next_states[-1], before.next_actions[-1])


@pytest.mark.parametrize("name", ALGORITHMS)
@pytest.mark.parametrize("autoreset", ["next_step", "same_step"])
def test_actions_belong_to_the_states_that_they_are_taken_in(name, autoreset):
    """Also an episode's first, where the state before it in the stream is the last of another."""
    environment = {"id": "CliffWalking-v1", "max_episode_steps": 3, "autoreset": autoreset}
    stream, model = stream_of(name, environment, num_envs=5, epsilon={"start": 0.0, "end": 0.0})
    with torch.no_grad():
        model.values.copy_(torch.rand(48, 4, generator=torch.Generator().manual_seed(1)))
        model.values[36] = torch.tensor([1.0, 0.0, 0.0, 0.0])  # up, away from the cliff
    batches = [stream.next(model, Progress()) for _ in range(12)]
    states, actions = (torch.cat(column) for column in list(zip(*batches, strict=True))[:2])
    best = model.values.detach().argmax(1)
    assert len(set(best[states].tolist())) > 1
    assert torch.equal(actions, best[states])


@pytest.mark.parametrize("name", ALGORITHMS)
@pytest.mark.parametrize("autoreset", ["next_step", "same_step"])
def test_an_end_is_told_from_a_limit_and_nothing_else_is_counted(name, autoreset):
    """Dry lake, always right and down: episodes end in a hole or at the limit of 3 steps, in states of their own."""
    environment = {"id": LAKE, "args": {"is_slippery": False}, "max_episode_steps": 3, "autoreset": autoreset}
    stream, model = stream_of(name, environment, num_envs=4, n_steps=40, epsilon={"start": 1.0, "end": 1.0})
    batch = stream.next(model, Progress())
    holes = torch.isin(batch.next_states, torch.tensor([5, 7, 11, 12]))
    assert holes.any()
    assert torch.equal(batch.goes_on == 0, holes)
    limits = (batch.lengths == 3) & (batch.goes_on == 1)
    assert limits.any()
    assert torch.equal(batch.ended == 1, holes | limits)
    num_rows, num_episodes = len(batch.states), int(batch.ended.sum())
    moved = [(s, a, n) for s, a, n in zip(*(batch[k].tolist() for k in (0, 1, 3)), strict=True)]
    inner = gymnasium.make(LAKE, is_slippery=False).unwrapped
    assert all(inner.P[s][a][0][1] == n for s, a, n in moved)  # what was really done, not a beginning anew
    dummies = 4 * 40 - num_rows
    assert dummies == 0 if autoreset == "same_step" else num_episodes - 4 <= dummies <= num_episodes


def failing(name: str, restarts: int, **args: Any) -> tuple[TabularStream, Any]:
    """On environments that count, in batches of 8 steps."""
    environment = {"id": "own.counting:CountingStates", "args": {"length": 50, **args}}
    spec = tabular_spec(name, environment, n_steps=8) | {"limits": {"max_restarts": restarts}}
    task = build_task(job_of(spec))
    return task.stream(Part(2, 3, 5, "train")), task.build_model()


@pytest.mark.parametrize("name", ALGORITHMS)
def test_an_environment_that_fails_is_begun_anew_within_the_limit(name):
    LIFE["failures"] = 0
    stream, model = failing(name, 1, raises_at=3, failures=1)
    with pytest.warns(UserWarning, match=r"worker 2: .*the motor is hot; its environments begin anew \(1 of 1\)"):
        batch = stream.next(model, Progress())
    assert batch.states.tolist() == list(range(8))  # nothing of the failed attempt is left
    LIFE["failures"] = 0
    stream, model = failing(name, 0, raises_at=3)
    with pytest.raises(EnvironmentFailed, match=r"worker 2: .*seed \d+, after 3 steps.*max_restarts: 0"):
        stream.next(model, Progress())


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_reward_that_is_not_a_number_does_not_reach_the_table(name):
    stream, model = failing(name, 0, nan_at=11)
    stream.next(model, Progress())
    with pytest.raises(EnvironmentFailed, match=r"worker 2: .*a reward that is not finite .*step 10\): nan"):
        stream.next(model, Progress())


def test_a_batch_is_never_empty():
    environment = {"id": LAKE, "max_episode_steps": 1}
    stream, model = stream_of("q_learning", environment)
    assert [len(stream.next(model, Progress()).states) for _ in range(5)] == [1] * 5


def test_frames_are_the_transitions_that_happened(seen):
    spec = tabular_spec("q_learning", {"id": LAKE, "max_episode_steps": 2}, steps=30, envs_per_worker=3, n_steps=2)
    trained = train(spec)
    frames = sum(len(batch.states) for batch in seen)
    assert frames < 30 * 6  # dummies
    assert trained.reports[-1].frames == frames


def test_episodes_in_training_are_reported(seen):
    trained = train(tabular_spec("sarsa", {"id": "CliffWalking-v1", "max_episode_steps": 5}, steps=50))
    means = trained.reports[-1].means
    assert means["rl/episode_length_mean"] == (50, 10)
    assert means["rl/episode_return_mean"][0] == sum(float(batch.rewards.sum()) for batch in seen)


def loss_of(name: str, goes_on: float) -> tuple[float, torch.Tensor]:
    _, model = stream_of(name, LAKE)
    task = build_task(job_of(tabular_spec(name, LAKE)))
    with torch.no_grad():
        model.values[1] = torch.tensor([1.0, 2.0, 3.0, 4.0])
    one, zero = torch.ones(1), torch.zeros(1)
    batch = Transitions(torch.tensor([0]), torch.tensor([2]), one, torch.tensor([1]), torch.tensor([1]),
                        goes_on * one, one, zero, zero)  # fmt: skip
    loss = task.loss(model, batch, Progress())
    loss.total.backward()
    return float(loss.total.detach()), model.values.grad


@pytest.mark.parametrize(("name", "goes_on", "target"), [
    ("q_learning", 1, 1 + 0.9 * 4), ("sarsa", 1, 1 + 0.9 * 2), ("q_learning", 0, 1), ("sarsa", 0, 1),
])  # fmt: skip
def test_targets(name, goes_on, target):
    total, gradient = loss_of(name, goes_on)
    assert total == pytest.approx(0.5 * target**2)
    assert gradient[0, 2] == pytest.approx(-target)
    assert gradient.abs().sum() == pytest.approx(target)  # none flows into the target


# -------------------------------------------------------------------------------------------------------------- acting
def test_epsilon_falls_with_the_budget_and_stays():
    spec = EpsilonSpec(start=1.0, end=0.2, fraction=0.5)
    values = [epsilon_at(spec, Progress(fraction=fraction)) for fraction in (0.0, 0.25, 0.5, 1.0)]
    assert values == pytest.approx([1.0, 0.6, 0.2, 0.2])
    assert epsilon_at(EpsilonSpec(start=1.0, end=0.2, fraction=0.0), Progress()) == pytest.approx(0.2)


def test_actions_are_the_best_or_any():
    """40,000 draws: a standard error is at most 0.0025."""
    generator = np.random.default_rng(0)
    values = np.tile([1.0, 3.0, 3.0, 2.0], (40_000, 1)).astype(np.float32)
    for epsilon, shares in ((0.0, [0, 0.5, 0.5, 0]), (0.2, [0.05, 0.45, 0.45, 0.05]), (1.0, [0.25] * 4)):
        found = np.bincount(epsilon_greedy(values, epsilon, generator), minlength=4) / 40_000
        np.testing.assert_allclose(found, shares, atol=0.01)


def test_evaluations_are_what_the_exact_values_say():
    """The optimal table on the slippery lake with its limit of 100 steps; 240 episodes: standard errors of 0.03."""
    mdp = mdp_of(gymnasium.make(LAKE))
    best = value_iteration(mdp, 0.9)
    constant = {"start": 0.3, "end": 0.3}
    task = build_task(job_of(tabular_spec("q_learning", LAKE, epsilon=constant, evaluation={"episodes": 240})))
    model = task.build_model()
    with torch.no_grad():
        model.values.copy_(torch.from_numpy(best.action_values))
    parts = [task.evaluate(model, Part(index, 2, 7, "validation"), Progress()) for index in range(2)]
    greedy = np.eye(4)[best.policy]
    for mode, policy in (("greedy", greedy), ("sampled", 0.7 * greedy + 0.3 / 4)):
        mean = parts[0][f"return_{mode}_mean"] + parts[1][f"return_{mode}_mean"]
        assert mean.count == 240
        assert mean.value == pytest.approx(policy_values(mdp, policy, 1.0, steps=100)[0], abs=0.11)
    assert parts[0]["return_greedy_mean"].value - parts[0]["return_sampled_mean"].value > 0.1  # control


# ------------------------------------------------------------------------------------------------------------- learning
SMALL_LAKE = {"desc": ["SFF", "FHF", "FFG"]}


@pytest.mark.parametrize(("args", "steps"), [(SMALL_LAKE, 150), pytest.param({}, 1500, marks=pytest.mark.slow)],
                         ids=["3x3", "4x4"])  # fmt: skip
def test_the_table_approaches_the_exact_optimum(args, steps):
    """Slippery lakes, gamma 0.9, random steps whose rate falls to 0: Q is exact but for 0.03 (root mean square).

    What is left is the noise of pairs that are seldom visited: seen were 0.006 to 0.014, where values reach 0.6.
    """
    mdp = mdp_of(gymnasium.make(LAKE, **args))
    best = value_iteration(mdp, 0.9)
    spec = tabular_spec("q_learning", {"id": LAKE, "args": args}, steps=steps, envs_per_worker=64, n_steps=4,
                        epsilon={"start": 1.0, "end": 1.0},
                        optimizer={"name": "sgd", "lr": 16.0, "schedule": "linear"})  # fmt: skip
    q = table(train(spec), best.action_values.shape)
    live = ~mdp.terminal

    def error(table: np.ndarray) -> float:
        return float(np.sqrt(np.square(table - best.action_values)[live].mean()))

    assert error(q) < 0.03
    assert error(0 * q) > 0.15  # control: nothing learned
    assert policy_values(mdp, np.eye(4)[q.argmax(1)], 0.9)[0] == pytest.approx(best.values[0], rel=0.02)
    assert policy_values(mdp, np.full(q.shape, 0.25), 0.9)[0] < 0.6 * best.values[0]  # control: random actions


def greedy_path(q: np.ndarray) -> list[int]:
    """States that the greedy policy goes through, from after the start to the goal, or 60."""
    moves = gymnasium.make("CliffWalking-v1").unwrapped.P
    states = [36]
    while states[-1] != 47 and len(states) <= 60:
        states.append(moves[states[-1]][int(q[states[-1]].argmax())][0][1])
    return states[1:]


@pytest.mark.slow
def test_on_the_cliff_sarsa_walks_safely_and_q_learning_along_the_edge():
    """Sutton & Barto 2018, example 6.6; the control: once nobody explores, the edge is the better way.

    Means over the last 2,000 steps; with seeds 0 to 2 seen: Q-learning -57 to -50 and SARSA -25 to -21 while they
    explore, -14 to -13 and -17 to -15 when they no longer do.
    """
    found = {}
    for name in ALGORITHMS:
        for end in (0.1, 0.0):
            spec = tabular_spec(name, "CliffWalking-v1", steps=8000, gamma=1.0,
                                epsilon={"start": 0.1, "end": end, "fraction": 0.8},
                                optimizer={"name": "sgd", "lr": 0.5, "schedule": "linear"})  # fmt: skip
            trained = train(spec | {"log": {"every": 2000, "to": []}})
            total, count = trained.reports[-1].means["rl/episode_return_mean"]
            found[name, end] = total / count, greedy_path(table(trained, (48, 4)))
    assert len(found["q_learning", 0.1][1]) == len(found["q_learning", 0.0][1]) == 13  # the optimum
    assert len(found["sarsa", 0.1][1]) > 13
    assert not set(found["sarsa", 0.1][1]) & set(range(25, 35))  # no step beside the cliff
    assert found["sarsa", 0.1][0] > found["q_learning", 0.1][0] + 10
    assert found["q_learning", 0.0][0] > found["sarsa", 0.0][0] + 0.5  # control


# ------------------------------------------------------------------------------------------------------------- refusals
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gamma": 1.1}, "task.gamma"),
        ({"environment": "FrozenLake-v9"}, "unknown environment 'FrozenLake-v9'; did you mean"),
        ({"epsilon": {"start": 2.0}}, "task.epsilon.start"),
        ({"policy": "mlp"}, "unknown key 'policy'"),
    ],
)
def test_a_wrong_spec_is_refused(changes, message):
    with pytest.raises(UsageError) as caught:
        job_of(tabular_spec("q_learning", LAKE, **changes))
    assert message in str(caught.value)


@pytest.mark.parametrize(("environment", "what"), [
    ("CartPole-v1", "observations Box"), ("Blackjack-v1", "observations Tuple"), ("Pendulum-v1", "observations Box"),
])  # fmt: skip
def test_other_spaces_are_refused(environment, what):
    task = build_task(job_of(tabular_spec("sarsa", environment)))
    with pytest.raises(UsageError) as caught:
        task.build_model()
    assert what in str(caught.value)
    assert "a table is for Discrete ones" in str(caught.value)


@pytest.mark.parametrize(("keys", "n_steps", "batch_size"), [
    ({}, 1, 2), ({"n_steps": 3}, 3, 6), ({"envs_per_worker": 2, "n_steps": 3}, 3, 12),
])  # fmt: skip
def test_the_batch_follows_from_workers_environments_and_steps(keys, n_steps, batch_size):
    job = job_of(tabular_spec("q_learning", LAKE, workers=2, **keys))
    assert (job.task.n_steps, job.batch_size) == (n_steps, batch_size)
    given = job_of(tabular_spec("q_learning", LAKE, workers=2) | {"batch_size": 8})
    assert given.task.n_steps == 4
