"""`distml show` of a job over jobs: its table on the terminal, its pictures as PNG, and report.html with both.

population    lineage.png, schedules.png
sweep         parallel.png, best-so-far.png; of several objectives pareto.png: the first against each other one
nas           pareto.png where there is a cost, best-so-far.png; parallel.png where the space has paths
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from distml.runs.files import write_atomically
from distml.runs.history import History
from distml.runs.over import (
    ENDS,
    Axis,
    Copy,
    Lineage,
    Objective,
    Trial,
    axes_of,
    front,
    kind_of,
    objectives_of,
    read_trials,
)
from distml.runs.over_plots import draw_best_so_far, draw_front, draw_gain, draw_lineage, draw_parallel, draw_schedules
from distml.runs.page import (
    cell,
    columns,
    console,
    error_line,
    grid,
    page,
    picture,
    status_of,
    table_section,
    write_report,
)
from distml.runs.units import duration, number

MOST_ROWS = 20  # on the terminal; the page has all
Pictures = dict[str, tuple[str, bytes]]
"""File -> what it shows, and the picture."""
Rows = list[list[str]]


def show_over(history: History) -> None:
    """Print the table of a population, a sweep or a search; write its pictures and its report.

    Raises:
        UsageError: one of its files is not readable.
    """
    from rich.text import Text

    summary, tables, pictures = (_population if kind_of(history) == "population" else _trials)(history)
    screen = console()
    screen.print(grid(summary, title=history.name))
    for title, headings, rows in tables:
        if rows:
            screen.print(Text(f"  {title}", style="bold"))
            screen.print(columns(headings, rows[:MOST_ROWS]))
            if len(rows) > MOST_ROWS:
                screen.print(Text(f"  and {len(rows) - MOST_ROWS} more, in report.html"))
    written = []
    for name, (_, data) in pictures.items():
        try:
            write_atomically(history.path / name, data, durable=False)
            written.append(name)
        except OSError as error:
            screen.print(Text(f"no {name}: {error.strerror or error}"), soft_wrap=True)
    sections = ["<h2>Pictures</h2>", *(picture(title, data, wide=True) for title, data in pictures.values())]
    sections += [table_section(title, headings, rows) for title, headings, rows in tables]
    write_report(history, page(history, summary, sections if pictures else sections[1:]), screen)
    if written:
        screen.print(Text(f"pictures: {', '.join(str(history.path / name) for name in written)}"), soft_wrap=True)


Table = tuple[str, tuple[str, ...], Rows]
Shown = tuple[dict[str, str], list[Table], Pictures]


def _summary(history: History, middle: Mapping[str, str]) -> dict[str, str]:
    """What every kind says; `middle`: what this one does besides. Only what there is."""
    spec, result, base = history.spec, history.result, history.spec.get("base") or {}
    task, strategy = (base.get(key) if isinstance(base, dict) else None for key in ("task", "strategy"))
    best = result.best or {}
    whose = " of ".join(f"{what} {best[what]}" for what in ("member", "trial") if what in best)
    scores = [f"{name} {cell(value)}" for name, value in sorted(result.metrics.items()) if name.startswith("test/")]
    entries = {
        "status": status_of(history),
        "error": error_line(result.error),
        "kind": str(spec.get("kind", "")),
        "base": ", ".join(_name(block) for block in (task, strategy) if block),
        **middle,
        "time": duration(result.wall_s),
        "best": f"{whose}: {best.get('metric')} {cell(best.get('value'))} at step {best.get('step')}" if whose else "",
        "of it, once": "  ".join(scores),
    }
    return {label: text for label, text in entries.items() if text}


def _name(block: Any) -> str:
    if not isinstance(block, dict):
        return str(block)
    return "/".join(str(block[key]) for key in ("name", "mode") if block.get(key))


def _goals(objectives: Sequence[Objective]) -> str:
    return ", ".join(f"{one.metric} ({one.mode})" for one in objectives)


# ----------------------------------------------------------------------------------------------------------- population
def _population(history: History) -> Shown:
    lineage, spec = Lineage.read(history.path), history.spec
    objective, axes = objectives_of(spec)[0], axes_of(spec)
    ranked = lineage.ranked(objective)
    found = history.result.best or {}
    best, step = str(found.get("member", ranked[0] if ranked else "")), found.get("step")
    lost = [copy for copy in lineage.copies if copy.replaced]
    summary = _summary(history, {
        "members": f"{spec.get('members')}, {len(lineage.finished)} of them to their end",
        "objective": _goals([objective]),
        "exploit, explore": ", ".join(_name(spec[key]) for key in ("exploit", "explore") if spec.get(key)),
        "copies": f"{len(lineage.copies)}, {len(lost)} of them in place of a member that failed" if lost
        else str(len(lineage.copies)),
    })  # fmt: skip
    rows = [_member_row(lineage, name, axes) for name in ranked]
    headings = ("member", "step", objective.metric, "copied", "was copied", *(axis.path for axis in axes))
    tables: list[Table] = [("Members", headings, rows)]
    if lost:
        tables.append(("Replaced", ("member", "step", "by a clone of", "cause"), [_lost_row(copy) for copy in lost]))
    pictures: Pictures = {}
    if best in lineage.points and any(points[-1].step for points in lineage.points.values()):
        pictures["lineage.png"] = "who copied whom", draw_lineage(lineage, objective, best, step)
        pictures["schedules.png"] = (
            "schedules that were discovered",
            draw_schedules(lineage, axes, objective, best, step),
        )
    return summary, tables, pictures


def _member_row(lineage: Lineage, name: str, axes: Sequence[Axis]) -> list[str]:
    last = lineage.points[name][-1]
    return [
        name,
        f"{last.step:,}",
        cell(lineage.last_score(name)),
        str(sum(copy.member == name for copy in lineage.copies)),
        str(sum(copy.donor == name for copy in lineage.copies)),
        *(_value(last.values.get(axis.path)) for axis in axes),
    ]


def _lost_row(copy: Copy) -> list[str]:
    return [copy.member, f"{copy.step:,}", copy.donor, copy.cause or "-"]


def _value(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "-" if value is None else _name(value)
    return number(value)


# --------------------------------------------------------------------------------------------------------------- trials
def _trials(history: History) -> Shown:
    """Of a sweep or a search."""
    spec, objectives, axes = history.spec, objectives_of(history.spec), axes_of(history.spec)
    trials = read_trials(history.path)
    is_nas = spec.get("kind") == "nas"
    reward = spec.get("reward") or {}
    cost = str(reward["cost"]) if is_nas and reward.get("cost") else None
    first = objectives[0]
    best = str((history.result.best or {}).get("trial", ""))
    ended = sorted((trial for trial in trials if trial.has_ended), key=lambda one: _worth(one, first, is_nas),
                   reverse=True)  # fmt: skip
    failed = [trial for trial in trials if trial.event in ("diverged", "failed")]
    edge = front(trials, objectives, cost is not None) if cost or len(objectives) > 1 else []
    by = {"controller": _name(spec.get("controller"))} if is_nas else {
        key: _name(spec[key]) for key in ("sampler", "scheduler") if spec.get(key)}  # fmt: skip
    summary = _summary(history, {
        "trials": _counts(trials, spec.get("trials")),
        "objective": _goals(objectives) + (f", for its {cost}" if cost else ""),
        **by,
        "Pareto front": f"{len(edge)} trials" if edge else "",
    })  # fmt: skip
    headings = ("trial", "ended", "step", *(one.metric for one in objectives), *((cost,) if cost else ()),
                *(("reward",) if is_nas else ()), *(axis.path for axis in axes), "seconds")  # fmt: skip
    tables: list[Table] = [
        ("Trials, the best first", headings, [_trial_row(trial, objectives, cost, is_nas, axes) for trial in ended])
    ]
    if edge:
        rows = [_trial_row(trial, objectives, cost, is_nas, axes) for trial in edge]
        tables.append(("Pareto front", headings, rows))
    if failed:
        rows = [[trial.name, trial.event, trial.error or "-"] for trial in failed]
        tables.append(("Failed", ("trial", "ended", "why"), rows))
    return summary, tables, _trial_pictures(trials, objectives, axes, cost, best, reward if is_nas else None)


def _worth(trial: Trial, objective: Objective, is_nas: bool) -> tuple[bool, float]:
    """Those that failed or diverged last, whatever they came to."""
    worth = (-math.inf if trial.reward is None else trial.reward) if is_nas else objective.worth(
        trial.value(objective.metric))  # fmt: skip
    return trial.event not in ("failed", "diverged"), worth


def _counts(trials: Sequence[Trial], wanted: int | None) -> str:
    """How many there are, and how they ended."""
    counts = [f"{count} {word}" for event, word in ENDS.items() if (count := sum(one.event == event for one in trials))]
    going = sum(not one.has_ended for one in trials)
    counts += [f"{going} not ended"] if going else []
    return f"{len(trials)} of {wanted}: {', '.join(counts)}" if wanted else f"{len(trials)}: {', '.join(counts)}"


def _trial_row(
    trial: Trial, objectives: Sequence[Objective], cost: str | None, is_nas: bool, axes: Sequence[Axis]
) -> list[str]:  # fmt: skip
    words = {"stopped": "early"}
    return [
        trial.name,
        words.get(trial.event, trial.event),
        f"{trial.step:,}",
        *(cell(trial.value(one.metric)) for one in objectives),
        *((cell(trial.cost),) if cost else ()),
        *((cell(trial.reward),) if is_nas else ()),
        *(_value(trial.values.get(axis.path)) for axis in axes),
        f"{trial.seconds:.1f}",
    ]


def _trial_pictures(
    trials: Sequence[Trial], objectives: Sequence[Objective], axes: Sequence[Axis], cost: str | None, best: str,
    reward: Mapping[str, Any] | None,
) -> Pictures:  # fmt: skip
    """Of trials that came to something.

    Args:
        reward: the spec's block, of a search.
    """
    if not any(trial.value(objectives[0].metric) is not None for trial in trials if trial.has_ended):
        return {}
    pictures: Pictures = {}
    if cost and reward is not None:
        worth = -math.log2(1 + reward.get("doubling_is_worth", 0.05))
        drawn = draw_gain(trials, cost, objectives[0], best, reward.get("target"), worth)
        pictures["pareto.png"] = "what is gained for what it costs", drawn
    elif len(objectives) > 1:
        pictures["pareto.png"] = "objectives against each other", draw_front(trials, objectives, best)
    if axes:
        pictures["parallel.png"] = "values and what came of them", draw_parallel(trials, axes, objectives, best)
    has_reward = reward is not None and any(trial.reward is not None for trial in trials)
    pictures["best-so-far.png"] = "the best so far", draw_best_so_far(trials, objectives, reward=has_reward)
    return pictures
