"""What every job over jobs is given when it runs, and what it is to whoever runs it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from distml.errors import UsageError
from distml.runs.directory import MetricsFile, RunDirectory
from distml.runs.display import Display
from distml.runtime.endings import StopSignals
from distml.spec.loader import LoadedSpec

if TYPE_CHECKING:
    from distml.tasks.sources import SourceTree

JOURNALS = ("population.json", "trials.jsonl")  # one of them is there as soon as there is something to go on from


@dataclass(frozen=True)
class OverContext:
    """A job over jobs, about to run.

    Attributes:
        loaded: its spec; `loaded.job.base` is the training job, `loaded.base` the same as `with_values` takes it.
        directory: the run directory, locked.
        sources: the user's own files, for the base's task.
        where: `ray` or `inline`.
        address: of a running Ray cluster.
        started: `time.perf_counter()` when the command began.
        inject: failures to cause.
    """

    loaded: LoadedSpec[Any]
    directory: RunDirectory
    sources: SourceTree
    where: str
    address: str | None
    display: Display
    started: float
    inject: tuple[str, ...] = ()


class OverRun(Protocol):
    """A job over jobs that runs: what `launch/run.py` asks of it."""

    directory: RunDirectory
    display: Display
    signals: StopSignals
    hosts: Sequence[str]

    def build(self, resume: bool) -> None:
        """Start what is needed, and find the state to go on from."""
        ...

    def train(self) -> None:
        """To the end; result.json says how it ended."""
        ...

    def fail(self, error: BaseException) -> None:
        """Record an end by an exception."""
        ...

    def close(self) -> None:
        """End all processes; safe to call twice."""
        ...


def has_begun(directory: RunDirectory) -> bool:
    """Whether a run directory holds something that a job over jobs can go on from."""
    return any((directory.path / name).exists() for name in JOURNALS)


def has_trained(directory: RunDirectory) -> bool:
    """Whether something would be lost with it: a member's checkpoint, or a trial that has ended by itself."""
    population, trials = (directory.path / name for name in JOURNALS)
    try:
        members = json.loads(population.read_bytes())["members"].values() if population.exists() else ()
        rows = MetricsFile(trials).read()
        return any(one["checkpoint"] for one in members) or any(
            row["event"] in ("finished", "stopped", "diverged") for row in rows
        )
    except (ValueError, LookupError, TypeError, AttributeError, UsageError):
        return True  # damaged, which whoever resumes says


def forget(directory: RunDirectory) -> None:
    """Remove what an earlier run left that is not gone on from."""
    for name in ("members", "trials", "tune"):
        shutil.rmtree(directory.path / name, ignore_errors=True)
    for name in (*JOURNALS, "lineage.jsonl", "best.yaml"):
        (directory.path / name).unlink(missing_ok=True)
