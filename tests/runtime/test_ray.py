"""The Ray runtime against the inline one, and what happens when its processes die.

Every death is caused by the injector that users have. A recovered synchronous run must end with the very weights of an
undisturbed one: that is the oracle, and the count of restarts shows that the death took place.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import numpy as np
import psutil
import pytest
import ray
from own.on_ray import SPEC, TIMES, Notes, assert_same, weights

import distml
from distml.errors import RunError, UsageError
from distml.runs.checkpoints import CheckpointStore
from distml.runtime.connection import PRIVATE_SETTINGS

pytestmark = pytest.mark.usefixtures("shared_ray")

SERVED = {"name": "parameter_server", "servers": 2}
OWN_TASK_THAT_RAISES = """
import distml

class Mine(distml.Task):
    def build_model(self):
        raise KeyError("no such thing")

    def data(self, split):
        import torch

        return (torch.zeros(10, 1),)
"""


def run(out: Path, runtime: str = "ray", inject=(), display=None, **keys) -> distml.Result:
    if "servers" in keys.get("strategy", ""):  # with processes of their own, which shared memory has not
        keys["transport"] = "object_store"
    return distml.run({**SPEC, **keys}, out=out, runtime=runtime, inject=inject, display=display)


def rows(out: Path) -> list[dict]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith(TIMES)} for line in lines]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> dict[str, Path]:
    """One inline run per synchronous strategy: what everything else must come to."""
    found = {}
    for name, strategy in (("all_reduce", "all_reduce"), ("served", SERVED)):
        found[name] = tmp_path_factory.mktemp(name) / "run"
        run(found[name], "inline", strategy=strategy)
    return found


@pytest.mark.parametrize("name", ["all_reduce", "served"])
def test_ray_and_inline_give_the_same_numbers(name, undisturbed, tmp_path):
    strategy = SERVED if name == "served" else name
    result = run(tmp_path / "run", strategy=strategy)
    assert (result.status, result.step) == ("done", 60)
    used = json.loads((tmp_path / "run" / "environment.json").read_text())["transport"]
    assert used.startswith("object_store (2 servers" if name == "served" else "shared_memory (2 workers on one host")
    assert_same(weights(tmp_path / "run"), weights(undisturbed[name]))
    assert rows(tmp_path / "run") == rows(undisturbed[name])


def test_served_and_reduced_agree(undisturbed):
    one, other = (weights(undisturbed[name]) for name in ("all_reduce", "served"))
    assert max(np.abs(one[name] - other[name]).max() for name in one) <= 1e-4


@pytest.mark.parametrize(
    ("name", "injection"),
    [
        pytest.param("all_reduce", "kill:rank=1,step=34", marks=pytest.mark.slow),
        ("all_reduce", "stop:rank=0,step=34"),
        pytest.param("served", "kill:rank=0,step=34", marks=pytest.mark.slow),
        ("served", "kill:server=1,step=34"),
    ],
)
def test_a_synchronous_run_that_loses_a_process_ends_as_if_it_had_not(name, injection, undisturbed, tmp_path):
    notes = Notes()
    result = run(tmp_path / "run", strategy=SERVED if name == "served" else name, inject=[injection], display=notes)
    assert result.metrics["runtime/restarts"] == 1
    role = injection.split(":")[1].split(",")[0].replace("=", " ")
    assert [line for line in notes.lines if line.startswith(f"{role} was lost") and "from step 30" in line]
    assert_same(weights(tmp_path / "run"), weights(undisturbed[name]))
    assert rows(tmp_path / "run") == rows(undisturbed[name])


@pytest.mark.parametrize("name", ["all_reduce", pytest.param("served", marks=pytest.mark.slow)])
def test_a_death_before_the_first_snapshot_begins_anew(name, undisturbed, tmp_path):
    strategy = SERVED if name == "served" else name
    result = run(tmp_path / "run", strategy=strategy, inject=["kill:rank=1,step=5"])
    assert result.metrics["runtime/restarts"] == 1
    assert_same(weights(tmp_path / "run"), weights(undisturbed[name]))


@pytest.mark.slow
def test_two_deaths_at_once(undisturbed, tmp_path):
    inject = ["kill:rank=1,step=34", "kill:server=0,step=34"]
    result = run(tmp_path / "run", strategy=SERVED, inject=inject)
    assert result.status == "done"
    assert_same(weights(tmp_path / "run"), weights(undisturbed["served"]))


@pytest.mark.parametrize("version", [30, pytest.param(60, marks=pytest.mark.slow)])
def test_an_evaluator_that_dies_loses_neither_its_checkpoint_nor_the_last_one(version, tmp_path, monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[1] / "own")
    task = {"name": "mortal:Mortal", "args": {"marker": str(tmp_path / "died"), "version": version}}
    keep = {"every": 30, "keep": 5, "best": {"metric": "eval/loss", "mode": "min"}}
    result = run(tmp_path / "run", task=task, strategy={"name": "parameter_server", "mode": "async"}, checkpoint=keep,
                 optimizer={"name": "sgd", "lr": 0.01})  # fmt: skip
    assert (result.status, result.step, result.metrics["runtime/restarts"]) == ("done", 60, 1)
    assert {30, 60} <= set(CheckpointStore(tmp_path / "run" / "checkpoints", 1).steps())
    assert [row["step"] for row in rows(tmp_path / "run") if "eval/loss" in row][-1] == 60
    assert "test/loss" in result.metrics


def test_an_evaluation_without_the_goals_metric_ends_the_run_and_hangs_nothing(tmp_path):
    goal = {"metric": "eval/acuracy", "at_least": 0.9}
    with pytest.raises(RunError, match=r"does not report 'eval/acuracy'.*eval/accuracy"):
        run(tmp_path / "run", strategy={"name": "parameter_server", "mode": "async"}, stop={"steps": 60, "goal": goal})


def test_an_asynchronous_worker_that_dies_rejoins(tmp_path):
    notes = Notes()
    strategy = {"name": "parameter_server", "mode": "async"}
    result = run(tmp_path / "run", strategy=strategy, inject=["kill:rank=1,step=20"], display=notes,
                 stop={"steps": 2000}, evaluate={"every": 500}, checkpoint={"every": 500})  # fmt: skip
    assert (result.status, result.step, result.metrics["runtime/restarts"]) == ("done", 2000, 1)
    assert any("the others went on; it rejoins" in line for line in notes.lines)
    assert "staleness/max" in result.metrics


def test_ssp_survives_its_clock(tmp_path):
    strategy = {"name": "parameter_server", "mode": "ssp", "max_staleness": 2, "servers": 2}
    result = run(tmp_path / "run", strategy=strategy, inject=["stop:server=0,step=34"])
    below = psutil.Process(os.getpid()).children(recursive=True)
    assert [process.pid for process in below if process.status() == psutil.STATUS_STOPPED] == []
    assert (result.status, result.step, result.metrics["runtime/restarts"]) == ("done", 60, 1)
    assert all(row.get("staleness/max", 0) <= 2 for row in rows(tmp_path / "run"))


def test_too_many_deaths_end_the_run_with_one_line_and_keep_its_checkpoints(tmp_path):
    inject = ["kill:rank=1,step=34", "kill:rank=1,step=40"]
    limits = {**SPEC["limits"], "max_restarts": 1}
    with pytest.raises(RunError, match=r"rank 1, [a-z_]+, step \d+: .*killed by a signal.*max_restarts: 1") as caught:
        run(tmp_path / "run", inject=inject, limits=limits)
    assert caught.value.exit_code == 3
    assert weights(tmp_path / "run", 30)
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert (result["status"], result["error"]["rank"]) == ("failed", "rank 1")


def test_a_run_that_is_asked_to_end_in_a_recovery_has_its_state_and_waits_for_nobody(tmp_path, monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[1] / "own")
    arguments = {"run": str(tmp_path / "run"), "died": str(tmp_path / "died"), "driver": os.getpid()}
    notes = Notes()
    task = {"name": "detained:Detained", "args": arguments}
    keys = {"evaluate": {"every": 1000}, "checkpoint": {"every": 1000}}
    assert run(tmp_path / "run", task=task, display=notes, **keys).status == "interrupted"
    assert (tmp_path / "secured").exists()  # before anything was waited for
    assert not (tmp_path / "outlived").exists()
    kept = re.search(r"not replaced, as the run was asked to end; step (\d+) is kept", notes.lines[-1])
    assert CheckpointStore(tmp_path / "run" / "checkpoints", 1).steps() == [int(kept[1])]


def test_a_death_says_what_the_process_was_doing(tmp_path, monkeypatch):
    """As it was last asked: three times in the pause before it dies."""
    monkeypatch.chdir(Path(__file__).parents[1] / "own")
    task = {"name": "mortal:Mortal", "args": {"marker": str(tmp_path / "died"), "version": 30, "pause_s": 1.5}}
    with pytest.raises(RunError, match=r"rank \d, evaluate, step 30: .*killed by a signal") as caught:
        run(tmp_path / "run", task=task, limits={**SPEC["limits"], "max_restarts": 0})
    assert caught.value.phase == "evaluate"


def test_a_loss_that_is_nan_names_rank_and_step_and_is_not_tried_again(tmp_path):
    with pytest.raises(RunError, match=r"rank 1, loss, step 44: .*nan") as caught:
        run(tmp_path / "run", inject=["nan:rank=1,step=44"])
    assert (caught.value.exit_code, caught.value.step) == (3, 44)
    assert weights(tmp_path / "run", 30)


def test_what_can_never_be_placed_is_refused_with_asked_and_available(tmp_path):
    with pytest.raises(UsageError, match=r"asks for 5 CPUs \(5 workers x 1\), this cluster has 4"):
        run(tmp_path / "a", resources={"workers": 5})
    with pytest.raises(UsageError, match=r"asks for 2 GPUs .*, this cluster has none"):
        run(tmp_path / "b", resources={"workers": 2, "gpus_per_worker": 1})
    with pytest.raises(UsageError, match=r"strict_spread asks for 2 nodes, the cluster has 1"):
        run(tmp_path / "c", resources={"workers": 2, "placement": "strict_spread"})


def test_a_users_own_task_reaches_the_workers(tmp_path):
    result = distml.run("own-task", {"log.to": []}, out=tmp_path / "run", runtime="ray")
    assert result.status == "goal_met"
    assert (tmp_path / "run" / "own_task.py").exists()


def test_an_own_task_that_cannot_be_built_is_one_line(tmp_path):
    (tmp_path / "mine.py").write_text(OWN_TASK_THAT_RAISES)
    (tmp_path / "mine.yaml").write_text(
        "distml: v1\nname: mine\ntask: {name: 'mine:Mine'}\nstop: {steps: 2}\nresources: {workers: 2}\n"
    )
    with pytest.raises(UsageError, match=r"KeyError: 'no such thing' \(mine.py:6\)"):
        distml.run(tmp_path / "mine.yaml", out=tmp_path / "run", runtime="ray")


def test_rays_core_still_knows_the_settings_of_a_private_ray():
    """It takes no notice of an unknown one."""
    core = (Path(ray.__file__).parent / "core/src/ray/raylet/raylet").read_bytes()
    assert b"RAY_raylet_client_misspelt" not in core, "the control"
    for name in PRIVATE_SETTINGS:
        assert name.encode() in core


@pytest.mark.parametrize(
    "job",
    ["digits-all-reduce", pytest.param("digits-ps-sync", marks=pytest.mark.slow), "digits-ps-async", "digits-ps-ssp"],
)
def test_shipped_jobs_reach_their_goal(job, tmp_path):
    result = distml.run(job, out=tmp_path / "run", runtime="ray")
    assert result.status == "goal_met"
    assert result.metrics["eval/accuracy"] >= 0.96
    assert 0.93 <= result.metrics["test/accuracy"] <= 1.0


def test_digits_single_reaches_its_goal(tmp_path):
    assert distml.run("digits-single", out=tmp_path / "run").status == "goal_met"
