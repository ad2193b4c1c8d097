"""The driver: listens to a group of workers, writes the run directory, and brings a run back after a death.

It consumes `Event`s (reports, evaluations, snapshots) and `Lost`s, and produces metrics, checkpoints and the result. It
holds the newest *cut*: the state at one version, from which a recovery goes on and out of which checkpoints are written
on a background thread. Where ranks keep parts of the state (`keeps_parts`), they have written these when their
snapshots come: the driver commits them, and a recovery goes on from what is committed. It waits only in
`group.events()`, whose waits all have a limit. An end, healthy or not, always passes `close`. No torch here: a driver
starts fast, and runs where torch is not wanted.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from distml.errors import DistmlError, RunError, UsageError
from distml.events import Evaluated, Event, Failed, Finished, FirstUpdate, Report, Snapshot, WrittenPart
from distml.exchange.layout import Array
from distml.memory import binary_size, is_out_of_memory
from distml.runs.checkpoints import Checkpoint, CheckpointStore, folder_name
from distml.runs.directory import RunDirectory
from distml.runs.display import Display
from distml.runs.tensorboard import TensorBoardWriter
from distml.runtime.cut import Cut, from_checkpoint, from_folder, join_parts, reshard, to_checkpoint
from distml.runtime.endings import StopSignals, close_all, record_of_end
from distml.runtime.group import Lost, WorkerGroup
from distml.runtime.merge import ReportMerger
from distml.spec.language_rules import task_tokens
from distml.spec.schema import JobSpec
from distml.strategies.agenda import Agenda

RESULT_EVERY_S = 1.0
NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
OF_THE_RUN = ("timing/start_s", "timing/recover_s", "runtime/restarts")  # metrics of no step
EXIT_STATUS = {"goal": "goal_met", "requested": "interrupted"}


@dataclass
class Candidate:
    """A cut that is not complete yet, or waits for the evaluation of its version.

    Attributes:
        event: the snapshot of the rank that speaks for the version.
        judged: its evaluation is there, or will never be.
        keep: the evaluation makes it worth writing: it is the best one, or ends the run.
    """

    cut: Cut
    event: Snapshot
    judged: bool
    keep: bool = False


class Driver:
    """One training run.

    Args:
        job: the spec.
        directory: its run directory, locked.
        group: the runtime's workers.
        display: where progress is shown.
        started: `time.perf_counter()` when the command began.
        memory_advice: what a plan says to a job that ran out of memory; asked for when it has.
    """

    def __init__(
        self, job: JobSpec, directory: RunDirectory, group: WorkerGroup, display: Display, started: float,
        memory_advice: Callable[[], str],
    ) -> None:  # fmt: skip
        self.job, self.directory, self.group, self.display, self.started = job, directory, group, display, started
        self.elastic, group.say = job.resources.elastic, display.note
        self.store = CheckpointStore(directory.checkpoints, job.checkpoint.keep)
        self.agenda = Agenda(job)
        self.merger = self._merger()
        self.boards: TensorBoardWriter | None = None
        self.metrics: dict[str, Any] = {}
        self.cut: Cut | None = None
        self.candidates: dict[int, Candidate] = {}
        self.own: dict[int, dict[int, dict[str, Any]]] = {}
        self.parts: dict[int, list[WrittenPart]] = {}
        self.keeps_parts = job.strategy.keeps_parts
        self.start_version, self.version, self.restarts = 0, 0, 0
        self.reason, self.end_version, self.judged = "requested", -1, False
        self.start_written = False
        self.signals = StopSignals(group.request_stop)
        self.result_written_at, self.has_started = 0.0, False
        self.best: dict[str, Any] | None = None
        self.memory_advice, self.memory_ran_out = memory_advice, False

    # -------------------------------------------------------------------------------------------------------- the run
    def build(self, start_weights: Callable[[], dict[str, Array] | None], resume: bool) -> None:
        """Start the processes, and find the state to go on from; without one, begin with `start_weights()`.

        Raises:
            UsageError: the spec, the task, the checkpoint or the resources do not fit.
        """
        self.store.discard(self.store.ranks_folders())
        checkpoint = self._newest_checkpoint() if resume else None
        first = start_weights() if checkpoint is None else None
        if checkpoint is not None and self.job.init is not None:  # what is frozen comes with it
            first = checkpoint.model()
        try:
            self.description = self.group.build(first)
        except UsageError as error:
            raise UsageError(self._with_advice(str(error))) from error
        self._follow_size()
        self.signals.take()
        if checkpoint is not None:
            self.cut = self._cut_of(checkpoint)
            self.start_version = self.version = self.cut.version
            self.agenda.evaluations = self._evaluations()
            self.best = self._stored_best()
            if self.description.frozen:
                verify_frozen(checkpoint.step, checkpoint.model(), self.description.frozen)
        self._rewind()

    def _newest_checkpoint(self) -> Checkpoint | None:
        """Without weights and moments where the ranks read these themselves."""
        return self.store.newest_good(self.display.note, whole=not self.keeps_parts)

    def _cut_of(self, checkpoint: Checkpoint) -> Cut:
        read = from_folder if self.keeps_parts else from_checkpoint
        return reshard(read(checkpoint, self.description.layout), self.job.resources.workers)

    def _stored_best(self) -> dict[str, Any] | None:
        """The best checkpoint so far, where it is of the metric that counts now."""
        best = self.job.checkpoint.best
        found = self.store.best(best.metric) if best is not None else None
        if best is None or found is None or found[0] > self.version:
            return None
        return {"metric": best.metric, "step": found[0], "value": found[1]}

    def train(self) -> str:
        """Train to the end; the run's status."""
        if "tensorboard" in self.job.log.to:
            resumed_at = self.start_version or None
            self.boards = TensorBoardWriter(self.directory.tensorboard, resumed_at=resumed_at)
        self.group.begin(self.cut)
        self.signals.is_training = True
        self._listen()
        while self.group.wants_more and self.reason == "requested" and not self.signals.asked:
            self._grow()
            self._listen()
        self.signals.is_training = False
        for row in self.merger.flush():
            self._write(row)
        saved = self.cut.version if self.cut is not None else -1
        if self.end_version < 0 or (self.reason == "requested" and saved < self.end_version):
            self._keep_newest()  # asked to stop, and not all workers could end in time
        return self._finish()

    def _listen(self) -> None:
        for event in self.group.events():
            with self._disk():
                self.handle(event)

    @contextlib.contextmanager
    def _disk(self) -> Iterator[None]:
        """Inside, a disk without space is the run's failure, as it is where a checkpoint is written."""
        try:
            yield
        except OSError as error:
            if error.errno not in NO_SPACE:
                raise
            message = f"{self.directory.path} cannot be written: {error.strerror}"
            raise RunError(message, phase="checkpoint", step=self.version) from error

    def _keep_newest(self) -> None:
        self._fetch()
        self._rewind()
        self.end_version = self.version
        if self.cut is not None and self.cut.version not in self.store.steps():
            self._commit(self.cut, important=True)

    def _fetch(self) -> None:
        """Copy what the newest cut has left in shared memory; if it is no longer there, take the newest checkpoint.

        What is on the disk is verified once more.
        """
        if self.cut is None or "weights" in self.cut.shared:
            return
        vectors = self.group.kept(self.cut.version)
        if vectors is not None:
            self.cut.shared |= {"weights": vectors.pop("weights"), "moments": vectors}
            return
        self.store.wait()
        checkpoint = self._newest_checkpoint()
        self.cut = self._cut_of(checkpoint) if checkpoint is not None else None

    def handle(self, event: Event | Lost) -> None:
        """Act on one event."""
        if isinstance(event, FirstUpdate):
            if not self.has_started:
                self.has_started = True
                self.metrics["timing/start_s"] = time.perf_counter() - self.started
                trace_start()
        elif isinstance(event, Report):
            for row in self.merger.add(event):
                self._write(row)
                self.display.report(row["step"], event.fraction, row)
        elif isinstance(event, Snapshot):
            self._keep(event)
        elif isinstance(event, Evaluated):
            self._evaluated(event)
        elif isinstance(event, Finished):
            if not self.judged:
                self.reason, self.end_version = event.reason, max(self.end_version, event.version)
        elif isinstance(event, Failed):
            self._failed(event)
        elif isinstance(event, Lost):
            self._recover(event)

    # ------------------------------------------------------------------------------------------------------------ size
    def _merger(self) -> ReportMerger:
        job = self.job
        return ReportMerger(job.resources.workers, job.strategy.is_synchronous, task_tokens(job.task))

    def _follow_size(self) -> str:
        """Take the group's size for the job's; what to say of it where it is another one."""
        before, now = self.job.resources.workers, self.group.size
        self.job = self.job.with_workers(now)
        if now == before:
            return ""
        self.merger = self._merger()
        self.cut = reshard(self.cut, now) if self.cut is not None else None
        return f" with {now} worker{'s' if now > 1 else ''} in place of {before}"

    def _grow(self) -> None:
        """All workers have ended at one version, as there is room for more: go on from there with these."""
        self._fetch()
        from_version = self.cut.version if self.cut is not None else 0
        try:
            self.group.regroup(self.cut)
        except UsageError as error:
            raise RunError(f"the group could not go on with more workers: {error}", phase="start",
                           step=self.version) from error  # fmt: skip
        self._forget_candidates(None)
        self.reason, self.end_version = "requested", -1
        size = self._follow_size()
        self.display.note(f"{'there is room for more: ' if size else ''}all go on from step {from_version}{size}")
        self._record_whereabouts()
        self._rewind()

    def _record_whereabouts(self) -> None:
        """Keep environment.json true: after a change other hosts have the workers, or gradients travel otherwise."""
        transport, hosts = self.group.whereabouts()
        if (transport, hosts) == (self.description.transport, self.description.hosts):
            return
        self.description = replace(self.description, transport=transport, hosts=hosts)
        known = self.directory.read_environment()
        self.directory.write_environment({**known, "transport": transport, "hosts": hosts})

    # --------------------------------------------------------------------------------------------------------- metrics
    def _write(self, row: dict[str, Any]) -> None:
        self.version = max(self.version, row["step"])
        if not self.start_written and self.has_started:
            row["timing/start_s"], self.start_written = self.metrics["timing/start_s"], True
        if self.elastic is not None:
            row["runtime/workers"] = self.group.size
        self.directory.metrics.append(row)
        self.metrics |= {name: value for name, value in row.items() if "/" in name}
        if self.boards is not None:
            self.boards.scalars(row["step"], {n: v for n, v in row.items() if "/" in n}, time.time())
        if time.monotonic() - self.result_written_at >= RESULT_EVERY_S:
            self.result_written_at = time.monotonic()
            self.directory.result.update(durable=False, status="running", step=self.version,
                                         wall_s=self.merger.seconds, metrics=self.metrics, best=self.best)  # fmt: skip

    def _evaluated(self, event: Evaluated) -> None:
        if self.judged:  # what others evaluated after the version that ended the run
            return
        with contextlib.suppress(ValueError):  # the worker has said so already
            self.agenda.judge(event.version, event.metrics)
        if event.finished in ("goal", "patience"):
            self.judged, self.reason, self.end_version = True, event.finished, event.version
        row = {"step": event.version, "wall_s": self.merger.seconds, **event.metrics,
               "timing/evaluate_s": event.seconds}  # fmt: skip
        self._write(row)
        self.display.evaluated(event.version, event.metrics)
        candidate = self.candidates.get(event.version)
        if candidate is None:  # its state is gone: it can be neither the best one nor a checkpoint
            return
        is_best = self._is_best(event)
        if is_best and self.best is not None:
            self.store.mark_best(event.version, self.best["metric"], self.best["value"])
        candidate.judged, candidate.keep = True, is_best or event.finished is not None
        self._settle(event.version)

    def _is_best(self, event: Evaluated) -> bool:
        best = self.job.checkpoint.best
        if best is None:
            return False
        if best.metric not in event.metrics:
            raise RunError(f"checkpoint.best: the evaluation does not report {best.metric!r}; it reports "
                           f"{sorted(event.metrics)}", phase="evaluate", step=event.version)  # fmt: skip
        value = event.metrics[best.metric]
        before = self.best["value"] if self.best is not None else None
        better = math.isfinite(value) and (before is None or (value > before if best.mode == "max" else value < before))
        if better:
            self.best = {"metric": best.metric, "value": value, "step": event.version}
        return better

    # ----------------------------------------------------------------------------------------------- cuts, checkpoints
    def _keep(self, event: Snapshot) -> None:
        """A rank's half of a snapshot; the rank that speaks for the version also brings the shared half."""
        if self.judged and event.version > self.end_version:  # after the one that ended the run
            return
        self.own.setdefault(event.version, {})[event.rank] = event.own
        if event.part is not None:
            self.parts.setdefault(event.version, []).append(event.part)
        if event.carried is not None:
            shared = event.shared or self.group.shared_state(event.version, event.carried)
            if shared is not None:
                cut = Cut(event.version, shared, averaged=event.checkpoint or event.evaluated)
                self.candidates[event.version] = Candidate(cut, event, judged=not event.evaluated)
        self._settle(event.version)

    def _settle(self, version: int) -> None:
        """Accept a version's cut once it is complete and judged: whoever goes on from it must know its evaluation.

        Complete are the halves of all ranks at that version; under async and ssp each rank's newest.
        """
        candidate, halves = self.candidates.get(version), self.own.get(version, {})
        synchronous = self.job.strategy.is_synchronous
        if candidate is None or not candidate.judged:
            return
        if synchronous and len(halves) < self.job.resources.workers:
            return
        known = {rank: half for v in sorted(self.own) for rank, half in self.own[v].items() if v <= version}
        candidate.cut.own = dict(halves) if synchronous else known
        if self.keeps_parts:
            candidate.cut.parts = join_parts(self.parts.pop(version))
        del self.candidates[version]
        waiting = {v for v in self.candidates if v < version}
        self.own = {v: rows for v, rows in self.own.items() if v > version - 50 or v in waiting}
        event = candidate.event
        self._accept(candidate.cut, event.checkpoint or candidate.keep, important=event.last or candidate.keep)

    def _accept(self, cut: Cut, checkpoint: bool, important: bool) -> None:
        """From now on a recovery goes on from here; and a resume, if it is to be a checkpoint."""
        self.version = max(self.version, cut.version)
        self._remember(cut)
        if cut.parts is not None:
            self._accept_parts(cut, checkpoint)
            return
        if self.cut is None or cut.version >= self.cut.version:
            self.cut = cut
        if checkpoint:
            self._commit(cut, important)

    def _accept_parts(self, cut: Cut, checkpoint: bool) -> None:
        """The same where only what is committed can be gone on from; what is not to be a checkpoint goes."""
        assert cut.parts is not None
        if not checkpoint:
            self.store.discard([cut.parts.folder])
            return
        folder = self.store.write(self._checkpoint(cut))  # no data is written: a rename
        self.cut = Cut(cut.version, {"folder": str(folder), "clock": cut.shared["clock"]}, cut.own)

    def _remember(self, cut: Cut) -> None:
        """Put all evaluations up to its version into a cut."""
        evaluations = [list(pair) for pair in self.agenda.evaluations if pair[0] <= cut.version]
        cut.shared["clock"] = {**cut.shared["clock"], "agenda": {"evaluations": evaluations}}

    def _evaluations(self) -> list[tuple[int, float]]:
        """What the metrics file says of the watched metric up to the version that the run goes on from."""
        name = self.agenda.watched[0]
        found = [(row["step"], row[name]) for row in self.directory.metrics.read() if name in row]
        return [(step, math.nan if value is None else value) for step, value in found if step <= self.version]

    def _commit(self, cut: Cut, important: bool) -> None:
        self.store.write_async(self._checkpoint(cut), important=important)

    def _checkpoint(self, cut: Cut) -> Checkpoint:
        extra = {"name": self.job.name, "wall_s": self.merger.seconds}
        return to_checkpoint(cut, self.description.layout, self.description.frozen, extra)

    # -------------------------------------------------------------------------------------------------------- failures
    def _failed(self, event: Failed) -> None:
        with contextlib.suppress(OSError):  # a full disk must not hide the error itself
            self.directory.logs.mkdir(exist_ok=True)
            (self.directory.logs / f"rank-{event.rank}-error.txt").write_text(event.traceback)
        message = self._with_advice(event.message)
        error = RunError(message, role=f"rank {event.rank}", phase=event.phase, step=event.version)
        raise UsageError(str(error)) if event.version == self.start_version == 0 else error

    def _with_advice(self, cause: str) -> str:
        """A message; of one that is about memory what is known of it, and what a plan says."""
        if not is_out_of_memory(cause):
            return cause
        resident = self.metrics.get("memory/rank_bytes")
        had = [f"ranks had {binary_size(resident)} at the last report"] if resident else []
        return "; ".join(part for part in (cause, *had, self.memory_advice()) if part)

    def _check_memory(self, event: Lost) -> None:
        """Go on from one death for lack of memory, whose cause may have been another process; not from a second."""
        if not is_out_of_memory(event.cause):
            return
        if self.memory_ran_out:
            message = f"{self._with_advice(event.cause)}; not restarted again: it was the second time"
            raise RunError(message, role=event.role, phase=event.phase, step=self.version)
        self.memory_ran_out = True

    def _recover(self, event: Lost) -> None:
        self._check_memory(event)
        if self.restarts >= self.job.limits.max_restarts:
            message = (
                f"{self._with_advice(event.cause)}; not restarted again (limits.max_restarts: "
                f"{self.job.limits.max_restarts})"
            )
            raise RunError(message, role=event.role, phase=event.phase, step=self.version)
        self.restarts += 1
        self.metrics["runtime/restarts"] = self.restarts
        self._fetch()
        if self.cut is not None:
            self._remember(self.cut)
            self._secure(self.cut)
        from_version = self.cut.version if self.cut is not None else 0
        left, declared = self.store.ranks_folders(), time.perf_counter()
        try:
            went_back = self.group.recover(self.cut)
        except UsageError as error:  # no place, no answer: what is a user's matter at the start is a failure now
            raise RunError(
                f"{event.cause}; not recovered: {error}", role=event.role, phase=event.phase, step=self.version
            ) from error
        self._forget_candidates(None if went_back else event.role)
        if went_back:
            self.store.discard(left)
        self.metrics["timing/recover_s"] = time.perf_counter() - declared
        size = self._follow_size()
        what = f"all go on from step {from_version}{size}" if went_back else "the others went on; it rejoins"
        if self.signals.asked:
            what = f"not replaced, as the run was asked to end; step {from_version} is kept"
        self.display.note(f"{event.role} was lost at step {self.version} ({event.cause}): {what} "
                          f"(restart {self.restarts} of {self.job.limits.max_restarts})")  # fmt: skip
        if went_back:
            self._record_whereabouts()
            self._rewind()

    def _secure(self, cut: Cut) -> None:
        """Have it written before anything is waited for: whoever ends this process meanwhile loses no more."""
        if not self.keeps_parts and cut.version not in self.store.steps():
            self._commit(cut, important=True)

    def _forget_candidates(self, role: str | None) -> None:
        """All that a run will come to again; or, where the others went on, those whose evaluations one rank owes."""
        gone_over = self.cut.version if self.cut is not None else 0  # what is older will not come again
        for version, candidate in sorted(self.candidates.items()):
            if f"rank {candidate.event.rank}" == role or (role is None and version < gone_over):
                candidate.judged = True
                self._settle(version)
        if role is None:
            self.candidates, self.own, self.parts = {}, {}, {}

    def _rewind(self) -> None:
        """Rows after the cut are forgotten; they will be written again."""
        version = self.cut.version if self.cut is not None else 0
        self.directory.metrics.cut_back(version if version else -1)
        rows = self.directory.metrics.read()
        self.version = version
        self.agenda.evaluations = [pair for pair in self.agenda.evaluations if pair[0] <= version]
        if self.cut is not None:
            self._remember(self.cut)
        self.merger.restore(version, rows)
        kept = {name: self.metrics[name] for name in OF_THE_RUN if name in self.metrics}
        self.metrics = {name: value for row in rows for name, value in row.items() if "/" in name} | kept
        self.metrics = {name: value for name, value in self.metrics.items() if not name.startswith("test/")}

    # -------------------------------------------------------------------------------------------------------- the end
    def _finish(self) -> str:
        status = EXIT_STATUS.get(self.reason, "goal_missed" if self.job.stop.goal is not None else "done")
        self.store.wait()
        if self.judged:  # asynchronous workers were ahead of the evaluation that ended the run
            self.directory.metrics.cut_back(self.end_version)
            for row in self.directory.metrics.read():
                self.metrics |= {name: value for name, value in row.items() if "/" in name}
        if status != "interrupted":
            self._test()
        self.version = self.end_version
        checkpoint = f"checkpoints/{folder_name(self.version)}" if self.version in self.store.steps() else None
        self.directory.result.update(status=status, step=self.version, wall_s=self.merger.seconds, error=None,
                                     metrics=self.metrics, best=self.best, checkpoint=checkpoint)  # fmt: skip
        return status

    def _test(self) -> None:
        """The test split, measured once, on the best checkpoint (without `checkpoint.best`: on the last)."""
        step = self.best["step"] if self.best is not None else self.end_version
        checkpoint = self.store.load(step, whole=not self.keeps_parts)
        saved = self._cut_of(checkpoint).shared if self.keeps_parts else checkpoint.model()
        sums = self.group.evaluate("test", saved)
        row = {f"test/{name}": total / count for name, (total, count) in sorted(sums.items()) if count}
        if row:
            self._write({"step": step, "wall_s": self.merger.seconds, **row})

    def fail(self, error: BaseException) -> None:
        """Record how the run failed, or that it was interrupted before it began; committed checkpoints stay."""
        with contextlib.suppress(DistmlError, OSError):
            self.store.wait(timeout_s=30.0)
        self.store.discard(self.store.ranks_folders())  # now: they may be what has filled the disk
        steps = self.store.steps()
        checkpoint = f"checkpoints/{folder_name(steps[-1])}" if steps else None
        ended = record_of_end(error, self.version)
        changes = dict(ended)
        if self.has_started:  # else what an earlier run came to stays as it is
            changes |= {"step": self.version, "checkpoint": checkpoint}
        if self.has_started and ended["error"] is not None:
            changes |= {"wall_s": self.merger.seconds, "metrics": self.metrics, "best": self.best}
        with contextlib.suppress(OSError):  # a full disk must not hide the error itself
            self.directory.result.update(**changes)

    def close(self) -> None:
        """End processes, threads and files, whatever happened; what ranks have written for nobody goes."""
        close_all(self.group.close, self.store.close, self.directory.metrics.close,
                  lambda: self.store.discard(self.store.ranks_folders()))  # fmt: skip
        if self.boards is not None:
            self.boards.close()


def verify_frozen(step: int, saved: Mapping[str, Array], frozen: Mapping[str, Array]) -> None:
    """Frozen tensors must be what the checkpoint of `step` was trained with.

    Raises:
        UsageError: one differs.
    """
    for name, array in frozen.items():
        if name not in saved or not np.array_equal(saved[name], array, equal_nan=array.dtype.kind == "f"):
            raise UsageError(
                f"checkpoint step-{step:08d} was trained with other values of the frozen tensor {name}; "
                "use --out for a new run, --fresh to move the old one away, or init: {from: ...}"
            )


def trace_start() -> None:
    """For `distml bench start`: write the time, and whether torch is imported, to the file DISTML_TRACE_START."""
    path = os.environ.get("DISTML_TRACE_START")
    if path:
        imported = [name for name in ("torch",) if name in sys.modules]
        Path(path).write_text(json.dumps({"time": time.time(), "imported": imported}), encoding="utf-8")
