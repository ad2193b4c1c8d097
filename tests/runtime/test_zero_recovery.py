"""ZeRO on Ray: what each rank writes survives any of them, and serves any number of others.

Deaths are caused by the injector that users have. The oracle of a recovered run is one in one process that nobody
disturbed: the same data order, another order of sums. Where the number of workers is the same, the oracle is bitwise.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from own.on_ray import Notes
from own.oracle import OWN, same, saved, spec_of
from own.rhyming import LIMITS, assert_alike, chain, rhyming, zero

import distml
from distml.errors import RunError, UsageError
from distml.runs.checkpoints import CheckpointStore
from distml.runs.probe import Probe

pytestmark = pytest.mark.usefixtures("shared_ray")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    """One process, one strategy, one file per checkpoint."""
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    chain(out, [("all_reduce", 1, 30)])
    return out


def run(out: Path, spec: dict, *inject: str) -> tuple[distml.Result, list[str]]:
    notes = Notes()
    return distml.run(spec, out=out, runtime="ray", inject=inject, display=notes), notes.lines


def checkpoints(out: Path) -> CheckpointStore:
    return CheckpointStore(out / "checkpoints", 9)


def test_a_rank_that_dies_while_it_writes_costs_no_more_than_since_the_checkpoint_before(undisturbed, tmp_path):
    """And one process under another strategy goes on from what the two have written."""
    out = tmp_path / "run"
    result, notes = run(out, rhyming(zero(3), 2, 20), "kill:rank=1,step=19,at=save")
    assert (result.status, result.step, result.metrics["runtime/restarts"]) == ("done", 20, 1)
    assert any(line.startswith("rank 1 was lost") and "all go on from step 10" in line for line in notes)
    store = checkpoints(out)
    assert (store.steps(), store.ranks_folders()) == ([10, 20], [])
    assert len(list((store.root / "step-00000020").glob("model-*-of-00002.safetensors"))) == 2
    assert json.loads((out / "environment.json").read_text())["transport"].startswith("process_group")
    last = chain(out, [("all_reduce", 1, 30)])
    assert_alike(undisturbed, out)
    assert last.metrics["eval/loss"] == pytest.approx(metrics(undisturbed)["eval/loss"], abs=1e-5)


def metrics(out: Path) -> dict:
    return json.loads((out / "result.json").read_text())["metrics"]


def label(strategy: dict | str) -> str:
    return strategy if isinstance(strategy, str) else f"zero-{strategy['stage']}"


@pytest.mark.slow
@pytest.mark.parametrize("links", [
    [(zero(3), 4, 10), ("all_reduce", 1, 20), (zero(2), 3, 30)],
    [("all_reduce", 2, 10), (zero(1), 2, 20), (zero(3), 3, 30)],
    [(zero(2), 3, 10), (zero(3), 1, 20), ("parameter_server", 2, 30)],
    [("local_sgd", 1, 10), (zero(2), 4, 20), (zero(1), 1, 30)],
], ids=lambda links: " then ".join(f"{label(strategy)} x {workers}" for strategy, workers, _ in links))  # fmt: skip
def test_any_number_of_workers_goes_on_under_any_strategy(links, undisturbed, tmp_path):
    result = chain(tmp_path / "run", links, "ray")
    assert_alike(undisturbed, tmp_path / "run", 1e-4)
    for name in ("eval/loss", "test/loss"):
        assert result.metrics[name] == pytest.approx(metrics(undisturbed)[name], abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_run_that_loses_ranks_ends_bit_by_bit_as_if_it_had_not(stage, tmp_path):
    """Before the first checkpoint, between two, while it writes, frozen instead of dead."""
    spec = rhyming(zero(stage), 2, 30)
    run(tmp_path / "whole", spec)
    assert "runtime/restarts" not in metrics(tmp_path / "whole"), "the control"
    for injection in (
        "kill:rank=0,step=4",
        "kill:rank=1,step=15",
        "kill:rank=0,step=29,at=save",
        "stop:rank=1,step=25",
    ):
        out = tmp_path / injection.replace(":", "-")
        result, _ = run(out, spec, injection)
        assert (result.status, result.metrics["runtime/restarts"]) == ("done", 1)
        one, other = saved(tmp_path / "whole"), saved(out)
        assert same(one["model"], other["model"])
        assert same(one["optimizer"], other["optimizer"])
        assert result.metrics["test/loss"] == metrics(tmp_path / "whole")["test/loss"]


@pytest.mark.slow
def test_a_rank_that_dies_in_an_evaluation_is_a_loss_to_the_others_and_no_error_of_theirs(tmp_path, monkeypatch):
    """They notice in the model's own forward pass, where weights are gathered."""
    monkeypatch.chdir(OWN)
    task = {"name": "mortal:Mortal", "args": {"marker": str(tmp_path / "died"), "version": 10}}
    spec = spec_of(task, strategy=zero(3), workers=2, steps=15, limits=LIMITS, evaluate={"every": 5},
                   checkpoint={"every": 5})  # fmt: skip
    result, notes = run(tmp_path / "run", spec)
    assert (result.status, result.step, result.metrics["runtime/restarts"]) == ("done", 15, 1)
    assert any("all go on from step" in line for line in notes)


@pytest.mark.slow
def test_restarts_are_counted_and_come_to_an_end(tmp_path):
    spec = rhyming(zero(2), 2, 20)
    spec["limits"] = {**spec["limits"], "max_restarts": 1}
    with pytest.raises(RunError, match=r"not restarted again \(limits.max_restarts: 1\)"):
        run(tmp_path / "run", spec, "kill:rank=0,step=4", "kill:rank=1,step=8")
    assert json.loads((tmp_path / "run" / "result.json").read_text())["error"]["rank"] == "rank 1"


@pytest.mark.slow
def test_a_run_directory_that_not_all_hosts_see_is_refused_before_the_first_step(tmp_path, monkeypatch):
    """There is one host here: that what rank 1 wrote went elsewhere is made up."""
    monkeypatch.setattr(Probe, "missing", lambda self, rank: "what it wrote is not here" if rank == 1 else None)
    with pytest.raises(UsageError, match=r"^rank 1 on \S+ does not see the run directory .*run \(what it wrote.*--out"):
        run(tmp_path / "run", rhyming(zero(2), 2, 10))
    monkeypatch.undo()
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.slow
def test_a_rank_that_dies_in_the_test_ends_the_run_in_one_line_and_the_next_run_measures_it(tmp_path, monkeypatch):
    """All are needed for a forward pass: the others must not wait for it."""
    monkeypatch.chdir(OWN)
    task = {"name": "mortal:Mortal", "args": {"marker": str(tmp_path / "died"), "version": 6, "split": "test"}}
    spec = spec_of(task, strategy=zero(3), workers=2, steps=6, limits=LIMITS)
    with pytest.raises(RunError) as caught:
        run(tmp_path / "run", spec)
    assert (caught.value.phase, caught.value.role) in {("evaluate test", "rank 0"), ("evaluate test", "rank 1")}
    assert "killed" in str(caught.value)
    result, notes = run(tmp_path / "run", spec)
    assert "resuming from step 6" in notes
    assert (result.status, result.step, "test/loss" in result.metrics) == ("done", 6, True)


@pytest.mark.slow
def test_a_run_that_is_asked_to_end_writes_a_checkpoint_of_all_ranks(tmp_path):
    import signal

    class Asking(Notes):
        def report(self, step: int, fraction: float, row: dict) -> None:
            if step == 20:
                signal.raise_signal(signal.SIGTERM)

    spec = rhyming(zero(2), 2, 1000, checkpoint={"every": 1000}, evaluate={"every": 1000})
    result = distml.run(spec, out=tmp_path / "run", runtime="ray", display=Asking())
    assert (result.status, result.exit_code) == ("interrupted", 130)
    assert checkpoints(tmp_path / "run").steps() == [result.step]
    assert result.step < 1000
    resumed = distml.run(rhyming(zero(2), 1, result.step + 3), out=tmp_path / "run", runtime="inline")
    assert resumed.step == result.step + 3
