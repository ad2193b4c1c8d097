"""A training job as a class that Ray Tune trains: a `Member` in the trial's process, whatever Tune does to it.

    Tune: reset_config(values) ──▶ load_checkpoint(folder) ──▶ step ──▶ step … ──▶ save_checkpoint(folder)
    here: takes note              takes note                 builds the member with its values, loads the state,
                                                             reads the values back; trains `every` steps

Nothing happens before `step`: by then both the values and the state are known, in whatever order Tune brought them,
and the values count (Tune's own population-based training loses a mutation where a checkpoint brings back the values
it was written with). Checkpoints are safetensors and JSON, as everywhere in distml. A member that fails ends its trial
with a line that says why; its process stays for the next trial.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import ray
from ray.tune import PlacementGroupFactory, Trainable
from ray.tune.result import DONE

from distml.adapters.tune_beats import Doing, Pulse
from distml.errors import DistmlError
from distml.population.applied import asked, equal
from distml.population.member import Member, MemberError, Stand, check
from distml.runs.checkpoints import Checkpoint, CheckpointStore
from distml.runtime.cut import from_checkpoint, to_checkpoint
from distml.runtime.group import WorkerGroup
from distml.runtime.placement import selector_of
from distml.runtime.planning import bundle_of
from distml.runtime.ray import RayRuntime
from distml.spec.loader import LoadedSpec, load_train, with_values
from distml.spec.schema import BestSpec, JobSpec
from distml.tasks.sources import SourceTree

OBJECTIVE, STEP, FINISHED, DETAIL = "objective", "step", "finished", "detail"
WORST = 1e30  # instead of NaN: Tune's schedulers cannot order that
DIVERGENCES = 3  # of a process, after which a trial that diverges is over even where it could be copied into


@dataclass
class Detail:
    """What a sweep's trial reports besides what Tune wants to know.

    Attributes:
        rows: what belongs into metrics.jsonl since the last report.
        values: by path, as they are now.
        fresh: it is at its beginning.
        error: why it has failed or diverged, one line.
        defect: the values that were asked for are not those in use.
    """

    step: int
    seconds: float
    metrics: dict[str, float]
    rows: list[Mapping[str, Any]]
    values: dict[str, Any]
    fresh: bool
    error: str | None = None
    defect: bool = False


class AppliedDiffers(Exception):
    """What computes has other values than were asked for: a defect."""


def trainable(
    spec: str | os.PathLike[str] | Mapping[str, Any],
    overrides: Mapping[str, object] | Sequence[str] = (),
    *,
    every: int | None = None,
) -> type[Trainable]:
    """A training job for `ray.tune.Tuner`.

    Its config has values by dotted path (`{"optimizer.lr": 0.01}`). Each result has the newest metrics
    (`eval/accuracy`, …) and `step`; a trial is over when the job's own `stop` says so. It can be paused, reset
    (`reuse_actors`), and trained by population-based schedulers: values count, and are read back from what computes.

    Args:
        spec: a file, a shipped job's name, or the spec as a dict.
        overrides: dotted keys and values.
        every: steps between two results; None: `evaluate.every`.

    Raises:
        UsageError: the spec is wrong, or of another kind.
    """
    loaded = load_train(spec, overrides)
    return make_trainable(loaded, SourceTree.collect(loaded.job.task, loaded.directory), every)


def make_trainable(
    base: LoadedSpec[JobSpec], sources: SourceTree, every: int | None, goals: Sequence[BestSpec] = (),
    home: Path | None = None, revives: bool = False, clear_of: Sequence[str] = (),
) -> type[Trainable]:  # fmt: skip
    """The same for a sweep.

    Args:
        goals: the first one is reported as `objective`, a number even where it is NaN.
        home: the run directory, if results are to carry `detail` and weights are to be kept.
        revives: the scheduler copies another trial into one that has diverged.
        clear_of: nodes that are for others.

    Raises:
        UsageError: the base's strategy has its state in no one place.
    """
    check(base.job)
    attributes = {"base": base, "sources": sources, "every": every or base.job.evaluate.every, "goals": tuple(goals),
                  "home": None if home is None else str(home.resolve()), "revives": revives,
                  "selector": selector_of(base.job, clear_of)}  # fmt: skip
    return type(f"Trial_{base.job.name}", (MemberTrainable,), attributes)


class MemberTrainable(Trainable):  # type: ignore[misc]
    """One trial; see `trainable`."""

    base: ClassVar[LoadedSpec[JobSpec]]
    sources: ClassVar[SourceTree]
    every: ClassVar[int]
    goals: ClassVar[tuple[BestSpec, ...]]
    home: ClassVar[str | None]
    revives: ClassVar[bool]
    selector: ClassVar[dict[str, str]]

    @classmethod
    def default_resource_request(cls, config: dict[str, Any]) -> PlacementGroupFactory:
        """A bundle per worker; the trial's own process takes none where it has several, and only waits for them."""
        job, resources = cls.base.job, cls.base.job.resources
        labels = {"bundle_label_selector": [cls.selector] * resources.workers} if cls.selector else {}
        bundles = [bundle_of(job)] * resources.workers
        own: list[dict[str, float]] = [{}] if resources.workers > 1 else []
        return PlacementGroupFactory(own + bundles, strategy=resources.placement.upper(), **labels)

    def setup(self, config: dict[str, Any]) -> None:
        """In a new process."""
        os.chdir(os.environ.get("TUNE_ORIG_WORKING_DIR", "."))  # a task's own files are looked for where the run began
        self.member: Member | None = None
        self.divergences = 0
        home = self.sources.install()
        self.local = replace(self.base, directory=home) if self.sources.files else self.base
        self.stepping_since: float | None = None
        self.pulse = None if self.home is None else Pulse(Path(self.home), self.base.job, self._doing)
        self._take(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """The process is given another trial, or other values."""
        os.chdir(os.environ.get("TUNE_ORIG_WORKING_DIR", "."))
        self._take(new_config)
        return True

    def _take(self, config: Mapping[str, Any]) -> None:
        self._end_member()
        self.values = dict(config)
        self.progress = 0
        self.reported: tuple[str, ...] = ()
        self.start: Checkpoint | None = None

    def step(self) -> dict[str, Any]:
        """Train until the next result is due."""
        self.stepping_since = time.monotonic()
        if self.pulse is not None:
            self.pulse.beat()
        try:
            return self._step()
        finally:
            self.stepping_since = None

    def _doing(self) -> Doing:
        """For the driver, asked from another thread."""
        member, since, name = self.member, self.stepping_since, str(self.trial_id)
        if since is None:
            return name, "idle", 0.0
        if member is None or member.step is None:
            return name, "start", time.monotonic() - since
        return (name, *member.activity)

    def _step(self) -> dict[str, Any]:
        try:
            fresh, member = self._built()
            now = self.progress + self.every
            stand = member.advance(now - now % self.every)
        except (DistmlError, MemberError, AppliedDiffers) as error:
            self._end_member()
            if self.home is None and (getattr(error, "kind", "") != "not_finite" or not self.reported):
                raise  # of a trial that diverges before its first result nobody knows its metrics: it alone fails
            return self._failed(error)
        self.progress = stand.step
        return self._result(stand, fresh)

    def _built(self) -> tuple[bool, Member]:
        """Whether it is at its beginning, and the member; with what it was told to load, and its own values."""
        if self.member is not None:
            return False, self.member
        job = with_values(self.local, self.values).job
        from distml.launch.run import start_weights

        first = start_weights(job)
        if self.start is not None and first is not None:  # what is frozen comes with the state
            first = self.start.model()
        member = self.member = Member(job, self.sources, Path(self.logdir), make_group=self._make_group,
                                      start_weights=first)  # fmt: skip
        built = member.build()
        self.layout, self.frozen = built.layout, built.frozen
        if self.start is not None:
            member.load(from_checkpoint(self.start, built.layout))
            self.progress = self.start.step
        check_applied(job, list(self.values), member.live(list(self.values)))
        return self.start is None, member

    def _make_group(self, job: JobSpec) -> WorkerGroup:
        """Several workers, in the bundles that Tune has reserved for the trial."""
        (folder := Path(self.logdir) / "logs").mkdir(parents=True, exist_ok=True)
        place = ray.util.get_current_placement_group()
        return RayRuntime(job, self.sources, None, folder.parent, place=place, recovers=False)

    def _result(self, stand: Stand, fresh: bool) -> dict[str, Any]:
        metrics = {name: float(value) for name, value in stand.metrics.items() if value is not None}
        result: dict[str, Any] = {STEP: stand.step, DONE: stand.finished is not None}
        if self.home is None:
            self.reported = tuple(name for name in metrics if name.startswith("eval/"))
            return {**result, **metrics}
        if stand.finished is not None:
            self._keep_weights()
        detail = Detail(stand.step, stand.seconds, metrics, list(stand.rows), self.values, fresh)
        return {**result, FINISHED: stand.finished, OBJECTIVE: ordered(metrics, self.goals[0]), DETAIL: detail}

    def _failed(self, error: Exception) -> dict[str, Any]:
        """A trial that has diverged is the worst there is; one that has failed may be tried again."""
        diverged, step = getattr(error, "kind", "") == "not_finite", getattr(error, "step", None) or self.progress
        names = self.reported if self.home is None else tuple(goal.metric for goal in self.goals)
        none = dict.fromkeys(names, math.nan) if diverged else {}
        if self.home is None:
            return {STEP: step, DONE: True, **none}
        self.divergences += diverged
        copied = self.revives and diverged and self.divergences < DIVERGENCES
        defect = isinstance(error, AppliedDiffers)
        rows: list[Mapping[str, Any]] = [{"step": step, "wall_s": 0.0, **none}] if none else []
        detail = Detail(step, 0.0, none, rows, self.values, fresh=False, error=str(error), defect=defect)
        return {STEP: step, DONE: not copied, FINISHED: "not_finite" if diverged else None, DETAIL: detail,
                OBJECTIVE: ordered({}, self.goals[0])}  # fmt: skip

    # ---------------------------------------------------------------------------------------------------- checkpoints
    def save_checkpoint(self, checkpoint_dir: str) -> str:
        """The whole state, for a pause or for another trial."""
        if self.member is None and self.start is None:  # it has diverged: there is nothing that one could go on from
            return checkpoint_dir
        with CheckpointStore(Path(checkpoint_dir), 1) as store:
            store.write(self._checkpoint())
        return checkpoint_dir

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Go on from there at the next `step`, with the values that are known by then."""
        with CheckpointStore(Path(checkpoint), 1) as store:
            self._end_member()
            self.start = store.newest_good(print)

    def _checkpoint(self) -> Checkpoint:
        if self.member is None:  # it was told to load, and has not begun
            assert self.start is not None
            return self.start
        extra = {"name": self.member.job.name, "wall_s": 0.0}
        return to_checkpoint(self.member.state(), self.layout, self.frozen, extra)

    def _keep_weights(self) -> None:
        assert self.home is not None
        with CheckpointStore(Path(self.home) / "trials" / str(self.trial_name) / "checkpoints", 1) as store:
            store.write(self._checkpoint())

    def cleanup(self) -> None:
        """The process ends."""
        if self.pulse is not None:
            self.pulse.close()
        self._end_member()

    def _end_member(self) -> None:
        if self.member is not None:
            self.member.close()
            self.member = None


def ordered(metrics: Mapping[str, float], goal: BestSpec) -> float:
    """The objective as a finite number, NaN as the worst there is."""
    value = metrics.get(goal.metric, math.nan)
    worst = WORST if goal.mode == "min" else -WORST
    return worst if math.isnan(value) else min(max(value, -WORST), WORST)


def check_applied(job: JobSpec, paths: Sequence[str], live: Mapping[str, Any]) -> None:
    """Whether what computes has the values of the resolved job.

    Raises:
        AppliedDiffers: it has not.
    """
    for path, value in asked(job, paths).items():
        found = live.get(path)
        if path not in live or not equal(value, found):
            raise AppliedDiffers(f"{path}: {value!r} was asked for, {found!r} is in use")
