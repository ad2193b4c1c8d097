"""What a worker says of its own standing still; and streams that begin anew only once the checkpoint is safe."""

from __future__ import annotations

import time

import pytest
import torch
from own.oracle import OWN, job_of, spec_of

from distml import run
from distml.errors import RunError
from distml.loop import Trainer
from distml.runs.checkpoints import CheckpointStore
from distml.tasks.build import build_task
from distml.tasks.sources import SourceTree


def trainer_of(task: str) -> Trainer:
    job = job_of(spec_of(task))
    SourceTree.collect(job.task, OWN).install()
    trainer = Trainer(job, build_task(job), 0, 1)
    trainer.build()
    return trainer


class SlowGroup:
    """Another worker that is late."""

    size = 1

    def __init__(self, trainer: Trainer) -> None:
        self.trainer, self.seen = trainer, []

    def all_reduce(self, tensor: torch.Tensor) -> None:
        time.sleep(0.02)
        self.seen.append(self.trainer.motionless_s())


def test_only_its_own_work_counts_and_not_the_waits_for_others_within_it(monkeypatch):
    trainer = trainer_of("small:Small")
    for activity, stands in (("stream", True), ("exchange", False), ("evaluate", True), ("checkpoint", False)):
        trainer.activity = activity
        time.sleep(0.02)
        assert (trainer.motionless_s() >= 0.02) == stands
    trainer.activity = "loss"
    group = SlowGroup(trainer)
    monkeypatch.setattr(type(trainer.strategy), "group", group)
    time.sleep(0.05)
    before = trainer.motionless_s()
    trainer.strategy.group_mean(torch.ones(1))
    assert group.seen == [0.0]
    assert trainer.motionless_s() < 0.05 <= before  # from the end of the wait on


@pytest.mark.parametrize("evaluates", [5, 1000], ids=["judged", "not judged"])
def test_a_stream_that_cannot_begin_anew_does_not_cost_the_checkpoint(evaluates, tmp_path, monkeypatch):
    monkeypatch.chdir(OWN)
    spec = spec_of("anew_once:AnewOnce", steps=20, checkpoint={"every": 5}, evaluate={"every": evaluates})
    with pytest.raises(RunError, match=r"rank 0, stream, step 5: .*no second time"):
        run(spec, out=tmp_path / "run", runtime="inline")
    assert CheckpointStore(tmp_path / "run" / "checkpoints", 1).steps() == [5]


def test_at_the_end_no_stream_begins_anew(tmp_path, monkeypatch):
    monkeypatch.chdir(OWN)
    found = run(spec_of("anew_once:AnewOnce", steps=5), out=tmp_path / "run", runtime="inline")
    assert (found.status, found.step) == ("done", 5)
