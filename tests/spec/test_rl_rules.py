"""Specs of tasks that act: what follows from what, and what is refused with its place."""

from __future__ import annotations

import pytest

from distml.spec.loader import load_spec

HEAD = "distml: v1\nname: t\nstop: {frames: 1000}\n"


def load(task, **keys):
    spec = {"distml": "v1", "name": "t", "stop": {"frames": 1000}, "task": task, **keys}
    return load_spec(spec).job


def test_a_name_alone_is_an_environment():
    job = load({"name": "actor_critic", "environment": "CartPole-v1"})
    assert (job.task.environment.id, job.task.environment.autoreset) == ("CartPole-v1", None)
    wrapped = load({"name": "ppo", "environment": {"id": "CartPole-v1", "wrappers": ["FlattenObservation"]}})
    assert wrapped.task.environment.wrappers[0].name == "FlattenObservation"
    assert load({"name": "ppo", "environment": "CartPole-v1", "policy": "gru"}).task.policy.name == "gru"


@pytest.mark.parametrize(
    ("task", "keys", "batch_size", "n_steps"),
    [
        ({"name": "actor_critic"}, {}, 128, 8),
        ({"name": "actor_critic", "n_steps": 5}, {"resources": {"workers": 3}}, 240, 5),
        ({"name": "actor_critic", "envs_per_worker": 4}, {"batch_size": 40, "resources": {"workers": 2}}, 40, 5),
        ({"name": "actor_critic", "n_steps": 5}, {"batch_size": 80}, 80, 5),
        ({"name": "ppo", "envs_per_worker": 8, "n_steps": 32, "minibatches": 4}, {}, 64, 32),
        ({"name": "ppo", "envs_per_worker": 8, "minibatches": 4}, {"batch_size": 64}, 64, 32),
        ({"name": "reinforce", "envs_per_worker": 8}, {"resources": {"workers": 2}}, 16, None),
    ],
)
def test_of_batch_size_and_n_steps_what_is_not_given_follows(task, keys, batch_size, n_steps, tmp_path):
    job = load({**task, "environment": "CartPole-v1"}, **keys)
    assert job.batch_size == batch_size
    assert n_steps is None or job.task.n_steps == n_steps
    loaded = load_spec({"distml": "v1", "name": "t", "stop": {"frames": 1000},
                        "task": {**task, "environment": "CartPole-v1"}, **keys})  # fmt: skip
    (tmp_path / "spec.yaml").write_text(loaded.dump())
    assert load_spec(tmp_path / "spec.yaml").job == loaded.job


@pytest.mark.parametrize(
    ("task", "every"),
    [
        ({"name": "actor_critic"}, 10_000),
        ({"name": "q_learning", "environment": "FrozenLake-v1"}, 10_000),
        ({"name": "ppo", "epochs": 10, "minibatches": 32, "n_steps": 64}, 10_240),
        ({"name": "reinforce", "epochs": 3, "importance_weighting": True}, 10_002),
    ],
)
def test_checkpoints_which_end_every_episode_are_far_apart_if_nothing_is_said(task, every, tmp_path):
    spec = {"distml": "v1", "name": "t", "stop": {"steps": 10}, "task": {"environment": "CartPole-v1", **task}}
    loaded = load_spec(spec)
    assert loaded.job.checkpoint.every == every
    assert load_spec({**spec, "checkpoint": {"every": 30 * every}}).job.checkpoint.every == 30 * every
    assert load_spec({**spec, "checkpoint": {"keep": 5}}).job.checkpoint.every == every
    (tmp_path / "spec.yaml").write_text(loaded.dump())
    assert f"every: {every}" in loaded.dump()
    assert load_spec(tmp_path / "spec.yaml").job == loaded.job
    assert load_spec({**spec, "task": "regression"}).job.checkpoint.every == 100  # the control


def test_a_checkpoint_that_cuts_no_rollout_of_known_length_may_come_at_any_step():
    ppo = {"name": "ppo", "environment": "CartPole-v1"}
    at_any = {"checkpoint": {"every": 30}}
    assert load({**ppo, "target_kl": 0.02}, **at_any).checkpoint.every == 30
    assert load(ppo, strategy={"name": "parameter_server", "mode": "async"}, **at_any).checkpoint.every == 30
    assert load({**ppo, "name": "actor_critic"}, **at_any).checkpoint.every == 30


BAD = {
    "unknown environment": (
        "task: {name: actor_critic, environment: CartPol-v1}", "4:41",
        "unknown environment 'CartPol-v1'; did you mean 'CartPole-v1'?",
    ),
    "unknown version": (
        "task: {name: actor_critic, environment: {id: CartPole-v9}}", "4:46", "did you mean 'CartPole-v1'?",
    ),
    "own environment that is not there": (
        "task: {name: actor_critic, environment: 'nowhere:Env'}", "4:41", "no module 'nowhere'",
    ),
    "own policy that is not there": (
        "task: {name: actor_critic, environment: CartPole-v1, policy: 'nowhere:Net'}", "4:62", "no module 'nowhere'",
    ),
    "gamma": (
        "task: {name: actor_critic, environment: CartPole-v1, gamma: 1.5}", "4:61",
        "task.gamma must be at most 1, got 1.5",
    ),
    "batch that no steps make": (
        "task: {name: actor_critic, environment: CartPole-v1}\nbatch_size: 100", "5:1",
        "batch_size 100 is not a multiple of workers 1 x envs_per_worker 16 = 16",
    ),
    "both and they differ": (
        "task: {name: actor_critic, environment: CartPole-v1, n_steps: 5}\nbatch_size: 64", "4:54",
        "batch_size 64 is not workers 1 x envs_per_worker 16 x n_steps 5 = 80; leave batch_size out",
    ),
    "minibatches that do not fit": (
        "task: {name: ppo, environment: CartPole-v1, n_steps: 5, minibatches: 3}", "4:57",
        "= 80 frames cannot be cut into 3 minibatches",
    ),
    "episodes": (
        "task: {name: reinforce, environment: CartPole-v1}\nbatch_size: 64", "5:1",
        "batch_size 64 is not workers 1 x envs_per_worker 16 = 16 episodes",
    ),
    "frames of a task without": ("task: regression", "3:8", "takes none; set one of steps, examples, epochs, seconds"),
    "epochs of a task that acts": (
        "task: {name: ppo, environment: CartPole-v1}\nstop: {epochs: 2}", "4:8",
        "acts in environments; set stop.frames",
    ),
    "low precision": (
        "task: {name: ppo, environment: CartPole-v1}\nprecision: bf16", "5:1", "not for tasks that act",
    ),
    "trpo with another rule": (
        "task: {name: trpo, environment: CartPole-v1}\noptimizer: {name: adam}", "5:1",
        "set optimizer: {name: sgd, lr: 1.0} and nothing else in it",
    ),
    "trpo with shared layers": (
        "task: {name: trpo, environment: CartPole-v1, policy: {name: mlp, trunk: shared}}\n"
        "optimizer: {name: sgd, lr: 1.0}", "4:66", "set task.policy.trunk: separate",
    ),
    "trpo without a group": (
        "task: {name: trpo, environment: CartPole-v1}\noptimizer: {name: sgd, lr: 1.0}\n"
        "strategy: {name: parameter_server, mode: async}", "6:1", "needs group_mean, which parameter_server/async",
    ),
    "a bound on KL without a group": (
        "task: {name: ppo, environment: CartPole-v1, target_kl: 0.02}\nstrategy: local_sgd", "5:1",
        "task ppo needs group_mean, which local_sgd does not offer",
    ),
    "kernels": (
        "task: {name: ppo, environment: CartPole-v1, policy: {name: cnn, channels: [8, 8]}}", "4:65",
        "their numbers differ: channels 2, kernels 3, strides 3",
    ),
    "sequences that cannot be cut": (
        "task: {name: ppo, environment: CartPole-v1, policy: lstm, envs_per_worker: 6}", "4:",
        "envs_per_worker 6 is not a",
    ),
    "a checkpoint within a rollout": (
        "task: {name: ppo, environment: CartPole-v1}\ncheckpoint: {every: 100}", "5:14",
        "checkpoint.every 100 is not a multiple of epochs x minibatches = 16, so that each checkpoint would drop the "
        "rest of a rollout; set it to 112",
    ),
    "a checkpoint between uses of the same episodes": (
        "task: {name: reinforce, environment: CartPole-v1, epochs: 3, importance_weighting: true}\n"
        "checkpoint: {every: 10}", "5:14", "checkpoint.every 10 is not a multiple of epochs 3",
    ),
    "old episodes without weights": (
        "task: {name: reinforce, environment: CartPole-v1, epochs: 3}", "4:51", "set importance_weighting: true",
    ),
    "standardised in pieces": (
        "task: {name: actor_critic, environment: CartPole-v1, normalise_advantages: true}\nmicro_batch_size: 64", "5:1",
        "is over a worker's rollout, which micro_batch_size 64 cuts into pieces; remove one of them",
    ),
    "minibatches that may be empty": (
        "task: {name: ppo, environment: CartPole-v1, envs_per_worker: 1, n_steps: 8, minibatches: 8}", "4:77",
        "may leave as few as 4 rows for minibatches 8; raise task.n_steps or lower task.minibatches",
    ),
    "a decay that nothing reads": (
        "task: {name: reinforce, environment: CartPole-v1, decay: 0.5}", "4:51",
        "task.decay 0.5 is for baseline: moving_average; remove it",
    ),
    "a coefficient that nothing reads": (
        "task: {name: reinforce, environment: CartPole-v1, value_coefficient: 0.1, baseline: none}", "4:51",
        "task.value_coefficient 0.1 is for baseline: learned; remove it",
    ),
    "a largest weight that nothing reads": (
        "task: {name: reinforce, environment: CartPole-v1, max_weight: 2.0}", "4:51",
        "task.max_weight 2 is for importance_weighting: true; remove it",
    ),
    "a schedule whose end nobody knows": (
        "task: {name: reinforce, environment: CartPole-v1}\noptimizer: {name: adam, schedule: linear}", "5:25",
        "must know where it ends",
    ),
    "statistics in a wrapper": (
        "task: {name: ppo, environment: {id: CartPole-v1, wrappers: [FlattenObservation, NormalizeObservation]}}",
        "4:81", "remove it; set task.normalise: {observations: true}",
    ),
    "statistics in a wrapper of rewards": (
        "task: {name: ppo, environment: {id: CartPole-v1, wrappers: [{name: NormalizeReward}]}}",
        "4:61", "remove it; set task.normalise: {rewards: true}",
    ),
    "statistics in a table's wrapper": (
        "task: {name: sarsa, environment: {id: Taxi-v3, wrappers: [NormalizeReward]}}",
        "4:59", "scores would not be the environment's; remove it",
    ),
    "a memory without last observations": (
        "task: {name: ppo, policy: gru, environment: {id: CartPole-v1, autoreset: same_step}}",
        "4:63", "policy gru has a memory, and with autoreset same_step",
    ),
    "unknown wrapper key": (
        "task: {name: ppo, environment: {id: CartPole-v1, wrapers: []}}", "4:50", "did you mean 'wrappers'?",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_wrong_spec_is_refused_at_its_place(case, fails):
    text, place, phrase = BAD[case]
    head = HEAD if "stop:" not in text else HEAD.replace("stop: {frames: 1000}\n", "")
    message = fails(f"{head}{text}\n")
    assert phrase in message, message
    assert message.startswith(f"job.yaml:{place}"), message


def test_settings_that_are_read_may_be_anything():
    pairs = [{"decay": 0.5, "baseline": "moving_average"}, {"value_coefficient": 0.1},
             {"max_weight": 2.0, "importance_weighting": True}, {"decay": 0.9, "max_weight": 10.0}]  # fmt: skip
    for keys in pairs:
        task = load({"name": "reinforce", "environment": "CartPole-v1", **keys}).task
        assert {key: getattr(task, key) for key in keys} == keys
    assert load({"name": "actor_critic", "environment": "CartPole-v1"}, micro_batch_size=64).micro_batch_size == 64
    environment = {"id": "CartPole-v1", "autoreset": "same_step"}  # without dummies
    small = load({"name": "ppo", "environment": environment, "envs_per_worker": 1, "n_steps": 8, "minibatches": 8})
    assert small.batch_size == 1


def test_frames_end_a_schedule_where_each_becomes_so_many_examples():
    for name, uses in (("actor_critic", 1.0), ("ppo", 4.0), ("reinforce", None)):
        assert load({"name": name, "environment": "CartPole-v1"}).task.uses_per_frame == uses
    load({"name": "ppo", "environment": "CartPole-v1"}, optimizer={"name": "adam", "schedule": "linear"})
