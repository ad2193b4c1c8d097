"""A member: one training job that stays alive in this process, between decisions about it.

    build ──▶ advance(until) ──▶ (state, evaluate) ──▶ copy | apply ──▶ advance(until) ──▶ ... ──▶ close

A member with one worker is a `Trainer` alone, whose loop is left at `until` and entered again; one with several is a
`WorkerGroup` that ends at `until` and begins again from the cut it ended with. To its task a stop at `until` is a
checkpoint's boundary: a stream whose position cannot be saved begins anew there.

A state is a `Cut`, whose clock also says by which optimiser's block it was made (`optimizer`). A copy takes that block
along: first the donor's shared half is loaded, with the rule that its moments are of; *then* the new values are
applied. In the other order the donor's values would overwrite them, and the values read back show it.

No ray here: several workers come from the group that `make_group` makes. Who waits for whom: nobody; all is done in the
caller's thread.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from distml.errors import RunError, UsageError
from distml.events import Evaluated, Failed, Finished, Report
from distml.exchange.flat import CopyVector, copy_vector
from distml.exchange.layout import Array, Layout
from distml.population.alone import Alone
from distml.population.grouped import Grouped
from distml.population.transfer import copied
from distml.runtime.cut import Cut
from distml.runtime.group import Lost, WorkerGroup
from distml.runtime.merge import ReportMerger
from distml.spec.language_rules import task_tokens
from distml.spec.schema import JobSpec, ParameterServerSpec
from distml.strategies.agenda import PAUSED, stronger
from distml.tasks.sources import SourceTree

Kind = Literal["died", "failed", "not_finite"]
MakeGroup = Callable[[JobSpec], WorkerGroup]


class MemberError(Exception):
    """A member cannot go on; it is only to be closed.

    Attributes:
        kind: "failed": an exception; "not_finite": loss or weights are NaN or inf; "died": a process of its own did.
        cause: one line.
        phase: what it was doing; `step`: its version then.
        traceback: of the exception, or empty.
    """

    def __init__(self, kind: Kind, cause: str, phase: str, step: int | None, traceback: str = "") -> None:
        self.kind, self.cause, self.phase, self.step, self.traceback = kind, cause, phase, step, traceback
        super().__init__(f"{phase}: {cause}" if step is None else f"{phase}, step {step}: {cause}")

    def __reduce__(self) -> tuple[Any, ...]:
        """Made anew from its own arguments, which are not those of `Exception`."""
        return MemberError, (self.kind, self.cause, self.phase, self.step, self.traceback)


@dataclass(frozen=True)
class Built:
    """What a member has built.

    Attributes:
        layout: of its trained weights.
        frozen: its tensors that are not trained.
        parameters: trained elements.
    """

    layout: Layout
    frozen: Mapping[str, Array]
    parameters: int


@dataclass(frozen=True)
class Stand:
    """Where a member is after `advance`.

    Attributes:
        step: its version.
        metrics: the last value of each metric, with `eval/…` of an evaluation at this very step.
        rows: what belongs into its metrics.jsonl since the last answer.
        finished: why its own run is over (a budget, "goal", "patience"), or None.
        state: its whole state, where it was to be kept.
        seconds: of training, all in all.
    """

    step: int
    metrics: Mapping[str, float]
    rows: Sequence[Mapping[str, Any]]
    finished: str | None
    state: Cut | None
    seconds: float


class Member:
    """One live training job.

    Args:
        job: its own spec, of kind train.
        sources: the user's own files.
        directory: the member's own folder; logs of its workers go below it.
        injections: failures to cause, in the form of a training run (`kill:rank=0,step=40`).
        make_group: makes the group of a job with several workers; by default logical workers in this process.
        start_weights: what `init` starts from: tensors by name.
        memory: for each state in turn, what copies its vectors.

    Raises:
        UsageError: its strategy's state is in no one place.
    """

    def __init__(
        self, job: JobSpec, sources: SourceTree, directory: Path, injections: tuple[str, ...] = (),
        make_group: MakeGroup | None = None, start_weights: Mapping[str, Array] | None = None,
        memory: Callable[[], CopyVector] = lambda: copy_vector,
    ) -> None:  # fmt: skip
        check(job)
        self.memory = memory
        self.job, self.sources, self.directory = job, sources, directory
        self.training = self._training(injections, make_group, start_weights)
        self.merger = ReportMerger(job.resources.workers, job.strategy.is_synchronous, task_tokens(job.task))
        self.metrics: dict[str, float] = {}
        self.evaluated_at = -1
        self.is_built = self.is_closed = False

    def _training(
        self, injections: tuple[str, ...], make_group: MakeGroup | None, start_weights: Mapping[str, Array] | None
    ) -> Alone | Grouped:
        job = self.job
        if job.resources.workers == 1 and not isinstance(job.strategy, ParameterServerSpec):
            return Alone(job, self.sources, start_weights, injections)
        if make_group is not None and job.resources.workers > 1:
            return Grouped(job, make_group(job), start_weights)
        from distml.runtime.inline import InlineRuntime

        return Grouped(job, InlineRuntime(job, self.sources, injections, self.directory), start_weights)

    def build(self, start: Cut | None = None) -> Built:
        """Build task, stream and model, and load a whole state, if there is one to go on from.

        Raises:
            UsageError: the task, the resources or the state do not fit.
        """
        self.training.build()
        self.is_built = True
        if start is not None:
            self.load(start)
        layout = self.training.layout
        return Built(layout, self.training.frozen(), layout.numel)

    def advance(self, until: int | None, keep: bool = False) -> Stand:
        """Train until version `until` (None: to the end of its own budget), and evaluate there.

        Args:
            keep: give a copy of the whole state, too.

        Raises:
            MemberError: it failed.
        """
        rows: list[dict[str, Any]] = []
        finished: str | None = None
        for event in self.training.run(until):
            if isinstance(event, (Failed, Lost)):
                raise self._error(event)
            if isinstance(event, Report):
                rows += self.merger.add(event)
            elif isinstance(event, Evaluated):
                self.evaluated_at = event.version
                rows.append(self._row(event.version, event.metrics | {"timing/evaluate_s": event.seconds}))
                finished = stronger(finished, event.finished)
            elif isinstance(event, Finished):
                finished = stronger(finished, event.reason)
        rows += self.merger.flush()
        step = self.training.version
        if self.evaluated_at != step:  # it was there already
            self.evaluated_at = step
            rows.append(self._row(step, self.evaluate("validation")))
        rows.sort(key=lambda row: row["step"])
        for row in rows:
            self.metrics |= {name: value for name, value in row.items() if "/" in name}
        return Stand(step, dict(self.metrics), rows, None if finished == PAUSED else finished,
                     self.state() if keep else None, self.merger.seconds)  # fmt: skip

    def _row(self, step: int, values: Mapping[str, float]) -> dict[str, Any]:
        return {"step": step, "wall_s": self.merger.seconds, **values}

    def _error(self, event: Failed | Lost) -> MemberError:
        if isinstance(event, Lost):
            return MemberError("died", f"{event.role}: {event.cause}", event.phase, self.training.version)
        kind: Kind = "not_finite" if event.not_finite else "failed"
        return MemberError(kind, event.message, event.phase, event.version, event.traceback)

    def state(self) -> Cut:
        """A copy of the whole state: shared half, own halves; to be asked for between two calls of `advance`."""
        return self.training.state(self.memory())

    def load(self, cut: Cut) -> None:
        """Go on from a whole state, with this member's own values: budget, stream and random states are the cut's.

        Raises:
            UsageError: it is of a model of another shape.
        """
        self._check_size(cut)
        self.training.load(cut)
        self.training.become(self.job)
        clock = cut.shared["clock"]
        seconds = max((float(half.get("train_seconds", 0.0)) for half in cut.own.values()), default=0.0)
        totals = {"step": cut.version, "wall_s": seconds, "train/examples": int(clock["examples"]),
                  "rl/frames": int(clock.get("frames", 0))}  # fmt: skip
        self.merger.restore(cut.version, [totals])
        self.metrics, self.evaluated_at = {}, -1

    def copy(self, cut: Cut, job: JobSpec, watch: Sequence[str] = ()) -> dict[str, Any]:
        """Take another member's shared half, *then* `job`'s values; keep the own budget, stream and random states.

        What workers keep besides for their own weights (residuals, inner moments) is dropped with these weights.

        Returns:
            applied: path -> value of each of `watch`, read back from the live optimiser, module, task and stream.

        Raises:
            UsageError: the other one's model has another shape.
            MemberError: a process of its own died.
        """
        self._check_size(cut)
        self.training.load(copied(*self.training.standing(), cut))
        try:
            self.apply(job)
            self.evaluated_at = -1
            return self.live(watch)
        except RunError as error:  # a process of its own has died since the last interval: nobody listened
            raise MemberError("died", f"{error.role}: {error.message}", "copy", self.step) from error

    def _check_size(self, cut: Cut) -> None:
        theirs, own = int(cut.shared["weights"].size), self.training.layout.numel
        if theirs != own:
            raise UsageError(f"a state of {theirs:,} trained elements does not fit a model of {own:,}; a population "
                             "copies weights between members; use kind: sweep")  # fmt: skip

    def apply(self, job: JobSpec) -> None:
        """Go on with another spec: in place below `optimizer.`, else task and stream are built anew.

        Moments that appear are zeros. The state stays; a stream of examples goes on at the same example, also with
        another batch size.

        Raises:
            UsageError: the model's shape would change; with the path.
        """
        check(job)
        self.training.become(job)
        self.job = job

    def live(self, paths: Sequence[str]) -> dict[str, Any]:
        """Path -> value as what really computes has it: optimiser, module, task, stream; not as it was asked for."""
        return self.training.live(paths)

    def evaluate(self, split: str) -> dict[str, float]:
        """The task's evaluation of a split with the weights of now, as `eval/NAME` or `test/NAME`."""
        return self.training.evaluate(split)

    @property
    def step(self) -> int | None:
        """Its version; None: it is not built yet."""
        return self.training.version if self.is_built else None

    @property
    def activity(self) -> tuple[str, float]:
        """What it is doing, and for how many seconds it has not moved in it."""
        return self.training.activity if self.is_built else ("start", 0.0)

    def close(self) -> None:
        """End processes and threads of its own; safe to call twice."""
        if not self.is_closed:
            self.is_closed = True
            if self.is_built or isinstance(self.training, Grouped):  # which may have started something
                self.training.close()


def check(job: JobSpec) -> None:
    """Refuse a strategy whose state is in no one place.

    Raises:
        UsageError: it is one.
    """
    if job.strategy.keeps_parts:
        raise UsageError(f"strategy {job.strategy.label} keeps each rank's part of the state on disk, and a population "
                         "copies states in memory; use strategy: all_reduce for its members")  # fmt: skip
