"""The picture of `distml bench rl`: frames per second as bars, returns against training seconds and against frames.

Shapes: S seeds, G points of a common axis.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from distml.bench.rl_kept import Array
from distml.runs.plots import COLOURS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

POINTS = 400
_DPI = 120
_DASHES = ("-", "--", ":", "-.")


def draw(report: Mapping[str, Any]) -> bytes:
    """The report as PNG, drawn without a display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    found: Mapping[str, Any] = report["contenders"]
    figure = Figure(figsize=(15.0, 5.2), layout="constrained")
    FigureCanvasAgg(figure)
    rates, by_seconds, by_frames = figure.subplots(1, 3)
    _bars(rates, found)
    _curves(by_seconds, found, "seconds", report)
    by_seconds.set_xscale("log")
    by_seconds.set_xlabel("seconds of training", fontsize=9)
    _curves(by_frames, found, "frames", report)
    by_frames.set_xscale("log")
    by_frames.set_xlabel("frames", fontsize=9)
    figure.suptitle(_title(report), fontsize=10)
    handles, labels = by_frames.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False, fontsize=9)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI)
    return buffer.getvalue()


def styles(found: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """Colour and line of each contender: ours are solid, peers are not."""
    colours = itertools.cycle(COLOURS)
    dashes = itertools.cycle(_DASHES[1:])
    return {name: (next(colours), _DASHES[0] if one["ours"] else next(dashes)) for name, one in found.items()}


def _bars(axes: Axes, found: Mapping[str, Any]) -> None:
    """The first contender on top, with whiskers from the slowest to the quickest seed."""
    for place, (name, one) in enumerate(found.items()):
        rate = one["frames_per_s"]
        spread = [[rate["median"] - rate["min"]], [rate["max"] - rate["median"]]] if len(rate["all"]) > 1 else None
        axes.barh(place, rate["median"], xerr=spread, color=styles(found)[name][0], height=0.7,
                  error_kw={"elinewidth": 1.2, "capsize": 3, "ecolor": "black"})  # fmt: skip
        axes.annotate(f"{rate['median']:,.0f}", (rate["max"], place), xytext=(5, 0), textcoords="offset points",
                      va="center", fontsize=8)  # fmt: skip
    axes.set_yticks(range(len(found)), [one["label"] for one in found.values()], fontsize=9)
    axes.invert_yaxis()
    axes.set_xlim(0.0, 1.25 * max((one["frames_per_s"]["max"] for one in found.values()), default=1.0))
    axes.locator_params(axis="x", nbins=5)
    axes.set_xlabel("frames per second (more is better)", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)


def _curves(axes: Axes, found: Mapping[str, Any], axis: str, report: Mapping[str, Any]) -> None:
    """The median over seeds, and from the worst to the best of them."""
    for name, one in found.items():
        colour, dash = styles(found)[name]
        at, lowest, middle, highest = over_seeds(one["runs"], axis)
        axes.plot(at, middle, dash, color=colour, linewidth=1.6, label=one["label"])
        axes.fill_between(at, lowest, highest, color=colour, alpha=0.12, linewidth=0)
    axes.axhline(report["threshold"], color="#777777", linestyle=":", linewidth=1.0)
    axes.set_ylabel(report["returns"], fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)


def over_seeds(runs: Sequence[Mapping[str, Any]], axis: str) -> tuple[Array, Array, Array, Array]:
    """[G] each: an axis that all seeds cover, and the least, the median and the largest return there (NaN: none)."""
    first, last = max(run[axis][0] for run in runs), min(run[axis][-1] for run in runs)
    at = np.geomspace(first, max(first, last), POINTS)
    returns = np.stack([np.interp(at, run[axis], np.array(run["returns"], float)) for run in runs])  # [S, G]
    return at, returns.min(0), np.median(returns, 0), returns.max(0)


def _title(report: Mapping[str, Any]) -> str:
    about = report["conditions"]
    seeds = f"median of {about['seeds']} seeds, shaded: worst to best" if about["seeds"] > 1 else "one seed"
    return f"{about['environment']}: {about['cpus']} CPUs, torch {about['torch']}, ray {about['ray']}; {seeds}"
