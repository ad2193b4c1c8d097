"""`distml show` and `distml compare`: tables on the terminal, report.html and compare.png beside the runs."""

from __future__ import annotations

import base64
import html
import io
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distml.errors import UsageError
from distml.runs.directory import RunDirectory
from distml.runs.files import finite, strict_json, write_atomically
from distml.runs.history import Goal, History
from distml.runs.plots import Curve, Panel, draw
from distml.runs.units import byte_size, duration, number

if TYPE_CHECKING:
    from rich.table import Table

_PLAIN_WIDTH = 120  # columns of what does not go to a terminal
_MAX_COMPARED_METRICS = 3
_NUMBER_AT_END = re.compile(r"_\d+(\.\d+)?(e-?\d+)?$")


# ----------------------------------------------------------------------------------------------------------------- show
def show(run: Path) -> None:
    """Print a run's table and write its report.html.

    Raises:
        UsageError: there is no run there, or one of its files is not readable.
    """
    from rich.console import Console
    from rich.text import Text

    history = History.load(run)
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, _PLAIN_WIDTH)
    console.print(_grid(_summary(history), title=history.name))
    if scores := _scores(history):
        console.print(_score_table(scores))
    path = RunDirectory(history.path).report
    try:
        write_atomically(path, _page(history), durable=False)
        note = f"report: {path}"
    except OSError as error:  # someone else's run, perhaps: the table is worth having all the same
        note = f"no report.html: {error.strerror or error}"
    console.print(Text(note), soft_wrap=True)


def _summary(history: History) -> dict[str, str]:
    """What a run was and what became of it, as label and text; only what there is."""
    spec, result = history.spec, history.result
    error, best = result.error, result.best
    restarts = history.last("runtime/restarts")
    status = history.status
    if status == "died":
        status = "died: it was running, and its process is gone; the same `distml run` resumes it"
    elif history.holder is not None:
        status += f" ({history.holder})"
    entries = {
        "status": status,
        "error": "" if error is None else _error_line(error),
        "task": _named(spec.get("task")),
        "algorithm": f"{spec['algorithm']} of RLlib" if "algorithm" in spec else "",
        "environment": str(_section(spec, "environment").get("id", "")),
        "strategy": "" if "algorithm" in spec else history.strategy,
        "optimizer": _named(spec.get("optimizer"), "lr"),
        "batch size": str(spec.get("batch_size", "")),
        "workers": str(_section(spec, "resources").get("workers", "")),
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
        "best": "" if best is None else f"{best.get('metric')} {_cell(best.get('value'))} at step {best.get('step')}",
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
        (name, _cell(history.last(name)), _cell(history.best(name)) if name.startswith("eval/") else "")
        for name in names
    ]


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


def _error_line(error: Mapping[str, Any]) -> str:
    where = [f"rank {error['rank']}" if isinstance(error.get("rank"), int) else str(error.get("rank") or "")]
    where += [str(error.get("phase") or ""), "" if error.get("step") is None else f"step {error['step']}"]
    return ": ".join(part for part in (", ".join(filter(None, where)), str(error.get("message", ""))) if part)


def _cell(value: object) -> str:
    return number(value) if isinstance(value, int | float) else "-"


def _grid(entries: Mapping[str, str], title: str) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(title, style="bold"), title_justify="left", box=box.SIMPLE, show_header=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for label, text in entries.items():
        table.add_row(label, Text(text, style="red" if label == "error" else ""))
    return table


def _score_table(scores: Sequence[tuple[str, str, str]]) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE)
    for heading in ("metric", "last", "best"):
        table.add_column(heading, justify="left" if heading == "metric" else "right")
    for row in scores:
        table.add_row(*map(Text, row))
    return table


# ---------------------------------------------------------------------------------------------------------- report.html
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1a1a1a; margin: 2rem auto; max-width: 1100px; padding: 0 1rem; }
h1 { margin-bottom: .2rem; } h2 { margin-top: 2rem; border-bottom: 1px solid #ddd; }
table { border-collapse: collapse; } td, th { padding: .15rem 1.2rem .15rem 0; text-align: left; vertical-align: top; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; } td.label { color: #555; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(420px, 1fr)); gap: 1rem; }
.plots img { width: 100%; } .error { color: #a40000; }
pre { background: #f6f6f6; padding: 1rem; overflow-x: auto; font-size: 13px; }
"""
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def _page(history: History) -> str:
    """The whole page: it loads nothing from anywhere, and what the run wrote is text in it, never markup."""
    title = html.escape(history.name)
    summary = "".join(
        f'<tr><td class="label">{html.escape(label)}</td><td class="{_text_class(label)}">'
        f"{html.escape(text)}</td></tr>\n"
        for label, text in _summary(history).items()
    )
    environment = json.dumps(history.environment, indent=1, ensure_ascii=False)
    sections = [
        f"<h1>{title}</h1>\n<p>{html.escape(str(history.path))}</p>\n<table>\n{summary}</table>",
        _scores_section(history),
        _plots_section(history),
        _episode_section(history),
        f"<h2>Spec</h2>\n<pre>{html.escape(history.spec_text)}</pre>" if history.spec_text else "",
        f"<h2>Environment</h2>\n<pre>{html.escape(environment)}</pre>" if history.environment else "",
    ]
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        f"<title>{title}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(section for section in sections if section)
        + "\n</body>\n</html>\n"
    )


def _text_class(label: str) -> str:
    return "error" if label == "error" else "text"


def _scores_section(history: History) -> str:
    rows = "".join(
        f'<tr><td>{html.escape(name)}</td><td class="number">{last}</td><td class="number">{best}</td></tr>\n'
        for name, last, best in _scores(history)
    )
    heading = '<tr><th>metric</th><th class="number">last</th><th class="number">best</th></tr>'
    return f"<h2>Scores</h2>\n<table>\n{heading}\n{rows}</table>" if rows else ""


def _plots_section(history: History) -> str:
    images = []
    for panel in _panels(history):
        data = base64.b64encode(draw([panel])).decode()
        images.append(f'<img alt="{html.escape(panel.title)}" src="data:image/png;base64,{data}">')
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
        runs: run directories.
        out: the folder that the two files go to; made if it is not there.

    Raises:
        UsageError: fewer than one run, one that is not readable, or `out` cannot be written.
    """
    if not runs:
        raise UsageError("nothing to compare: name at least one run directory")
    histories = [History.load(run) for run in runs]
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
            f"{_cell(fact['final'][name])} ({_cell(fact['best'][name])})" if name in fact["final"] else "-"
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
