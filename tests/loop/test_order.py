"""The driver does not rely on the order in which different workers' events reach it."""

from __future__ import annotations

import distml
from distml.events import Evaluated, Snapshot
from distml.runs.checkpoints import CheckpointStore
from distml.runtime.inline import InlineRuntime

SPEC = {
    "distml": "v1", "name": "order", "task": "classification", "strategy": "all_reduce", "log": {"to": []},
    "stop": {"steps": 40, "goal": {"metric": "eval/accuracy", "at_least": 0.0}}, "evaluate": {"every": 10},
    "checkpoint": {"every": 10}, "resources": {"workers": 2},
}  # fmt: skip


def test_a_workers_half_that_comes_after_the_evaluation_that_ends_the_run_is_not_lost(tmp_path, monkeypatch):
    original, delayed = InlineRuntime.events, []

    def reordered(self):
        held = []
        for event in original(self):
            if isinstance(event, Snapshot) and event.rank == 1:
                held.append(event)
                continue
            yield event
            if isinstance(event, Evaluated):
                delayed.extend(held)
                yield from held
                held = []

    monkeypatch.setattr(InlineRuntime, "events", reordered)
    result = distml.run(SPEC, out=tmp_path / "run", runtime="inline")
    assert (result.status, result.step) == ("goal_met", 10)
    assert delayed
    assert CheckpointStore(tmp_path / "run" / "checkpoints", 1).steps() == [10]
