"""What one key can have wrong, where the message points, and what is written short."""

# ruff: noqa: E501 (tables: one case per line)
from __future__ import annotations

import os
from pathlib import Path

import pytest

from distml.errors import UsageError
from distml.spec.jobs import shipped_jobs
from distml.spec.loader import load_spec
from distml.spec.schema import AdamWSpec, AllReduceSpec, BestSpec, CNNSpec, JobSpec, MLPSpec, OwnTaskSpec

HEAD = "distml: v1\nname: x\n"
SPEC = HEAD + "task: classification\nstop: {steps: 10}\n"  # what follows is line 5
BASE = {"distml": "v1", "name": "x", "task": "classification", "stop": {"steps": 10}}

BAD = {
    "unknown key": ("optimzer: sgd", "5:1", "unknown key 'optimzer'; did you mean 'optimizer'?"),
    "unknown inner key": ("optimizer: {name: sgd, lrr: 1}", "5:24", "unknown key 'lrr' in optimizer; did you mean 'lr'?"),
    "unlike any key": ("strategy: {name: single, zzz: 1}", "5:26", "unknown key 'zzz' in strategy; known: name"),
    "key of another variant": ("optimizer: {name: adam, nesterov: true}", "5:25", "unknown key 'nesterov' in optimizer"),
    "field's name, not its alias": ("init: {source: x}", "5:8", "unknown key 'source' in init; known: from"),
    "string for number": (
        "optimizer: {name: sgd, lr: fast}",
        "5:28",
        "optimizer.lr must be a number, got the string 'fast'",
    ),
    "float for integer": ("batch_size: 6.5", "5:13", "batch_size must be an integer, got 6.5"),
    "boolean for integer": ("seed: true", "5:7", "seed must be an integer, got true"),
    "string for boolean": ("optimizer: {name: sgd, nesterov: yes}", "5:34", "must be true or false, got the string 'yes'"),
    "integer for string": ("init: {from: 5}", "5:14", "init.from must be a string, got 5"),
    "null for block": ("resources: null", "5:12", "resources must be a mapping, got null"),
    "number for named block": ("strategy: 5", "5:11", "strategy must be a name or a mapping, got 5"),
    "string for list": ("inline: {speeds: 5}", "5:18", "inline.speeds must be a list, got 5"),
    "list for mapping": ("log: [1]", "5:6", "log must be a mapping, got a list"),
    "too small": ("batch_size: 0", "5:13", "batch_size must be at least 1, got 0"),
    "negative rate": ("optimizer: {name: sgd, lr: -1}", "5:28", "optimizer.lr must be at least 0, got -1"),
    "too large": ("seed: 4294967296", "5:7", "seed must be less than 4294967296, got 4294967296"),
    "share of one": ("optimizer: {name: sgd, momentum: 1.0}", "5:34", "optimizer.momentum must be less than 1, got 1.0"),
    "not above zero": ("limits: {start_s: 0}", "5:19", "limits.start_s must be greater than 0, got 0"),
    "infinite": ("optimizer: {name: sgd, lr: .inf}", "5:28", "optimizer.lr must be a finite number, got inf"),
    "overflowing": ("optimizer: {name: sgd, lr: 1e999}", "5:28", "optimizer.lr must be a finite number"),
    "too few entries": ("optimizer: {name: adam, betas: [0.9]}", "5:32", "betas must have at least 2 entries, got 1"),
    "choice": ("precision: fp8", "5:12", "precision must be one of fp32, bf16, fp16, got the string 'fp8'"),
    "near choice": ("transport: object_stor", "5:12", "did you mean 'object_store'?"),
    "entry of a list": ("log: {to: [tensorbord]}", "5:12", "log.to.0 must be 'tensorboard'"),
    "key in a list of blocks": ("optimizer: {name: sgd, groups: [{match: a}, {lr: 1}]}", "5:45", "'match' is missing"),
    "strategy": (
        "strategy: all_redcue",
        "5:11",
        "unknown strategy 'all_redcue'; did you mean 'all_reduce'? (known: single, all_reduce, parameter_server, "
        "local_sgd, zero)",
    ),
    "strategy in a block": ("strategy: {name: x}", "5:18", "unknown strategy 'x'; known: single, all_reduce"),
    "strategy without a name": ("strategy: {mode: sync}", "5:11", "'name' is missing in strategy; one of single"),
    "strategy's name no string": ("strategy: {name: [1]}", "5:18", "strategy.name must be a string, got a list"),
    "optimizer": ("optimizer: adamm", "5:12", "unknown optimizer 'adamm'; did you mean 'adam'?"),
    "schedule": (
        "optimizer: {name: sgd, schedule: cosin}",
        "5:34",
        "unknown schedule 'cosin'; did you mean 'cosine'? (known: constant, linear, cosine, step)",
    ),
    "mode": ("strategy: {name: parameter_server, mode: asinc}", "5:42", "did you mean 'async'?"),
    "goal on the training loss": ("checkpoint: {best: train/loss}", "5:20", "must start with eval/"),
    "two wrong": ("seed: x\nbatch_size: y", "5:7", "got the string 'x' (and 1 more)"),
    "kind that is none": ("kind: swep", "5:7", "kind 'swep' does not work; did you mean 'sweep'? kinds that work: train"),
    "kind of no string": ("kind: [1]", "5:7", "kinds that work: train"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_wrong_key_or_value_is_named_at_its_place(case, fails):
    text, place, phrase = BAD[case]
    message = fails(f"{SPEC}{text}\n")
    assert message.startswith(f"job.yaml:{place}: "), message
    assert phrase in message


WHOLE = {
    "unknown task": (
        HEAD + "task: classificatoin\nstop: {steps: 1}\n",
        "3:7",
        "unknown task 'classificatoin'; did you mean 'classification'? (known: classification, regression, language_model, "
        "masked_language_model, actor_critic, reinforce, ppo, trpo, q_learning, sarsa, bandit, module:Class)",
    ),
    "task in a block": (HEAD + "task: {name: x}\nstop: {steps: 1}\n", "3:14", "unknown task 'x'; known: classification"),
    "task's name a number": (HEAD + "task: {name: 5}\nstop: {steps: 1}\n", "3:14", "task.name must be a string, got 5"),
    "task's name a list": (HEAD + "task: {name: []}\nstop: {steps: 1}\n", "3:14", "must be a string, got a list"),
    "task's name null": (HEAD + "task: {name: null}\nstop: {steps: 1}\n", "3:14", "must be a string, got null"),
    "task without a name": (HEAD + "task: {data: digits}\nstop: {steps: 1}\n", "3:7", "'name' is missing in task"),
    "not a module": (HEAD + "task: 'a b:C'\nstop: {steps: 1}\n", "3:7", "must be a built-in's name or 'module:Class'"),
    "model": (
        HEAD + "task: {name: classification, model: mlpp}\nstop: {steps: 1}\n",
        "3:37",
        "unknown model 'mlpp'; did you mean 'mlp'?",
    ),
    "data": (
        HEAD + "task: {name: classification, data: mnist}\nstop: {steps: 1}\n",
        "3:36",
        "task.data must be one of digits, cifar10, got the string 'mnist'",
    ),
    "no stop": (HEAD + "task: regression\n", "1:1", "the key 'stop' is missing; add it"),
    "misspelt, so missing": ("distml: v1\nname: x\ntask: regression\nstpo: {steps: 1}\n", "4:1", "did you mean 'stop'? (and 1 more)"),
    "version": ("distml: v2\nname: x\ntask: regression\nstop: {steps: 1}\n", "1:9", "distml must be 'v1'"),
    "name": ("distml: v1\nname: a b\ntask: regression\nstop: {steps: 1}\n", "2:7", "name must be 1 to 100 of"),
    "line break in a key": (SPEC + '"a\\nb": 1\n', "5:1", r"unknown key 'a\nb'"),
}  # fmt: skip


@pytest.mark.parametrize("case", WHOLE)
def test_a_wrong_spec_is_named_at_its_place(case, fails):
    text, place, phrase = WHOLE[case]
    message = fails(text)
    assert message.startswith(f"job.yaml:{place}: "), message
    assert phrase in message


def test_names_stand_for_blocks():
    job = load_spec({**BASE, "strategy": "all_reduce", "optimizer": {"name": "adamw", "schedule": "cosine"}}).job
    assert isinstance(job.strategy, AllReduceSpec)
    assert job.optimizer.schedule.name == "cosine"
    assert load_spec({**BASE, "task": {"name": "classification", "model": "cnn"}}).job.task.model == CNNSpec(name="cnn")
    assert load_spec({**BASE, "optimizer": "adamw"}).job.optimizer == AdamWSpec(name="adamw")


@pytest.mark.parametrize(
    ("metric", "mode"),
    [("eval/accuracy", "max"), ("eval/loss", "min"), ("eval/top1_error", "min"), ("eval/perplexity", "min"),
     ("eval/loss/accuracy", "max")],
)  # fmt: skip
def test_best_alone_is_a_metric_whose_name_says_the_mode(metric, mode):
    job = load_spec({**BASE, "checkpoint": {"best": metric}}).job
    assert job.checkpoint.best == BestSpec(metric=metric, mode=mode)


def test_a_colon_makes_it_an_own_task(tmp_path):
    (tmp_path / "mine.py").write_text("class A:\n    pass\n")
    job = load_spec({**BASE, "task": {"name": "mine:A", "args": {"x": [1, None]}}}, directory=tmp_path).job
    assert job.task == OwnTaskSpec(name="mine:A", args={"x": [1, None]})


def test_defaults_are_the_schema_s():
    job = load_spec(BASE).job
    assert job.task.model == MLPSpec(name="mlp")
    assert isinstance(job, JobSpec)
    assert job.optimizer == AdamWSpec(name="adamw")


@pytest.mark.parametrize(
    ("spec", "phrase"),
    [
        ({}, "is missing"),
        ({**BASE, "seed": "x"}, "seed must be an integer, got the string 'x'"),
        ({**BASE, "init": {"from": object()}}, "init.from must be a value that YAML can hold, got an object of class object"),
        ({**BASE, 5: 1}, "the key 5 of the spec must be a string"),
        ({**BASE, "optimizer": {"name": "sgd", "lr": float("nan")}}, "nan"),
        ({**BASE, "seed": 10**5000}, "64 bits"),
        ({**BASE, "name": "\ud800"}, "surrogate"),
    ],
)  # fmt: skip
def test_a_dict_s_errors_stand_at_spec_1_1(spec, phrase):
    with pytest.raises(UsageError) as caught:
        load_spec(spec)
    assert str(caught.value).startswith("<spec>:1:1: ")
    assert phrase in str(caught.value)


def test_a_dict_that_contains_itself():
    spec = dict(BASE)
    spec["init"] = spec
    with pytest.raises(UsageError, match=r"<spec>:1:1: .*contain itself"):
        load_spec(spec)


def test_tuples_and_paths_are_taken_as_they_would_be_written(tmp_path):
    job = load_spec(
        {
            **BASE,
            "init": {"from": tmp_path},
            "task": {"name": "classification", "model": {"name": "mlp", "hidden": (8,)}},
        }
    ).job
    assert job.task.model.hidden == [8]
    assert job.init.source == str(tmp_path)


def test_a_dict_is_not_changed():
    spec = {**BASE, "strategy": "single"}
    load_spec(spec, ["strategy.name=all_reduce", "stop.steps=3"])
    assert spec == {**BASE, "strategy": "single"}


def test_files_that_cannot_be_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("digits.yaml").write_text(SPEC)
    Path("folder").mkdir()
    for source, phrase in [
        ("digitz.yaml", "digitz.yaml: no such file; did you mean 'digits.yaml'?"),
        ("digits-singel", "digits-singel: no such file; did you mean 'digits-single'?"),
        ("qqqq", f"qqqq: no such file; shipped jobs: {', '.join(shipped_jobs())}"),
        ("folder", "folder: is a directory"),
        ("x" * 5000, "not a path: "),
        ("a\0b", r"a\x00b: "),
    ]:
        with pytest.raises(UsageError) as caught:
            load_spec(source)
        assert phrase in str(caught.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_file_without_permission(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text(SPEC)
    path.chmod(0)
    with pytest.raises(UsageError, match="cannot be read"):
        load_spec(path)


def test_where_a_spec_comes_from(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_spec(BASE).path is None
    assert load_spec(BASE).directory == tmp_path
    (tmp_path / "a.yaml").write_text(SPEC)
    assert load_spec(tmp_path / "a.yaml").directory == tmp_path
    assert load_spec("digits-single").path.name == "digits-single.yaml"
