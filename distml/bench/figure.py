"""The picture of `distml bench exchange`: a bar per contender, the floor as a line, one panel per cell of the grid."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from distml.bench.contenders import LABELS, STRATEGIES
from distml.runs.plots import COLOURS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FLOOR, PEER, OURS = "#777777", COLOURS[1], COLOURS[0]
COLUMNS = 3
_DPI = 120


def draw(report: Mapping[str, Any]) -> bytes:
    """The report as PNG, drawn without a display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    panels = report["cells"]
    columns = min(COLUMNS, len(panels))
    lines = math.ceil(len(panels) / columns)
    bars = max(len(cell["contenders"]) for cell in panels)
    height = 0.36 * bars + 1.3
    figure = Figure(figsize=(7.5 if columns == 1 else 5.6 * columns, height * lines + 1.3), layout="constrained")
    FigureCanvasAgg(figure)
    for index, cell in enumerate(panels):
        _panel(figure.add_subplot(lines, columns, index + 1), cell)
    figure.suptitle(_title(report["conditions"]), fontsize=10)
    kinds = (("no exchange at all", FLOOR), ("peers", PEER), ("distml", OURS))
    figure.legend(handles=[Patch(color=colour, label=label) for label, colour in kinds], loc="outside lower center",
                  ncols=3, frameon=False, fontsize=9)  # fmt: skip
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI)
    return buffer.getvalue()


def _panel(axes: Axes, cell: Mapping[str, Any]) -> None:
    """Bars from zero, the first contender on top, with whiskers from the quickest to the slowest repeat."""
    found: Mapping[str, Any] = cell["contenders"]
    for place, (name, one) in enumerate(found.items()):
        ms = one["ms_per_step"]
        spread = [[ms["median"] - ms["min"]], [ms["max"] - ms["median"]]] if len(ms["all"]) > 1 else None
        axes.barh(place, ms["median"], xerr=spread, color=_colour(name), height=0.7,
                  error_kw={"elinewidth": 1.2, "capsize": 3, "ecolor": "black"})  # fmt: skip
        digits = 1 if ms["median"] < 100 else 0
        axes.annotate(f"{ms['median']:,.{digits}f} ms", (ms["max"], place), xytext=(5, 0), textcoords="offset points",
                      va="center", fontsize=8)  # fmt: skip
    if "compute" in found:
        axes.axvline(found["compute"]["ms_per_step"]["median"], color=FLOOR, linestyle="--", linewidth=1.2)
    axes.set_yticks(range(len(found)), [LABELS[name] for name in found], fontsize=9)
    axes.invert_yaxis()
    axes.set_xlim(0.0, 1.18 * max(one["ms_per_step"]["max"] for one in found.values()))
    axes.set_xlabel("ms per step of all workers (less is better)", fontsize=9)
    axes.set_title(f"{cell['size']} parameters, {cell['workers']} workers, {cell['optimizer']}", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)


def _colour(name: str) -> str:
    return FLOOR if name == "compute" else OURS if name in STRATEGIES else PEER


def _title(about: Mapping[str, Any]) -> str:
    where = "one host" if about["hosts"] == 1 else f"two hosts, {rate_name(about['rate'])} between them"
    many = about["repeats"] > 1
    repeats = f"median of {about['repeats']} repeats in turn, whiskers: min and max" if many else "one run of each"
    return (
        f"Training step by how gradients travel: {where}\n"
        f"{about['cpus']} CPUs, batch {about['batch_per_worker']} per worker, one thread each, "
        f"torch {about['torch']}, ray {about['ray']}\n{repeats}"
    )


def rate_name(rate: str) -> str:
    """tc's way to write a rate, as people do: 1gbit -> 1 Gbit/s."""
    number = rate.rstrip("abcdefghijklmnopqrstuvwxyz")
    return f"{number} {rate[len(number) :].capitalize()}/s"
