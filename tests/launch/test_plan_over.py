"""`distml plan` of jobs over jobs: the plan of one run, and what all of them come to on what there is."""

from __future__ import annotations

import json
import re

import pytest

from distml.cli import main
from distml.launch.plan.budget import Budget
from distml.launch.plan.over import many_of, over_line, unused_line
from distml.spec.loader import load_spec

NAS = """\
distml: v1
kind: nas
name: many
base:
  task: {name: classification, model: {name: mlp, hidden: [32]}}
  stop: {epochs: 20.0, seconds: 8640}
  resources: {gpus_per_worker: 1}
trials: 20000
max_concurrent: 500
space: {task.model.hidden.0: {choice: [16, 32]}}
"""
POPULATION = """\
distml: v1
kind: population
name: p
base: {task: classification, stop: {steps: 400}}
members: 4
every: 50
space: {optimizer.lr: {loguniform: [1.0e-5, 1.0e-1]}}
objective: eval/loss
"""
SWEEP = """\
distml: v1
kind: sweep
name: s
base: {task: classification, stop: {steps: 400}}
sampler: grid
space: {optimizer.lr: {choice: [0.1, 0.2, 0.3]}, batch_size: {choice: [16, 32]}}
objective: eval/loss
"""
CLUSTER = "nodes: 25\ngpus_per_node: 8\ngpu: h100\nhost_memory_gib: 2000\n"


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, text in (("nas", NAS), ("population", POPULATION), ("sweep", SWEEP)):
        (tmp_path / f"{name}.yaml").write_text(text)
    (tmp_path / "cluster.yaml").write_text(CLUSTER)
    return tmp_path


def planned(capsys, *arguments) -> dict:
    assert main(["plan", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_search_by_hand(here, capsys):
    """The base ends after 2.4 hours: 20,000 of these on 500 GPUs are 40 rounds."""
    assert main(["plan", "nas.yaml", "--hours-each", "2.4"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "many, nas of classification, all_reduce: 20,000 children, each of them"
    assert lines[-1] == "20,000 children x 2.4 GPU-hours on 500 GPUs: 2,000 GPU-days, 4.0 days"
    children = planned(capsys, "nas.yaml")["children"]
    assert children["gpus"] == 500
    assert children["most"] == pytest.approx(2.4)  # by stop.seconds


def test_the_shipped_search_takes_four_days(capsys):
    assert main(["plan", "nasnet-cifar"]) == 0
    line = "20,000 children x 2.4 GPU-hours on 500 GPUs: 2,000 GPU-days, 4.0 days"
    assert capsys.readouterr().out.splitlines()[-1] == line


def test_the_cluster_says_how_many_at_once(here, capsys):
    children = planned(capsys, "nas.yaml", "--cluster", "cluster.yaml", "--hours-each", "2.4")["children"]
    assert children["gpus"] == 200
    assert children["days"] == [10.0, 10.0]
    children = planned(capsys, "nas.yaml", "--gpus", "1000", "--hours-each", "2.4", "--children", "100")["children"]
    assert (children["children"], children["gpus"]) == (100, 1000)


def test_a_population_that_ends_together(here, capsys):
    whole = planned(capsys, "population.yaml")
    half = planned(capsys, "population.yaml", "--set", "stop.steps=800")
    per_step = [one["step"]["least_s"] for one in (whole, half)]
    assert whole["kind"] == "population"
    assert (whole["children"]["what"], whole["children"]["children"]) == ("members", 4)
    assert whole["children"]["least"] == pytest.approx(400 * per_step[0] / 3600)
    assert half["children"]["least"] == pytest.approx(200 * per_step[1] / 3600)  # of 1,600 steps 800


def test_a_grid_has_every_combination(here, capsys):
    assert many_of(load_spec("sweep.yaml").job).number == 6
    assert main(["plan", "sweep.yaml"]) == 0
    assert re.search(r"^6 trials x .* on \d+ workers: .*", capsys.readouterr().out.splitlines()[-1])


def test_trials_that_end_early_are_an_upper_bound(here, capsys):
    assert main(["plan", "sweep.yaml", "--set", "scheduler=asha", "--set", "every=50"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith("; less, as asha ends trials early")


def test_without_a_budget_in_steps_there_is_no_sum(here, capsys):
    base = ["--set", "base.stop={epochs: 2.0}"]
    assert main(["plan", "population.yaml", *base]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("all of them: base.stop has no steps")
    assert main(["plan", "population.yaml", *base, "--hours-each", "3"]) == 0
    assert "4 members x 3 worker-hours" in capsys.readouterr().out


def test_a_training_job_needs_children_for_gpus(here, capsys):
    assert main(["plan", "digits-single", "--gpus", "4"]) == 2
    assert "--gpus and --hours-each are of --children; add --children N" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("nas", "plan: 20,000 children, at most 500 at the same time"),
        ("population", "plan: 4 members x 400 steps: 1,600 in all"),
        ("sweep", "plan: 6 trials x 400 steps: 2,400 in all"),
    ],
)
def test_what_a_run_says_first(here, name, text):
    assert over_line(load_spec(f"{name}.yaml").job) == text


def test_small_work_is_said_in_small_units():
    assert str(Budget(20000, 2.4, 2.4, 500)) == (
        "20,000 children x 2.4 GPU-hours on 500 GPUs: 2,000 GPU-days, 4.0 days"
    )
    assert str(Budget(4, 0.01, 0.02, 2, 1, "worker", "members")) == (
        "4 members x 0.6 to 1.2 worker-minutes on 2 workers: 2.4 to 4.8 worker-minutes, 72 s to 2 min 24 s"
    )


def test_what_variants_do_not_do_of_the_base_is_said(here):
    usual = load_spec("sweep.yaml", ["base.log.to=[]"]).job
    assert unused_line(usual) is None
    said = ["base.log.to=[tensorboard]", "base.checkpoint={every: 7, keep: 2}"]
    assert unused_line(load_spec("sweep.yaml", said).job) == (
        "not used of the base: checkpoint.every (the best keep their last weights); log.to (each has its metrics.jsonl)"
    )
    assert "(a population has its own checkpoint)" in str(unused_line(load_spec("population.yaml", said).job))
    population = load_spec("population.yaml", ["base.evaluate.every=7"]).job
    assert unused_line(population) == "not used of the base: evaluate.every (members are evaluated at each decision)"
    assert unused_line(load_spec("sweep.yaml", ["base.evaluate.every=7"]).job) is None


def test_why_activations_are_not_counted_is_a_whole_sentence(capsys):
    assert main(["plan", "nasnet-cifar"]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "activations are not counted" in line]
    assert "data_batch_1.bin is missing; download" in line
    assert line.endswith("and set task.path to its folder)")
