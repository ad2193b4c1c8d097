"""Sweeps on a real Ray: what trials leave, how they fail, what a resume does, and how Tune's schedulers treat them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from own.on_ray import Notes
from own.sweeps import BASE, ends, events, sweep_file, values

import distml
from distml.errors import RunError, UsageError
from distml.launch.evaluate import evaluate_split, load_model
from distml.launch.run import Result
from distml.spec.loader import load_spec


@pytest.fixture
def sweep(shared_ray: str, tmp_path: Path) -> Callable[..., Result]:
    """Run a small sweep in `tmp_path/run`."""

    def run(display: Any = None, **changes: Any) -> Result:
        return distml.run(sweep_file(tmp_path, **changes), out=tmp_path / "run", display=display)

    return run


def modes(folder: Path, *names: str) -> dict[str, Any]:
    """A grid over what the task does wrong."""
    task = {"name": "tuned:Tuned", "args": {"folder": str(folder)}}
    return {"base": {**BASE, "task": task}, "space": {"task.args.mode": {"choice": list(names)}}, "sampler": "grid",
            "trials": None}  # fmt: skip


TWO_WORKERS = {**BASE, "strategy": "all_reduce", "resources": {"workers": 2}}


@pytest.mark.slow
def test_trials_with_several_workers_have_bundles_for_them(sweep, tmp_path):
    """Two trials of two workers fill four CPUs; the best one comes to the same as alone, in one process."""
    result = sweep(base=TWO_WORKERS, trials=4, max_concurrent=2, scheduler="asha", every=3)
    out = tmp_path / "run"
    assert set(ends(out).values()) <= {"finished", "stopped"}
    assert sum(end == "finished" for end in ends(out).values()) >= 1
    alone = distml.run(out / "trials" / result.best["trial"] / "spec.yaml", out=tmp_path / "alone", runtime="inline")
    assert alone.step == result.step == 9
    assert alone.metrics["eval/loss"] == result.best["value"]


def test_every_trial_leaves_its_folder_failures_are_retried_and_listed_and_the_rest_is_run_again(
    sweep, tmp_path, monkeypatch
):
    notes, spec = Notes(), modes(tmp_path, "good", "broken", "broken-once", "nan")
    result = sweep(notes, **spec)
    out = tmp_path / "run"
    assert ends(out) == {"0000": "finished", "0001": "failed", "0002": "finished", "0003": "diverged"}
    assert [row["trial"] for row in events(out) if row["event"] == "retried"] == ["0001", "0002"]
    assert (result.status, result.best["trial"], result.step) == ("done", "0000", 9)
    assert any("trial 0001 failed: " in line and "broken by its argument" in line for line in notes.lines[-4:])
    assert any("4 trials: 2 finished, 0 ended early, 1 diverged, 1 failed" in line for line in notes.lines)
    assert any("trial 0003 diverged: " in line and "loss is nan" in line for line in notes.lines[-4:])
    for name, status in (("0000", "done"), ("0001", "failed"), ("0002", "done"), ("0003", "failed")):
        record = json.loads((out / "trials" / name / "result.json").read_text())
        assert record["status"] == status
    assert (out / "trials" / "0003" / "metrics.jsonl").exists()
    test = evaluate_split(load_model(out / "trials" / "0000"), "test")
    assert {name: value for name, value in result.metrics.items() if name.startswith("test/")} == test
    assert load_spec(out / "trials" / "0000" / "spec.yaml").job.task.args["mode"] == "good"
    assert not (out / "tune").exists()
    monkeypatch.chdir(tmp_path)
    alone = distml.run(out / "best.yaml")  # into a folder of its own name, which is not the sweep's
    assert alone.directory.resolve() == (tmp_path / "runs" / "small-best").resolve()
    assert alone.metrics["eval/loss"] == result.best["value"]

    # As if the driver had been killed before the second and the last trial ended.
    whole = events(out)
    kept = [row for row in whole if row["trial"] in ("0000", "0002") or row["event"] == "proposed"]
    (out / "trials.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
    record = json.loads((out / "result.json").read_text())
    (out / "result.json").write_text(json.dumps({**record, "status": "running"}))
    again = sweep(notes, **spec)
    assert [(row["trial"], row["event"]) for row in events(out)[len(kept) :] if row["event"] != "retried"] == [
        ("0003", "diverged"),
        ("0001", "failed"),
    ]
    assert again.best == result.best


def test_asha_ends_the_worse_ones_early_and_a_lost_process_costs_a_retry(sweep, tmp_path):
    # The first trial's process dies; the rates come from the best to the worst, so that each can be compared.
    task = {"name": "tuned:Tuned", "args": {"folder": str(tmp_path), "mode": "dies-once"}}
    rates = [0.3, 0.2, 0.1, 0.05, 0.02, 0.01]
    result = sweep(base={**BASE, "task": task}, space={"optimizer.lr": {"choice": rates}}, sampler="grid", trials=None,
                   scheduler="asha")  # fmt: skip
    out = tmp_path / "run"
    assert [row["trial"] for row in events(out) if row["event"] == "retried"] == ["0000"]
    assert result.metrics["eval/loss"] == min(row["metrics"].get("eval/loss", 1.0) for row in events(out))
    stopped = [row for row in events(out) if row["event"] == "stopped"]
    assert stopped
    assert all(row["step"] < 9 for row in stopped)
    assert {trial for trial, end in ends(out).items() if end == "finished"} <= {"0000", "0001", "0002"}


@pytest.mark.slow
def test_trials_that_hang_are_ended_and_run_again(sweep, tmp_path, monkeypatch):
    monkeypatch.setattr("distml.adapters.tune_beats.patience_s", lambda base: 6.0)
    spec, notes = modes(tmp_path, "blocked-once", "stopped-once"), Notes()
    result = sweep(notes, limits={"heartbeat_s": 0.2, "lost_after_s": 4}, **spec)
    assert ends(tmp_path / "run") == {"0000": "finished", "0001": "finished"}
    assert result.status == "done"
    retried = {row["trial"]: row["error"] for row in events(tmp_path / "run") if row["event"] == "retried"}
    assert "it has not moved in loss for " in retried["0000"]
    assert "it gave no answer for 4 s (stopped or cut off) and was ended" in retried["0001"]


def test_an_objective_that_is_not_reported_is_said_at_the_first_report(sweep, tmp_path):
    with pytest.raises(UsageError, match="does not report 'eval/losses'; did you mean 'eval/loss'"):
        sweep(objective={"metric": "eval/losses", "mode": "min"})
    assert len(values(tmp_path / "run")) <= 4


@pytest.mark.slow
def test_a_sweep_whose_trials_all_fail_has_failed(sweep, tmp_path):
    with pytest.raises(RunError, match=r"no trial finished; the last one failed: .*broken by its argument"):
        sweep(retries=0, **{**modes(tmp_path, "broken", "good"), "trials": 1})


@pytest.mark.slow
@pytest.mark.parametrize("scheduler", ["pbt", "pb2", "hyperband"])
def test_tune_s_other_schedulers_train_members_to_their_end(sweep, tmp_path, scheduler):
    result = sweep(scheduler=scheduler, trials=4, max_concurrent=None)
    out = tmp_path / "run"
    assert set(ends(out)) == {f"000{index}" for index in range(4)}
    last = {row["trial"]: row["values"] for row in events(out) if row["event"] == "finished"}
    first = {row["trial"]: row["values"] for row in events(out) if row["event"] == "proposed"}
    assert result.best["value"] < 0.3
    if scheduler != "hyperband":  # somebody was copied, and read back with other values
        assert any(last[trial] != first[trial] for trial in last)
        assert all(0.01 <= one["optimizer.lr"] <= 0.4 for one in last.values())
        assert load_spec(out / "trials" / "0000" / "spec.yaml").job.optimizer.lr == last["0000"]["optimizer.lr"]


@pytest.mark.slow
@pytest.mark.parametrize(("ends_by", "code"), [(signal.SIGKILL, -9), (signal.SIGINT, 130)])
def test_a_sweep_that_is_ended_goes_on_and_proposes_what_it_would_have(tmp_path, ends_by, code):
    pytest.importorskip("optuna")
    base = {**BASE, "stop": {"steps": 400}, "evaluate": {"every": 50}, "log": {"every": 400, "to": []}}
    spec = sweep_file(tmp_path, base=base, sampler="optuna", trials=14)
    command = [sys.executable, "-m", "distml", "run", str(spec), "--out"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    subprocess.run([*command, str(whole)], check=True, timeout=200, env=environment, stdout=subprocess.DEVNULL)
    with subprocess.Popen([*command, str(cut)], env=environment, stdout=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 120
        while not (cut / "trials.jsonl").exists() or len(ends(cut)) < 6:
            assert time.monotonic() < deadline, "six trials did not end"
            time.sleep(0.05)
        process.send_signal(ends_by)
        assert process.wait(timeout=60) == code
    ended = len(ends(cut))
    assert ended < 14
    subprocess.run([*command, str(cut)], check=True, timeout=200, env=environment, stdout=subprocess.DEVNULL)
    assert values(cut) == values(whole)
    assert ends(cut) == ends(whole)
    results = [json.loads((out / "result.json").read_text()) for out in (cut, whole)]
    assert results[0]["best"] == results[1]["best"]
