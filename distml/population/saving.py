"""What a population leaves to go on from: population.json and the members' checkpoints it names.

    decider   put(snapshot) ──▶ background thread: states that are not on the disk yet ──▶ then population.json

A snapshot is consistent: each member as it was after its last decision, with the number of its events in the lineage.
population.json is written when all checkpoints that it names are committed, so whenever the decider dies, a resume
finds one whole snapshot; what came after it is done once more. A newer snapshot takes the place of one that waits:
nothing is lost by it. The decider never waits, except for the last snapshot.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distml.errors import UsageError
from distml.exchange.layout import Layout
from distml.population.folder import MemberFolder
from distml.population.host import Handle
from distml.population.individual import Held, Record
from distml.runs.background import BackgroundWriter
from distml.runs.checkpoints import Checkpoint
from distml.runs.files import finite, strict_json, write_atomically
from distml.runtime.cut import Cut, from_checkpoint, to_checkpoint

FILE = "population.json"
FORMAT = 1
RECORD = "member"  # key of a member's record in its checkpoint's state.json


@dataclass(frozen=True)
class Best:
    """The best state so far, by the objective."""

    member: str
    held: Held


@dataclass(frozen=True)
class Snapshot:
    """A population at one moment.

    Attributes:
        wall_s: seconds since its start, counted over resumes.
        records: of all members.
    """

    wall_s: float
    records: Mapping[str, Record]
    best: Best | None = None


class Saver:
    """Writes snapshots on a thread of its own.

    Args:
        directory: the population's run directory.
        folders: of all members.
        fetch: brings a state here.
        metric: the objective.
    """

    def __init__(
        self, directory: Path, folders: Mapping[str, MemberFolder], fetch: Callable[[Handle], Cut], metric: str
    ) -> None:
        self.path, self.folders, self.fetch, self.metric = directory / FILE, folders, fetch, metric
        self.layout: Layout | None = None
        self.frozen: Mapping[str, Any] = {}
        self.saved: dict[str, int] = {}
        self.best_saved: tuple[str, int] | None = None
        self.lost: set[str] = set()  # members whose states are no longer where they were
        self._writer = BackgroundWriter(self.write)

    def put(self, snapshot: Snapshot, *, important: bool = False) -> None:
        """Hand a snapshot over.

        Raises:
            CheckpointFailed: an earlier one could not be written.
        """
        self._writer.put(snapshot, important=important)

    def wait(self) -> None:
        """Until all that was handed over is written.

        Raises:
            CheckpointFailed: it could not be.
        """
        self._writer.wait()

    def close(self) -> None:
        """Write what is in line, and end the thread."""
        self._writer.close()

    def write(self, snapshot: Snapshot) -> None:
        """Commit the states that are not on the disk yet, then population.json.

        Where a state was lost with the process that had it, the file stays as it is, and `lost` says whose it was.
        """
        best = snapshot.best
        if best is not None and self.best_saved != (best.member, best.held.step):
            with contextlib.suppress(LookupError):  # then the one before stays
                self._commit_best(best)
        lost: set[str] = set()  # not `self.lost`: the decider takes from that at any time
        for name, record in snapshot.records.items():
            try:
                self._commit(name, record)
            except LookupError:
                lost.add(name)
        if lost:
            self.lost |= lost
            return
        write_atomically(self.path, strict_json(finite(to_json(snapshot, self.metric)), FILE))
        for name, step in self.saved.items():
            self.folders[name].prune(step)

    def _commit_best(self, best: Best) -> None:
        assert best.held.score is not None
        store, step = self.folders[best.member].store, best.held.step
        checkpoint = None
        if self.saved.get(best.member) != step:
            checkpoint = self._checkpoint(best.held, {})
        store.mark_best(step, self.metric, best.held.score)
        if checkpoint is not None:
            store.write(checkpoint)
        self.best_saved = best.member, step

    def _commit(self, name: str, record: Record) -> None:
        if record.held.state is None or self.saved.get(name) == record.held.step:
            return
        extra = {"wall_s": record.seconds, RECORD: finite(record_to_json(record))}
        self.folders[name].store.write(self._checkpoint(record.held, extra))
        self.folders[name].write_spec(record.held.values)
        self.saved[name] = record.held.step

    def _checkpoint(self, held: Held, extra: Mapping[str, Any]) -> Checkpoint:
        assert self.layout is not None
        return to_checkpoint(self.fetch(held.state), self.layout, self.frozen, {"name": self.path.parent.name, **extra})


def to_json(snapshot: Snapshot, metric: str) -> dict[str, Any]:
    """What population.json holds."""
    best = snapshot.best
    found = None if best is None else {
        "member": best.member, "metric": metric, "step": best.held.step, "value": best.held.score,
        "values": dict(best.held.values), "metrics": dict(best.held.metrics),
    }  # fmt: skip
    members = {name: record_to_json(record) for name, record in snapshot.records.items()}
    return {"format": FORMAT, "wall_s": snapshot.wall_s, "best": found, "members": members}


def record_to_json(record: Record) -> dict[str, Any]:
    """As JSON values."""
    return {
        "step": record.held.step, "values": dict(record.held.values), "checkpoint": record.held.state is not None,
        "score": record.score, "own_score": record.held.score, "decisions": record.decisions,
        "events": record.events, "losses": record.losses, "copies": record.copies,
        "seconds": record.seconds,
        "reason": record.reason, "error": record.error,
    }  # fmt: skip


def record_of(values: Mapping[str, Any], state: Handle | None) -> Record:
    """The inverse, with the state that the checkpoint of its step holds; a score that was no number is NaN again."""
    held = Held(values["step"], values["values"], state, values["own_score"])
    score = values["score"]
    if score is None and values["decisions"]:
        score = math.nan
    return Record(held, score, values["decisions"], values["events"], values["losses"], values["copies"],
                  values["seconds"], values["reason"], values["error"])  # fmt: skip


def read_population(directory: Path) -> dict[str, Any]:
    """population.json.

    Raises:
        UsageError: it is not one of ours.
    """
    path = directory / FILE
    try:
        found = json.loads(path.read_bytes())
        if found["format"] != FORMAT:
            raise ValueError(f"its format is {found['format']!r}")
        for values in found["members"].values():
            record_of(values, None)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UsageError(f"{path} is not what a population leaves ({error}); --fresh begins anew") from error
    return dict(found)


def cut_of(checkpoint: Checkpoint) -> Cut:
    """A member's whole state."""
    return from_checkpoint(checkpoint, Layout.from_json(checkpoint.state["layout"]))
