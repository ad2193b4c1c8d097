"""Pictures of metrics, as PNG, drawn without a display and without matplotlib's global state."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from distml.runs.history import Numbers

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe & Ito (2008): told apart with every kind of colour vision; its yellow is left out, too pale on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
# Runs that do the same lie on each other: each dash pattern lets the curve beneath it show.
_DASHES = ((0, ()), (0, (5, 2.5)), (0, (3, 4)), (0, (7, 2, 1.5, 2)), (0, (1.5, 2)))
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_LOG_RATIO = 30.0  # largest over smallest value beyond which an axis is logarithmic
_DPI = 120


@dataclass(frozen=True)
class Curve:
    """One line. Few points get markers."""

    label: str
    x: Numbers
    y: Numbers
    style: int = 0


@dataclass(frozen=True)
class Panel:
    """One pair of axes.

    Attributes:
        unit: of the x axis: "s" and "B" get prefixes (k, M, G), "" counts.
        from_zero: whether the y axis begins at 0, so that heights compare; such an axis is never logarithmic.
        note: said inside the panel, for example which run is not drawn and why.
    """

    title: str
    x_label: str
    y_label: str
    curves: list[Curve] = field(default_factory=list)
    unit: str = ""
    note: str = ""
    from_zero: bool = False


def draw(panels: Sequence[Panel], *, shared_legend: bool = False, title: str = "") -> bytes:
    """The panels side by side, as PNG.

    Args:
        shared_legend: one legend below all panels, for curves that stand for the same thing in each.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    width = 5.0 * len(panels) if len(panels) > 1 else 6.4
    figure = Figure(figsize=(width, 4.4 if shared_legend else 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    if title:
        figure.suptitle(title, fontsize=13)
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        _draw_panel(axes, panel, has_legend=not shared_legend)
    if shared_legend:
        _add_legend(figure, panels)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=_DPI)
    return picture.getvalue()


def _draw_panel(axes: Axes, panel: Panel, *, has_legend: bool) -> None:
    from matplotlib.ticker import EngFormatter

    for curve in panel.curves:
        few = len(curve.x) <= 60
        axes.plot(
            curve.x,
            curve.y,
            label=curve.label,
            color=COLOURS[curve.style % len(COLOURS)],
            linestyle=_DASHES[0 if has_legend else curve.style % len(_DASHES)],
            marker=_MARKERS[curve.style % len(_MARKERS)] if few else "",
            markersize=4,
            linewidth=1.7 if few else 1.1,
        )
    axes.set_title(panel.title, fontsize=11)
    axes.set_xlabel(panel.x_label)
    axes.set_ylabel(panel.y_label)
    axes.grid(True, color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_xlim()[1] >= 1000:  # below, plain numbers read better than thousandths
        axes.xaxis.set_major_formatter(EngFormatter(unit=panel.unit))
    if _is_wide(panel.curves, ends_only=True, axis="x"):
        axes.set_xscale("log", nonpositive="mask")
        axes.xaxis.set_major_formatter(EngFormatter(unit=panel.unit))
    if panel.from_zero:
        axes.set_ylim(bottom=0)
    elif _is_wide(panel.curves, ends_only=False, axis="y"):
        _use_log_y(axes)
    if panel.note:
        axes.text(0.98, 0.97, panel.note, transform=axes.transAxes, fontsize=8, ha="right", va="top", color="#555555")
    if has_legend and len(panel.curves) > 1:
        axes.legend(fontsize=9, frameon=False)


def _use_log_y(axes: Axes) -> None:
    """A logarithmic y axis with plain numbers on it, at 1, 2, 5 while they do not crowd."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high / low < 1e3 else (1.0,)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _is_wide(curves: Sequence[Curve], *, ends_only: bool, axis: str) -> bool:
    """Whether an axis' values, or the curves' last ones, span so many times that small ones vanish on a linear one."""
    columns = [curve.x if axis == "x" else curve.y for curve in curves]
    columns = [column[np.isfinite(column)] for column in columns]
    values = np.concatenate([column[-1:] if ends_only else column for column in columns] or [np.empty(0)])
    return bool(len(values)) and values.min() > 0 and values.max() / values.min() > _LOG_RATIO


def _add_legend(figure: Figure, panels: Sequence[Panel]) -> None:
    entries = {}
    for axes in figure.axes:
        handles, labels = axes.get_legend_handles_labels()
        entries.update(dict(zip(labels, handles, strict=True)))
    if entries:
        columns = max(1, min(len(entries), 110 // (max(map(len, entries)) + 8)))
        figure.legend(
            entries.values(), entries.keys(), loc="outside lower center", ncols=columns, frameon=False, fontsize=10
        )
