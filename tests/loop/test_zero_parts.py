"""Checkpoints in parts, of runs in one process: any strategy goes on from them; no death while writing harms them."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from own.on_ray import Notes
from own.oracle import OWN, job_of, same, saved, spec_of
from own.rhyming import assert_alike, chain, rhyming, zero

import distml
from distml.errors import RunError, UsageError
from distml.runs.checkpoints import CheckpointStore
from distml.runs.directory import MetricsFile
from distml.runs.files import write_atomically
from distml.runtime.inline import InlineRuntime
from distml.tasks.sources import SourceTree

FLOAT = {"dtype": "float32"}
STEMS = ("model", "optimizer")


@pytest.fixture(autouse=True)
def _in_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(OWN)


class Looking(Notes):
    """Counts what ranks have written and nobody has committed, at every report."""

    def __init__(self, out: Path) -> None:
        super().__init__()
        self.store, self.seen = CheckpointStore(out / "checkpoints", 9), list[int]()

    def report(self, step: int, fraction: float, row: dict) -> None:
        self.seen.append(len(self.store.ranks_folders()))


def run(out: Path, spec: dict, **keys) -> tuple[distml.Result, list[str]]:
    notes = Notes()
    return distml.run(spec, out=out, runtime="inline", display=notes, **keys), notes.lines


@pytest.fixture(scope="module")
def reduced(tmp_path_factory) -> Path:
    """The oracle: never interrupted, one strategy, checkpoints in one file."""
    out = tmp_path_factory.mktemp("reduced") / "run"
    chain(out, [("all_reduce", 1, 40)])
    return out


def test_each_strategy_goes_on_from_the_others_checkpoints(reduced, tmp_path):
    result = chain(tmp_path / "run", [(zero(3), 1, 10), ("all_reduce", 1, 20), (zero(1), 1, 30), (zero(2), 1, 40)])
    assert_alike(reduced, tmp_path / "run")
    losses = [distml.run(rhyming("all_reduce", 1, 40), out=reduced).metrics, result.metrics]
    for name in ("eval/loss", "test/loss"):
        assert losses[0][name] == pytest.approx(losses[1][name], abs=1e-5)
    model, on_disk = result.model().state_dict(), saved(tmp_path / "run")["model"]
    assert same({name: model[name].numpy() for name in on_disk}, on_disk)
    store = CheckpointStore(tmp_path / "run" / "checkpoints", 1)
    files = {step: sorted(path.name for path in (store.root / f"step-{step:08d}").glob("model*")) for step in (10, 20)}
    assert files == {10: ["model-00001-of-00001.safetensors"], 20: ["model.safetensors"]}


def test_moments_that_are_dropped_are_missed(reduced, tmp_path, monkeypatch):
    """The control: with weights alone the chain comes to something else."""
    from distml.runs.parts import PartReader

    read = PartReader.read
    monkeypatch.setattr(
        PartReader, "read", lambda self, kind, *rest: read(self, kind, *rest) if kind == "model" else None
    )
    chain(tmp_path / "run", [("all_reduce", 1, 20), (zero(2), 1, 40)])
    with pytest.raises(AssertionError):
        assert_alike(reduced, tmp_path / "run")


@pytest.mark.parametrize("stage", [2, 3])
def test_buffers_and_frozen_weights_are_in_the_parts_too(stage, tmp_path):
    """Running statistics, an integer count, and a frozen layer that was given; all over a resume."""
    source, _ = run(tmp_path / "source", small("bn:BN", "all_reduce", 4))
    given = saved(source.directory)["model"]
    init = {"from": str(tmp_path / "source"), "freeze": ["norm.*"]}
    run(tmp_path / "whole", small("bn:BN", zero(stage), 12, init=init))
    run(tmp_path / "parts", small("bn:BN", zero(stage), 6, init=init))
    shutil.rmtree(tmp_path / "source")
    _, notes = run(tmp_path / "parts", small("bn:BN", zero(stage), 12, init=init))
    assert "resuming from step 6" in notes
    whole, parts = saved(tmp_path / "whole")["model"], saved(tmp_path / "parts")["model"]
    assert same(whole, parts)
    assert same({"norm.weight": given["norm.weight"]}, {"norm.weight": whole["norm.weight"]})
    assert int(whole["seen"]) == int(given["seen"]) + 12 * 12
    assert not np.array_equal(whole["norm.running_mean"], given["norm.running_mean"])
    result, notes = run(tmp_path / "parts", small("bn:BN", "all_reduce", 20, init=init))
    assert (result.step, "resuming from step 12" in notes) == (20, True)


@pytest.mark.parametrize("stage", [2, 3])
def test_low_precision_resumes_bit_by_bit(stage, tmp_path):
    """What is saved are the float32 weights; those that are computed with follow from them."""
    spec = {"precision": "bf16", "micro_batch_size": 3}
    run(tmp_path / "whole", rhyming(zero(stage), 1, 20, **spec))
    run(tmp_path / "parts", rhyming(zero(stage), 1, 10, **spec))
    run(tmp_path / "parts", rhyming(zero(stage), 1, 20, **spec))
    one, other = saved(tmp_path / "whole"), saved(tmp_path / "parts")
    assert same(one["model"], other["model"])
    assert same(one["optimizer"], other["optimizer"])


def test_ranks_of_an_earlier_start_that_still_write_are_in_nobodys_way(tmp_path):
    """A version comes again after a recovery, when those who wrote it before may not be dead yet."""
    job = job_of(rhyming(zero(2), 1))
    runtime = InlineRuntime(job, SourceTree.collect(job.task, OWN), (), tmp_path)
    try:
        runtime.build(None)
        runtime.begin(None)
        (trainer,) = runtime.trainers
        first = trainer._write_part()
        with pytest.raises(FileExistsError):
            trainer._write_part()
        trainer.save_parts_in(tmp_path / "checkpoints", "again")
        second = trainer._write_part()
    finally:
        runtime.close()
    assert first.folder != second.folder
    assert first.files == second.files


@pytest.mark.parametrize("stage", [2, 3])
def test_buffers_come_back(stage, tmp_path):
    run(tmp_path / "whole", small("bn:BN", zero(stage), 12))
    run(tmp_path / "parts", small("bn:BN", zero(stage), 6))
    run(tmp_path / "parts", small("bn:BN", zero(stage), 12))
    whole = saved(tmp_path / "whole")["model"]
    assert same(whole, saved(tmp_path / "parts")["model"])
    assert int(whole["seen"]) == 12 * 12


def small(task: str, strategy, steps: int, **changes) -> dict:
    return spec_of({"name": task, "args": FLOAT}, strategy=strategy, steps=steps, **changes)


def test_another_model_is_refused_in_one_line(tmp_path):
    run(tmp_path / "run", small("small:Small", zero(2), 4))
    (tmp_path / "run" / "spec.yaml").write_text(
        (tmp_path / "run" / "spec.yaml").read_text().replace("float32", "float32, hidden: 64"))  # fmt: skip
    task = {"name": "small:Small", "args": {**FLOAT, "hidden": 64}}
    with pytest.raises(UsageError, match=r"another model: 0.weight has shape \(128, 5\) there, \(64, 5\) here"):
        run(tmp_path / "run", spec_of(task, strategy=zero(2), steps=8))


def test_evaluated_versions_that_are_not_the_best_do_not_stay_on_the_disk(tmp_path):
    """Each evaluated version is written, as it may be the best."""
    looking = Looking(tmp_path / "run")
    values = [0.9, 0.5, 0.4, 0.3, 0.2, 0.95, 0.1, 0.1]
    task = {"name": "script:Script", "args": {**FLOAT, "values": values}}
    best = {"metric": "eval/score", "mode": "max"}
    spec = spec_of(task, strategy=zero(2), steps=24, evaluate={"every": 3}, log={"every": 1, "to": []},
                   checkpoint={"every": 100, "keep": 1, "best": best})  # fmt: skip
    result = distml.run(spec, out=tmp_path / "run", runtime="inline", display=looking)
    assert looking.seen == [0] * 24
    assert result.best == {"metric": "eval/score", "step": 18, "value": 0.95}
    assert CheckpointStore(tmp_path / "run" / "checkpoints", 1).steps() == [18, 24]


def test_a_damaged_part_is_passed_over_and_said(tmp_path):
    whole, _ = run(tmp_path / "whole", small("small:Small", zero(2), 12, checkpoint={"every": 4, "keep": 3}))
    run(tmp_path / "run", small("small:Small", zero(2), 8, checkpoint={"every": 4, "keep": 3}))
    newest = tmp_path / "run" / "checkpoints" / "step-00000008" / "model-00001-of-00001.safetensors"
    data = bytearray(newest.read_bytes())
    data[-5] ^= 1
    newest.write_bytes(data)
    _, notes = run(tmp_path / "run", small("small:Small", zero(2), 12, checkpoint={"every": 4, "keep": 3}))
    assert any("step-00000008 is damaged" in note and "using step-00000004" in note for note in notes)
    assert "resuming from step 4" in notes
    assert same(saved(whole.directory)["model"], saved(tmp_path / "run")["model"])


@pytest.mark.parametrize("when", ["the rank's part", "the driver's report"])
def test_a_disk_without_space_is_the_runs_failure_and_said_in_its_result(when, tmp_path, monkeypatch):
    """Full from the moment when the rank's part is begun, for as long as it lies there."""
    no_space = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    replace_file, append = write_atomically, MetricsFile.append

    def check_space(path: Path) -> None:
        if list((tmp_path / "run" / "checkpoints").glob("*.ranks")):
            raise no_space

    def fill(folder: Path, *rest) -> None:
        folder.mkdir(parents=True)
        raise no_space

    def fill_and_report(self: MetricsFile, row: dict) -> None:
        if row["step"] == 8:
            (tmp_path / "run" / "checkpoints" / "step-00000008.other.ranks").mkdir(parents=True)
        check_space(self.path)
        append(self, row)

    def guarded(path: Path, *rest, **keys) -> None:
        check_space(path)
        replace_file(path, *rest, **keys)

    if when == "the rank's part":
        monkeypatch.setattr("distml.loop.write_part", fill)
    else:
        monkeypatch.setattr(MetricsFile, "append", fill_and_report)
    monkeypatch.setattr("distml.runs.directory.write_atomically", guarded)
    monkeypatch.setattr(Path, "write_text", lambda path, *_, **__: check_space(path))
    with pytest.raises(RunError, match="No space left on device") as caught:
        run(tmp_path / "run", small("small:Small", zero(2), 12, checkpoint={"every": 8}, log={"every": 4, "to": []}))
    role = "rank 0" if when == "the rank's part" else "driver"
    assert (caught.value.phase, caught.value.role) == ("checkpoint", role)
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert (result["status"], result["error"]["phase"], result["error"]["rank"]) == ("failed", "checkpoint", role)
    assert "No space left" in result["error"]["message"]


def test_a_run_that_is_killed_while_it_writes_goes_on_from_the_checkpoint_before(tmp_path):
    """SIGKILL, with a file on the disk that has a header and no values."""
    spec = rhyming(zero(2), 1, 30)
    run(tmp_path / "whole", spec)
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(spec))
    command = [sys.executable, "-m", "distml", "run", str(tmp_path / "job.yaml"), "--out", str(tmp_path / "parts"),
               "--inject", "kill:rank=0,step=19,at=save"]  # fmt: skip
    process = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False,
                             env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip
    assert process.returncode == -signal.SIGKILL, process.stderr
    store = CheckpointStore(tmp_path / "parts" / "checkpoints", 9)
    (left,) = store.ranks_folders()
    assert left.name.startswith("step-00000020.")
    assert {path.name for path in left.iterdir()} == {f"{stem}-00001-of-00001.safetensors" for stem in STEMS}
    assert store.newest_good(print).step == 10
    looking = Looking(tmp_path / "parts")
    distml.run(tmp_path / "job.yaml", out=tmp_path / "parts", display=looking)
    assert "resuming from step 10" in looking.lines
    assert looking.seen == [0, 0]
    one, other = saved(tmp_path / "whole"), saved(tmp_path / "parts")
    assert same(one["model"], other["model"])
    assert same(one["optimizer"], other["optimizer"])
