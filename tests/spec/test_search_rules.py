"""What is wrong with a job over jobs is said in one line with its place, before anything starts."""

from __future__ import annotations

from pathlib import Path

import jsonschema
import pytest

from distml.spec.json_schema import json_schema
from distml.spec.loader import load_spec
from distml.spec.search_rules import paths_of, within
from distml.spec.yaml import parse

POPULATION = """\
distml: v1
kind: population
name: p
base: digits-single
members: 4
every: 50
space:
  optimizer.lr: {loguniform: [1.0e-5, 1.0e-1]}
objective: eval/loss
"""
SWEEP = """\
distml: v1
kind: sweep
name: s
base: digits-single
trials: 8
space:
  optimizer.lr: {loguniform: [1.0e-5, 1.0e-1]}
objective: eval/loss
"""
NAS = """\
distml: v1
kind: nas
name: n
base: digits-single
trials: 8
space:
  task.model.hidden.0: {choice: [16, 32]}
"""
LOCAL = """\
distml: v1
name: base
task: classification
strategy: {name: local_sgd, inner_steps: 8}
resources: {workers: 2}
stop: {steps: 400}
"""


def changed(text: str, *changes: tuple[str, str]) -> str:
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    return text


LR = "optimizer.lr: {loguniform: [1.0e-5, 1.0e-1]}"


# ---------------------------------------------------------------------------------------------------------------- paths
@pytest.mark.parametrize(
    ("dimension", "column", "text"),
    [
        ("optimiser.lr: {uniform: [0, 1]}", 3, "space.optimiser.lr: the base has no such path; did you mean "
                                               "'optimizer.lr'?"),
        ("weight_decay: {uniform: [0, 1]}", 3, "space.weight_decay: the base has no such path; did you mean "
                                               "'optimizer.weight_decay'?"),
        ("optimizer.betas.2: {uniform: [0, 1]}", 3, "did you mean 'optimizer.betas.1'?"),
        ("xyz: {uniform: [0, 1]}", 3, "there are, for example: optimizer.lr, optimizer.weight_decay, "),
        ("stop.steps: {randint: [1, 9]}", 3, "space.stop.steps may not be searched: a member keeps it while it trains; "
                                             "remove it (what may, for example: optimizer.lr, "),
        ("optimizer: {choice: [sgd, adam]}", 3, "space.optimizer is a whole block, and not all in it may be searched; "
                                                "name a single value below it, for example optimizer."),
        ("task.model.hidden.0: {randint: [8, 64]}", 3, "space.task.model.hidden.0 may not be searched"),
        ("strategy.inner_steps: {randint: [1, 9]}", 3, "space.strategy.inner_steps may not be searched"),
        ("seed: {randint: [1, 9]}", 3, "space.seed may not be searched"),
        ("batch_size: {uniform: [3, 9]}", 3, "space.batch_size: the base does not take 3.0 there: batch_size must be "
                                             "an integer, got 3.0; use randint"),
        ("optimizer.lr: {choice: [0.1, -3]}", 3, "the base does not take -3 there: optimizer.lr must be at least 0, "
                                                 "got -3"),
        ("optimizer.lr: {uniform: [-1, 1]}", 3, "the base does not take -1.0 there: optimizer.lr must be at least 0"),
        ("optimizer.lr: {uniform: [3, 1]}", 27, "the lower end 3 is not below the upper end 1"),
        ("optimizer.lr: {loguniform: [0, 1]}", 30, "the lower end must be above 0, got 0"),
        ("optimizer.lr: {choice: [1, 2, 1]}", 26, "choice lists 1 twice"),
        ("optimizer: {lr: {uniform: [0, 1]}}", 3, "write its path with dots, as optimizer.lr"),
        ("optimizer.lr: 0.1", 17, "space.optimizer.lr must be one of {uniform: […]}"),
    ],
)  # fmt: skip
def test_a_space_that_does_not_fit(fails, dimension, column, text):
    message = fails(changed(POPULATION, (LR, dimension)))
    assert message.startswith(f"job.yaml:8:{column}: ")
    assert text in message


def test_what_may_not_change_while_training_may_differ_between_trials(fails, tmp_path):
    """The control: only what is the same for all is refused in a sweep."""
    for dimension in ("stop.steps: {randint: [1, 9]}", "optimizer: {choice: [sgd, adam]}",
                      "task.model.hidden.0: {randint: [8, 64]}", "seed: {randint: [1, 9]}"):  # fmt: skip
        Path("job.yaml").write_text(changed(SWEEP, (LR, dimension)))
        load_spec("job.yaml")
    assert "space.name may not be searched: it is the same for all" in fails(
        changed(SWEEP, (LR, "name: {choice: [a, b]}"))
    )
    for path in ("resources.workers", "resources.placement"):  # all trials are placed alike
        assert f"space.{path} may not be searched: it is the same for all" in fails(
            changed(SWEEP, (LR, f"{path}: {{choice: [2, 3]}}"))
        )
    for scheduler in ("pbt", "pb2"):  # these change values while a trial trains
        text = changed(SWEEP, (LR, "stop.steps: {randint: [1, 9]}"))
        assert "may not be searched: a member keeps it" in fails(f"{text}scheduler: {scheduler}\n")


def test_a_value_under_each_block_that_the_space_may_choose(fails):
    both = "optimizer.name: {choice: [sgd, adamw]}\n  optimizer.momentum: {uniform: [0, 0.9]}"
    message = fails(changed(SWEEP, (LR, both)))
    assert message.startswith("job.yaml:8:3: space.optimizer.momentum: the base does not take 0.0 there where "
                              "optimizer.name is 'adamw': unknown key 'momentum' in optimizer")  # fmt: skip
    Path("job.yaml").write_text(changed(SWEEP, (LR, "optimizer.name: {choice: [sgd, rmsprop]}\n"
                                                    "  optimizer.momentum: {uniform: [0, 0.9]}")))  # fmt: skip
    load_spec("job.yaml")


def test_patterns_of_paths():
    assert within("task.model.hidden.0", ["task.model.hidden"])
    assert within("task", ["task.model.hidden"])
    assert within("optimizer.groups.3.match", ["optimizer.groups.*.match"])
    assert not within("optimizer.groups.3.lr", ["optimizer.groups.*.match"])
    assert not within("optimizer.names", ["optimizer.name"])
    assert list(paths_of({"a": {"b": [1, {"c": None}]}, "d": []})) == ["a.b.0", "a.b.1.c"]


# ----------------------------------------------------------------------------------------------------------- population
@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ([("members: 4", "members: 1")], "5:10: members must be at least 2, got 1"),
        ([("every: 50", "every: 1000")], "6:8: every is 1000, and a member ends at step 625 (base.stop): nothing would "
                                         "ever be decided; lower every or raise base.stop"),
        ([("every: 50", "every: 625")], "6:8: every is 625, and a member ends at step 625"),
        ([("objective: eval/loss", "objective: train/loss")], "9:12: objective.metric must start with eval/"),
        ([("objective: eval/loss\n", "")], "1:1: the key 'objective' is missing; add it"),
        ([("members: 4", "member: 4")], "5:1: unknown key 'member'; did you mean 'members'?"),
        ([("base: digits-single\n", "")], "1:1: the key 'base' is missing; add it"),
        ([(f"space:\n  {LR}", "space: {}")], "7:8: space has no dimension; add one"),
        ([("every: 50", "every: 50\nstop: {steps: 100}")], "7:15: stop.steps is 100, of all 4 members together, and "
                                                          "every is 50: it ends before all had their first decision; "
                                                          "raise stop.steps to at least 200, or lower every"),
        ([("every: 50", "every: 50\nstop: {goal: {metric: eval/loss}}")], "7:14: stop.goal needs exactly one of"),
        ([("every: 50", "every: 50\nexploit: truncate")], "7:10: unknown exploit 'truncate'; did you mean"),
        ([("every: 50", "every: 50\nexplore: {name: perturb, factors: []}")], "7:35: explore.factors must have at"),
        ([("every: 50", "every: 50\nexploit: {name: truncation, fraction: 0.6}")], "7:39: exploit.fraction must be at "
                                                                                  "most 0.5, got 0.6"),
        ([("every: 50", "every: 50\nmax_concurrent: 9")], "7:17: max_concurrent is 9, and there are 4 members"),
    ],
)  # fmt: skip
def test_a_population_that_cannot_be(fails, changes, text):
    assert f"job.yaml:{text}" in fails(changed(POPULATION, *changes))


def test_without_decisions_every_may_be_anything(fails):
    """The control: a population that never copies is a random search, and ends where its members do."""
    Path("job.yaml").write_text(changed(POPULATION, ("every: 50", "every: 1000\nexploit: none")))
    assert load_spec("job.yaml").job.exploit.name == "none"


def test_examples_are_a_budget_too(fails):
    text = changed(POPULATION, ("every: 50", "every: 500"))
    assert "a member ends at step 400" in fails(text, ["base.stop={examples: 25600}", "base.batch_size=64"])
    assert "a member ends at step 100" in fails(text, ["base.stop={examples: 25600, steps: 100}"])


def test_decisions_fall_on_the_rounds_of_local_sgd(fails):
    Path("base.yaml").write_text(LOCAL)
    text = changed(POPULATION, ("base: digits-single", "base: base.yaml"))
    assert fails(text).startswith("job.yaml:6:8: every is 50, no multiple of 8, the base's strategy.inner_steps: "
                                  "between two rounds every worker has weights of its own; use 56")  # fmt: skip
    Path("job.yaml").write_text(changed(text, ("every: 50", "every: 48")))
    load_spec("job.yaml")
    sweep = changed(SWEEP, ("base: digits-single", "base: base.yaml"))
    Path("job.yaml").write_text(f"{sweep}every: 50\n")
    one = ["base.resources.workers=1"]
    Path("job.yaml").write_text(sweep)
    load_spec("job.yaml", one)  # nobody decides about it before its end
    assert "every is 50, no multiple of 8" in fails(f"{sweep}every: 50\nscheduler: asha\n", one)


# ----------------------------------------------------------------------------------------------------------------- base
@pytest.mark.parametrize(
    ("base", "text"),
    [
        ("digits-singel", "4:7: base: digits-singel: "),
        ("{kind: population, members: 3}", "4:14: base.kind must be 'train', got the string 'population'"),
        ("3", "4:7: base must be a training job: a block, a file or a shipped job's name; got 3"),
        ("pop.yaml", "4:7: base: pop.yaml is a job of kind population; a base must be of kind train"),
        ("job.yaml", "4:7: base: job.yaml is a job of kind population"),
        ("broken.yaml", "4:7: base: broken.yaml:2:1: unknown key 'nam'; did you mean 'name'?"),
        ("{task: classification, stop: {steps: 400}, optimizer: {name: adamw, learn: 3}}",
         "4:75: unknown key 'learn' in base.optimizer"),
        ("{task: classification, stop: {}}", "4:30: stop has no budget"),
        ("{task: classification, stop: {steps: 400}, resources: {workers: 2}, strategy: zero}",
         "4:85: base.strategy: zero/2 keeps each rank's part of the state on disk, and a population copies states in "
         "memory; use strategy: all_reduce"),
    ],
)  # fmt: skip
def test_a_base_that_cannot_be(fails, base, text):
    Path("pop.yaml").write_text(POPULATION)
    Path("broken.yaml").write_text("distml: v1\nnam: x\ntask: classification\nstop: {steps: 3}\n")
    assert f"job.yaml:{text}" in fails(changed(POPULATION, ("digits-single", base)))


def test_a_base_is_found_beside_the_spec_that_names_it(tmp_path, monkeypatch):
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs" / "base.yaml").write_text(LOCAL)
    (tmp_path / "jobs" / "job.yaml").write_text(
        changed(POPULATION, ("digits-single", "base.yaml"), ("every: 50", "every: 48"))
    )
    monkeypatch.chdir(tmp_path)
    loaded = load_spec("jobs/job.yaml")
    assert loaded.job.base.strategy.name == "local_sgd"
    assert loaded.directory == Path("jobs")
    assert loaded.base.job == loaded.job.base


# ---------------------------------------------------------------------------------------------------------------- sweep
@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ([("trials: 8\n", "")], "1:1: the key 'trials' is missing; with sampler random it says how many to run"),
        ([("trials: 8", "trials: 8\nsampler: grid")], "8:17: space.optimizer.lr: grid takes every combination, and "
                                                     "loguniform has no list of values; use choice, or sampler: "),
        ([("trials: 8", "trials: 8\nsampler: optunna")], "6:10: "),
        ([("trials: 8", "trials: 8\nscheduler: {name: fifo, grace: 3}")], "6:25: scheduler.grace is for asha, the "
                                                                         "scheduler is fifo; remove it"),
        ([("trials: 8", "trials: 8\nscheduler: {name: asha, grace: 625}")], "6:32: scheduler.grace is 625, and a trial "
                                                                           "ends at step 625"),
        ([("trials: 8", "trials: 8\nscheduler: asha\nevery: 625")],
         "7:8: the scheduler looks at a trial every 625 steps (every), and a trial ends at step 625"),
        ([("trials: 8", "trials: 8\nscheduler: pbt\nsampler: optuna")], "7:10: scheduler pbt changes values itself and "
                                                                       "cannot follow optuna; use sampler: random"),
        ([("trials: 8", "trials: 8\nscheduler: pb2"), (LR, "optimizer.lr: {choice: [0.1, 0.2]}")],
         "8:17: space.optimizer.lr: scheduler pb2 models intervals only"),
        ([("trials: 8", "trials: 8\nscheduler: {name: pbt, reduction_factor: 4}")],
         "6:24: scheduler.reduction_factor is for asha and hyperband, the scheduler is pbt; remove it"),
        ([("trials: 8", "trials: 8\nscheduler: {name: pbt, grace: 4}")], "6:24: scheduler.grace is for asha"),
        ([("trials: 8", "trials: 8\nevery: 10")], "6:1: every says when a scheduler looks at a trial, and scheduler "
                                                  "fifo never does"),
        ([("trials: 8", "trials: 8\nscheduler: asha\nevery: 9"), (LR, "stop.steps: {randint: [100, 200]}")],
         "9:3: space.stop.steps may not be searched with scheduler asha, which compares trials by their number of"),
        ([("trials: 8", "trials: 8\nscheduler: hyperband\nevery: 9"), (LR, "evaluate.every: {randint: [1, 9]}")],
         "9:3: space.evaluate.every may not be searched with scheduler hyperband"),
        ([("objective: eval/loss", "objective: [eval/loss, eval/accuracy]\nscheduler: asha")],
         "9:12: scheduler asha ranks trials by one metric, and objective has 2; use scheduler: fifo"),
        ([("objective: eval/loss", "objective: [eval/loss]")], "8:12: objective is a list of 1; give one metric, or"),
        ([("objective: eval/loss", "objective: [eval/loss, eval/loss]")], "8:24: objective names eval/loss twice"),
        ([("objective: eval/loss", "objective: eval/loss\ntie_break: eval/loss")], "9:1: tie_break is for several "
                                                                                  "objectives, and there is one"),
    ],
)  # fmt: skip
def test_a_sweep_that_cannot_be(fails, changes, text):
    assert f"job.yaml:{text}" in fails(changed(SWEEP, *changes))


@pytest.mark.parametrize("text", [SWEEP, NAS], ids=["sweep", "nas"])
def test_how_often_a_trial_is_run_again_is_said_once(fails, text):
    wrong = fails(f"{text}limits: {{max_restarts: 5}}\n")
    assert "limits.max_restarts is 5, and how often a trial that failed is run again is said by retries" in wrong
    Path("job.yaml").write_text(f"{text}limits: {{lost_after_s: 5}}\n")
    kept = load_spec("job.yaml", ["base.limits={max_restarts: 5}"])  # of the base, which may be run alone
    Path("job.yaml").write_text(kept.dump())
    load_spec("job.yaml")
    Path("job.yaml").write_text(f"{POPULATION}limits: {{max_restarts: 5}}\n")
    load_spec("job.yaml")


def test_by_examples_a_batch_size_decides_how_many_reports_there_are(fails):
    text = changed(SWEEP, (LR, "batch_size: {randint: [8, 64]}"), ("trials: 8", "trials: 8\nscheduler: asha"))
    assert "space.batch_size may not be searched with scheduler asha" in fails(text, ["base.stop={examples: 25600}"])
    load_spec("job.yaml", ["base.stop={steps: 400}"])


# ------------------------------------------------------------------------------------------------------------------ nas
@pytest.mark.parametrize(
    ("added", "text"),
    [
        ("reward: {cost: flops}", "8:16: reward.cost is flops, and there is no reward.target"),
        ("reward: {target: 1000.0}", "8:10: reward.target is of reward.cost, which is null"),
        ("reward: {metric: test/accuracy}", "8:18: reward.metric must start with eval/"),
        ("reward: {doubling_is_worth: 0.1}", "8:10: reward.doubling_is_worth is of reward.cost, which is null"),
        ("controller: {name: reinforce, batch: 9}", "8:38: controller.batch is 9 rewards per update, and trials is 8"),
        ("controller: {name: evolution, population: 8}", "8:43: controller.population is 8, all drawn by chance, and"),
        ("controller: evolutoin", "8:13: unknown controller 'evolutoin'; did you mean 'evolution'?"),
        ("controller: {name: evolution, population: 4}", "8:13: controller.sample is 5 of a population of 4; lower it"),
        ("controller: {name: random, lr: 1}", "8:28: unknown key 'lr' in controller"),
    ],
)
def test_a_search_that_cannot_be(fails, added, text):
    assert f"job.yaml:{text}" in fails(f"{NAS}{added}\n")


# --------------------------------------------------------------------------------------------------- what all share
@pytest.mark.parametrize("text", [POPULATION, SWEEP, NAS], ids=["population", "sweep", "nas"])
def test_overrides_reach_into_base_and_space(tmp_path, text):
    path = tmp_path / "job.yaml"
    path.write_text(text)
    job = load_spec(path, ["base.optimizer.lr=0.25", "space={batch_size: {randint: [8, 64]}}"]).job
    assert job.base.optimizer.lr == 0.25
    assert job.space == {"batch_size": {"randint": [8, 64]}}


def test_a_bad_override_is_located_at_itself(fails):
    assert fails(POPULATION, ["base.optimizer.lrr=1"]).startswith(
        "--set base.optimizer.lrr=1: unknown key 'lrr' in base.optimizer; did you mean 'lr'?"
    )
    assert fails(POPULATION, ["space={optimizer.lr: {uniform: [3, 1]}}"]).startswith(
        "--set space={optimizer.lr: {uniform: [3, 1]}}: space.optimizer.lr: uniform: the lower end 3"
    )


@pytest.mark.parametrize("text", [POPULATION, SWEEP, NAS], ids=["population", "sweep", "nas"])
def test_limits_are_the_same_above_and_in_the_base(tmp_path, text):
    """What is written above goes before what the base has, and that before the defaults."""
    path = tmp_path / "job.yaml"
    path.write_text(text)
    job = load_spec(path, ["limits.start_s=600", "base.limits={start_s: 60, lost_after_s: 7}"]).job
    assert (job.limits.start_s, job.limits.lost_after_s, job.limits.heartbeat_s) == (600, 7, 2)
    assert job.base.limits == job.limits
    path.write_text(load_spec(path, ["limits.start_s=600"]).dump())
    assert load_spec(path).job.base.limits.start_s == 600


@pytest.mark.parametrize("text", [POPULATION, SWEEP, NAS], ids=["population", "sweep", "nas"])
def test_the_dump_loads_to_an_equal_job_and_fits_the_schema(tmp_path, text):
    path, dumped = tmp_path / "job.yaml", tmp_path / "spec.yaml"
    path.write_text(text)
    loaded = load_spec(path)
    dumped.write_text(loaded.dump())
    assert load_spec(dumped).job == loaded.job
    assert load_spec(dumped).dump() == loaded.dump()
    validator = jsonschema.Draft202012Validator(json_schema())
    validator.validate(parse(text.encode(), "x").data)
    validator.validate(parse(loaded.dump(), "x").data)
    assert not validator.is_valid({**parse(text.encode(), "x").data, "spac": {}})
