"""`kind: rllib`: what is wrong with a spec is said with its place, before ray is imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest

from distml.errors import UsageError
from distml.spec.json_schema import json_schema
from distml.spec.loader import load_spec, load_train
from distml.spec.rllib import RLlibSpec
from distml.spec.yaml import parse

HEAD = "distml: v1\nkind: rllib\nname: x\n"
GOOD = "algorithm: PPO\nenvironment: CartPole-v1\nstop: {steps: 3}\n"
BROKEN = {
    "unknown algorithm": ("algorithm: PPPO\nenvironment: CartPole-v1\nstop: {steps: 3}", "4:12", "did you mean 'PPO'?"),
    "no environment": ("algorithm: PPO\nstop: {steps: 3}", "1:1", "'environment' is missing"),
    "unknown environment": (
        "algorithm: PPO\nenvironment: CartPol-v1\nstop: {steps: 3}",
        "5:14",
        "did you mean 'CartPole-v1'?",
    ),
    "how it is stepped": (
        "algorithm: PPO\nenvironment: {id: CartPole-v1, autoreset: same_step}\nstop: {steps: 3}",
        "5:32",
        "environment.autoreset is RLlib's to decide",
    ),
    "unknown key": (
        f"{GOOD}config: {{lambd: 0.9}}",
        "7:10",
        "unknown key 'lambd' in config of PPO; did you mean 'lambda_'?",
    ),
    "key of another": (f"{GOOD}config: {{num_atoms: 3}}", "7:10", "unknown key 'num_atoms' in config of PPO"),
    "unknown key below": (
        f"{GOOD}config:\n  lr: 1.0e-3\n  model_config:\n    fcnet_hidden: [3]",
        "10:5",
        "unknown key 'fcnet_hidden' in config.model_config; did you mean 'fcnet_hiddens'?",
    ),
    "wrong kind": (f"{GOOD}config: {{num_env_runners: two}}", "7:27", "must be an integer, got the string 'two'"),
    "wrong kind below": (
        f"{GOOD}config: {{model_config: {{use_lstm: 1}}}}",
        "7:35",
        "config.model_config.use_lstm must be true or false",
    ),
    "no mapping": (f"{GOOD}config: {{model_config: 3}}", "7:24", "config.model_config must be a mapping, got 3"),
    "true is no number": (f"{GOOD}config: {{lr: true}}", "7:14", "config.lr must be a number or a list, got true"),
    "buffer's type": (
        "algorithm: DQN\nenvironment: CartPole-v1\nstop: {steps: 3}\nconfig: {replay_buffer_config: {type: os.system}}",
        "7:39",
        "must be one of EpisodeReplayBuffer, PrioritizedEpisodeReplayBuffer, got the string 'os.system'",
    ),
    "buffer's key": (
        "algorithm: DQN\nenvironment: CartPole-v1\nstop: {steps: 3}\n"
        "config: {replay_buffer_config: {type: EpisodeReplayBuffer, capacty: 3}}",
        "7:60",
        "did you mean 'capacity'?",
    ),
    "buffer without type": (
        "algorithm: DQN\nenvironment: CartPole-v1\nstop: {steps: 3}\nconfig: {replay_buffer_config: {capacity: 3}}",
        "7:32",
        "the key 'type' is missing in config.replay_buffer_config",
    ),
    "our environment": (
        f"{GOOD}config: {{env: X}}",
        "7:10",
        "cannot be set: the environment stands in the key 'environment'",
    ),
    "our arguments": (f"{GOOD}config: {{env_config: {{}}}}", "7:10", "stand in environment.args"),
    "our evaluation": (
        f"{GOOD}config: {{evaluation_interval: 3}}",
        "7:10",
        "stands in evaluate.every and evaluate.episodes",
    ),
    "our seed": (f"{GOOD}config: {{seed: 3}}", "7:10", "the seed stands in the key 'seed'"),
    "a seed that would not hold": (
        f"{GOOD}config: {{batch_mode: complete_episodes}}\nseed: 3",
        "8:1",
        "seed 3 would hold for evaluations alone",
    ),
    "a class": (f"{GOOD}config: {{callbacks_class: os.system}}", "7:10", "it takes Python code"),
    "a function": (f"{GOOD}config: {{callbacks_on_sample_end: x}}", "7:10", "it takes Python code"),
    "old stack": (f"{GOOD}config: {{model: {{fcnet_hiddens: [3]}}}}", "7:10", "use model_config"),
    "no budget": (
        "algorithm: PPO\nenvironment: CartPole-v1\nstop: {goal: {metric: eval/return_mean, at_least: 3}}",
        "6:1",
        "stop has no budget; set one of steps, frames, seconds",
    ),
    "no bound": (
        "algorithm: PPO\nenvironment: CartPole-v1\nstop: {steps: 1, goal: {metric: eval/return_mean}}",
        "6:18",
        "stop.goal has neither at_least nor at_most",
    ),
    "two bounds": (
        "algorithm: PPO\nenvironment: CartPole-v1\n"
        "stop: {steps: 1, goal: {metric: eval/return_mean, at_least: 1, at_most: 3}}",
        "6:18",
        "stop.goal has both at_least and at_most",
    ),
    "unknown metric": (
        "algorithm: PPO\nenvironment: CartPole-v1\nstop: {steps: 1, goal: {metric: eval/return, at_least: 1}}",
        "6:33",
        "did you mean 'eval/return_mean'?",
    ),
    "nothing recorded": (
        "algorithm: BC\nenvironment: CartPole-v1\nstop: {steps: 3}\nconfig: {lr: 1.0e-3}",
        "7:1",
        "set config.input_",
    ),
    "nothing there": (
        "algorithm: BC\nenvironment: CartPole-v1\nstop: {steps: 3}\nconfig: {input_: nowhere}",
        "7:18",
        "give the folder of recorded episodes",
    ),
    "frames of none": (
        "algorithm: BC\nenvironment: CartPole-v1\nstop: {frames: 3}\nconfig: {input_: .}",
        "6:8",
        "learns from recorded episodes",
    ),
    "no such class": (
        "algorithm: PPO\nenvironment: 'nowhere:Env'\nstop: {steps: 3}",
        "5:14",
        "no module 'nowhere'",
    ),
    "a train job's key": (f"{GOOD}optimizer: adam", "7:1", "unknown key 'optimizer'"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_wrong_is_named_at_its_place(case, fails):
    text, place, phrase = BROKEN[case]
    message = fails(f"{HEAD}{text}\n")
    assert message.startswith(f"job.yaml:{place}: "), message
    assert phrase in message


def test_the_same_without_the_mistake_is_accepted(tmp_path):
    (tmp_path / "job.yaml").write_text(f"{HEAD}{GOOD}config: {{lambda_: 0.9, model_config: {{fcnet_hiddens: [3]}}}}\n")
    job = load_spec(tmp_path / "job.yaml").job
    assert isinstance(job, RLlibSpec)
    assert job.environment.id == "CartPole-v1"
    assert job.evaluate.episodes == 10


def test_overrides_reach_rllibs_own_keys():
    job = load_spec(
        "rllib-ppo-cartpole", ["config.lr=0.5", "config.model_config.fcnet_hiddens=[7]", "environment=Acrobot-v1"]
    ).job
    assert job.config["lr"] == 0.5
    assert job.config["model_config"] == {"fcnet_hiddens": [7], "vf_share_layers": False}
    assert job.environment.id == "Acrobot-v1"
    with pytest.raises(UsageError, match=r"^--set config.lr_=1: unknown key 'lr_' in config of PPO"):
        load_spec("rllib-ppo-cartpole", ["config.lr_=1"])


def test_an_override_may_change_the_kind():
    train = {"distml": "v1", "name": "x", "stop": {"steps": 1}}
    loaded = load_spec(train, {"kind": "rllib", "algorithm": "PPO", "environment": "CartPole-v1"})
    assert loaded.job.environment.id == "CartPole-v1"


def test_recorded_episodes_lie_beside_the_spec_wherever_it_is_run(tmp_path, monkeypatch):
    (tmp_path / "recorded").mkdir()
    spec = tmp_path / "job.yaml"
    spec.write_text(
        f"{HEAD}algorithm: BC\nenvironment: CartPole-v1\nstop: {{steps: 1}}\nconfig: {{input_: recorded}}\n"
    )
    monkeypatch.chdir("/")
    loaded = load_spec(spec)
    assert loaded.job.config["input_"] == str(tmp_path / "recorded")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "spec.yaml").write_text(loaded.dump())
    assert load_spec(tmp_path / "run" / "spec.yaml").job == loaded.job


def test_verbs_for_training_jobs_refuse_it():
    with pytest.raises(
        UsageError, match="rllib-ppo-cartpole is a job of kind rllib; this works with jobs of kind train"
    ):
        load_train("rllib-ppo-cartpole")
    assert load_train("digits-single").job.kind == "train"


def test_the_json_schema_speaks_of_the_kind_that_is_written():
    validator = jsonschema.Draft202012Validator(json_schema())
    good = parse(f"{HEAD}{GOOD}".encode(), "x").data
    assert validator.is_valid(good)
    assert not validator.is_valid({**good, "algorithm": "PPPO"})
    assert not validator.is_valid({**good, "optimizer": "adam"})
    errors = list(validator.iter_errors({**good, "stop": {"step": 3}}))
    assert any("'step' was unexpected" in error.message for error in errors)


def test_a_check_imports_nothing_heavy(tmp_path):
    code = (
        "import sys\nfrom distml.cli import main\ncode = main(['validate', 'rllib-ppo-cartpole'])\n"
        "print(code, [name for name in ('torch', 'ray') if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert found.stdout.splitlines()[-1] == "0 []"
    assert "rllib-ppo-cartpole, PPO of RLlib, CartPole-v1" in found.stdout
    assert Path(found.stdout.partition(":")[0]).name == "rllib-ppo-cartpole.yaml"
