"""`distml show` and `distml compare`: tables on the terminal, report.html and compare.png beside the runs."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from distml.errors import UsageError
from distml.runs.directory import RunDirectory
from distml.runs.files import finite, strict_json, write_atomically
from distml.runs.history import Goal, History
from distml.runs.over import best_run, kind_of
from distml.runs.over_report import show_over
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
from distml.runs.plots import Curve, Panel, draw
from distml.runs.units import byte_size, duration

SCORES = ("metric", "last", "best")
_MAX_COMPARED_METRICS = 3
_NUMBER_AT_END = re.compile(r"_\d+(\.\d+)?(e-?\d+)?$")


# ----------------------------------------------------------------------------------------------------------------- show
def show(run: Path) -> None:
    """Print a run's table and write its report.html, of a job over jobs also its pictures.

    Raises:
        UsageError: there is no run there, or one of its files is not readable.
    """
    history = History.load(run)
    if kind_of(history) is not None:
        show_over(history)
        return
    summary, scores = _summary(history), _scores(history)
    screen = console()
    screen.print(grid(summary, title=history.name))
    if scores:
        screen.print(columns(SCORES, scores))
    sections = [table_section("Scores", SCORES, scores), _plots_section(history), _episode_section(history)]
    write_report(history, page(history, summary, sections), screen)


def _summary(history: History) -> dict[str, str]:
    """What a run was and what became of it, as label and text; only what there is."""
    spec, result = history.spec, history.result
    best = result.best
    restarts = history.last("runtime/restarts")
    entries = {
        "status": status_of(history),
        "error": error_line(result.error),
        "task": _named(spec.get("task")),
        "algorithm": f"{spec['algorithm']} of RLlib" if "algorithm" in spec else "",
        "environment": str(_section(spec, "environment").get("id", "")),
        "strategy": "" if "algorithm" in spec else history.strategy,
        "optimizer": _named(spec.get("optimizer"), "lr"),
        "batch size": str(spec.get("batch_size", "")),
        "workers": _workers(_section(spec, "resources").get("workers", "")),
        "budget": ", ".join(
            f"{value} {key}" for key, value in _section(spec, "stop").items() if _is_budget(key, value)
        ),
        "goal": str(history.goal or ""),
        "steps": f"{result.step:,}",
        "examples": "" if (examples := history.last("train/examples")) is None else f"{examples:,.0f}",
        "frames": "" if (frames := history.last("rl/frames")) is None else f"{frames:,.0f}",
        "training time": duration(result.wall_s),
        "sent": "" if (sent := history.last("comm/bytes")) is None else byte_size(sent),
        "restarts": f"{restarts:.0f}" if restarts else "",
        "checkpoint": result.checkpoint or "none",
        "best": "" if best is None else f"{best.get('metric')} {cell(best.get('value'))} at step {best.get('step')}",
    }
    return {label: text for label, text in entries.items() if text}


def _scores(history: History) -> list[tuple[str, str, str]]:
    """Name, last and best value of what was evaluated; the last training loss."""
    names = [
        *history.metrics("train/loss"),
        *history.metrics("rl/episode_return_mean"),
        *history.metrics("eval/"),
        *history.metrics("test/"),
    ]
    names += sorted(
        name for name in history.result.metrics if name.startswith(("eval/", "test/")) and name not in names
    )
    return [
        (name, cell(history.last(name)), cell(history.best(name)) if name.startswith("eval/") else "") for name in names
    ]


def _workers(given: Any) -> str:
    return f"{given['min']} to {given['max']}" if isinstance(given, Mapping) else str(given)


def _section(spec: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = spec.get(key)
    return value if isinstance(value, dict) else {}


def _named(block: Any, *keys: str) -> str:
    """A block of the spec by its name and some of its keys."""
    if not isinstance(block, dict):
        return str(block) if block else ""
    parts = [str(block.get("name", "")), *(f"{key} {block[key]}" for key in keys if key in block)]
    return ", ".join(part for part in parts if part)


def _is_budget(key: str, value: Any) -> bool:
    return value is not None and key not in ("goal", "patience")


# ---------------------------------------------------------------------------------------------------------- report.html
def _plots_section(history: History) -> str:
    images = []
    for panel in _panels(history):
        images.append(picture(panel.title, draw([panel])))
    return '<h2>Plots</h2>\n<div class="plots">\n' + "\n".join(images) + "\n</div>" if images else ""


def _episode_section(history: History) -> str:
    """The animated picture that lies beside the report, if there is one."""
    try:
        data = base64.b64encode(RunDirectory(history.path).episode.read_bytes()).decode()
    except OSError:
        return ""
    return f'<h2>Episode</h2>\n<p><img alt="an episode of the best checkpoint" src="data:image/gif;base64,{data}"></p>'


def _panels(history: History) -> list[Panel]:
    """What is drawn of one run, against steps; only what it reported."""
    scores = [name for name in history.metrics("eval/") if name != "eval/loss"]
    played = [name for name in history.metrics("rl/") if _NUMBER_AT_END.search(name)]
    wanted = [
        ("Loss", "loss", ["train/loss", "eval/loss"], False),
        *((title, title.removeprefix("eval/"), names, False) for title, names in _families(scores)),
        *((title, title.removeprefix("rl/"), names, False) for title, names in _families(played)),
        ("Episode return in training", "return", ["rl/episode_return_mean"], False),
        (
            "Throughput",
            "per second",
            ["throughput/examples_per_s", "throughput/frames_per_s", "throughput/tokens_per_s"],
            True,
        ),
        ("Time of a step", "seconds", ["timing/compute_s", "timing/exchange_s"], True),
        ("Staleness when consumed", "versions", ["staleness/mean", "staleness/max"], True),
        ("Learning rate", "learning rate", ["train/lr"], True),
        ("Gradient norm", "norm", ["train/grad_norm"], True),
    ]
    panels = []
    for title, y_label, names, from_zero in wanted:
        series = {name: history.series(name) for name in names}
        curves = [Curve(name, x, y, style) for style, (name, (x, y)) in enumerate(series.items()) if len(x)]
        if curves:
            panels.append(Panel(title, "step", y_label, curves, from_zero=from_zero))
    return panels


def _families(names: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Metrics whose names differ in nothing but a number at the end (`rl/optimal_share_0.1`), which are one chart."""
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(_NUMBER_AT_END.sub("", name), []).append(name)
    return [(stem if len(members) > 1 else members[0], members) for stem, members in found.items()]


# -------------------------------------------------------------------------------------------------------------- compare
def compare(runs: Sequence[Path], out: Path) -> str:
    """Hold runs against each other: write compare.png and compare.json, return the table.

    Args:
        runs: run directories; for a job over jobs stands its best member or trial.
        out: the folder that the two files go to; made if it is not there.

    Raises:
        UsageError: fewer than one run, one that is not readable, or `out` cannot be written.
    """
    if not runs:
        raise UsageError("nothing to compare: name at least one run directory")
    histories = [History.load(best_run(run)) for run in runs]
    labels = _labels(histories)
    facts = [_facts(history, label) for history, label in zip(histories, labels, strict=True)]
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_atomically(out / "compare.png", _comparison_picture(histories, labels), durable=False)
        write_atomically(out / "compare.json", strict_json(finite({"runs": facts}), "comparison"), durable=False)
    except OSError as error:
        raise UsageError(f"cannot write the comparison to {out}: {error.strerror or error}") from error
    return _comparison_table(facts, _compared_metrics(histories))


def _labels(histories: Sequence[History]) -> list[str]:
    """Names that tell the runs apart: the spec's, else the folders', else the paths."""
    for candidates in ([run.name for run in histories], [run.path.resolve().name for run in histories]):
        if len(set(candidates)) == len(candidates):
            return candidates
    return [str(run.path) for run in histories]


def _facts(history: History, label: str) -> dict[str, Any]:
    """What compare.json holds of a run."""
    names = history.metrics("eval/")
    goal = history.goal
    return {
        "name": label,
        "path": str(history.path),
        "strategy": history.strategy,
        "status": history.status,
        "steps": history.result.step,
        "examples": history.last("train/examples"),
        "seconds": history.result.wall_s,
        "bytes": history.last("comm/bytes"),
        "final": {name: history.last(name) for name in names},
        "best": {name: history.best(name) for name in names},
        "goal": None if goal is None else _goal_facts(history, goal),
    }


def _goal_facts(history: History, goal: Goal) -> dict[str, Any]:
    seconds, examples = history.reached(goal) or (None, None)
    return {"goal": str(goal), "is_met": seconds is not None, "seconds": seconds, "examples": examples}


def _compared_metrics(histories: Sequence[History]) -> list[str]:
    """The metrics that get a column: those the specs name, then eval/loss, then others by name."""
    there = {name for history in histories for name in history.metrics("eval/")}
    named = [history.goal.metric for history in histories if history.goal is not None]
    named += [
        best["metric"]
        for history in histories
        if (best := _section(history.spec, "checkpoint").get("best")) is not None
    ]
    ordered = dict.fromkeys([*named, "eval/loss", *sorted(there)])
    return [name for name in ordered if name in there][:_MAX_COMPARED_METRICS]


def _comparison_table(facts: Sequence[Mapping[str, Any]], metrics: Sequence[str]) -> str:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    has_goal = any(fact["goal"] for fact in facts)
    headings = ["run", "strategy", "status", "steps", "examples", "seconds", "sent"]
    headings += [f"{name}\nlast (best)" for name in metrics]
    headings += ["seconds\nto goal", "examples\nto goal"] if has_goal else []
    table = Table(box=box.SIMPLE_HEAD)
    for index, heading in enumerate(headings):
        table.add_column(heading, justify="left" if index < 3 else "right", no_wrap=True)
    for fact in facts:
        cells = [fact["name"], fact["strategy"], fact["status"], _count(fact["steps"]), _count(fact["examples"])]
        cells += [f"{fact['seconds']:.1f}", "-" if fact["bytes"] is None else byte_size(fact["bytes"])]
        cells += [
            f"{cell(fact['final'][name])} ({cell(fact['best'][name])})" if name in fact["final"] else "-"
            for name in metrics
        ]
        if has_goal:
            goal = fact["goal"] or {"seconds": None, "examples": None}
            cells += ["-" if goal["seconds"] is None else f"{goal['seconds']:.1f}", _count(goal["examples"])]
        table.add_row(*map(Text, cells))
    # As wide as it needs: a table that goes to a file or is pasted somewhere must not depend on this terminal.
    console = Console(file=io.StringIO(), width=10_000, color_system=None, highlight=False)
    with console.capture() as captured:
        console.print(table)
    return "\n".join(line.rstrip() for line in captured.get().splitlines()).strip("\n") + "\n"


def _count(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}"


def _comparison_picture(histories: Sequence[History], labels: Sequence[str]) -> bytes:
    """Loss against what it cost: seconds, examples and bytes."""
    metric = "eval/loss" if all(run.metrics("eval/loss") for run in histories) else "train/loss"
    panels = []
    for title, axis, label, unit in (
        ("by time", "wall_s", "training time (s)", ""),
        ("by examples", "train/examples", "examples", ""),
        ("by bytes", "comm/bytes", "sent (bytes)", "B"),
    ):
        curves, left_out = [], []
        for style, (run, name) in enumerate(zip(histories, labels, strict=True)):
            x, y = run.series(metric, axis)
            if len(x) and x[-1] > 0:
                curves.append(Curve(f"{name} ({run.strategy})", x, y, style))
            else:
                left_out.append(name)
        why = "sent nothing" if unit == "B" else "not reported"
        note = f"{why}: {', '.join(left_out)}" if left_out else ""
        panels.append(Panel(f"{metric} {title}", label, metric, curves, unit, note))
    return draw(panels, shared_legend=True)
