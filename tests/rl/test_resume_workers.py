"""A run that acts goes on with other workers; its batch, which follows from them, changes with them."""

from __future__ import annotations

import pytest
from own.on_ray import Notes
from own.rl_jobs import acting_spec

from distml import run
from distml.errors import UsageError
from distml.runs.checkpoints import CheckpointStore

ACTS = {"environment": "CartPole-v1", "envs_per_worker": 4, "evaluation": {"episodes": 2, "max_frames": 20}}
TASKS = {
    "actor_critic": ({**ACTS, "name": "actor_critic", "n_steps": 5}, 20),
    "ppo": ({**ACTS, "name": "ppo", "n_steps": 10, "epochs": 2, "minibatches": 2}, 20),
    "reinforce": ({**ACTS, "name": "reinforce"}, 4),
    "sarsa": ({**ACTS, "name": "sarsa", "environment": "CliffWalking-v1"}, 4),
}


def spec(name: str, workers: int = 1, steps: int = 4) -> dict:
    return acting_spec(TASKS[name][0], strategy="all_reduce", workers=workers, steps=steps)


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1)])
def test_the_batch_follows_the_workers_and_it_is_said(name, before, after, tmp_path):
    notes, each = Notes(), TASKS[name][1]
    run(spec(name, before), out=tmp_path / "run", runtime="inline")
    found = run(spec(name, after, steps=8), out=tmp_path / "run", runtime="inline", display=notes)
    assert (found.status, found.step) == ("done", 8)
    assert "resuming from step 4" in notes.lines
    assert f"changed: batch_size: {before * each} -> {after * each}" in notes.lines
    if name == "actor_critic":  # rows of environments that only begin anew do not count
        clocks = [CheckpointStore(tmp_path / "run" / "checkpoints", 2).load(step).state["clock"] for step in (4, 8)]
        frames = [clocks[0]["frames"], clocks[1]["frames"] - clocks[0]["frames"]]
        assert 0.9 < frames[0] / (4 * each * before) <= 1.0
        assert 0.9 < frames[1] / (4 * each * after) <= 1.0


@pytest.mark.parametrize("name", ["actor_critic", "reinforce"])
def test_the_spec_that_the_run_keeps_says_what_to_set(name, tmp_path):
    run(spec(name), out=tmp_path / "run", runtime="inline")
    kept, each = tmp_path / "run" / "spec.yaml", TASKS[name][1]
    more = ["resources.workers=2", "stop.steps=8"]
    with pytest.raises(UsageError, match=f"batch_size {each} is not .*set it to {2 * each}"):
        run(kept, more, out=tmp_path / "run", runtime="inline")
    assert run(kept, [*more, f"batch_size={2 * each}"], out=tmp_path / "run", runtime="inline").step == 8


def test_other_changes_of_the_batch_are_refused(tmp_path):
    run(spec("actor_critic"), out=tmp_path / "acts", runtime="inline")
    with pytest.raises(UsageError, match=r"holds a run of another spec \(task.n_steps: 5 -> 10\)"):
        run(spec("actor_critic"), {"task.n_steps": 10}, out=tmp_path / "acts", runtime="inline")
    reads = {**acting_spec({"name": "regression"}, strategy="all_reduce", steps=4), "batch_size": 8}
    run(reads, out=tmp_path / "reads", runtime="inline")
    with pytest.raises(UsageError, match=r"holds a run of another spec \(batch_size: 8 -> 16\)"):
        run({**reads, "batch_size": 16}, {"resources.workers": 2}, out=tmp_path / "reads", runtime="inline")
