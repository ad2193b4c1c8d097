"""A run as its files tell it: what `show` and `compare` read."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distml.errors import UsageError
from distml.runs.directory import Holder, Result, RunDirectory

Numbers = NDArray[np.float64]

_LESS_IS_BETTER = re.compile(r"loss|error|perplexity|mse|mae|nll|distance|bits", re.IGNORECASE)


@dataclass(frozen=True)
class Goal:
    """The value of a metric that the spec asks for."""

    metric: str
    at_least: float | None
    at_most: float | None

    def is_met(self, value: float) -> bool:
        """Whether `value` is as good as asked."""
        return (self.at_least is None or value >= self.at_least) and (self.at_most is None or value <= self.at_most)

    def __str__(self) -> str:
        bound = f"at least {self.at_least:g}" if self.at_least is not None else f"at most {self.at_most:g}"
        return f"{self.metric} {bound}"


@dataclass(frozen=True)
class History:
    """One run's spec, result and reports.

    Attributes:
        spec: spec.yaml as plain values; empty when there is none.
        rows: the reports, oldest first.
        holder: the process that is running it now.
    """

    path: Path
    spec: Mapping[str, Any]
    spec_text: str
    environment: Mapping[str, Any]
    result: Result
    rows: list[dict[str, Any]]
    holder: Holder | None

    @classmethod
    def load(cls, path: Path | str) -> History:
        """Read a run directory.

        Raises:
            UsageError: there is no run there, or one of its files is not readable.
        """
        import yaml

        run = RunDirectory.view(path)
        text = run.read_spec_text() or ""
        try:
            spec = yaml.safe_load(text) or {}
        except yaml.YAMLError as error:
            raise UsageError(f"{run.spec} is not YAML") from error
        if not isinstance(spec, dict):
            raise UsageError(f"{run.spec} is not a spec")
        result = run.result.read() or Result()
        return cls(run.path, spec, text, run.read_environment(), result, run.metrics.read(), run.in_use())

    @property
    def name(self) -> str:
        """The spec's name, else the folder's."""
        return str(self.spec.get("name") or self.path.resolve().name)

    @property
    def strategy(self) -> str:
        """For example `parameter_server/ssp`."""
        strategy = self.spec.get("strategy")
        if not isinstance(strategy, dict):
            return str(strategy) if strategy else "-"
        return "/".join(str(strategy[key]) for key in ("name", "mode") if strategy.get(key))

    @property
    def status(self) -> str:
        """The result's status; of a run whose driver is gone: `died`."""
        is_gone = self.result.status == "running" and self.holder is None
        return "died" if is_gone else self.result.status.replace("_", " ")

    @property
    def goal(self) -> Goal | None:
        """The spec's goal."""
        stop = self.spec.get("stop")
        goal = stop.get("goal") if isinstance(stop, dict) else None
        if not isinstance(goal, dict) or "metric" not in goal:
            return None
        return Goal(str(goal["metric"]), goal.get("at_least"), goal.get("at_most"))

    def metrics(self, prefix: str) -> list[str]:
        """Names of the metrics under a prefix that have a value in some report."""
        names = {name for row in self.rows for name, value in row.items() if value is not None}
        return sorted(name for name in names if name.startswith(prefix))

    def series(self, metric: str, against: str = "step") -> tuple[Numbers, Numbers]:
        """A metric's values and where they lie on another axis, such as `wall_s`, `train/examples` or `comm/bytes`.

        A report need not hold both: the axis is interpolated linearly in steps. Empty when either is never reported.
        """
        steps, values = self._column(metric)
        if against == "step" or not len(steps):
            return steps, values
        known_steps, known = self._column(against)
        if not len(known_steps):
            return np.empty(0), np.empty(0)
        # The test of the best checkpoint is reported last and under an earlier step: it is no point on the way.
        forward = known_steps >= np.maximum.accumulate(known_steps)
        known_steps, known = known_steps[forward], known[forward]
        if known_steps[0] > 0:  # all of these count from 0 at the start
            known_steps, known = np.append(0.0, known_steps), np.append(0.0, known)
        return np.interp(steps, known_steps, known), values

    def last(self, metric: str) -> float | None:
        """The last value of a metric, out of the reports, else out of the result."""
        values = self._column(metric)[1]
        if len(values):
            return float(values[-1])
        value = self.result.metrics.get(metric)
        return float(value) if isinstance(value, int | float) else None

    def best(self, metric: str) -> float | None:
        """The best value of a metric: as the spec says what is better, else the lowest of losses and errors."""
        values = self._column(metric)[1]
        if not len(values):
            return self.last(metric)
        return float(values.min() if self._less_is_better(metric) else values.max())

    def reached(self, goal: Goal) -> tuple[float, float | None] | None:
        """Seconds of training and examples at the first report that meets a goal; None: none does."""
        seconds, values = self.series(goal.metric, "wall_s")
        met = [index for index, value in enumerate(values) if goal.is_met(value)]
        if not met:
            return None
        examples = self.series(goal.metric, "train/examples")[0]
        return float(seconds[met[0]]), float(examples[met[0]]) if len(examples) else None

    def _less_is_better(self, metric: str) -> bool:
        checkpoint = self.spec.get("checkpoint")
        best = checkpoint.get("best") if isinstance(checkpoint, dict) else None
        if isinstance(best, dict) and best.get("metric") == metric:
            return best.get("mode") == "min"
        if self.goal is not None and self.goal.metric == metric:
            return self.goal.at_least is None
        return _LESS_IS_BETTER.search(metric) is not None

    def _column(self, metric: str) -> tuple[Numbers, Numbers]:
        """Steps and values of the reports that hold a metric."""
        rows = [row for row in self.rows if isinstance(row.get(metric), int | float)]
        steps = np.array([row.get("step", 0) for row in rows], dtype=np.float64)
        return steps, np.array([row[metric] for row in rows], dtype=np.float64)
