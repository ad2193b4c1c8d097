"""Pictures of jobs over jobs, as PNG: lineage and schedules; parallel coordinates, best so far, Pareto front."""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from distml.runs.over import ENDS, Axis, Lineage, Objective, Piece, Trial, front
from distml.runs.plots import COLOURS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

BEST, OTHERS, FAILED, LOST = COLOURS[1], "#9a9a9a", "#c8c8c8", "#c00000"
MAP = "viridis"
MAX_AXES = 12
FEW = 25  # so many rows have their names and markers
_LOG_RATIO = 30.0
_DPI = 120


def _figure(width: float, height: float) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _png(figure: Figure) -> bytes:
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=_DPI)
    return picture.getvalue()


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, color="#e4e4e4", linewidth=0.6)
    axes.set_axisbelow(True)


def _is_wide(values: Sequence[float]) -> bool:
    return bool(values) and min(values) > 0 and max(values) / min(values) > _LOG_RATIO


def _log_axis(axes: Axes, which: str, prefixes: bool = False) -> None:
    """Plain numbers (or k, M, G) at powers of ten, at 1, 2 and 5 where there are few of those."""
    from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, NullFormatter

    (axes.set_xscale if which == "x" else axes.set_yscale)("log")
    low, high = axes.get_xlim() if which == "x" else axes.get_ylim()
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high / low < 300 else (1.0,)))
    axis.set_major_formatter(EngFormatter() if prefixes else FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _scale(values: Sequence[float], objective: Objective) -> tuple[Normalize, str]:
    """From values to a colour map, the better the darker. A few very bad ones do not take all of it."""
    from matplotlib.colors import LogNorm, Normalize

    best_first = sorted(values, reverse=objective.mode == "max")
    kept = best_first[: max(2, math.ceil(0.9 * len(best_first)))] or [0.0, 1.0]
    low, high = min(kept), max(kept)
    if low == high:
        low, high = low - 0.5, high + 0.5
    norm = (LogNorm if _is_wide(kept) else Normalize)(low, high, clip=True)
    return norm, MAP if objective.mode == "min" else f"{MAP}_r"


def _add_scale(figure: Figure, axes: Any, norm: Normalize, colours: str, label: str) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LogNorm
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    bar = figure.colorbar(ScalarMappable(norm, colours), ax=axes, label=label, pad=0.015, aspect=30)
    if isinstance(norm, LogNorm):
        bar.ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    bar.ax.yaxis.set_minor_formatter(NullFormatter())


# ----------------------------------------------------------------------------------------------------------- population
def draw_lineage(lineage: Lineage, objective: Objective, best: str, step: int | None = None) -> bytes:
    """A row per member, the best on top, its colour the score; an arrow for each copy, from the donor.

    The way on which the best member's weights came to be is drawn broad.

    Args:
        step: of the best weights; None: the member's last ones.
    """
    order = lineage.ranked(objective)
    order = [best, *(name for name in order if name != best)]
    rows = {name: index for index, name in enumerate(order)}
    few = len(order) <= FEW
    figure = _figure(11.0, min(16.0, 2.0 + (0.32 if few else 0.13) * len(order)))
    axes = figure.subplots()
    scores = [point.score for points in lineage.points.values() for point in points if point.score is not None]
    norm, colours = _scale(scores, objective)
    for name, row in rows.items():
        _draw_life(axes, lineage, name, row, norm, colours, few)
    pieces = lineage.ancestry(best, step)
    _draw_copies(axes, lineage, rows, pieces)
    _draw_ancestry(axes, lineage, pieces, rows, few)
    axes.set_yticks(range(len(order)) if few else [0], order if few else [best], fontsize=8 if few else 9)
    axes.set_ylim(len(order) - 0.4, -0.6)
    axes.set_ylabel("member, the best on top" if few else f"{len(order)} members, the best on top")
    axes.set_xlabel("step of the member")
    num_lost = sum(copy.replaced for copy in lineage.copies)
    lost = f", {num_lost} of them (red) in place of a member that failed" if num_lost else ""
    axes.set_title(f"Who copied whom: {len(lineage.copies)} copies{lost}; broad: how member {best} came to be",
                   fontsize=11)  # fmt: skip
    axes.spines[["top", "right"]].set_visible(False)
    _add_scale(figure, axes, norm, colours, objective.metric)
    return _png(figure)


def _draw_life(
    axes: Axes, lineage: Lineage, name: str, row: int, norm: Normalize, colours: str, few: bool
) -> None:  # fmt: skip
    """Each stretch in the colour of the score at its end."""
    from matplotlib import colormaps
    from matplotlib.collections import LineCollection

    points = lineage.points[name]
    pairs = [(first, last) for first, last in itertools.pairwise(points) if last.step > first.step]
    scores = [_score_at(lineage, name, last.step) for _, last in pairs]
    shades = [FAILED if score is None else colormaps[colours](norm(score)) for score in scores]
    segments = [[(first.step, row), (last.step, row)] for first, last in pairs]
    axes.add_collection(LineCollection(segments, colors=shades, linewidths=5.0 if few else 3.0, capstyle="butt"))
    axes.update_datalim([(points[0].step, row), (points[-1].step, row)])
    axes.autoscale_view()


def _score_at(lineage: Lineage, name: str, step: int) -> float | None:
    """What a member had come to at a step, before it copied there."""
    return next((point.score for point in lineage.points[name] if point.step == step), None)


def _draw_copies(axes: Axes, lineage: Lineage, rows: Mapping[str, int], pieces: Sequence[Piece]) -> None:
    """All but those of the best one's ancestry, which are drawn broad."""
    own = {(piece.member, piece.first) for piece in pieces[1:]}
    copies = [copy for copy in lineage.copies if (copy.member, copy.step) not in own]
    faint = 0.75 if len(copies) <= 40 else 0.35 if len(copies) <= 200 else 0.18
    for copy in copies:
        if copy.donor not in rows:
            continue
        colour = LOST if copy.replaced else "#444444"
        axes.annotate("", (copy.step, rows[copy.member]), (copy.donor_step, rows[copy.donor]), arrowprops={
            "arrowstyle": "-|>", "color": colour, "alpha": max(faint, 0.7 if copy.replaced else 0.0),
            "linewidth": 0.9, "shrinkA": 0, "shrinkB": 1, "mutation_scale": 7,
            "connectionstyle": "arc3,rad=0.08"})  # fmt: skip


def _draw_ancestry(axes: Axes, lineage: Lineage, pieces: Sequence[Piece], rows: Mapping[str, int], few: bool) -> None:
    width = 2.2 if few else 1.6
    for piece in pieces:
        axes.plot([piece.first, piece.last], [rows[piece.member]] * 2, color=BEST, linewidth=width, zorder=4,
                  solid_capstyle="butt")  # fmt: skip
    axes.plot(pieces[-1].last, rows[pieces[-1].member], "*", color=BEST, markersize=13, zorder=7, clip_on=False)
    replaced = {(copy.member, copy.step) for copy in lineage.copies if copy.replaced}
    for before, after in itertools.pairwise(pieces):
        if (after.member, after.first) in replaced:  # above the broad arrow: it stands for both
            axes.plot(after.first, rows[after.member], "o", color=LOST, markersize=5, zorder=6)
        axes.annotate("", (after.first, rows[after.member]), (before.last, rows[before.member]), zorder=5, arrowprops={
            "arrowstyle": "-|>", "color": BEST, "linewidth": width, "shrinkA": 0, "shrinkB": 0,
            "mutation_scale": 12})  # fmt: skip


def draw_schedules(
    lineage: Lineage, axes_: Sequence[Axis], objective: Objective, best: str, step: int | None = None
) -> bytes:  # fmt: skip
    """The objective and each hyperparameter over steps: all members thin, the best one's ancestry broad."""
    shown = list(axes_)[:MAX_AXES]
    columns = min(2, len(shown) + 1)
    lines = math.ceil((len(shown) + 1) / columns)
    figure = _figure(6.2 * columns, 3.0 * lines + 0.4)
    grid = figure.subplots(lines, columns, squeeze=False).ravel()
    pieces = lineage.ancestry(best, step)
    _score_panel(grid[0], lineage, objective, pieces)
    for panel, axis in zip(grid[1:], shown, strict=False):
        _schedule_panel(panel, lineage, axis, pieces)
    for panel in grid[len(shown) + 1 :]:
        panel.set_visible(False)
    figure.suptitle(f"Schedules that were discovered; orange: how member {best} came to be", fontsize=11)
    return _png(figure)


def _score_panel(axes: Axes, lineage: Lineage, objective: Objective, pieces: Sequence[Piece]) -> None:
    for points in lineage.points.values():
        known = [(point.step, point.score) for point in points if point.score is not None]
        if known:
            axes.plot(*zip(*known, strict=True), color=OTHERS, linewidth=0.9, alpha=_faint(len(lineage.points)))
    way = [(point.step, point.score) for piece in pieces for point in lineage.within(piece) if point.score is not None]
    if way:
        axes.plot(*zip(*way, strict=True), color=BEST, linewidth=2.2, zorder=4)
    scores = [point.score for points in lineage.points.values() for point in points if point.score is not None]
    if _is_wide(scores):
        _log_axis(axes, "y")
    axes.set_xlim(left=0.0)
    axes.set_title(objective.metric, fontsize=10)
    axes.set_xlabel("step", fontsize=9)
    _plain(axes)


def _schedule_panel(axes: Axes, lineage: Lineage, axis: Axis, pieces: Sequence[Piece]) -> None:
    """Values hold from one decision to the next, so lines are steps; those who share a choice lie beside each other."""
    names = list(lineage.points)
    for index, name in enumerate(names):
        beside = 0.5 * (index / max(1, len(names) - 1) - 0.5) if axis.choices else 0.0
        points = [(point.step, _place(axis, point.values.get(axis.path))) for point in lineage.points[name]]
        known = [(step, at + beside) for step, at in points if at is not None]
        if known:
            axes.step(*zip(*known, strict=True), where="post", color=OTHERS, linewidth=0.9, alpha=_faint(len(names)))
    way: list[tuple[float, float]] = []
    for piece in pieces:
        points_ = [(point.step, _place(axis, point.values.get(axis.path))) for point in lineage.within(piece)]
        way += [(step, at) for step, at in points_ if at is not None]
        way += [(piece.last, way[-1][1])] if way else []
    if way:
        axes.step(*zip(*way, strict=True), where="post", color=BEST, linewidth=2.2, zorder=4)
    if axis.choices:
        axes.set_yticks(range(len(axis.choices)), [_text(one) for one in axis.choices])
        axes.set_ylim(-0.5, len(axis.choices) - 0.5)
    elif axis.is_log:
        axes.set_ylim(axis.low, axis.high)
        _log_axis(axes, "y")
        axes.set_ylim(axis.low / 1.15, axis.high * 1.15)
    else:
        margin = 0.04 * (axis.high - axis.low)
        axes.set_ylim(axis.low - margin, axis.high + margin)
    axes.set_title(axis.path, fontsize=10)
    axes.set_xlabel("step", fontsize=9)
    _plain(axes)


def _faint(count: int) -> float:
    return 0.9 if count <= 8 else 0.6 if count <= 30 else 0.35


def _place(axis: Axis, value: Any) -> float | None:
    """Where a value lies: a choice at its index."""
    if axis.choices:
        return next((float(i) for i, one in enumerate(axis.choices) if one == value), None)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _text(value: Any) -> str:
    if isinstance(value, dict) and "name" in value:
        return str(value["name"])
    shown = f"{value:g}" if isinstance(value, float) else str(value)
    return shown if len(shown) <= 16 else f"{shown[:15]}…"


# --------------------------------------------------------------------------------------------------------------- trials
def draw_parallel(trials: Sequence[Trial], axes_: Sequence[Axis], objectives: Sequence[Objective], best: str) -> bytes:
    """A line per trial through its values to its score, its colour the first objective; failed ones end before it."""
    from matplotlib import colormaps

    first = objectives[0]
    shown = list(axes_)[: MAX_AXES - len(objectives)]
    ended = [trial for trial in trials if trial.has_ended]
    scores = [value for trial in ended if (value := trial.value(first.metric)) is not None]
    norm, colours = _scale(scores, first)
    scales = [_Vertical(axis.path, axis.choices, axis.low, axis.high, axis.is_log) for axis in shown]
    scales += [_of_scores(ended, one) for one in objectives]
    figure = _figure(max(6.5, 1.9 * len(scales) + 1.2), 5.0)
    axes = figure.subplots()
    ordered = sorted(enumerate(ended), key=lambda one: first.worth(one[1].value(first.metric)))
    for index, trial in ordered:
        score = trial.value(first.metric)
        ats = [_place(axis, trial.values.get(axis.path)) for axis in shown]
        ats += [trial.value(one.metric) for one in objectives]
        nudge = 0.05 * ((index * 0.618034) % 1.0 - 0.5)  # trials that share a choice lie beside each other
        heights = [None if at is None else scale.height(at, nudge) for scale, at in zip(scales, ats, strict=True)]
        known = [(place, height) for place, height in enumerate(heights) if height is not None]
        if not known:
            continue
        is_best = trial.name == best
        style = {"color": FAILED, "linestyle": ":", "linewidth": 1.0} if score is None else {
            "color": BEST if is_best else colormaps[colours](norm(score)), "linewidth": 2.6 if is_best else 1.1,
            "linestyle": "-" if trial.event == "finished" else (0, (4, 2))}  # fmt: skip
        axes.plot(*zip(*known, strict=True), alpha=1.0 if is_best else _faint(len(ended)), **style)
        if score is None:
            axes.plot(*known[-1], "x", color=LOST, markersize=5, zorder=6)
    for place, scale in enumerate(scales):
        scale.draw(axes, place)
    _finish_parallel(figure, axes, scales, ended, best)
    _add_scale(figure, axes, norm, colours, first.metric)
    return _png(figure)


def _finish_parallel(
    figure: Figure, axes: Axes, scales: Sequence[_Vertical], ended: Sequence[Trial], best: str
) -> None:  # fmt: skip
    axes.set_xlim(-0.45, len(scales) - 0.9)
    axes.set_ylim(-0.06, 1.06)
    axes.set_xticks(range(len(scales)), [scale.label for scale in scales], fontsize=9)
    axes.set_yticks([])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    drawn = {"stopped": " (dashed)", "diverged": " (red cross)", "failed": " (red cross)"}
    counts = {event: sum(trial.event == event for trial in ended) for event in ENDS}
    said = ", ".join(f"{count} {ENDS[event]}{drawn.get(event, '')}" for event, count in counts.items() if count)
    axes.set_title(f"{len(ended)} trials: {said}; orange: the best, {best}", fontsize=11)


class _Vertical:
    """One vertical axis of the parallel coordinates, from 0 to 1."""

    def __init__(self, label: str, choices: tuple[Any, ...], low: float, high: float, is_log: bool) -> None:
        self.label, self.choices, self.is_log = label, choices, is_log and low > 0
        self.low, self.high = low, high if high > low else low + 1.0

    def height(self, at: float, nudge: float) -> float:
        """Of a value; of a choice's index."""
        if self.choices:
            return (at + 0.5) / len(self.choices) + nudge
        if self.is_log:
            return math.log(max(at, 1e-300) / self.low) / math.log(self.high / self.low)
        return (at - self.low) / (self.high - self.low)

    def ticks(self) -> list[tuple[float, str]]:
        """Heights and texts."""
        if self.choices:
            return [(self.height(i, 0.0), _text(one)) for i, one in enumerate(self.choices)]
        if self.is_log:
            from matplotlib.ticker import LogLocator

            subs = (1.0, 2.0, 5.0) if self.high / self.low < 300 else (1.0,)
            found = LogLocator(subs=subs).tick_values(self.low, self.high)
        else:
            from matplotlib.ticker import MaxNLocator

            found = MaxNLocator(5).tick_values(self.low, self.high)
        slack = 1e-9
        heights = [(self.height(float(one), 0.0), f"{one:g}") for one in found if one > 0 or not self.is_log]
        return [(height, text) for height, text in heights if -slack <= height <= 1 + slack]

    def draw(self, axes: Axes, place: int) -> None:
        """The axis and its ticks, above the lines."""
        axes.plot([place, place], [0, 1], color="#333333", linewidth=1.2, zorder=5)
        for height, text in self.ticks():
            axes.plot([place - 0.02, place + 0.02], [height, height], color="#333333", linewidth=1.0, zorder=5)
            axes.annotate(text, (place, height), xytext=(-6, 0), textcoords="offset points", ha="right", va="center",
                          fontsize=8, zorder=6, bbox={"facecolor": "white", "alpha": 0.75, "edgecolor": "none",
                                                      "pad": 0.6})  # fmt: skip


def _of_scores(trials: Sequence[Trial], objective: Objective) -> _Vertical:
    values = [value for trial in trials if (value := trial.value(objective.metric)) is not None] or [0.0]
    return _Vertical(objective.metric, (), min(values), max(values), _is_wide(values))


def draw_best_so_far(trials: Sequence[Trial], objectives: Sequence[Objective], reward: bool = False) -> bytes:
    """What each trial came to, in the order in which they ended, and the best until then; one panel per objective.

    Args:
        reward: of the controller's reward, with its moving baseline, instead.
    """
    ended = [trial for trial in trials if trial.has_ended]
    figure = _figure(6.4 * len(objectives), 3.8)
    for axes, objective in zip(figure.subplots(1, len(objectives), squeeze=False)[0], objectives, strict=True):
        named = Objective("reward", "max") if reward else objective
        values = [trial.reward if reward else trial.value(objective.metric) for trial in ended]
        _best_panel(axes, ended, values, named)
        if reward and any(trial.baseline is not None for trial in ended):
            lines = [(i + 1, trial.baseline) for i, trial in enumerate(ended) if trial.baseline is not None]
            axes.plot(*zip(*lines, strict=True), color=COLOURS[0], linewidth=1.4, label="moving baseline")
        _legend(axes)
    return _png(figure)


def _best_panel(
    axes: Axes, ended: Sequence[Trial], values: Sequence[float | None], objective: Objective
) -> None:  # fmt: skip
    from matplotlib.ticker import MaxNLocator

    known = [(i + 1, value, trial) for i, (trial, value) in enumerate(zip(ended, values, strict=True))
             if value is not None and math.isfinite(value)]  # fmt: skip
    for event, marker, label in (("finished", "o", "finished"), ("stopped", "x", "ended early")):
        chosen = [(at, value) for at, value, trial in known if trial.event == event]
        if chosen:
            axes.plot(*zip(*chosen, strict=True), marker, markersize=4.5 if len(ended) <= 60 else 3, color=OTHERS,
                      label=label)  # fmt: skip
    best: list[tuple[int, float]] = []
    for at, value, trial in known:
        if trial.event == "finished" and (not best or objective.is_better(value, best[-1][1])):
            best.append((at, value))
    if best:
        best.append((len(ended), best[-1][1]))
        axes.step(*zip(*best, strict=True), where="post", color=BEST, linewidth=2.0, label="best so far",
                  marker="o", markersize=5, markevery=range(len(best) - 1))  # fmt: skip
    if _is_wide([value for _, value, _ in known]):
        _log_axis(axes, "y")
    failed = [i + 1 for i, trial in enumerate(ended) if trial.event == "failed"]
    if failed:
        axes.scatter(failed, [0.0] * len(failed), transform=axes.get_xaxis_transform(), marker="|", s=60,
                     color=LOST, clip_on=False, label="failed")  # fmt: skip
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlim(0.5, len(ended) + 0.5)
    axes.set_xlabel("trials that have ended")
    axes.set_ylabel(objective.metric)
    axes.set_title(f"Best so far: {objective.metric}", fontsize=11)


Place = tuple[float, float]


def draw_front(trials: Sequence[Trial], objectives: Sequence[Objective], best: str) -> bytes:
    """Trials by several objectives: the first against each other one, with the front of all of them together."""
    first, *others = objectives
    edge = front(trials, objectives)
    figure = _figure(6.4 * len(others) + 0.8, 4.6)
    for axes, second in zip(figure.subplots(1, len(others), squeeze=False)[0], others, strict=True):
        places = {trial.name: at for trial in trials if trial.event == "finished" and
                  (at := _both(trial.value(first.metric), trial.value(second.metric))) is not None}  # fmt: skip
        on_front = [places[trial.name] for trial in edge]
        _draw_places(axes, places, on_front, best, {"linestyle": "-" if len(objectives) == 2 else ""})
        for which, index in (("x", 0), ("y", 1)):
            if _is_wide([at[index] for at in places.values()]):
                _log_axis(axes, which)
        axes.set_xlabel(f"{first.metric} ({first.mode})")
        axes.set_ylabel(f"{second.metric} ({second.mode})")
        _legend(axes)
    figure.suptitle(_with_left_out(f"{len(objectives)} objectives", trials, objectives), fontsize=11)
    return _png(figure)


def draw_gain(
    trials: Sequence[Trial], cost: str, objective: Objective, best: str, target: float | None, worth: float
) -> bytes:  # fmt: skip
    """Trials by their cost and what they gain, those that no other one beats joined by a line.

    Args:
        cost: its name, for example flops.
        target: of the cost.
        worth: w of the reward metric · (cost / target)^w: the line of all that are worth what the best one is.
    """
    figure = _figure(7.2, 4.6)
    axes = figure.subplots()
    places = {trial.name: at for trial in trials if trial.event == "finished" and
              (at := _both(trial.cost, trial.value(objective.metric))) is not None}  # fmt: skip
    on_front = [places[trial.name] for trial in front(trials, [objective], has_cost=True)]
    _draw_places(axes, places, on_front, best, {"drawstyle": "steps-post"})
    costs = [x for x, _ in places.values()]
    if costs and (_is_wide(costs) or max(costs) > 1e4):
        _log_axis(axes, "x", prefixes=True)
    if best in places:
        _draw_equal_worth(axes, places[best], worth)
    if target is not None:
        axes.axvline(target, color="#777777", linestyle=":", linewidth=1.2, label="target")
    axes.set_xlabel(f"{cost} (less is better)")
    axes.set_ylabel(objective.metric)
    axes.set_title(_with_left_out("What is gained for what it costs", trials, [objective]), fontsize=11)
    _legend(axes)
    return _png(figure)


def _both(x: float | None, y: float | None) -> Place | None:
    return None if x is None or y is None else (x, y)


def _with_left_out(title: str, trials: Sequence[Trial], objectives: Sequence[Objective]) -> str:
    """A title that says how many trials have no place in the picture."""
    ended = [trial for trial in trials if trial.event == "finished"]
    count = sum(any(trial.value(one.metric) is None for one in objectives) for trial in ended)
    return f"{title}; left out: {count} of {len(ended)} trials, which came to NaN or infinity" if count else title


def _draw_places(
    axes: Axes, places: Mapping[str, Place], on_front: Sequence[Place], best: str, line: Mapping[str, Any]
) -> None:  # fmt: skip
    if places:
        axes.plot(*zip(*places.values(), strict=True), "o", markersize=4 if len(places) > 60 else 5, color=OTHERS,
                  alpha=0.7, label=f"{len(places)} trials")  # fmt: skip
    if on_front:
        axes.plot(*zip(*on_front, strict=True), color=COLOURS[0], marker="o", markersize=5, linewidth=1.6,
                  label=f"Pareto front ({len(on_front)})", **line)  # fmt: skip
    if best in places:
        axes.plot(*places[best], "*", markersize=14, color=BEST, zorder=5, label=f"the best, {best}")


def _legend(axes: Axes, columns: int = 4) -> None:
    """Below the picture, where no data are."""
    axes.legend(fontsize=8, frameon=False, ncols=columns, loc="upper center", bbox_to_anchor=(0.5, -0.14))
    _plain(axes)


def _draw_equal_worth(axes: Axes, chosen: tuple[float, float], worth: float) -> None:
    """Through the chosen one: metric · cost^w is the same along it."""
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    x = np.geomspace(max(left, right * 1e-6), right, 100)
    axes.plot(x, chosen[1] * (x / chosen[0]) ** (-worth), color=BEST, linestyle="--", linewidth=1.0,
              label="worth as much")  # fmt: skip
    axes.set_xlim(left, right)
    axes.set_ylim(bottom, top)
