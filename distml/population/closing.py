"""How a population ends: its best member's spec and score on the test split, and what the terminal shows last."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from distml.population.individual import Individual
from distml.runs.units import number
from distml.spec.loader import LoadedSpec
from distml.spec.schema import JobSpec

MAX_ROWS = 20  # of the closing table; a larger population shows its best and its lost members


def best_text(spec: LoadedSpec[JobSpec], name: str) -> str:
    """best.yaml: the best member's job as NAME-best; trains from the start with its last values.

    The name is not the run's own: a run without --out goes into a folder of its job's name.
    """
    job = spec.job.model_copy(update={"name": f"{name[:95]}-best"})
    return LoadedSpec(job, None, spec.directory).dump()


def test_scores(member: Path) -> dict[str, float]:
    """The test split, measured on the best checkpoint of a member's folder, in this process.

    Raises:
        UsageError: the checkpoint or the task do not fit any more, or the evaluation fails.
    """
    from distml.launch.evaluate import evaluate_split, load_model

    return evaluate_split(load_model(member), "test")


def closing_table(members: Iterable[Individual], order: list[str], metric: str) -> list[str]:
    """One line per member, the best first: its last score and values, how often it copied and was lost.

    Args:
        order: of those that have a score, the best first.
    """
    known = {one.name: one for one in members}
    names = [*order, *(name for name in known if name not in order)]
    if len(names) > MAX_ROWS:
        names = [name for index, name in enumerate(names) if index < MAX_ROWS or known[name].record.error is not None]
    paths = list(next(iter(known.values())).own.values) if known else []
    rows = [["member", "step", metric, *paths, "copied", "lost"]]
    for one in (known[name] for name in names):
        values = [_shown(one.record.held.values[path]) for path in paths]
        score = number(one.record.score) if one.record.score is not None else "-"
        rows.append([one.name, f"{one.record.held.step}", score, *values, f"{one.copies}", f"{one.losses}"])
    left_out = len(known) - len(names)
    lines = _aligned(rows) + ([f"and {left_out} more members, which are worse"] if left_out else [])
    given_up = [f"member {one.name} was given up: {one.record.error}" for one in known.values() if one.record.error]
    return lines + given_up


def _shown(value: object) -> str:
    return number(value) if isinstance(value, float) else str(value)


def _aligned(rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
