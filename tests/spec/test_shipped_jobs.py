"""Every YAML in jobs/ loads, survives its own dump, and fits the JSON schema."""

from __future__ import annotations

import jsonschema
import pytest
from own.jobs import JOBS

from distml.spec.jobs import find_job, shipped_jobs
from distml.spec.json_schema import json_schema
from distml.spec.loader import load_spec
from distml.spec.over_jobs import OverJobs
from distml.spec.yaml import parse

FILES = sorted(JOBS.glob("*.yaml"))
FAMILY = ["digits-single", "digits-all-reduce", "digits-ps-sync", "digits-ps-async", "digits-ps-ssp",
          "digits-local-sgd"]  # fmt: skip
GPT_FAMILY = ["gpt-stdlib", "gpt-stdlib-zero1", "gpt-stdlib-zero2", "gpt-stdlib-zero3"]
TWINS = {"gpt2-124m-8gpu": "gpt2-124m-cpu", "gpt2-1.5b-zero2-8gpu": "gpt2-1.5b-zero2-cpu",
         "llama-8b-zero3-16gpu": "llama-8b-zero3-cpu", "gpt3-175b": "gpt3-175b-cpu"}  # fmt: skip


@pytest.fixture(scope="module")
def validator():
    jsonschema.Draft202012Validator.check_schema(json_schema())
    return jsonschema.Draft202012Validator(json_schema())


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_job_loads_and_its_dump_is_the_same_job(path, tmp_path, validator):
    loaded = load_spec(path)
    assert loaded.job.name == path.stem
    dumped = tmp_path / "spec.yaml"
    dumped.write_text(loaded.dump())
    again = load_spec(dumped, directory=JOBS)
    assert again.job == loaded.job
    assert again.dump() == loaded.dump()
    validator.validate(parse(path.read_bytes(), "x").data)
    validator.validate(parse(loaded.dump(), "x").data)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_job_says_what_it_shows_and_how_to_run_it(path):
    lines = path.read_text().splitlines()
    assert lines[0].startswith("# ")
    assert lines[1] == f"# distml run {path.stem}"
    job = load_spec(path).job
    trained = job.base if isinstance(job, OverJobs) else job
    if trained.kind == "train" and trained.resources.gpus_per_worker:
        assert lines[2].startswith("# Not run here, where there is no such machine.")
        return
    if isinstance(job, OverJobs):  # its tests say what must come of it
        return
    goal = job.stop.goal
    assert goal is not None
    assert not path.stem.startswith(("digits", "own")) or goal.at_least >= 0.96


def test_the_strategies_family_differs_in_strategy_workers_and_name_only():
    jobs = [load_spec(name).job.model_dump() for name in FAMILY]
    for job in jobs:
        for key in ("name", "strategy", "resources"):
            del job[key]
    assert all(job == jobs[0] for job in jobs)
    assert jobs[0]["stop"]["examples"] is not None


def test_the_gpt_family_differs_in_strategy_workers_and_name_only():
    jobs = [load_spec(name).job.model_dump() for name in GPT_FAMILY]
    for job in jobs:
        for key in ("name", "strategy", "resources"):
            del job[key]
    assert all(job == jobs[0] for job in jobs)


@pytest.mark.parametrize("name", TWINS)
def test_a_gpu_jobs_twin_is_the_same_in_small(name):
    large, small = load_spec(name).job, load_spec(TWINS[name]).job
    assert small.resources.gpus_per_worker == 0
    assert f"# {TWINS[name]} is the same in small." in find_job(name).read_text().splitlines()[3]
    sizes = {"layers", "heads", "kv_heads", "width", "hidden", "vocabulary", "compile"}
    models = [job.task.model.model_dump(exclude=sizes) for job in (large, small)]
    rules = [job.optimizer.model_dump(exclude={"lr": True, "schedule": {"warmup"}}) for job in (large, small)]
    assert models[0] == models[1]
    assert rules[0] == rules[1]
    assert (large.strategy, large.precision) == (small.strategy, small.precision)
    for job in (large, small):  # both accumulate
        assert job.batch_size > job.micro_batch_size * job.resources.workers


PARAMETERS = {"gpt2-124m-8gpu": 124_439_808, "gpt2-1.5b-zero2-8gpu": 1_557_611_200,
              "llama-8b-zero3-16gpu": 8_030_261_248, "gpt3-175b": 174_604_259_328}  # fmt: skip


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_gpu_job_has_its_models_parameters(name):
    import torch

    from distml.tasks.build import build_task

    with torch.device("meta"):
        model = build_task(load_spec(name).job).build_model()
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[name]


@pytest.mark.parametrize("key", ["optimzer", "task"])
def test_the_schema_refuses_what_is_wrong(key, validator):
    spec = parse(FILES[0].read_bytes(), "x").data
    assert not validator.is_valid({**spec, key: 5})
    assert validator.is_valid({**spec, "task": "mine:A", "checkpoint": {"best": "eval/loss"}, "init": {"from": "x"}})


def test_a_shipped_job_is_found_by_name_unless_a_file_has_it(tmp_path, monkeypatch):
    assert sorted(shipped_jobs()) == sorted(path.stem for path in FILES)
    monkeypatch.chdir(tmp_path)
    assert find_job("digits-single") == JOBS / "digits-single.yaml"
    (tmp_path / "digits-single").mkdir()  # a run directory, say
    assert find_job("digits-single") == JOBS / "digits-single.yaml"
    (tmp_path / "digits-single").rmdir()
    (tmp_path / "digits-single").write_text("x")
    assert str(find_job("digits-single")) == "digits-single"
