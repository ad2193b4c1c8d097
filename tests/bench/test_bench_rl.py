"""`distml bench rl`: what is kept and how it acts, the jobs as they are measured, targets and tables; some for real."""

from __future__ import annotations

import importlib.util
import json
import time
from dataclasses import replace

import gymnasium as gym
import numpy as np
import pytest
import torch
import yaml
from torch import nn

import distml
from distml.bench import contenders, rl, rl_figure
from distml.bench.rl_contenders import SUITES, Ask, Contender, write_spec
from distml.bench.rl_kept import (
    EVALUATION_SEED,
    RETURN,
    Keeper,
    Kept,
    as_arrays,
    first_solved,
    greedy_actions,
    greedy_returns,
    outputs,
)
from distml.bench.rl_task import Watched, layers
from distml.cli import main
from distml.errors import RunError
from distml.rl.policies import build_policy
from distml.spec.jobs import shipped_jobs
from distml.spec.loader import load_spec
from distml.spec.rl import MLPPolicySpec, NormaliseSpec
from distml.strategies.agenda import Agenda
from distml.tasks.base import Mean

HAS_SB3 = importlib.util.find_spec("stable_baselines3") is not None
OURS = sorted({one.job for suite in SUITES.values() for one in suite.contenders.values()} & set(shipped_jobs()))


class Clock:
    """Seconds that pass only when somebody says so."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


# ----------------------------------------------------------------------------------------------------------------- kept
def test_weights_are_kept_at_every_multiple_and_copying_takes_no_time(tmp_path):
    clock = Clock()
    keeper = Keeper(every=100, clock=clock)
    keeper.start()

    def copy():
        clock.now += 50.0
        return {"weight-0": np.full((1, 2), clock.now)}

    for frames in (60, 120, 180, 240, 470, 490, 500):
        clock.now += 1.0
        keeper.start()  # only the first one counts
        keeper.offer(frames, copy)
    assert keeper.frames == [120, 240, 470, 500]
    assert keeper.seconds == [2.0, 4.0, 5.0, 7.0]
    assert keeper.at == [102.0, 154.0, 205.0, 257.0]  # by the clock itself
    keeper.save(tmp_path / "kept.npz", "relu")
    kept = Kept.load(tmp_path / "kept.npz")
    assert kept.frames_per_s == (500 - 120) / 5.0
    assert kept.activation == "relu"
    assert kept.arrays["weight-0"].shape == (4, 1, 2)


def test_what_is_kept_is_a_copy():
    weight = torch.zeros(2, 2)
    arrays = as_arrays([(weight, torch.zeros(2))])
    weight += 1.0
    assert not arrays["weight-0"].any()


def test_solved_is_the_first_of_three_in_a_row():
    assert first_solved([500, 500, 0, 475, 480, 490, 0], 475) == 3
    assert first_solved([500, 500, 0, 475, 480, 474.9], 475) is None
    assert first_solved([500, 500], 475) is None
    assert first_solved([np.nan, 500, 500], 475) is first_solved([500, np.nan, 500], 475) is None


@pytest.mark.parametrize("activation", ["tanh", "relu", "linear"])
def test_kept_networks_compute_what_torch_does(activation):
    torch.manual_seed(0)
    function = {"tanh": nn.Tanh, "relu": nn.ReLU, "linear": nn.Identity}[activation]
    model = nn.Sequential(nn.Linear(3, 8), function(), nn.Linear(8, 8), function(), nn.Linear(8, 2))
    linear = [module for module in model if isinstance(module, nn.Linear)]
    arrays = as_arrays([(one.weight.detach(), one.bias.detach()) for one in linear])
    rows = torch.randn(5, 3)
    assert np.allclose(outputs(arrays, activation, rows.numpy()), model(rows).detach().numpy(), atol=1e-6)


@pytest.mark.parametrize("trunk", ["shared", "separate"])
@pytest.mark.parametrize("normalised", [False, True])
def test_our_kept_policy_acts_as_the_policy_itself(trunk, normalised):
    torch.manual_seed(0)
    observations, actions = gym.spaces.Box(-100, 100, (3,)), gym.spaces.Box(-2, 2, (1,))
    spec = MLPPolicySpec(name="mlp", hidden=[16, 16], trunk=trunk, activation="relu")
    policy = build_policy(spec, observations, actions, NormaliseSpec(observations=normalised))
    rows = np.random.default_rng(0).normal(5.0, 3.0, (7, 3)).astype(np.float32)
    if normalised:
        policy.observation_moments.update(rows)
        policy.observation_moments.freeze()
    parameters, _ = policy.act(torch.from_numpy(rows), (), torch.zeros(7, dtype=torch.bool))
    means = policy.distribution.mode(parameters.detach().numpy())
    assert np.allclose(outputs(layers(policy), "relu", rows), means, atol=1e-5)
    if normalised:  # the control: without the moments it is another function
        bare = {name: values for name, values in layers(policy).items() if name not in ("mean", "std")}
        assert not np.allclose(outputs(bare, "relu", rows), means, atol=1e-3)


def test_episodes_together_are_those_of_one_environment_at_a_time():
    generator = np.random.default_rng(0)
    arrays = as_arrays([(generator.normal(size=(1, 3)), np.zeros(1))])
    together = gym.make_vec("Pendulum-v1", num_envs=3)
    found = greedy_returns(arrays, "tanh", together)
    for index in range(3):
        alone, total, done = gym.make("Pendulum-v1"), 0.0, False
        observation, _ = alone.reset(seed=EVALUATION_SEED + index)
        while not done:
            action = np.clip(arrays["weight-0"] @ observation, -2.0, 2.0)
            observation, reward, terminated, truncated, _ = alone.step(action)
            total, done = total + reward, terminated or truncated
        assert found[index] == pytest.approx(total, rel=1e-5)


def test_only_the_first_episode_counts():
    weight = np.array([[0.0] * 4, [0.0, 0.0, 1.0, 0.0]])
    made = gym.make_vec("CartPole-v1", num_envs=20)
    found = greedy_returns(as_arrays([(weight, np.zeros(2))]), "tanh", made)
    observations, _ = made.reset(seed=EVALUATION_SEED)
    lengths = np.zeros(20)
    for step in range(1, 501):
        observations, _, terminated, truncated, _ = made.step((observations @ weight[1] > 0).astype(int))
        lengths[(terminated | truncated) & (lengths == 0)] = step
    assert found.tolist() == lengths.tolist()  # a step's reward is 1
    assert found.min() < found.max()  # who ended first has begun anew meanwhile


def test_discrete_actions_may_begin_elsewhere_and_continuous_ones_have_bounds():
    assert greedy_actions(np.array([[0.0, 1.0], [1.0, 0.0]]), gym.spaces.Discrete(2, start=3)).tolist() == [4, 3]
    assert greedy_actions(np.array([[5.0], [-1.0]]), gym.spaces.Box(-2.0, 2.0, (1,))).tolist() == [[2.0], [-1.0]]


# ----------------------------------------------------------------------------------------------------------------- jobs
@pytest.mark.parametrize("name", OURS)
def test_a_job_is_measured_as_it_is_shipped(name, tmp_path):
    contender = Contender("it", job=name)
    path, frames = write_spec(contender, Ask(seed=7), tmp_path / "kept.npz")
    shipped, measured = load_spec(name).job, load_spec(path).job
    assert measured.task.args["block"] == json.loads(shipped.task.model_dump_json(by_alias=True))
    for key in ("strategy", "optimizer", "batch_size", "log", "resources", "transport", "limits", "init"):
        assert getattr(measured, key) == getattr(shipped, key), key
    assert (measured.seed, frames) == (7, shipped.stop.frames)
    updates = 1 if shipped.strategy.is_synchronous else shipped.resources.workers
    if budget_steps(shipped, updates) is None:  # nobody knows how many updates: then no schedule may need to
        assert (measured.stop.frames, shipped.optimizer.schedule.name) == (shipped.stop.frames, "constant")
    else:
        assert budget_steps(measured, updates) == budget_steps(shipped, updates)


def budget_steps(job, updates_per_round):
    """Where a job's schedules end."""
    return Agenda(job, updates_per_round=updates_per_round).budget_steps


def test_frames_workers_and_overrides_are_laid_over_the_job(tmp_path):
    contender = Contender("it", job="a3c-cartpole", workers=4)
    ask = Ask(64_000, ("optimizer.lr=0.25", "task.n_steps=4"), 3)
    path, frames = write_spec(contender, ask, tmp_path / "kept.npz")
    job = load_spec(path).job
    assert (frames, job.resources.workers, job.optimizer.lr, job.task.args["block"]["n_steps"]) == (64_000, 4, 0.25, 4)
    assert job.stop.steps * job.batch_size / 4 == pytest.approx(64_000, rel=0.01)


def test_keeping_weights_changes_nothing_of_the_training(tmp_path):
    overrides = ["resources.workers=1", "strategy=single", "stop={steps: 40}", "evaluate.every=1000",
                 "checkpoint.every=1000", "seed=2"]  # fmt: skip
    shipped = load_spec("a3c-cartpole", overrides).job
    document = json.loads(shipped.model_dump_json(by_alias=True))
    args = {"block": document["task"], "path": str(tmp_path / "kept.npz"), "every": 1000, "max_failures": 0}
    ours = {**document, "task": {"name": "distml.bench.rl_task:KeepingActorCritic", "args": args}}
    (tmp_path / "ours.yaml").write_text(yaml.safe_dump(ours))
    plain = distml.run(document, out=tmp_path / "plain").model().state_dict()
    kept = distml.run(tmp_path / "ours.yaml", out=tmp_path / "kept").model().state_dict()
    assert all(torch.equal(plain[name], kept[name]) for name in plain)
    found = Kept.load(tmp_path / "kept.npz")
    assert [frames // 1000 for frames in found.frames] == list(range(1, int(found.frames[-1]) // 1000 + 1))
    assert (np.diff(found.seconds) > 0).all()


def test_with_images_the_return_of_training_episodes_is_kept(tmp_path):
    pytest.importorskip("ale_py", reason="needs ale-py: install distml[atari]")
    small = {"name": "cnn", "channels": [4], "kernels": [8], "strides": [8], "hidden": 8}
    block = {"name": "actor_critic", "environment": "ALE/Pong-v5", "envs_per_worker": 2, "n_steps": 8, "policy": small}
    job = load_spec({"distml": "v1", "name": "pong", "task": block, "stop": {"steps": 8}}).job
    document = json.loads(job.model_dump_json(by_alias=True))
    args = {"block": document["task"], "path": str(tmp_path / "kept.npz"), "every": 32, "max_failures": 0}
    document["task"] = {"name": "distml.bench.rl_task:KeepingActorCritic", "args": args}
    (tmp_path / "ours.yaml").write_text(yaml.safe_dump(document))
    distml.run(tmp_path / "ours.yaml", out=tmp_path / "run")
    kept = Kept.load(tmp_path / "kept.npz")
    assert kept.frames.tolist() == [32, 64, 96, 128]
    assert np.isnan(kept.returns("ALE/Pong-v5")).all()  # nobody has ended an episode yet


class Batches:
    """A stream of batches in which so many episodes with this mean return have ended."""

    def __init__(self, *ended):
        self.ended = iter(ended)

    def next(self, model, progress):
        batch = type("Batch", (), {"metrics": {}})()
        count, value = next(self.ended)
        if count:
            batch.metrics["rl/episode_return_mean"] = Mean(count * value, count)
        return batch


def test_the_training_return_is_that_of_the_last_hundred_episodes():
    watched = Watched(Batches((0, 0), (30, 1.0), (80, 2.0), (60, 4.0)), Keeper())
    means = []
    for _ in range(4):
        watched.next(None, None)
        means.append(float(watched.training_return()[RETURN]))
    assert np.isnan(means[0])
    assert means[1:] == [1.0, pytest.approx((30 + 160) / 110), pytest.approx((160 + 240) / 140)]


# --------------------------------------------------------------------------------------------------------------- report
def run_of(seed, rate, frames, seconds):
    """One run of a contender, solved at these frames and seconds, or not."""
    return {"seed": seed, "frames_per_s": rate, "frames_to_solved": frames, "seconds_to_solved": seconds,
            "frames": [4000, 8000], "seconds": [0.1, 20.0], "returns": [None, 500.0], "others_cpus": 0.0,
            "cpu_us_per_frame": 20.0}  # fmt: skip


def measured(**runs):
    """Contenders of CartPole with (rate, frames, seconds) of each seed."""
    contenders = SUITES["cartpole"].contenders
    return {
        name: rl.over_seeds(contenders[name], [run_of(index + 1, *one) for index, one in enumerate(all_)])
        for name, all_ in runs.items()
    }


def verdicts(found):
    """What -> (value, met)."""
    return {one["what"]: (one["value"], one["met"]) for one in rl.targets("cartpole", found)}


def test_targets_need_every_seed_and_take_the_worst():
    ours, theirs = (
        [(60_000.0, 100_000, 2.0), (66_000.0, 180_000, 3.0)],
        [(10_000.0, 90_000, 9.0), (10_000.0, None, None)],
    )
    found = verdicts(measured(a3c=ours, sb3_a2c=theirs))
    rates, seconds, frames = found.values()
    assert rates == (pytest.approx(6.3), True)
    assert seconds == (pytest.approx(2.0 / 9.0), True)  # the other one had not solved it after 20 s
    assert frames == (180_000.0, True)
    unsolved = verdicts(measured(a3c=[*ours, (60_000.0, None, None)], sb3_a2c=[*theirs, (10_000.0, 1, 1.0)]))
    assert list(unsolved.values())[1:] == [(None, False), (None, False)]


def test_no_target_without_its_contenders():
    assert list(verdicts(measured(ppo=[(1.0, 160_000, 1.0)])).values()) == [(160_000.0, False)]
    assert not verdicts(measured(sb3_a2c=[(1.0, 1, 1.0)]))


def test_a_report_is_json_its_tables_are_even_and_it_can_be_drawn():
    found = measured(a3c=[(60_000.0, 100_000, 2.0), (50_000.0, None, None)], sb3_a2c=[(10_000.0, 90_000, 9.0)] * 2)
    about = {"environment": "CartPole-v1", "seeds": 2, "cpus": 2, "load_before": 0.1, "torch": "2", "ray": "2",
             "overrides": ["seed=1"]}  # fmt: skip
    report = json.loads(json.dumps({
        "threshold": 475.0, "returns": "return", "conditions": about, "contenders": found,
        "errors": {"RLlib PPO": "it broke"}, "skipped": {"SB3 PPO": "needs it"},
        "targets": rl.targets("cartpole", found)}))  # fmt: skip
    [(title, header, body, lines)] = rl.tables(report)
    assert title == "CartPole-v1, 2 seeds"
    assert all(len(row) == len(header) for row in body)
    assert body[0][1:9] == ["55000", "50000", "60000", "5.50", "20", "1 of 2", "100,000", "2.00"]
    assert any("not solved with every seed (target at most 0.7: missed)" in line for line in lines)
    assert {"RLlib PPO failed: it broke", "SB3 PPO was left out: needs it", "our jobs with --set seed=1"} <= set(lines)
    assert rl.failure(report) == "RLlib PPO did not come to an end; the rest was measured"
    assert rl.draw(report).startswith(b"\x89PNG")


def test_a3c_by_its_workers_stands_beside_the_paper():
    chosen = rl.with_workers({"a3c": SUITES["cartpole"].contenders["a3c"]}, [1, 2])
    runs = {"a3c_1": run_of(1, 30_000.0, 100_000, 4.0), "a3c_2": run_of(1, 57_000.0, 100_000, 2.0)}
    found = [rl.over_seeds(chosen[name], [run]) for name, run in runs.items()]
    _, header, body, _ = rl.scaling_table(found, 2)
    assert all(len(row) == len(header) for row in body)
    assert body[1] == ["distml A3C, 2 workers", "57,000", "1.90", "2.00", "2.1"]


def test_curves_cover_what_all_seeds_have():
    runs = [{"frames": [0, 100], "returns": [0.0, 10.0]}, {"frames": [50, 150], "returns": [20.0, 20.0]}]
    at, low, middle, high = rl_figure.over_seeds(runs, "frames")
    assert (at[0], at[-1]) == (50, 100)
    assert (low[0], middle[0], high[0]) == (5.0, 12.5, 20.0)


def test_a_contender_that_fails_or_lacks_a_package_leaves_the_others(monkeypatch, capsys):
    def train(suite, contender, ask, folder):
        if contender.job == "a2c-cartpole":
            raise RunError("it broke", phase="bench")
        time.sleep(0.1)  # the sampler has looked once
        seconds = np.array([1.0, 2.0])
        return Kept(np.array([4000, 8000]), seconds, seconds, "tanh", {RETURN: np.array([np.nan, 2.0])})

    monkeypatch.setattr(rl, "train", train)
    suite = SUITES["cartpole"].contenders
    monkeypatch.setitem(suite, "sb3_a2c", replace(suite["sb3_a2c"], package="no_such_package"))
    assert main(["bench", "rl", "--contenders", "a3c,a2c,sb3_a2c", "--seeds", "2", "--json"]) == 3
    printed = capsys.readouterr()
    report = json.loads(printed.out)
    assert list(report["contenders"]) == ["a3c"]
    assert [run["returns"] for run in report["contenders"]["a3c"]["runs"]] == [[None, 2.0]] * 2
    assert "SB3 A2C, 16 envs is left out: needs no_such_package, which is not installed; install distml[bench]" in (
        printed.err
    )
    assert "distml A2C did not come to an end" in printed.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--environment", "go"], "--environment go is not known; choose from cartpole, pendulum, pong"),
        (["--contenders", "dqn"], "--contenders dqn is not known; choose from a3c, a2c"),
        (["--environment", "pong", "--contenders", "trpo"], "--contenders trpo is not known; choose from a3c, sb3_a2c"),
        (["--seeds", "0"], "--seeds 0 is not possible; give at least 1"),
        (["--frames", "4000"], "--frames 4000 is not possible; give at least 12000"),
        (["--workers", "1,0"], "--workers 0 is not possible"),
        (["--workers", "two"], "--workers 'two' is not a whole number"),
        (["--environment", "pendulum", "--workers", "2"], "--workers is for A3C, which is not measured on Pendulum-v1"),
        (["--rate", "1gbit"], "distml bench rl has no option --rate"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_starts(arguments, message, capsys):
    assert main(["bench", "rl", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_overrides_are_refused_by_other_measurements(capsys):
    assert main(["bench", "loop", "--set", "seed=1"]) == 2
    assert "distml bench loop has no option --set" in capsys.readouterr().err


def test_what_does_not_end_is_ended_and_named(tmp_path):
    waits = [contenders.ThisHost(), ["-c", "import time; time.sleep(600)"]]
    with pytest.raises(RunError, match=r"time.sleep\(600\) had not ended after 0.2 s"):
        contenders.run_all([waits], {}, tmp_path, 0.2)


# ------------------------------------------------------------------------------------------------------------- for real
@pytest.mark.slow
def test_our_a3c_for_real(capsys):
    assert main(["bench", "rl", "--contenders", "a3c", "--seeds", "1", "--frames", "16000", "--json"]) == 0
    [run] = json.loads(capsys.readouterr().out)["contenders"]["a3c"]["runs"]
    assert [frames // 4000 for frames in run["frames"]] in ([1, 2, 3], [1, 2, 3, 4])
    assert all(1 <= value <= 500 for value in run["returns"])
    assert run["frames_per_s"] > 0
    assert run["cpu_us_per_frame"] > 0


@pytest.mark.skipif(not HAS_SB3, reason="needs stable-baselines3: install distml[bench]")
@pytest.mark.parametrize(("environment", "contender"), [("cartpole", "sb3_a2c"), ("pendulum", "sb3_ppo")])
def test_stable_baselines_for_real(environment, contender, tmp_path):
    suite = SUITES[environment]
    kept = rl.train(suite, suite.contenders[contender], Ask(12_000), tmp_path)
    returns = kept.returns(suite.environment)
    assert [frames // 4000 for frames in kept.frames] == [1, 2, 3]
    low, high = (1, 500) if environment == "cartpole" else (-2000, 0)
    assert all(low <= value <= high for value in returns)


@pytest.mark.skipif(not HAS_SB3, reason="needs stable-baselines3: install distml[bench]")
def test_vector_environments_do_in_stable_baselines_what_its_own_do():
    from distml.bench.rl_peers.sb3 import VectorEnvironments

    same_step = {"autoreset_mode": gym.vector.AutoresetMode.SAME_STEP}
    made = VectorEnvironments(
        gym.make_vec("CartPole-v1", num_envs=2, vectorization_mode="sync", vector_kwargs=same_step)
    )
    made.seed(0)
    made.reset()
    length, endings = np.zeros(2), 0
    for _ in range(60):
        observations, _, done, infos = made.step(np.array([0, 1]))
        length += 1
        for index in np.flatnonzero(done):
            last = infos[index]["terminal_observation"]
            assert max(abs(last[0]) / 2.4, abs(last[2]) / 0.2095) > 1  # outside: where the episode ended
            assert np.abs(observations[index]).max() <= 0.05  # the next one's first
            assert infos[index]["episode"] == {"r": length[index], "l": length[index]}
            assert not infos[index]["TimeLimit.truncated"]
            length[index], endings = 0, endings + 1
    assert endings >= 8


@pytest.mark.slow
@pytest.mark.skipif(not HAS_SB3, reason="needs stable-baselines3: install distml[bench]")
def test_stable_baselines_in_pong_for_real(tmp_path):
    pytest.importorskip("ale_py", reason="needs ale-py: install distml[atari]")
    config = {"algorithm": "a2c", "environment": "ALE/Pong-v5", "frames": 320, "seed": 1, "every": 160,
              "path": str(tmp_path / "kept.npz"), "atari": {"id": "ALE/Pong-v5"}}  # fmt: skip
    arguments = ["-m", "distml.bench.rl_peers.sb3", json.dumps(config)]
    contenders.run_all([(contenders.ThisHost(), arguments)], contenders.EVERYWHERE, tmp_path)
    assert Kept.load(tmp_path / "kept.npz").frames.tolist() == [160, 320]


@pytest.mark.slow
@pytest.mark.parametrize("contender", ["rllib_impala", "rllib_ppo"])
def test_rllib_for_real(contender, tmp_path):
    suite = SUITES["cartpole"]
    kept = rl.train(suite, suite.contenders[contender], Ask(12_000), tmp_path)
    assert len(kept.frames) >= 2
    assert all(1 <= value <= 500 for value in kept.returns(suite.environment))
