"""What every report is made of: tables on the terminal, and report.html, a page that loads nothing from anywhere."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from distml.runs.directory import RunDirectory
from distml.runs.files import write_atomically
from distml.runs.history import History
from distml.runs.units import number

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_PLAIN_WIDTH = 120  # columns of what does not go to a terminal
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1a1a1a; margin: 2rem auto; max-width: 1100px; padding: 0 1rem; }
h1 { margin-bottom: .2rem; } h2 { margin-top: 2rem; border-bottom: 1px solid #ddd; }
table { border-collapse: collapse; } td, th { padding: .15rem 1.2rem .15rem 0; text-align: left; vertical-align: top; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; } td.label { color: #555; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(420px, 1fr)); gap: 1rem; }
.plots img, .wide { width: 100%; } .error { color: #a40000; }
pre { background: #f6f6f6; padding: 1rem; overflow-x: auto; font-size: 13px; }
"""
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def console() -> Console:
    """Of stdout; wide enough where that is no terminal."""
    from rich.console import Console

    found = Console(highlight=False)
    if not found.is_terminal:
        found.width = max(found.width, _PLAIN_WIDTH)
    return found


def grid(entries: Mapping[str, str], title: str) -> Table:
    """Labels and texts."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(title, style="bold"), title_justify="left", box=box.SIMPLE, show_header=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for label, text in entries.items():
        table.add_row(label, Text(text, style="red" if label == "error" else ""))
    return table


def columns(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """Rows whose first column is text and whose others are numbers."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE)
    for index, heading in enumerate(headings):
        table.add_column(heading, justify="right" if index else "left")
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def status_of(history: History) -> str:
    """How far it is, in words."""
    if history.status == "died":
        return "died: it was running, and its process is gone; the same `distml run` resumes it"
    return history.status if history.holder is None else f"{history.status} ({history.holder})"


def error_line(error: Mapping[str, Any] | None) -> str:
    """A result's error: who, doing what, at which step, and what it said; "" where there is none."""
    if error is None:
        return ""
    where = [f"rank {error['rank']}" if isinstance(error.get("rank"), int) else str(error.get("rank") or "")]
    where += [str(error.get("phase") or ""), "" if error.get("step") is None else f"step {error['step']}"]
    return ": ".join(part for part in (", ".join(filter(None, where)), str(error.get("message", ""))) if part)


def cell(value: object) -> str:
    """A number, or that there is none."""
    return number(value) if isinstance(value, int | float) else "-"


def write_report(history: History, text: str, screen: Console) -> None:
    """Write report.html and say where; someone else's run, perhaps: the table is worth having all the same."""
    from rich.text import Text

    path = RunDirectory(history.path).report
    try:
        write_atomically(path, text, durable=False)
        note = f"report: {path}"
    except OSError as error:
        note = f"no report.html: {error.strerror or error}"
    screen.print(Text(note), soft_wrap=True)


# ----------------------------------------------------------------------------------------------------------------- html
def page(history: History, summary: Mapping[str, str], sections: Sequence[str]) -> str:
    """The whole page: it loads nothing from anywhere, and what the run wrote is text in it, never markup."""
    title = html.escape(history.name)
    rows = "".join(
        f'<tr><td class="label">{html.escape(label)}</td><td class="{"error" if label == "error" else "text"}">'
        f"{html.escape(text)}</td></tr>\n"
        for label, text in summary.items()
    )
    environment = json.dumps(history.environment, indent=1, ensure_ascii=False)
    whole = [
        f"<h1>{title}</h1>\n<p>{html.escape(str(history.path))}</p>\n<table>\n{rows}</table>",
        *sections,
        f"<h2>Spec</h2>\n<pre>{html.escape(history.spec_text)}</pre>" if history.spec_text else "",
        f"<h2>Environment</h2>\n<pre>{html.escape(environment)}</pre>" if history.environment else "",
    ]
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        f"<title>{title}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(section for section in whole if section)
        + "\n</body>\n</html>\n"
    )


def table_section(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A heading and a table, its first column text and its others numbers; "" without rows."""
    if not rows:
        return ""
    head = "".join(_cell("th", index, heading) for index, heading in enumerate(headings))
    body = "".join(f"<tr>{''.join(_cell('td', i, text) for i, text in enumerate(row))}</tr>\n" for row in rows)
    return f"<h2>{html.escape(title)}</h2>\n<table>\n<tr>{head}</tr>\n{body}</table>"


def _cell(tag: str, index: int, text: str) -> str:
    kind = ' class="number"' if index else ""
    return f"<{tag}{kind}>{html.escape(text)}</{tag}>"


def picture(title: str, data: bytes, wide: bool = False) -> str:
    """An image with its data in it."""
    kind = ' class="wide"' if wide else ""
    return f'<img{kind} alt="{html.escape(title)}" src="data:image/png;base64,{base64.b64encode(data).decode()}">'
