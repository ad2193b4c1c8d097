"""Interrupted and resumed is the same as uninterrupted, bit by bit; and what may change in between."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from own.oracle import OWN, distance, same, saved, spec_of

import distml
from distml.errors import RunError, UsageError
from distml.runs.display import SilentDisplay

UNTIMED = ("timing/", "throughput/", "memory/", "wall_s")
CASES = {
    "single": (1, {"name": "single"}),
    "all_reduce": (2, {"name": "all_reduce"}),
    "server": (2, {"name": "parameter_server", "servers": 2}),
    "async-1": (1, {"name": "parameter_server", "mode": "async", "servers": 2}),
    "zero/2": (1, {"name": "zero", "stage": 2}),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _in_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(OWN)


class Watcher(SilentDisplay):
    """Keeps the notes, and asks the run to stop at a step, as Ctrl-C does."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.notes: list[str] = []
        self.stop_at = stop_at

    def note(self, text: str) -> None:
        self.notes.append(text)

    def report(self, step: int, fraction: float, metrics) -> None:
        if self.stop_at is not None and step >= self.stop_at:
            self.stop_at = None
            signal.raise_signal(signal.SIGINT)


def run(out: Path, spec: dict, stop_at: int | None = None, **keys) -> tuple[distml.Result, list[str]]:
    watcher = Watcher(stop_at)
    return distml.run(spec, out=out, runtime="inline", display=watcher, **keys), watcher.notes


def rows(out: Path) -> list[dict]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if not key.startswith(UNTIMED)} for row in lines]


def case(name: str, task="dropout:Dropout", **changes) -> dict:
    values = {"steps": 40, "log": {"every": 4, "to": []}, "evaluate": {"every": 5}, "checkpoint": {"every": 6}}
    return under(name, spec_of(task, **{**values, **changes}))


def under(name: str, spec: dict) -> dict:
    """The same under a strategy of `CASES`; zero trains in float32 only."""
    workers, strategy = CASES[name]
    task = spec["task"]
    if strategy["name"] == "zero":
        task = {**task, "args": {**task.get("args", {}), "dtype": "float32"}}
    return spec | {"strategy": strategy, "resources": {"workers": workers}, "task": task}


def assert_same(first: Path, second: Path) -> None:
    one, other = saved(first), saved(second)
    assert same(one["model"], other["model"])
    assert same(one["optimizer"], other["optimizer"])
    assert rows(first) == rows(second)
    ends = [json.loads((out / "result.json").read_text()) for out in (first, second)]
    for key in ("status", "step", "best", "checkpoint", "error"):
        assert ends[0][key] == ends[1][key]


MOMENTUM = {"name": "sgd", "lr": 0.1, "momentum": 0.9, "schedule": {"name": "cosine"}}
ADAM = {"name": "adam", "lr": 0.01, "clip_norm": 1.0}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("optimizer", "micro"), [(MOMENTUM, None), (ADAM, 2)])
def test_interrupted_and_resumed_is_uninterrupted(tmp_path, name, optimizer, micro):
    spec = case(name, optimizer=optimizer, micro_batch_size=micro)
    run(tmp_path / "whole", spec)
    first, _ = run(tmp_path / "parts", spec, stop_at=13)
    assert (first.status, first.exit_code) == ("interrupted", 130)
    assert 13 <= first.step <= 18
    second, notes = run(tmp_path / "parts", spec, stop_at=27)
    assert f"resuming from step {first.step}" in notes
    assert second.status == "interrupted"
    last, _ = run(tmp_path / "parts", spec)
    assert (last.status, last.step) == ("done", 40)
    assert_same(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.parametrize("name", ["single", "all_reduce", "server"])
@pytest.mark.parametrize("task", ["bn:BN", "gan_1d:GAN", "target:Target", "grow:Grow", "anew:Anew", "uneven:Uneven"])
def test_tasks_of_every_kind_resume_exactly(tmp_path, name, task):
    spec = case(name, task, steps=24, optimizer=ADAM)
    run(tmp_path / "whole", spec)
    failing = ("nan:rank=0,step=15",)  # after the checkpoint of step 12, in the middle of everything
    with pytest.raises(RunError, match="step 15"):
        run(tmp_path / "parts", spec, inject=failing)
    _, notes = run(tmp_path / "parts", spec)
    assert "resuming from step 12" in notes
    assert_same(tmp_path / "whole", tmp_path / "parts")


def test_a_run_that_is_extended_is_as_if_it_had_been_longer(tmp_path):
    spec = case("all_reduce", optimizer=MOMENTUM | {"schedule": {"name": "constant"}}, log={"every": 5, "to": []})
    run(tmp_path / "whole", spec)
    run(tmp_path / "parts", spec | {"stop": {"steps": 20}})
    _, notes = run(tmp_path / "parts", spec)
    assert any(note.startswith("changed: stop.") for note in notes)
    one, other = saved(tmp_path / "whole"), saved(tmp_path / "parts")
    assert same(one["model"], other["model"])
    assert same(one["optimizer"], other["optimizer"])
    without_test = [row for row in rows(tmp_path / "parts") if "test/loss" not in row or row["step"] == 40]
    assert without_test == rows(tmp_path / "whole")


@pytest.mark.parametrize(("before", "after"), [
    ((2, "all_reduce", {}), (3, "all_reduce", {})), ((3, "all_reduce", {}), (1, "single", {})),
    ((2, "parameter_server", {"servers": 1}), (3, "parameter_server", {"servers": 3})),
    ((3, "parameter_server", {"servers": 2}), (2, "all_reduce", {})),
    ((1, "single", {}), (2, "parameter_server", {"servers": 2})),
])  # fmt: skip
def test_workers_servers_and_strategy_may_change(tmp_path, before, after):
    def spec(workers, name, keys):
        return case("single", "uneven:Uneven", optimizer=ADAM) | {
            "strategy": {"name": name, **keys}, "resources": {"workers": workers}}  # fmt: skip

    run(tmp_path / "whole", spec(*before))
    _first, _ = run(tmp_path / "parts", spec(*before), stop_at=13)
    last, notes = run(tmp_path / "parts", spec(*after))
    assert last.step == 40
    assert any(note.startswith("changed: strategy") or note.startswith("changed: resources") for note in notes)
    assert distance(saved(tmp_path / "whole")["model"], saved(tmp_path / "parts")["model"]) <= 1e-12
    final = [[row for row in rows(tmp_path / part) if row["step"] == 40 and "eval/loss" in row]
             for part in ("whole", "parts")]  # fmt: skip
    assert final[0][0]["eval/loss"] == pytest.approx(final[1][0]["eval/loss"], abs=1e-12)


def contents(out: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in out.rglob("*") if path.is_file() and path.name != "lock"}


@pytest.mark.parametrize(("changes", "what"), [
    ({"optimizer": {"name": "sgd", "lr": 0.2}}, "optimizer.lr: 0.1 -> 0.2"),
    ({"batch_size": 13}, "batch_size: 12 -> 13"),
    ({"seed": 1}, "seed: 0 -> 1"),
    ({"task": {"name": "small:Small", "args": {"hidden": 7}}}, "task.args.hidden: null -> 7"),
])  # fmt: skip
def test_other_changes_are_refused_with_three_ways_out_and_nothing_is_lost(tmp_path, changes, what):
    spec = case("single", "small:Small")
    run(tmp_path / "run", spec, stop_at=13)
    before = contents(tmp_path / "run")
    with pytest.raises(UsageError) as caught:
        run(tmp_path / "run", spec | changes)
    for part in (what, "--out", "--fresh", "init: {from:"):
        assert part in str(caught.value)
    assert contents(tmp_path / "run") == before
    assert run(tmp_path / "run", spec)[0].step == 40


def test_another_model_under_the_same_spec_is_refused_too(tmp_path, monkeypatch):
    text = (OWN / "small.py").read_text()
    (tmp_path / "small_changing.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    spec = case("single", "small_changing:Small")
    first, _ = run(tmp_path / "run", spec, stop_at=13)
    (tmp_path / "small_changing.py").write_text(text.replace("hidden: int = 128", "hidden: int = 64"))
    message = r"another model: 0.weight has shape \(128, 5\) there, \(64, 5\) here; .*--out.*--fresh.*init"
    with pytest.raises(UsageError, match=message):
        run(tmp_path / "run", spec)
    (tmp_path / "small_changing.py").write_text(text + "\n# as it was\n")
    last, notes = run(tmp_path / "run", spec)
    assert f"resuming from step {first.step}" in notes
    assert last.step == 40


def test_a_finished_run_is_not_run_again(tmp_path):
    spec = case("single")
    first, _ = run(tmp_path / "run", spec)
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    again, notes = run(tmp_path / "run", spec)
    assert (again.status, again.step, again.metrics) == (first.status, first.step, first.metrics)
    assert any("already finished: done at step 40; nothing was run" in note for note in notes)
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before
    run(tmp_path / "run", spec, fresh=True)
    assert (tmp_path / "run.1" / "metrics.jsonl").read_bytes() == before


def test_a_shorter_budget_ends_a_run_where_it_stands(tmp_path):
    spec = case("all_reduce", steps=40)
    first, _ = run(tmp_path / "run", spec, stop_at=20)
    last, _ = run(tmp_path / "run", spec | {"stop": {"steps": 10}})
    assert (last.status, last.step) == ("done", first.step)
    assert "test/loss" in last.metrics


# ------------------------------------------------------------------------------------------------------ init and freeze
@pytest.mark.parametrize("workers", [1, 2])
def test_init_takes_and_freezes_what_it_names_also_over_a_resume(tmp_path, workers):
    strategy = {"name": "parameter_server", "servers": 2}
    source = saved_after(tmp_path / "source", case("single", "small:Small", steps=5))
    init = {"from": str(tmp_path / "source"), "only": ["0.*"], "freeze": ["0.*"]}
    spec = case("single", "small:Small", seed=3, init=init) | {
        "strategy": strategy, "resources": {"workers": workers}}  # fmt: skip
    run(tmp_path / "whole", spec)
    model = saved(tmp_path / "whole")["model"]
    assert same({n: model[n] for n in ("0.weight", "0.bias")}, {n: source[n] for n in ("0.weight", "0.bias")})
    assert not same({"2.bias": model["2.bias"]}, {"2.bias": source["2.bias"]})
    assert set(saved(tmp_path / "whole")["optimizer"]) == set()  # plain sgd
    run(tmp_path / "parts", spec, stop_at=13)
    shutil.rmtree(tmp_path / "source")  # a resume needs it no more
    run(tmp_path / "parts", spec)
    assert_same(tmp_path / "whole", tmp_path / "parts")


def saved_after(out: Path, spec: dict) -> dict:
    run(out, spec)
    return saved(out)["model"]


@pytest.mark.parametrize(("init", "message"), [
    ({"freeze": ["encoder.*"]}, r"init.freeze: 'encoder.\*' matches no parameter"),
    ({"from": "SOURCE", "only": ["encoder.*"]}, r"init: no tensor of the source matches"),
    ({"from": "nowhere"}, "nowhere does not exist"),
    ({"freeze": ["*"]}, "no parameter to train"),
])  # fmt: skip
def test_init_that_fits_nothing_is_refused(tmp_path, init, message):
    run(tmp_path / "source", case("single", "small:Small", steps=2))
    init = {key: str(tmp_path / "source") if value == "SOURCE" else value for key, value in init.items()}
    with pytest.raises(UsageError, match=message):
        run(tmp_path / "run", case("single", "small:Small", init=init))


def test_init_with_a_tensor_of_another_shape_is_refused(tmp_path):
    run(tmp_path / "source", case("single", {"name": "small:Small", "args": {"hidden": 9}}, steps=2))
    with pytest.raises(UsageError, match=r"init: 0.weight has shape \(9, 5\) in the source, \(128, 5\) here"):
        run(tmp_path / "run", case("single", "small:Small", init={"from": str(tmp_path / "source")}))


# ------------------------------------------------------------------------------------------------ best, patience, keep
def scripted(values: list[float], task=None, **changes) -> dict:
    return case("single", task or {"name": "script:Script", "args": {"values": values}}, **{
        "evaluate": {"every": 3}, "steps": 3 * len(values), **changes})  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_the_test_split_is_measured_on_the_best_checkpoint(tmp_path, name):
    values = [0.1, 0.5, 0.9, 0.3, 0.9, 0.2]
    best = {"metric": "eval/score", "mode": "max"}
    spec = under(name, scripted(values, checkpoint={"every": 4, "keep": 1, "best": best}))
    result, _ = run(tmp_path / "run", spec)
    assert result.best == {"metric": "eval/score", "value": 0.9, "step": 9}  # an equal one later is not better
    kept = sorted(path.name for path in (tmp_path / "run" / "checkpoints").glob("step-*"))
    assert kept == ["step-00000009", "step-00000018"]
    best = saved(tmp_path / "run", 9)["model"]["weight"]
    assert result.metrics["test/weight"] == pytest.approx(float(best[0]), abs=0)
    last = saved(tmp_path / "run", 18)["model"]["weight"]
    assert float(last[0]) != float(best[0])
    assert float(result.model().weight.detach()[0]) == float(best[0])


def test_without_best_the_last_is_tested(tmp_path):
    result, _ = run(tmp_path / "run", scripted([0.5, 0.1, 0.2]))
    assert result.best is None
    assert result.metrics["test/weight"] == float(saved(tmp_path / "run", 9)["model"]["weight"][0])


@pytest.mark.parametrize("name", CASES)
def test_patience_and_goal_end_the_run_also_over_a_resume(tmp_path, name):
    values = [0.1, 0.6, 0.5, 0.4, 0.6, 0.9, 0.9, 0.9]
    goal = {"metric": "eval/score", "at_least": 0.9}
    often = {"checkpoint": {"every": 3}}
    patient = under(name, scripted(values, stop={"steps": 24, "goal": goal, "patience": 3}, **often))
    result, _ = run(tmp_path / "whole", patient)
    assert (result.status, result.step, result.exit_code) == ("goal_missed", 15, 4)
    for number, stop_at in enumerate((4, 8, 12)):  # requests end at 5, 9 and 13, or one earlier
        run(tmp_path / "parts", patient, stop_at=stop_at)
        if number == 1:
            with pytest.raises(RunError):
                run(tmp_path / "parts", patient, inject=("nan:rank=0,step=11",))
    run(tmp_path / "parts", patient)
    assert_same(tmp_path / "whole", tmp_path / "parts")
    result, _ = run(tmp_path / "goal", under(name, scripted(values, stop={"steps": 24, "goal": goal}, **often)))
    assert (result.status, result.step, result.exit_code) == ("goal_met", 18, 0)
    short = scripted(values[:5], stop={"steps": 15, "goal": goal}, **often)
    missed, _ = run(tmp_path / "missed", under(name, short))
    assert (missed.status, missed.exit_code) == ("goal_missed", 4)


def test_an_evaluation_at_a_checkpoint_is_not_forgotten(tmp_path):
    """Killed right after the checkpoint of a version that was evaluated too: patience has counted that one."""
    spec = scripted([0.9, 0.5, 0.4, 0.3, 0.2, 0.1], stop={"steps": 18, "patience": 3}, checkpoint={
        "every": 6, "best": {"metric": "eval/score", "mode": "max"}})  # fmt: skip
    whole, _ = run(tmp_path / "whole", spec)
    assert whole.step == 12
    with pytest.raises(RunError):
        run(tmp_path / "parts", spec, inject=("nan:rank=0,step=7",))
    parts, notes = run(tmp_path / "parts", spec)
    assert "resuming from step 6" in notes
    assert parts.step == 12
    assert_same(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.parametrize("keep", [1, 3])
def test_the_newest_checkpoints_are_kept(tmp_path, keep):
    run(tmp_path / "run", case("server", "small:Small", checkpoint={"every": 6, "keep": keep}))
    steps = [int(path.name[5:]) for path in sorted((tmp_path / "run" / "checkpoints").glob("step-*"))]
    assert steps[-1] == 40
    assert len(steps) <= keep  # one that waits to be written may be overtaken by a newer one
    assert set(steps) <= {6, 12, 18, 24, 30, 36, 40}


# ------------------------------------------------------------------------------------------------------ damage, death
def test_a_damaged_checkpoint_is_passed_over_and_said(tmp_path):
    spec = case("all_reduce", checkpoint={"every": 6, "keep": 5})
    run(tmp_path / "whole", spec)
    first, _ = run(tmp_path / "parts", spec, stop_at=15)
    newest = tmp_path / "parts" / "checkpoints" / f"step-{first.step:08d}" / "model.safetensors"
    data = bytearray(newest.read_bytes())
    data[-5] ^= 1
    newest.write_bytes(data)
    _, notes = run(tmp_path / "parts", spec)
    said = [note for note in notes if "is damaged" in note]
    assert len(said) == 1
    assert f"step-{first.step:08d} is damaged (model.safetensors: hash differs); using step-" in said[0]
    assert {f"resuming from step {step}" for step in (6, 12)} & set(notes)
    assert_same(tmp_path / "whole", tmp_path / "parts")


def command(tmp_path: Path, spec: dict, *options: str) -> list[str]:
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(spec))
    for name in ("small.py", "dropout.py"):
        shutil.copy(OWN / name, tmp_path / name)
    return [sys.executable, "-m", "distml", "run", str(tmp_path / "job.yaml"), "--out", str(tmp_path / "parts"),
            "--runtime", "inline", *options]  # fmt: skip


def await_line(path: Path, process: subprocess.Popen, minimum: int) -> None:
    """Wait for an event: the file has so many lines."""
    deadline = time.monotonic() + 60
    while not path.exists() or path.read_bytes().count(b"\n") < minimum:
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_writes_a_checkpoint_and_exits_130(tmp_path, number):
    name = "all_reduce" if number == signal.SIGTERM else "single"
    spec = case(name, checkpoint={"every": 100_000}, evaluate={"every": 100_000}, steps=100_000)
    process = subprocess.Popen(command(tmp_path, spec), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                               env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip
    await_line(tmp_path / "parts" / "metrics.jsonl", process, 3)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    result = json.loads((tmp_path / "parts" / "result.json").read_text())
    assert result["status"] == "interrupted"
    assert result["checkpoint"] == f"checkpoints/step-{result['step']:08d}"
    assert saved(tmp_path / "parts")["model"]
    shorter = {**spec, "stop": {"steps": result["step"] + 7}}
    last, notes = run_in(tmp_path, shorter)
    assert f"resuming from step {result['step']}" in notes
    assert last.step == result["step"] + 7


def run_in(tmp_path: Path, spec: dict) -> tuple[distml.Result, list[str]]:
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(spec))
    watcher = Watcher()
    return distml.run(tmp_path / "job.yaml", out=tmp_path / "parts", runtime="inline", display=watcher), watcher.notes


def test_a_killed_run_is_said_to_be_dead_and_resumes_exactly(tmp_path):
    spec = case("single", optimizer=ADAM)
    run(tmp_path / "whole", spec)
    # Slow enough for a checkpoint to be written before the end.
    inject = ("--inject", "kill:rank=0,step=23", "--inject", "slow:rank=0,step=13")
    process = subprocess.run(command(tmp_path, spec, *inject), capture_output=True, text=True, timeout=60, check=False,
                             env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip
    assert process.returncode == -signal.SIGKILL
    result = json.loads((tmp_path / "parts" / "result.json").read_text())
    assert result["status"] == "running"
    last, notes = run_in(tmp_path, spec)
    assert any(f"process {result['pid']} on {result['host']}) ended without finishing" in note for note in notes)
    assert {f"resuming from step {step}" for step in (6, 12, 18)} & set(notes)
    assert last.step == 40
    assert_same(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.parametrize("name", CASES)
def test_a_run_that_dies_in_an_evaluation_does_it_again(tmp_path, name):
    values = [0.1, 0.6, 0.5, 0.4, 0.6, 0.9]
    task = {"name": "script:Fragile", "args": {"values": values, "at": 9, "file": str(tmp_path / "full")}}
    spec = under(name, scripted(values, task=task, stop={"steps": 18, "patience": 2}, checkpoint={
        "every": 3, "best": {"metric": "eval/score", "mode": "max"}}))  # fmt: skip
    whole, _ = run(tmp_path / "whole", spec)
    assert whole.step == 12
    (tmp_path / "full").touch()
    with pytest.raises(RunError, match="evaluate, step 9: OSError: the disk is full"):
        run(tmp_path / "parts", spec)
    (tmp_path / "full").unlink()
    _, notes = run(tmp_path / "parts", spec)
    assert "resuming from step 6" in notes
    assert_same(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.parametrize("seed", range(3))
def test_a_slow_worker_that_reaches_the_goal_ends_the_run_with_its_weights(tmp_path, seed):
    """The others are many versions and checkpoints ahead by then."""
    goal = {"metric": "eval/score", "at_least": 1.0}
    strategy = {"name": "parameter_server", "mode": "async", "servers": 2}
    spec = scripted([0.0], task={"name": "script:Ranked", "args": {"values": [0.0]}}, checkpoint={"every": 1},
                    stop={"steps": 3000, "goal": goal}, evaluate={"every": 1}, seed=seed) | {
        "strategy": strategy, "resources": {"workers": 2}, "inline": {"speeds": [1.0, 0.02]}}  # fmt: skip
    result, _ = run(tmp_path / "run", spec)
    assert result.status == "goal_met"
    assert result.metrics["eval/version"] == result.step
    record = json.loads((tmp_path / "run" / "result.json").read_text())
    assert record["checkpoint"] == f"checkpoints/step-{result.step:08d}"
    assert max(row["step"] for row in rows(tmp_path / "run")) == result.step
    weight = saved(tmp_path / "run", result.step)["model"]["weight"]
    assert result.metrics["eval/weight"] == result.metrics["test/weight"] == float(weight[0])
    assert float(result.model().weight.detach()[0]) == float(weight[0])


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("stop", "step"), [
    ({"steps": 24, "goal": {"metric": "eval/score", "at_least": 0.9}}, 18), ({"steps": 24, "patience": 2}, 12),
    ({"steps": 15}, 15), ({"examples": 15 * 12}, 15),
])  # fmt: skip
def test_a_run_that_dies_between_its_last_evaluation_and_its_result_does_no_further_step(tmp_path, name, stop, step):
    often = {"every": 100, "best": {"metric": "eval/score", "mode": "max"}}
    spec = under(name, scripted([0.1, 0.6, 0.5, 0.4, 0.6, 0.9, 0.95, 0.9], stop=stop, checkpoint=often))
    first, _ = run(tmp_path / "run", spec)
    assert first.step == step
    record = json.loads((tmp_path / "run" / "result.json").read_text())
    (tmp_path / "run" / "result.json").write_text(json.dumps(record | {"status": "running", "step": step - 1}))
    again, notes = run(tmp_path / "run", spec)
    assert f"resuming from step {step}" in notes
    assert (again.status, again.step, again.best) == (first.status, step, first.best)
    assert again.metrics["test/weight"] == first.metrics["test/weight"]
