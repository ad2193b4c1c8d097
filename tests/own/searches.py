"""Small architecture searches in this process, and hosts that do to their children what tests ask for."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from own.over import carry_through

from distml.population.context import OverContext
from distml.population.host import Advanced, Answer, Gone
from distml.population.search import SearchRun
from distml.population.trials import FOLDER
from distml.runs.directory import Result
from distml.runs.display import SilentDisplay
from distml.runtime.cut import Cut
from distml.runtime.members import InlineHost
from distml.spec.loader import load_spec

SPACE = {"task.model.hidden.0": {"choice": [2, 4, 8]}, "optimizer.lr": {"loguniform": [1.0e-3, 1.0e-1]}}
CHANGING = ("wall_s", "seconds")  # keys of the journal that differ between equal searches


def search(**keys: Any) -> dict[str, Any]:
    """A spec of ten small children."""
    base = {"task": {"name": "classification", "model": {"name": "mlp", "hidden": [4]}}, "batch_size": 32,
            "stop": {"steps": 6}, "strategy": "single"}  # fmt: skip
    controller = {"name": "reinforce", "batch": 2, "hidden": 8, "lr": 0.05}
    reward = {"metric": "eval/accuracy", "cost": "parameters", "target": 300.0}
    return {"distml": "v1", "kind": "nas", "name": "toy", "base": base, "space": SPACE, "controller": controller,
            "reward": reward, "trials": 10, **keys}  # fmt: skip


class Notes(SilentDisplay):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, text: str) -> None:
        self.lines.append(text)


class TriedHost(InlineHost):
    """Changes answers before they are given.

    Args:
        change: (answer, how many answers of this kind this child has given before) -> what is said instead.
        stop_after: answers after which `wait` is interrupted, as by a signal.
        late: with several slots: whoever was told last is carried out first.
    """

    def __init__(
        self, slots: int = 1, change: Callable[[Answer, int], Answer] = lambda answer, tries: answer,
        stop_after: int | None = None, late: bool = False, lost: tuple[str, ...] = (),
    ) -> None:  # fmt: skip
        self.wanted, self.change, self.stop_after, self.late, self.lost = slots, change, stop_after, late, list(lost)
        self.given = 0
        self.seen: dict[tuple[str, type], int] = {}
        self.finished: list[str] = []

    def settle_in(self, run: SearchRun) -> None:
        """What only the search knows."""
        super().__init__(run.base.job, run.context.sources, run.directory.path / FOLDER, self.wanted)

    def wait(self, timeout_s: float) -> list[Answer]:
        if self.stop_after is not None and self.given >= self.stop_after:
            raise KeyboardInterrupt
        if self.late:
            self.commands.rotate(1)
        answers = [self._changed(answer) for answer in super().wait(timeout_s)]
        self.given += len(answers)
        self.finished += [answer.member for answer in answers if isinstance(answer, Advanced)]
        return answers

    def _changed(self, answer: Answer) -> Answer:
        key = answer.member, type(answer)
        self.seen[key] = self.seen.get(key, -1) + 1
        changed = self.change(answer, self.seen[key])
        if isinstance(changed, Gone) and not isinstance(answer, Gone):
            self.release(changed.member)
        return changed

    def fetch(self, state: Any) -> Cut:
        if self.lost and self.finished[-1] == self.lost[0]:
            self.lost.pop(0)
            raise LookupError("lost")
        return super().fetch(state)


def gone(member: str, kind: Any = "failed") -> Gone:
    return Gone(member, kind, "on purpose", "loss", 3)


def with_metrics(answer: Answer, **metrics: float) -> Answer:
    return replace(answer, metrics=metrics) if isinstance(answer, Advanced) else answer


def run_search(
    spec: Mapping[str, Any], out: Path, host: TriedHost | None = None, *, resume: bool = False
) -> tuple[SearchRun, Result, list[str]]:
    """One search in `out`: it, how it ended, and what it said; recorded also when it ends by an exception."""
    notes = Notes()

    def make(context: OverContext) -> SearchRun:
        run = SearchRun(context, host)
        if host is not None:
            host.settle_in(run)
        return run

    run, result = carry_through(load_spec(spec), out, make, resume=resume, display=notes)
    return run, result, notes.lines


def journal(out: Path) -> list[dict[str, Any]]:
    """Its events without what differs between equal searches."""
    rows = [json.loads(line) for line in (out / "trials.jsonl").read_text().splitlines()]
    for row in rows:
        for key in CHANGING:
            del row[key]
        row["metrics"] = {name: value for name, value in row["metrics"].items() if name.startswith(("eval/", "train/"))}
    return rows
