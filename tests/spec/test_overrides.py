"""`--set` and its Python form: what they change, and how their errors name them."""

from __future__ import annotations

import pytest

from distml.errors import UsageError
from distml.spec.loader import load_spec

BASE = {"distml": "v1", "name": "x", "task": "classification", "stop": {"steps": 10}}
FULL = {
    **BASE,
    "strategy": "parameter_server",
    "optimizer": {"name": "sgd", "groups": [{"match": "*.bias"}]},
    "resources": {"workers": 2},
}


def value_at(job, path):
    for part in path.split("."):
        job = job[int(part)] if part.isdigit() else getattr(job, part)
    return job


@pytest.mark.parametrize(
    ("text", "path", "value"),
    [
        ("optimizer.lr=1e-2", "optimizer.lr", 0.01),
        ("optimizer.groups.0.lr=1", "optimizer.groups.0.lr", 1.0),
        ("strategy=all_reduce", "strategy.name", "all_reduce"),
        ("strategy={name: parameter_server, mode: async}", "strategy.mode", "async"),
        ("strategy.servers=2", "strategy.servers", 2),
        ("task.model=cnn", "task.model.name", "cnn"),
        ("task.model.dropout=0.5", "task.model.dropout", 0.5),
        ("optimizer.schedule.warmup=3", "optimizer.schedule.warmup", 3),
        ("checkpoint.best=eval/loss", "checkpoint.best.mode", "min"),
        ("init.from=a/b", "init.source", "a/b"),
        ("micro_batch_size=", "micro_batch_size", None),
        ("stop.goal={metric: eval/accuracy, at_least: 0.5}", "stop.goal.at_least", 0.5),
        ("init.from='a=b'", "init.source", "a=b"),
    ],
)
def test_set_changes_the_spec(text, path, value):
    assert value_at(load_spec(FULL, [text]).job, path) == value


def test_the_default_block_is_what_a_missing_one_begins_with():
    job = load_spec(BASE, ["optimizer.lr=0.5"]).job
    assert (job.optimizer.name, job.optimizer.lr) == ("adamw", 0.5)


def test_a_replaced_block_keeps_nothing_and_later_ones_lie_over_it():
    overrides = ["strategy.servers=3", "strategy=parameter_server", "strategy.mode=ssp", "strategy.max_staleness=4"]
    strategy = load_spec(FULL, overrides).job.strategy
    assert (strategy.servers, strategy.mode, strategy.max_staleness) == (1, "ssp", 4)


def test_the_last_one_wins():
    assert load_spec(FULL, ["seed=1", "seed=2"]).job.seed == 2


def test_python_values_are_used_as_they_are():
    job = load_spec(
        FULL, {"optimizer.lr": 0.25, "strategy": {"name": "single"}, "resources.workers": 1, "name": "5"}
    ).job
    assert (job.optimizer.lr, job.strategy.name, job.name) == (0.25, "single", "5")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (["optimizer.lr=fast"], "--set optimizer.lr=fast: optimizer.lr must be a number, got the string 'fast'"),
        (["optimzer.lr=1"], "--set optimzer.lr=1: unknown key 'optimzer'; did you mean 'optimizer'?"),
        (["strategy.mod=sync"], "--set strategy.mod=sync: unknown key 'mod' in strategy; did you mean 'mode'?"),
        (["optimizer.groups.1.lr=1"], "--set optimizer.groups.1.lr=1: optimizer.groups has 1 entries"),
        (["optimizer.groups.x.lr=1"], "--set optimizer.groups.x.lr=1: optimizer.groups is a list"),
        (["resources.workers.x=1"], "--set resources.workers.x=1: resources.workers is 2, not a block"),
        (["seed"], "--set seed: must be KEY=VALUE"),
        (["=1"], "--set =1: the key '' must be names joined by dots"),
        (["a..b=1"], "--set a..b=1: the key 'a..b' must be names"),
        (["seed=[1"], "--set seed=[1: not YAML"),
        (["seed=!!int 5"], "--set seed=!!int 5: !!int: tags are not allowed"),
        (["seed=a\nb"], r"--set seed=a\nb: seed must be an integer"),
        (["resources.workers=65"], "--set resources.workers=65: batch_size 64 is shared out over 65 workers"),
        (["strategy.mode=ssp"], "--set strategy.mode=ssp: mode ssp needs strategy.max_staleness"),
        (["kind=sweeps"], "--set kind=sweeps: kind 'sweeps' does not work"),
        ("seed=x", "--set seed=x: seed must be an integer"),
        ({"seed": "x"}, "override seed='x': seed must be an integer"),
        ({"optimizer.lr": float("nan")}, "override optimizer.lr=nan: nan"),
        ({"seed": object}, "override seed=<class 'object'>: seed must be a value that YAML can hold"),
    ],
)
def test_errors_are_located_at_the_override(override, message):
    with pytest.raises(UsageError) as caught:
        load_spec(FULL, override)
    assert str(caught.value).startswith(message)


def test_an_error_of_the_file_stays_located_in_the_file(fails):
    message = fails("distml: v1\nname: x\ntask: regression\nstop: {steps: x}\n", ["seed=y"])
    assert message == "job.yaml:4:15: stop.steps must be an integer, got the string 'x' (and 1 more)"
