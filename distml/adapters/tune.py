"""`kind: sweep`: Ray Tune runs the trials, distml proposes them, keeps their folders and the journal, and resumes.

    SweepRun.train:  tune.run ──▶ OrderedSearcher.suggest ──▶ trial NNNN ──▶ MemberTrainable in a process of its own
                        ▲                                                        │ reports every `every` steps
                        └── scheduler: goes on, pauses, ends, copies ◀── Watch ◀─┘ rows, metrics ──▶ DIR/trials/NNNN
    at the end:      the best trial ──▶ best.yaml, and its test split measured once

Tune's loop runs in the driver's main thread and consumes the processes' answers; it waits at most 0.1 s at a time, and
asks `Ending` in between whether a signal has come. What Tune writes goes below DIR/tune and is removed at the end;
nothing of it is ever read back: a resume goes on from the journal (DIR/trials.jsonl) alone.
"""

from __future__ import annotations

import contextlib
import logging
import os
import random
import shutil
import signal
import socket
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import ray
from ray import tune
from ray.tune import CheckpointConfig
from ray.util.placement_group import remove_placement_group

from distml.adapters.tune_beats import Beats
from distml.adapters.tune_book import TrialBook, TrialRecord
from distml.adapters.tune_hooks import Ending, OrderedSearcher, Proposals, SweepState, Watch, describe_values
from distml.adapters.tune_samplers import build_sampler
from distml.adapters.tune_schedulers import TOGETHER, build_scheduler, every, replay
from distml.adapters.tune_trainable import make_trainable, trainable
from distml.errors import RunError, UsageError
from distml.population.closing import best_text, test_scores
from distml.population.context import OverContext, forget
from distml.runs.files import write_atomically
from distml.runs.over import ENDS
from distml.runs.units import number
from distml.runtime.connection import connect, diverted_output
from distml.runtime.endings import StopSignals, close_all, close_within, record_of_end
from distml.runtime.placement import check_resources, cluster_nodes, place
from distml.runtime.planning import groups_that_fit, request_of
from distml.spec.loader import with_values
from distml.spec.search_rules import space_of
from distml.spec.sweep import SweepSpec
from distml.spec.sweep_rules import COPYING

__all__ = ["SweepRun", "trainable"]

CLOSE_PATIENCE_S = 20.0
KEPT_STATES = 4  # of a trial, of those that Tune asks for: one may be read while newer ones are written
SETTINGS = {  # of Tune's loop; it knows them as environment variables only
    "RAY_AIR_NEW_OUTPUT": "0",  # the old one is silent where it is told to
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_GLOBAL_CHECKPOINT_S": "1e9",  # its own state, which nobody reads
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
}


class SweepRun:
    """One sweep; see `OverRun`.

    Args:
        context: its spec and run directory, and where it runs.
    """

    def __init__(self, context: OverContext) -> None:
        self.context, self.directory, self.display = context, context.directory, context.display
        self.job: SweepSpec = context.loaded.job
        self.signals = StopSignals()
        self.hosts: Sequence[str] = [socket.gethostname()]
        self.storage = self.directory.path / "tune"
        self.book = TrialBook(context.loaded, context.directory, context.sources)
        self.quiet = contextlib.ExitStack()
        self.owns_ray, self.has_started = False, False
        self.reserved: Sequence[str] = ()  # nodes that trials keep clear of

    # ------------------------------------------------------------------------------------------------------- starting
    def build(self, resume: bool) -> None:
        """Read the journal, and connect to Ray.

        Raises:
            UsageError: a package is missing, or not even one trial fits or has a place within `limits.start_s`.
        """
        base = self.job.base
        if self.context.inject:
            raise UsageError(
                f"--inject {self.context.inject[0]}: trials of a sweep have no ranks to fail; leave it out"
            )
        self.space = space_of(self.job)
        self.sampler = build_sampler(self.job, self.space)
        if not resume:
            forget(self.directory)
        self.quiet.enter_context(diverted_output(self.directory.logs / "ray.log"))
        cores = len(os.sched_getaffinity(0))
        each = base.resources.workers * base.resources.cpus_per_worker
        slots = self.job.max_concurrent or max(1, cores // each)
        self.owns_ray = connect(self.context.address, slots * each, self.job.limits.start_s)
        first = base.model_copy(update={"limits": self.job.limits})
        outlook = check_resources(first, self.owns_ray)
        self.reserved = outlook.reserved
        if not self.owns_ray:  # others may have it all, of which Tune says nothing: it waits without a limit
            remove_placement_group(place(first, outlook, self.display.note))
        self.signals.take()
        self.slots = min(slots, self._fitting()) if self.owns_ray or self.job.max_concurrent else self._fitting()
        self._check_limit()
        if self.sampler.lag is not None:
            self.sampler.lag = self._lag()
        self.book.recall(self.sampler)
        self._record_progress()

    def _lag(self) -> int:
        """How many trials a proposal does not know of: what the spec says, so that it repeats itself anywhere."""
        if self.job.scheduler.name in TOGETHER and self.sampler.num_trials is not None:
            return self.sampler.num_trials  # which begin before any has ended
        return self.job.max_concurrent or self.slots

    def _fitting(self) -> int:
        """Trials that fit into the cluster at once."""
        nodes = [node for node in cluster_nodes() if node.id not in self.reserved]
        return max(1, groups_that_fit(nodes, request_of(self.job.base)))

    def _check_limit(self) -> None:
        """On a cluster a scheduler that wants all trials at once is held by resources alone."""
        name = self.job.scheduler.name
        if name in TOGETHER and not self.owns_ray and self.job.max_concurrent and self.slots < self._fitting():
            raise UsageError(f"scheduler {name} keeps all trials under way at once, and on a running cluster only its "
                             "resources limit how many train; leave max_concurrent or --address out")  # fmt: skip

    # ------------------------------------------------------------------------------------------------------- training
    def train(self) -> None:
        """All trials; then the best one's spec, and its test split."""
        job, book = self.job, self.book
        state = SweepState(book, self.sampler, self.display, job.retries, self._record_progress)
        planned = self.sampler.num_trials
        self.display.start(f"{planned or 'any number of'} trials, {job.sampler.name}, {job.scheduler.name}, "
                           f"{self.slots} at the same time, on Ray Tune")  # fmt: skip
        if book.trials:
            ended = sum(1 for _ in book.ended(*ENDS))
            self.display.note(f"resuming: {ended} trials have ended, {len(state.waiting)} are run again")
        if self.sampler.lag is not None and job.max_concurrent is None:
            self.display.note(f"{job.sampler.name} learns from trials that are {self.sampler.lag} back; it depends on "
                              "the cores here: set max_concurrent for the same trials everywhere")  # fmt: skip
        self.has_started = self.signals.is_training = True
        with tune_settings(self._pending(), job.seed):
            self._tune(state)
        self.signals.take()
        self.signals.is_training = False
        if state.problem is not None:
            raise state.problem
        self._finish(state)

    def _tune(self, state: SweepState) -> None:
        """Tune's loop, to the end of the last trial or to a signal."""
        job = self.job
        base = self.context.loaded.base
        assert base is not None
        scheduler = build_scheduler(job, self.space)
        replay(scheduler, self.book, job)
        together = job.scheduler.name in TOGETHER
        limit = None if together else self.slots if self._is_strict() else 2 * self.slots
        tune.run(
            make_trainable(
                base,
                self.context.sources,
                every(job),
                self.book.goals,
                self.directory.path,
                revives=job.scheduler.name in COPYING,
                clear_of=self.reserved,
            ),
            name="trials",
            search_alg=Proposals(OrderedSearcher(state, limit)),
            scheduler=scheduler,
            num_samples=-1,
            callbacks=[Watch(state, Beats(self.directory.path.resolve(), base.job))],
            stop=Ending(lambda: self.signals.asked or state.problem is not None),
            storage_path=str(self.storage.resolve()),
            checkpoint_config=CheckpointConfig(num_to_keep=KEPT_STATES if together else None),
            trial_name_creator=state.names,
            trial_dirname_creator=state.names,
            reuse_actors=True,
            max_failures=0,
            raise_on_failed_trial=False,
            verbose=0,
        )

    def _is_strict(self) -> bool:
        """Whether no trial may be proposed before there is a place for it.

        What learns from trials is asked as late as possible; on a cluster with more room a trial that waits would
        start. Else as many wait as run, so that Tune keeps the processes of those that end.
        """
        return self.job.sampler.name == "optuna" or not self.owns_ray

    def _pending(self) -> int:
        planned = self.sampler.num_trials or 0
        return max(2 * self.slots, planned if self.job.scheduler.name in TOGETHER else 0)

    # ---------------------------------------------------------------------------------------------------------- the end
    def _finish(self, state: SweepState) -> None:
        """Record how it ended."""
        best = self.book.best()
        if self.signals.asked:
            self.book.interrupted()
            self._record("interrupted", best, {})
            return
        if best is None:
            raise self._no_best()
        base = self.context.loaded.base
        assert base is not None
        text = best_text(with_values(base, best.values), self.job.name)
        write_atomically(self.directory.path / "best.yaml", text, durable=False)
        self._record("done", best, self._test(best))
        for line in self._closing_lines(best):
            self.display.note(line)

    def _no_best(self) -> RunError:
        """What a sweep ends with that has come to nothing."""
        names = ", ".join(goal.metric for goal in self.book.goals)
        ended = list(self.book.ended("finished", "stopped", "diverged"))
        if not ended:
            return RunError(f"no trial finished; the last one failed: {self.book.last_error}", role="trial",
                            phase="train")  # fmt: skip
        last, failed = ended[-1], sum(1 for _ in self.book.ended("failed"))
        others = f"{len(ended)} have diverged, {failed} failed" if failed else "all have diverged"
        return RunError(f"no trial came to a finite {names}; {others}; trial {last.name}: "
                        f"{last.error or 'it reported NaN'}", role="trial", phase="train", step=last.step)  # fmt: skip

    def _test(self, best: TrialRecord) -> dict[str, float]:
        """The best trial's test split, measured with the weights that it left."""
        folder = self.book.folder(best.index)
        if not (folder / "checkpoints").is_dir():
            self.display.note(f"trial {best.name} left no weights here; its test split is not measured")
            return {}
        return test_scores(folder)

    def _record_progress(self) -> None:
        """That it runs, and its best trial so far."""
        self._record("running", self.book.best(), {})

    def _record(self, status: str, best: TrialRecord | None, test: Mapping[str, float]) -> None:
        metrics = {**best.metrics, **test} if best is not None else {}
        self.directory.result.update(status=status, step=best.step if best is not None else 0, wall_s=self.book.wall_s,
                                     metrics=metrics, best=self._best_entry(best), error=None)  # fmt: skip

    def _best_entry(self, best: TrialRecord | None) -> dict[str, Any] | None:
        if best is None:
            return None
        goals = self.book.goals
        goal = self.job.tie_break if len(goals) > 1 and self.job.tie_break is not None else goals[0]
        entry = {"metric": goal.metric, "value": best.metrics.get(goal.metric), "step": best.step, "trial": best.name}
        if len(goals) > 1:
            entry["pareto"] = [{"trial": trial.name, "values": {g.metric: trial.metrics.get(g.metric) for g in goals}}
                               for trial in self.book.front()]  # fmt: skip
        return entry

    def _closing_lines(self, best: TrialRecord) -> Iterator[str]:
        counts = [f"{sum(1 for _ in self.book.ended(event))} {words}" for event, words in ENDS.items()]
        yield f"{len(self.book.trials)} trials: {', '.join(counts)}"
        for event in ("diverged", "failed"):
            for trial in self.book.ended(event):
                yield f"trial {trial.name} {event}: {trial.error} ({describe_values(trial.values)})"
        if len(self.book.goals) > 1:
            for trial in self.book.front():
                scores = ", ".join(
                    f"{goal.metric} {number(trial.metrics.get(goal.metric))}" for goal in self.book.goals
                )
                yield f"Pareto set: trial {trial.name}: {scores} ({describe_values(trial.values)})"
        yield f"best: trial {best.name} ({describe_values(best.values)}); distml run {self.directory.path}/best.yaml"

    def fail(self, error: BaseException) -> None:
        """Record how the sweep failed, or that it was interrupted before it began; the journal stays."""
        if self.has_started:
            self.book.interrupted()
        self.directory.result.update(**record_of_end(error))

    def close(self) -> None:
        """End a Ray of our own, and remove what Tune wrote; safe to call twice."""
        close_all(self.book.close)
        if self.owns_ray and ray.is_initialized():
            close_within(ray.shutdown, CLOSE_PATIENCE_S)
        shutil.rmtree(self.storage, ignore_errors=True)
        self.quiet.close()


@contextlib.contextmanager
def tune_settings(pending: int, seed: int) -> Iterator[None]:
    """Inside, Tune's loop is quiet, leaves signals to us, and draws its own choices from a seed.

    Args:
        pending: trials that may wait for resources.
        seed: of what schedulers draw: which trial is copied, where PB2 looks.
    """
    wanted = {**SETTINGS, "TUNE_MAX_PENDING_TRIALS_PG": str(pending)}
    before = {name: os.environ.get(name) for name in wanted}
    handler, drawn = signal.getsignal(signal.SIGUSR1), (random.getstate(), np.random.get_state())
    loggers = [logging.getLogger(name) for name in ("ray.tune", "ray.train")]
    levels = [logger.level for logger in loggers]
    os.environ.update(wanted)
    random.seed(seed)
    np.random.seed(seed)
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of PB2's Gaussian process, with the few points that it begins with
            yield
    finally:
        random.setstate(drawn[0])
        np.random.set_state(drawn[1])
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        signal.signal(signal.SIGUSR1, handler)
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
