"""What the measurements share: summaries of repeats, the conditions they were taken under, and the table."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import statistics
from collections.abc import Sequence
from typing import Any


def summary(values: Sequence[float]) -> dict[str, Any]:
    """Median, least, largest, and all of the repeats in their order."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "all": list(values)}


def conditions(**further: Any) -> dict[str, Any]:
    """What the numbers depend on besides the code: processors, their load before the measurement, versions."""
    versions = {name: importlib.metadata.version(name) for name in ("distml", "torch", "ray")}
    return {"cpus": len(os.sched_getaffinity(0)), "load_before": round(os.getloadavg()[0], 2),
            "python": platform.python_version(), **versions, **further}  # fmt: skip


def cells(values: dict[str, Any], digits: int) -> list[str]:
    """A summary as the table's cells: median, min, max."""
    return [f"{values[key]:.{digits}f}" for key in ("median", "min", "max")]


def verdict(value: float, target: float) -> str:
    """A value against the most that it should be."""
    return f"{value:.2f} (target at most {target:g}: {'met' if value <= target else 'missed'})"


def print_table(title: str, header: Sequence[str], body: Sequence[Sequence[str]], closing: Sequence[str]) -> None:
    """A table whose first column is text and whose others are numbers, with lines below it."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(title, style="bold"), title_justify="left", box=box.SIMPLE_HEAD)
    for index, heading in enumerate(header):
        table.add_column(heading, justify="right" if index else "left", no_wrap=True)
    for row in body:
        table.add_row(*map(Text, row))
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, 150)
    console.print(table)
    for line in closing:
        console.print(Text(line), soft_wrap=True)
