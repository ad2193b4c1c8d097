"""all_reduce on Ray with sums that are taken while backward runs, as between hosts; a death there."""

from __future__ import annotations

from pathlib import Path

import pytest
from own.oracle import OWN, distance, saved, spec_of

import distml
from distml.runs.display import SilentDisplay

pytestmark = pytest.mark.usefixtures("shared_ray")
LIMITS = {"heartbeat_s": 0.5, "lost_after_s": 5.0, "start_s": 60.0}


class Notes(SilentDisplay):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, text: str) -> None:
        self.lines.append(text)


@pytest.fixture(autouse=True)
def _in_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(OWN)


def run(out: Path, task: str, runtime: str, inject: tuple[str, ...], display: Notes) -> distml.Result:
    spec = spec_of({"name": task}, workers=2, steps=60, checkpoint={"every": 30}, micro_batch_size=3,
                   optimizer={"name": "adamw", "lr": 0.01}, limits=LIMITS)  # fmt: skip
    transport = {"transport": "process_group"}
    return distml.run(spec, transport, out=out, runtime=runtime, inject=inject, display=display)


def test_a_death_during_backward_goes_back_to_a_snapshot_and_ends_as_if_it_had_not_been(tmp_path):
    notes = Notes()
    run(tmp_path / "inline", "small:Small", "inline", (), notes)
    result = run(tmp_path / "ray", "apart:Apart", "ray", ("kill:rank=1,step=34",), notes)
    assert (result.status, result.step, result.metrics["runtime/restarts"]) == ("done", 60, 1)
    assert [line for line in notes.lines if line.startswith("rank 1 was lost") and "from step 30" in line]
    inline, ray = (saved(tmp_path / name) for name in ("inline", "ray"))
    assert distance(inline["model"], ray["model"]) <= 1e-12
    assert distance(inline["optimizer"], ray["optimizer"]) <= 1e-12
    said = (tmp_path / "ray" / "logs" / "worker-0.log").read_text()
    assert "interrupted: rank 0, all_reduce during backward of 2 ranks" in said
