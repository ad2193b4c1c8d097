"""Where Ray Tune and a sweep meet: Tune asks for proposals, and tells what trials report and how they end.

    Searcher.suggest            ◀── numbers and values, in order; none while enough trials are under way
    Watch.on_trial_result       ──▶ rows and metrics into the trial's folder; the first report is looked at closely
    Searcher.on_trial_complete  ──▶ the journal, then the sampler; a failed trial is proposed again
    Watch.on_trial_error        ──▶ the same for a trial whose process died
    Watch.on_step_begin         ──▶ Beats: ends processes that hang
    Ending.stop_all             ──▶ Tune, when a signal has come or nothing more is to be hoped for

Tune calls all of them from its loop, in the driver, one at a time.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, Literal

from ray.tune import Callback, Stopper
from ray.tune.search import SearchAlgorithm, Searcher, SearchGenerator

from distml.adapters.tune_beats import Beats
from distml.adapters.tune_book import TrialBook, TrialRecord
from distml.adapters.tune_samplers import Sampler
from distml.adapters.tune_trainable import DETAIL, FINISHED, AppliedDiffers, Detail
from distml.errors import UsageError
from distml.runs.display import Display
from distml.runs.over import ENDS
from distml.runs.units import number
from distml.spec.messages import near


class TrialNames:
    """Tune's id of a trial -> ours; nothing else, since Tune writes whoever names its trials into its own state."""

    def __init__(self) -> None:
        self.names: dict[str, str] = {}

    def __call__(self, trial: Any) -> str:
        """A trial's name, and its folder's."""
        return self.names[trial.trial_id]


class SweepState:
    """What the hooks share.

    Args:
        retries: of a failed trial.
        changed: called when a trial has ended.

    Attributes:
        live: Tune's id -> trial, from its proposal to its end.
        waiting: trials to propose before new ones: those that an earlier process left, those to be tried again.
        problem: why the sweep ends at once.
    """

    def __init__(
        self, book: TrialBook, sampler: Sampler, display: Display, retries: int, changed: Callable[[], None]
    ) -> None:  # fmt: skip
        self.book, self.sampler, self.display, self.retries, self.changed = book, sampler, display, retries, changed
        self.live: dict[str, TrialRecord] = {}
        self.names = TrialNames()
        self.waiting = deque(book.unfinished())
        self.problem: UsageError | AppliedDiffers | None = None
        self.checked = any(book.ended("finished", "stopped"))

    @property
    def num_proposed(self) -> int:
        """Trials that have a number."""
        return len(self.book.trials)

    def next(self) -> TrialRecord | Literal["later"] | None:
        """The next trial that the base takes; "later": the sampler waits for earlier ones; None: there is none left."""
        while True:
            if self.waiting:
                trial = self.waiting.popleft()
            elif self.sampler.num_trials is None or self.num_proposed < self.sampler.num_trials:
                index, lag = self.num_proposed, self.sampler.lag
                if lag is not None and any(self.book.trials[i].end is None for i in range(index - lag + 1)):
                    return "later"
                trial = self.book.propose(index, self.sampler.propose(index))
            else:
                return None
            try:
                self.book.prepare(trial)
            except UsageError as error:
                self.fail(trial, str(error), again=False)
                continue
            return trial

    def report(self, trial: TrialRecord, detail: Detail) -> None:
        """A trial's result has come."""
        if detail.values != trial.values:
            self.book.changed(trial, detail.values)
        self.book.report(trial, detail.step, detail.seconds, detail.metrics, detail.rows)
        trial.error = detail.error
        if detail.defect:
            self.problem = AppliedDiffers(f"trial {trial.name}: {detail.error}")
        elif trial.error is None and not self.checked:
            self.checked = True
            self.problem = self._not_reported(detail.metrics)

    def _not_reported(self, metrics: Mapping[str, float]) -> UsageError | None:
        """What an objective that no evaluation reports is answered with."""
        tie = [self.book.job.tie_break] if self.book.job.tie_break is not None else []
        reported = sorted(name for name in metrics if name.startswith("eval/"))
        for goal in [*self.book.goals, *tie]:
            if goal.metric not in reported:
                close = near(goal.metric, reported)
                hint = f"did you mean {close!r}? " if close else ""
                return UsageError(f"objective: the base's evaluation does not report {goal.metric!r}; {hint}"
                                  f"it reports {', '.join(reported) or 'nothing'}")  # fmt: skip
        return None

    def end(self, trial: TrialRecord, event: str) -> None:
        """A trial is over."""
        before = self.book.best()
        self.book.end(trial, event, trial.error)
        self.book.tell(self.sampler, trial)
        self._show(trial, before)
        self.changed()

    def fail(self, trial: TrialRecord, cause: str, again: bool = True) -> None:
        """A trial has failed: once more, or for good."""
        if again and trial.failures < self.retries:
            self.book.retry(trial, cause)
            self.waiting.append(trial)
            self.display.note(f"trial {trial.name} failed and is run again: {cause}")
            return
        trial.failures += 1
        self.book.end(trial, "failed", cause)
        self.book.tell(self.sampler, trial)
        self.display.note(f"trial {trial.name} failed: {cause}")
        self.changed()

    def _show(self, trial: TrialRecord, before: TrialRecord | None) -> None:
        goal = self.book.goals[0]
        done, planned = sum(1 for _ in self.book.ended(*ENDS)), self.sampler.num_trials
        value = trial.metrics.get(goal.metric)
        if trial.end == "diverged":
            self.display.note(f"trial {trial.name} has diverged: {trial.error} ({describe_values(trial.values)})")
        self.display.report(done, done / planned if planned else 0.0, {goal.metric: value})
        if self.book.best() is trial and before is not trial:
            self.display.note(f"trial {trial.name}: {goal.metric} {number(value)} at step {trial.step}, the best of "
                              f"{done} ({describe_values(trial.values)})")  # fmt: skip


def describe_values(values: Mapping[str, Any]) -> str:
    """`path value` of each, on one line."""
    return ", ".join(f"{path} {number(value) if isinstance(value, float) else value}" for path, value in values.items())


class OrderedSearcher(Searcher):  # type: ignore[misc]
    """Tune's side of the proposals.

    Args:
        limit: trials that are under way or wait for resources, at most; None: all at once.
    """

    def __init__(self, state: SweepState, limit: int | None) -> None:
        super().__init__()
        self.state, self.limit = state, limit

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """The values of Tune's next trial; None: later; FINISHED: there are no more."""
        state = self.state
        if state.problem is not None:
            return str(Searcher.FINISHED)
        if self.limit is not None and len(state.live) >= self.limit:
            return None
        trial = state.next()
        if trial == "later":
            return None
        if trial is None:
            return None if state.live and state.retries else str(Searcher.FINISHED)
        state.live[trial_id] = trial
        state.names.names[trial_id] = trial.name
        return dict(trial.values)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """A trial is over; one whose process died is `Watch.on_trial_error`'s."""
        if error or trial_id not in self.state.live:
            return
        trial = self.state.live.pop(trial_id)
        if isinstance(self.state.problem, AppliedDiffers):  # a defect ends the sweep, and no trial of it is at fault
            return
        finished = (result or {}).get(FINISHED)
        if trial.error is not None and finished != "not_finite":
            self.state.fail(trial, trial.error)
        elif trial.error is not None:
            self.state.end(trial, "diverged")
        else:
            self.state.end(trial, "finished" if finished is not None else "stopped")


class Proposals(SearchAlgorithm):  # type: ignore[misc]
    """The searcher as the algorithm that Tune's loop asks, which never writes what it knows.

    Tune's population-based schedulers refuse its own `SearchGenerator`, because values change while a trial trains;
    the searcher here learns from no trial of theirs.
    """

    def __init__(self, searcher: OrderedSearcher) -> None:
        self.inner = SearchGenerator(searcher)

    @property
    def total_samples(self) -> int:
        """So many that the searcher says when it is over."""
        return int(self.inner.total_samples)

    def add_configurations(self, experiments: Any) -> None:
        """What Tune is to run."""
        self.inner.add_configurations(experiments)

    def next_trial(self) -> Any:
        """The next trial; None: not now."""
        return self.inner.next_trial()

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """A trial is over."""
        self.inner.on_trial_complete(trial_id, result, error)

    def is_finished(self) -> bool:
        """Whether there are no more trials."""
        return bool(self.inner.is_finished())

    def set_finished(self) -> None:
        """There are to be no more."""
        self.inner.set_finished()

    def save_to_dir(self, dirpath: str, session_str: str) -> None:
        """Nothing: the journal has it."""


class Watch(Callback):  # type: ignore[misc]
    """Tune's side of the reports, and of silence."""

    def __init__(self, state: SweepState, beats: Beats) -> None:
        self.state, self.beats = state, beats

    def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Tune's loop goes round."""
        self.beats.look(trials)

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """A result; what is only for us does not stay in it."""
        detail = result.pop(DETAIL, None)
        record = self.state.live.get(trial.trial_id)
        if detail is not None and record is not None:
            self.state.report(record, detail)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Its process died, or Tune failed with it."""
        record = self.state.live.pop(trial.trial_id, None)
        if record is not None:
            self.state.fail(record, self.beats.causes.pop(trial.trial_id, "") or death(trial))


def death(trial: Any) -> str:
    """Why Tune gave a trial up, in one line."""
    text = ""
    with contextlib.suppress(Exception):  # what Tune wrote of it may not be there
        text = " ".join(str(trial.get_error() or "").split())
    if "connection error" in text or "SYSTEM_ERROR" in text or "ActorDied" in text:
        return "its process was killed by a signal (such as SIGKILL) or crashed"
    return text[-300:] or "its process ended"


class Ending(Stopper):  # type: ignore[misc]
    """Ends the sweep before its time."""

    def __init__(self, asked: Callable[[], bool]) -> None:
        self.asked = asked

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Tune writes whom it knows into its own state."""
        return {}

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Never a single trial."""
        return False

    def stop_all(self) -> bool:
        """Whether all is to end."""
        return self.asked()
