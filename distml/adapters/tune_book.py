"""What a sweep keeps of its trials: the journal, each trial's folder, and which of them is the best. No ray, no torch.

    DIR/trials.jsonl                                      proposed, then retried or one of `ENDS`: in this order
    DIR/trials/NNNN/{spec.yaml, metrics.jsonl, result.json, checkpoints/}    checkpoints: of the best ones only

The journal alone decides what a resume goes on from: a line counts once its newline is written, and is written before
the event has any consequence.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distml.adapters.tune_samplers import Sampler, Values
from distml.population.trials import FILE, FOLDER, TrialFolder
from distml.runs.directory import MetricsFile, RunDirectory
from distml.runs.files import write_atomically
from distml.runs.over import ENDS, event_of
from distml.runs.pareto import pareto_front
from distml.spec.loader import LoadedSpec, with_values
from distml.spec.schema import BestSpec
from distml.spec.search_rules import objectives_of
from distml.spec.sweep import SweepSpec
from distml.tasks.sources import SourceTree


@dataclass
class TrialRecord:
    """One trial, as far as it has come.

    Attributes:
        end: how it ended; None: it has not. "stopped": by the scheduler, before its own budget was spent; "diverged":
            with a loss or weights that are not finite, its cause being its error.
        failures: how often it failed.
    """

    index: int
    values: Values
    end: str | None = None
    step: int = 0
    metrics: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    error: str | None = None
    failures: int = 0

    @property
    def name(self) -> str:
        """Its folder."""
        return f"{self.index:04d}"

    def score(self, goal: BestSpec) -> float:
        """Of an objective, more is better; NaN, or none, is the worst there is."""
        value = self.metrics.get(goal.metric)
        if value is None or math.isnan(value):
            return -math.inf
        return float(value) if goal.mode == "max" else -float(value)


class TrialBook:
    """The trials of one sweep.

    Args:
        loaded: the sweep's spec.
        directory: its run directory, locked.
        sources: the user's own files, which each trial's folder gets a copy of.
        clock: seconds of the sweep so far, counted over resumes.
    """

    def __init__(self, loaded: LoadedSpec[SweepSpec], directory: RunDirectory, sources: SourceTree) -> None:
        assert loaded.base is not None
        self.job, self.base, self.directory, self.sources = loaded.job, loaded.base, directory, sources
        self.goals = objectives_of(self.job)
        self.journal = MetricsFile(directory.path / FILE)
        self.trials: dict[int, TrialRecord] = {}
        self.open: dict[int, TrialFolder] = {}
        self.kept: set[int] = set()  # whose weights are on the disk
        self.last_error: str | None = None  # of a trial that has failed
        self.began, self.earlier_s = time.monotonic(), 0.0

    @property
    def wall_s(self) -> float:
        """Seconds of the sweep, counted over resumes."""
        return self.earlier_s + time.monotonic() - self.began

    def folder(self, index: int) -> Path:
        """A trial's folder."""
        return self.directory.path / FOLDER / f"{index:04d}"

    # --------------------------------------------------------------------------------------------------------- resuming
    def recall(self, sampler: Sampler) -> None:
        """Read the journal, and bring the sampler to where it was."""
        for row in self.journal.read():
            index, event = int(row["trial"]), event_of(row)
            self.earlier_s = float(row["wall_s"])
            if event == "proposed":
                self.trials[index] = TrialRecord(index, dict(row["values"]))
                sampler.recall(index, row["values"])
                continue
            trial = self.trials[index]
            if event in ("failed", "retried"):
                trial.failures += 1
                self.last_error = row["error"]
            if event in ENDS:
                trial.end, trial.step, trial.metrics = event, int(row["step"]), dict(row["metrics"])
                trial.values, trial.seconds, trial.error = dict(row["values"]), float(row["seconds"]), row["error"]
                self.tell(sampler, trial)
        self.kept = {
            trial.index for trial in self.trials.values() if (self.folder(trial.index) / "checkpoints").is_dir()
        }
        self._prune()

    def tell(self, sampler: Sampler, trial: TrialRecord) -> None:
        """Let the sampler learn from a trial that has ended."""
        if trial.end == "failed":
            sampler.tell(trial.index, None)
            return
        values = [trial.metrics.get(goal.metric) for goal in self.goals]
        sampler.tell(trial.index, [math.nan if value is None else float(value) for value in values])

    def unfinished(self) -> list[TrialRecord]:
        """Proposed, and not ended: in the order of their numbers."""
        return [trial for _, trial in sorted(self.trials.items()) if trial.end is None]

    # ---------------------------------------------------------------------------------------------------------- events
    def propose(self, index: int, values: Values) -> TrialRecord:
        """A new trial."""
        trial = self.trials[index] = TrialRecord(index, values)
        self._write("proposed", trial)
        return trial

    def prepare(self, trial: TrialRecord) -> None:
        """Make its folder anew, with its spec.

        Raises:
            UsageError: the base does not take these values together.
        """
        loaded = with_values(self.base, trial.values)
        shutil.rmtree(self.folder(trial.index) / "checkpoints", ignore_errors=True)
        TrialFolder(self.directory.path, trial.name).begin(loaded, self.sources.files)
        (self.folder(trial.index) / "metrics.jsonl").touch()

    def rows(self, trial: TrialRecord) -> list[dict[str, Any]]:
        """What it has reported."""
        return MetricsFile(self.folder(trial.index) / "metrics.jsonl").read()

    def changed(self, trial: TrialRecord, values: Mapping[str, Any]) -> None:
        """The scheduler gave it other values."""
        trial.values = dict(values)
        loaded = with_values(self.base, trial.values)
        write_atomically(self.folder(trial.index) / "spec.yaml", loaded.dump(), durable=False)

    def report(
        self, trial: TrialRecord, step: int, seconds: float, metrics: Mapping[str, float],
        rows: Sequence[Mapping[str, Any]],
    ) -> None:  # fmt: skip
        """What a trial has come to since its last report."""
        trial.step, trial.seconds = step, seconds
        trial.metrics |= metrics
        folder = self.open.setdefault(trial.index, TrialFolder(self.directory.path, trial.name))
        folder.report(rows, self.base.job.log.to)

    def end(self, trial: TrialRecord, event: str, error: str | None = None) -> None:
        """It is over, in one of the ways of `ENDS`."""
        trial.end, trial.error = event, error
        if event == "failed":
            self.last_error = error
        self._write(event, trial)
        self._close(trial, self._status(trial), error)
        if (self.folder(trial.index) / "checkpoints").is_dir():
            self.kept.add(trial.index)
        self._prune()

    def retry(self, trial: TrialRecord, error: str) -> None:
        """It has failed, and will be run again from its beginning."""
        trial.failures += 1
        trial.error = self.last_error = error
        self._write("retried", trial)
        trial.step, trial.metrics, trial.seconds, trial.error = 0, {}, 0.0, None
        self._forget(trial)

    def interrupted(self) -> None:
        """The sweep ends before its trials have: they are run anew when it goes on."""
        for trial in self.unfinished():
            if self.folder(trial.index).is_dir():
                self._close(trial, "interrupted", None)

    def close(self) -> None:
        """Close all files."""
        for folder in self.open.values():
            folder.directory.metrics.close()
        self.journal.close()

    def _write(self, event: str, trial: TrialRecord) -> None:
        self.journal.append({"trial": trial.name, "event": event, "wall_s": self.wall_s, "values": trial.values,
                             "step": trial.step, "metrics": trial.metrics, "seconds": trial.seconds,
                             "error": trial.error})  # fmt: skip

    def _close(self, trial: TrialRecord, status: str, error: str | None) -> None:
        self._forget(trial)
        folder = self.folder(trial.index)
        if not folder.is_dir():  # values that the base does not take
            return
        steps = sorted(path.name for path in (folder / "checkpoints").glob("step-????????"))
        failure = None if error is None else {"rank": "trial", "phase": "", "step": trial.step, "message": error}
        RunDirectory(folder).result.update(
            durable=False, status=status, step=trial.step, wall_s=trial.seconds, metrics=trial.metrics, error=failure,
            checkpoint=f"checkpoints/{steps[-1]}" if steps else None,
        )  # fmt: skip

    def _status(self, trial: TrialRecord) -> str:
        return "failed" if trial.end in ("failed", "diverged") else "done"

    def _forget(self, trial: TrialRecord) -> None:
        if trial.index in self.open:
            self.open.pop(trial.index).directory.metrics.close()

    # ------------------------------------------------------------------------------------------------------------ best
    def _ranked(self) -> list[TrialRecord]:
        """Those that may be the best: that ran to their own end; if there is none, those that were stopped.

        Only those with finite objectives: a trial that has diverged hides none that was stopped.
        """
        finite = [t for t in self.ended("finished", "stopped") if all(t.score(g) > -math.inf for g in self.goals)]
        return [trial for trial in finite if trial.end == "finished"] or finite

    def front(self) -> list[TrialRecord]:
        """The Pareto front of all objectives, in the trials' order; of equals that which `tie_break` prefers."""
        ranked, goal = self._ranked(), self.job.tie_break or self.goals[0]
        ranked.sort(key=lambda trial: trial.score(goal), reverse=True)
        rows = [[trial.metrics.get(one.metric) for one in self.goals] for trial in ranked]
        found = [ranked[index] for index in pareto_front(rows, [one.mode for one in self.goals])]
        return sorted(found, key=lambda trial: trial.index)

    def best(self) -> TrialRecord | None:
        """By the objective; of a Pareto set by `tie_break`; None: no trial has ended with finite ones."""
        goal = self.job.tie_break if len(self.goals) > 1 and self.job.tie_break is not None else self.goals[0]
        return max(self.front(), key=lambda trial: (trial.score(goal), -trial.index), default=None)

    def _prune(self) -> None:
        """Keep the weights of the best trial; with several objectives, of the Pareto set."""
        best = self.best()
        wanted = {trial.index for trial in (self.front() if len(self.goals) > 1 else [best]) if trial is not None}
        for index in self.kept - wanted:
            trial = self.trials[index]
            shutil.rmtree(self.folder(index) / "checkpoints", ignore_errors=True)
            if trial.end is not None:
                RunDirectory(self.folder(index)).result.update(
                    durable=False, checkpoint=None, status=self._status(trial)
                )
        self.kept &= wanted

    def ended(self, *events: str) -> Iterator[TrialRecord]:
        """The trials that ended in one of these ways."""
        return (trial for _, trial in sorted(self.trials.items()) if trial.end in events)
