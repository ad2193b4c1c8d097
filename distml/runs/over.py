"""A job over jobs as its files tell it: members and who copied whom, or trials and what became of them.

lineage.jsonl and trials.jsonl are read here, and nowhere decided upon: what a run goes on from is its own matter.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distml.errors import UsageError
from distml.runs.directory import MetricsFile, RunDirectory
from distml.runs.history import History
from distml.runs.pareto import pareto_front

KINDS = ("population", "sweep", "nas")
LINEAGE, TRIALS = "lineage.jsonl", "trials.jsonl"
ENDS = {"finished": "finished", "stopped": "ended early", "diverged": "diverged", "failed": "failed"}  # event -> words


@dataclass(frozen=True)
class Objective:
    """A metric, and which way it is better."""

    metric: str
    mode: str

    def worth(self, value: float | None) -> float:
        """More is better; NaN and None are worst."""
        if value is None or math.isnan(value):
            return -math.inf
        return value if self.mode == "max" else -value

    def is_better(self, value: float | None, than: float | None) -> bool:
        """Whether a value is strictly better than another one."""
        return self.worth(value) > self.worth(than)


@dataclass(frozen=True)
class Axis:
    """A dimension of the space, as the spec's text has it.

    Attributes:
        kind: uniform, loguniform, randint, lograndint or choice.
        low, high: of an interval.
        choices: of a choice.
    """

    path: str
    kind: str
    low: float = 0.0
    high: float = 1.0
    choices: tuple[Any, ...] = ()

    @property
    def is_log(self) -> bool:
        """Whether equal ratios are equally far apart."""
        return self.kind.startswith("log")


def axes_of(spec: Mapping[str, Any]) -> list[Axis]:
    """The dimensions of a spec's space; none of a structured one."""
    found = []
    space = spec.get("space")
    for path, value in space.items() if isinstance(space, dict) and "name" not in space else ():
        if not isinstance(value, dict) or len(value) != 1:
            continue
        ((kind, ends),) = value.items()
        if kind == "choice":
            found.append(Axis(str(path), kind, choices=tuple(ends)))
        else:
            found.append(Axis(str(path), str(kind), float(ends[0]), float(ends[1])))
    return found


def objectives_of(spec: Mapping[str, Any]) -> list[Objective]:
    """What the run looks for: of a search the metric of its reward."""
    if spec.get("kind") == "nas":
        return [Objective(str(spec.get("reward", {}).get("metric", "eval/accuracy")), "max")]
    written = spec.get("objective")
    entries = written if isinstance(written, list) else [written]
    return [Objective(str(one["metric"]), str(one["mode"])) for one in entries if isinstance(one, dict)]


def kind_of(history: History) -> str | None:
    """The kind of a job over jobs; None: it is another one."""
    kind = history.spec.get("kind")
    return str(kind) if kind in KINDS else None


# ----------------------------------------------------------------------------------------------------------- population
@dataclass(frozen=True)
class Point:
    """Where a member was when something happened to it.

    Attributes:
        score: the objective there; None: none yet, or it was NaN.
        values: by path, from here on.
    """

    step: int
    score: float | None
    values: Mapping[str, Any]


@dataclass(frozen=True)
class Copy:
    """A member has taken another one's weights; `replaced`: because it was lost or NaN."""

    member: str
    step: int
    donor: str
    donor_step: int
    replaced: bool
    cause: str | None = None


@dataclass(frozen=True)
class Piece:
    """A stretch of one member's life that belongs to an ancestry: steps `first` to `last` of `member`."""

    member: str
    first: int
    last: int


@dataclass(frozen=True)
class Lineage:
    """All members' lives.

    Attributes:
        points: by member, in their order.
        finished: members that came to the end of their own budget.
    """

    points: dict[str, list[Point]] = field(default_factory=dict)
    copies: list[Copy] = field(default_factory=list)
    finished: set[str] = field(default_factory=set)

    @classmethod
    def read(cls, path: Path) -> Lineage:
        """Of a run directory.

        Raises:
            UsageError: a line is not a JSON object, or not one of ours.
        """
        lineage = cls()
        for number, row in enumerate(MetricsFile(path / LINEAGE).read(), 1):
            try:
                lineage._take(row)
            except (KeyError, TypeError, ValueError) as error:
                raise UsageError(f"{path / LINEAGE}:{number}: not an event of a population ({error!r})") from error
        return lineage

    def _take(self, row: Mapping[str, Any]) -> None:
        member, step, event = str(row["member"]), int(row["step"]), row["event"]
        score, points = row.get("score"), self.points.setdefault(member, [])
        if event in ("copy", "replace") and row.get("from") is not None:
            self.copies.append(Copy(member, step, str(row["from"]), int(row["from_step"]), event == "replace",
                                    row.get("cause")))  # fmt: skip
            points.append(Point(step, score, dict(row.get("before") or (points[-1].values if points else {}))))
            score = row.get("from_score")  # with the donor's weights it is as good as the donor
        if event == "finish":
            self.finished.add(member)
        points.append(Point(step, score, dict(row.get("values") or {})))

    def last_score(self, member: str) -> float | None:
        """The newest score of a member."""
        return next((point.score for point in reversed(self.points[member]) if point.score is not None), None)

    def ranked(self, objective: Objective) -> list[str]:
        """Members, the best first."""
        return sorted(self.points, key=lambda one: objective.worth(self.last_score(one)), reverse=True)

    def ancestry(self, member: str, step: int | None = None) -> list[Piece]:
        """The way on which a member's weights came to be, the oldest piece first.

        Args:
            step: that it had them at, before it copied anybody there; None: its last ones.
        """
        copies = list(self.copies)
        last = max(point.step for point in self.points[member]) if step is None else step
        pieces: list[Piece] = []
        while True:
            limit = last - 1 if step is not None and not pieces else last
            index = next((i for i in reversed(range(len(copies)))
                          if copies[i].member == member and copies[i].step <= limit), None)  # fmt: skip
            if index is None:
                pieces.append(Piece(member, 0, last))
                return pieces[::-1]
            copy = copies[index]
            pieces.append(Piece(member, copy.step, last))
            member, last = copy.donor, copy.donor_step
            copies = copies[:index]  # what happened later is no part of it

    def within(self, piece: Piece) -> Iterator[Point]:
        """A piece's points: after the copy that it begins with, before one that comes at its end."""
        inside = [point for point in self.points.get(piece.member, []) if piece.first <= point.step <= piece.last]
        first = max((i for i, point in enumerate(inside) if point.step == piece.first), default=0)
        last = next((i for i, point in enumerate(inside) if point.step == piece.last), len(inside))
        yield from inside[first : max(first, last) + 1]


# --------------------------------------------------------------------------------------------------------------- trials
@dataclass(frozen=True)
class Trial:
    """One trial, as far as it has come.

    Attributes:
        event: proposed, retried or one of `ENDS`: the newest.
        cost, reward, baseline, decisions: of an architecture search.
    """

    name: str
    event: str
    wall_s: float
    values: Mapping[str, Any]
    step: int
    metrics: Mapping[str, float | None]
    seconds: float
    error: str | None
    cost: float | None = None
    reward: float | None = None
    baseline: float | None = None
    decisions: tuple[int, ...] = ()

    @property
    def has_ended(self) -> bool:
        """Whether nothing more will come of it."""
        return self.event in ENDS

    def value(self, metric: str) -> float | None:
        """A metric's last value; None: none, or it was not finite."""
        found = self.metrics.get(metric)
        return float(found) if isinstance(found, int | float) and math.isfinite(found) else None


def read_trials(path: Path) -> list[Trial]:
    """The trials of a run directory, in the order in which they ended; those that go on last.

    Raises:
        UsageError: a line is not a JSON object, or not one of ours.
    """
    found: dict[str, Trial] = {}
    for number, row in enumerate(MetricsFile(path / TRIALS).read(), 1):
        try:
            name = str(row["trial"])
            earlier = found.pop(name, None)
            found[name] = _trial(name, row, earlier)
        except (KeyError, TypeError, ValueError) as error:
            raise UsageError(f"{path / TRIALS}:{number}: not an event of a trial ({error!r})") from error
    return sorted(found.values(), key=lambda one: not one.has_ended)


def _trial(name: str, row: Mapping[str, Any], earlier: Trial | None) -> Trial:
    baseline = row.get("baseline")
    return Trial(
        name, event_of(row), float(row.get("wall_s") or 0.0),
        dict(row.get("values") or (earlier.values if earlier else {})), int(row.get("step") or 0),
        dict(row.get("metrics") or {}), float(row.get("seconds") or 0.0), row.get("error"), row.get("cost"),
        row.get("reward"), earlier.baseline if baseline is None and earlier else baseline,
        tuple(row.get("decisions") or (earlier.decisions if earlier else ())),
    )  # fmt: skip


def event_of(row: Mapping[str, Any]) -> str:
    """What a line of a journal says; what has diverged had no word of its own once, and ended with an error."""
    event = str(row["event"])
    return "diverged" if event in ("finished", "stopped") and row.get("error") else event


def front(trials: Sequence[Trial], objectives: Sequence[Objective], has_cost: bool = False) -> list[Trial]:
    """The Pareto front of trials that ran to their end, the best in the first thing first.

    Args:
        has_cost: the trials' cost, less being better, goes before the objectives.
    """
    ended = [trial for trial in trials if trial.event == "finished"]
    rows = [[*([trial.cost] if has_cost else []), *(trial.value(one.metric) for one in objectives)] for trial in ended]
    modes = [*(["min"] if has_cost else []), *(one.mode for one in objectives)]
    return [ended[index] for index in pareto_front(rows, modes)]


# ------------------------------------------------------------------------------------------------------------- the best
def best_run(path: Path) -> Path:
    """The run directory of the best member or trial of a job over jobs; of another job its own.

    Raises:
        UsageError: there is no run, or none of its members or trials is the best yet.
    """
    history = History.load(path)
    kind = kind_of(history)
    if kind is None:
        return history.path
    what, folder = ("member", "members") if kind == "population" else ("trial", "trials")
    best = history.result.best
    if best is None or what not in best:
        raise UsageError(f"{path} has no best {what} yet; `distml show {path}` says how far it is")
    found = history.path / folder / str(best[what])
    if not found.is_dir():
        raise UsageError(f"{path}: its best is {what} {best[what]}, and {found} is not there")
    return RunDirectory.view(found).path
