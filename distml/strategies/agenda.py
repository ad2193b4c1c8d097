"""When a run ends and what is due at which version: pure functions of the spec, version and evaluations. No torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from distml.spec.language_rules import task_tokens
from distml.spec.schema import JobSpec

SNAPSHOT_EVERY = 10
SNAPSHOT_AFTER_S = 0.5  # asynchronous workers: no sooner, however fast their steps are
PAUSED = "paused"  # why a run is over that is to go on: whoever drives it wants to look at it at this version


def crossed(previous: int, version: int, every: int) -> bool:
    """Whether a multiple of `every` lies in (previous, version]."""
    return version // every > previous // every


@dataclass(frozen=True, slots=True)
class Spent:
    """What a run has used up.

    Attributes:
        version: changes of the model's weights.
        examples: in them, over all workers.
        frames: environment steps that they were the first to use, over all workers.
        seconds: of training.
    """

    version: int = 0
    examples: int = 0
    frames: int = 0
    seconds: float = 0.0

    @classmethod
    def of(cls, clock: Mapping[str, Any]) -> Spent:
        """From a clock's state; what was saved before frames were counted had none."""
        return cls(int(clock["version"]), int(clock["examples"]), int(clock.get("frames", 0)))


def stronger(reason: str | None, judged: str | None) -> str | None:
    """Why a run is over by a budget (or a pause) and by an evaluation's verdict: a goal counts more than a budget."""
    return judged if judged is not None and (judged == "goal" or reason in (None, PAUSED)) else reason


class Agenda:
    """The stop rule, the verdict over evaluations, and the duties of a version.

    Args:
        job: the spec.
        updates_per_round: updates per `batch_size` examples: 1, or the number of workers under async and ssp.
        dataset_size: examples of the training split, where it is known (for `stop.epochs`).
        snapshot_every: steps between snapshots for recovery; None: only checkpoints.
        until: the version at which the run ends for now, as `PAUSED`; None: it does not.
    """

    def __init__(
        self, job: JobSpec, *, updates_per_round: int = 1, dataset_size: int | None = None,
        snapshot_every: int | None = None, until: int | None = None,
    ) -> None:  # fmt: skip
        self.job, self.snapshot_every, self.until = job, snapshot_every, until
        stop = job.stop
        epochs = math.ceil(stop.epochs * dataset_size) if stop.epochs and dataset_size else None
        per_example = task_tokens(job.task)
        tokens = math.ceil(stop.tokens / per_example) if stop.tokens and per_example else None
        limits = {"examples": stop.examples, "epochs": epochs, "tokens": tokens}
        self.example_limits = {name: limit for name, limit in limits.items() if limit is not None}
        self.max_examples = min(self.example_limits.values(), default=None)
        examples_per_step = job.batch_size / updates_per_round
        by_examples = math.ceil(self.max_examples / examples_per_step) if self.max_examples else None
        uses = job.task.uses_per_frame
        by_frames = math.ceil(stop.frames * uses / examples_per_step) if stop.frames and uses else None
        self.max_steps, self.max_frames = stop.steps, stop.frames
        self.budget_steps = min((n for n in (stop.steps, by_examples, by_frames) if n is not None), default=None)
        self.evaluations: list[tuple[int, float]] = []

    # -------------------------------------------------------------------------------------------------------- budgets
    def spent(self, spent: Spent) -> str | None:
        """The budget that is used up, or None."""
        if self.max_steps is not None and spent.version >= self.max_steps:
            return "steps"
        if self.max_examples is not None and spent.examples >= self.max_examples:
            return min(self.example_limits, key=self.example_limits.__getitem__)
        if self.max_frames is not None and spent.frames >= self.max_frames:
            return "frames"
        if self.job.stop.seconds is not None and spent.seconds >= self.job.stop.seconds:
            return "seconds"
        return PAUSED if self.until is not None and spent.version >= self.until else None

    def over(self, spent: Spent) -> str | None:
        """Why a run that goes on from here has nothing left to do, or None."""
        judged = self._verdict() if self.evaluations and self.evaluations[-1][0] == spent.version else None
        return stronger(self.spent(spent), judged)

    def fraction(self, spent: Spent) -> float:
        """Share of the budget used, 0 to 1."""
        shares = [
            used / limit
            for used, limit in (
                (spent.version, self.max_steps), (spent.examples, self.max_examples),
                (spent.frames, self.max_frames), (spent.seconds, self.job.stop.seconds),
            )
            if limit
        ]  # fmt: skip
        return min(1.0, max(shares, default=0.0))

    # ----------------------------------------------------------------------------------------------------- evaluations
    @property
    def watched(self) -> tuple[str, str]:
        """(metric, mode) that patience and the best checkpoint look at: the goal's, `checkpoint.best`, or the loss."""
        goal, best = self.job.stop.goal, self.job.checkpoint.best
        if goal is not None:
            return goal.metric, "max" if goal.at_least is not None else "min"
        return (best.metric, best.mode) if best is not None else ("eval/loss", "min")

    def judge(self, version: int, metrics: dict[str, float]) -> str | None:
        """Record an evaluation: "goal" or "patience" when the run is over by it.

        Raises:
            ValueError: the goal's metric is not among those that the task reports.
        """
        stop, metric = self.job.stop, self.watched[0]
        if metric not in metrics:
            if stop.goal is None and stop.patience is None:
                return None
            raise ValueError(
                f"the evaluation does not report {metric!r}, which stop watches; it reports {sorted(metrics)}"
            )
        self.evaluations.append((version, metrics[metric]))
        return self._verdict()

    def _verdict(self) -> str | None:
        """Of the newest evaluation, in the light of those before it."""
        stop, mode, value = self.job.stop, self.watched[1], self.evaluations[-1][1]
        goal = stop.goal
        if goal is not None and goal.at_least is not None and value >= goal.at_least:
            return "goal"
        if goal is not None and goal.at_most is not None and value <= goal.at_most:
            return "goal"
        if stop.patience is not None and self._evaluations_since_best(mode) >= stop.patience:
            return "patience"
        return None

    def _evaluations_since_best(self, mode: str) -> int:
        sign = 1.0 if mode == "max" else -1.0
        values = [-math.inf if math.isnan(value) else sign * value for _, value in self.evaluations]
        return len(values) - 1 - values.index(max(values))

    # ---------------------------------------------------------------------------------------------------------- duties
    def duties(self, version: int, finished: str | None, since: int | None = None) -> tuple[str, ...]:
        """What is due at `version`: "evaluate", "checkpoint", "snapshot" (the state is handed over).

        Args:
            since: the last version at which anything could be done; what fell due after it is done now. None: the one
                before.
        """
        last, before = finished is not None, version - 1 if since is None else since
        found = []
        if (last and finished != "requested") or crossed(before, version, self.job.evaluate.every):
            found.append("evaluate")
        if last or crossed(before, version, self.job.checkpoint.every):
            found.append("checkpoint")
        if "checkpoint" in found or (self.snapshot_every and crossed(before, version, self.snapshot_every)):
            found.append("snapshot")
        return tuple(found)

    def captures(self, duties: tuple[str, ...]) -> bool:
        """Whether the servers keep their state at a version with these duties: an evaluation may make it the best."""
        return "snapshot" in duties or ("evaluate" in duties and self.keeps_evaluated)

    @property
    def keeps_evaluated(self) -> bool:
        """Whether an evaluated version may have to be written: as the best one, or as the one that ends the run."""
        stop = self.job.stop
        return self.job.checkpoint.best is not None or stop.goal is not None or stop.patience is not None

    def state(self) -> dict[str, Any]:
        """JSON values."""
        return {"evaluations": [list(row) for row in self.evaluations]}

    def load_state(self, state: dict[str, Any]) -> None:
        """The inverse of `state`."""
        self.evaluations = [(int(version), float(value)) for version, value in state["evaluations"]]
