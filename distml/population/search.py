"""`kind: nas`: a controller proposes architectures, children of the base train, and their rewards teach the controller.

    Controller.propose ──▶ Trial ──▶ trials.jsonl ── start, advance ──▶ Host: slots, each with one child at a time
    Controller.learn ◀── reward ◀── trials.jsonl ◀── Ready, Advanced, Gone ── Host.wait

A slot that is free gets the next proposal at once: rewards come back in any order, and nobody waits for anybody. What
happens is written to the journal before anything follows from it. A controller is a function of its seed and of the
order of its calls, so a resume plays the journal back, from the newest kept state of the controller on: it comes to the
same proposals, and children that were under way begin anew. So the search may be ended at any instruction, also by a
signal. The best child so far leaves its final weights, which are measured once on the test split, at the end; nothing
is trained again. Nothing waits without a limit but `Host.wait`, which answers with `Gone` when a child no longer does.
"""

from __future__ import annotations

import math
import os
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from distml.errors import RunError, UsageError
from distml.inject import of_member
from distml.population.closing import test_scores
from distml.population.context import OverContext
from distml.population.controller import Controller, make_controller
from distml.population.host import Advanced, Answer, Gone, Host, Ready
from distml.population.reward import reward_of, worst
from distml.population.trials import FOLDER, Journal, Trial, TrialFolder, trials_of
from distml.runs.checkpoints import Checkpoint, CheckpointDamaged, CheckpointStore
from distml.runs.files import write_atomically
from distml.runs.pareto import pareto_front
from distml.runs.units import number
from distml.runtime.authentication import cluster_address
from distml.runtime.endings import StopSignals, close_all, record_of_end
from distml.spec.decisions import decision_space
from distml.spec.loader import LoadedSpec, with_values
from distml.spec.messages import near
from distml.spec.nas import NasSpec
from distml.spec.schema import ClassificationSpec, JobSpec

WAIT_S, RESULT_EVERY_S = 1.0, 1.0
STATE_EVERY = 100  # rewards between two kept states of the controller; what came after is played back
HOPELESS = 10  # children that failed while none has finished: then it is not their architecture
FRONT_SHOWN = 12


class SearchRun:
    """One architecture search.

    Args:
        context: what it runs in.
        host: who trains the children; by default what `context.where` says.
    """

    def __init__(self, context: OverContext, host: Host | None = None) -> None:
        assert isinstance(context.loaded.job, NasSpec)
        assert context.loaded.base is not None
        self.context, self.job, self.base = context, context.loaded.job, context.loaded.base
        self.directory, self.display = context.directory, context.display
        self.space = decision_space(self.job)
        self.controller: Controller = make_controller(self.job.controller, self.space.options, self.job.seed)
        self.journal = Journal(self.directory.path)
        self.states = CheckpointStore(self.directory.path / "controller", keep=1)
        self.signals = StopSignals()  # the first one ends it where it is: there is nothing to write any more
        self.given = host
        self.hosts: Sequence[str] = [context.where]
        self.trials: dict[str, Trial] = {}
        self.running: dict[str, Trial] = {}
        self.ready: dict[str, Ready] = {}
        self.again: deque[Trial] = deque()
        self.unrewarded: list[Trial] = []  # that came to nothing before there was a reward to be less than
        self.best: Trial | None = None
        self.earlier_s, self.began, self.recorded_at = 0.0, time.perf_counter(), 0.0
        self.has_started = False
        self.closes: list[Callable[[], object]] = []

    # --------------------------------------------------------------------------------------------------------- the run
    def build(self, resume: bool) -> None:
        """Find what earlier processes came to, and start the host.

        Raises:
            UsageError: task, space, journal or resources do not fit.
        """
        self.context.sources.install()
        self._check_base()
        if resume:
            self._play_back(self.journal.read())
        self.host = self.given or self._make_host()
        self.closes.append(self.host.close)
        self.signals.take()
        sizes = f"{len(self.space.decisions)} decisions, {self.space.size:.3g} architectures"
        slots = f"{self.host.slots} at a time" if self.host.slots > 1 else "one at a time"
        self.display.start(f"{self.job.controller.name}, {sizes}, {self.job.trials} children, {slots}")
        if self.trials:
            self.display.note(f"resuming: {len(self._over())} children are known, {len(self.again)} begin anew")

    def train(self) -> None:
        """Propose, train and learn until all children have a reward.

        Raises:
            RunError: no child finishes. UsageError: none reports the metric.
        """
        self.has_started, self.began = True, time.perf_counter()
        self._fill()
        while self.running:
            for answer in self.host.wait(WAIT_S):
                if answer.member in self.running:
                    self._handle(answer)
            self._fill()
        self._finish()

    def _fill(self) -> None:
        """Give every free slot a child."""
        while len(self.running) < self.host.slots and (trial := self._next()) is not None:
            spec = self._spec(trial)
            if isinstance(spec, str):
                self._settle("failed", trial, spec)
                continue
            TrialFolder(self.directory.path, trial.name).begin(spec, self.context.sources.files)
            self.running[trial.name] = trial
            self.host.start(trial.name, spec.job)

    def _next(self) -> Trial | None:
        if self.again:
            return self.again.popleft()
        if len(self.trials) >= self.job.trials:
            return None
        choices = self.controller.propose()
        trial = Trial(len(self.trials), choices, self.space.values(choices),
                      log_prob=self.controller.log_prob(choices), baseline=self.controller.baseline)  # fmt: skip
        spec = self._spec(trial)
        if not isinstance(spec, str):
            trial.cost = self._cost(spec.job)
        self.trials[trial.name] = trial
        self.journal.write("proposed", trial, self.seconds)
        return trial

    def _spec(self, trial: Trial) -> LoadedSpec[JobSpec] | str:
        """A child's job, or why the base does not take its values together."""
        try:
            return with_values(self.base, trial.values, name=f"{self.job.name[:90]}-{trial.name}")
        except UsageError as error:
            return str(error)

    def _handle(self, answer: Answer) -> None:
        trial = self.running[answer.member]
        if isinstance(answer, Ready):
            self.ready[answer.member] = answer
            self.host.advance(answer.member, None, keep=True)
        elif isinstance(answer, Advanced):
            self._advanced(trial, answer)
        elif isinstance(answer, Gone):
            self._gone(trial, answer)

    def _advanced(self, trial: Trial, answer: Advanced) -> None:
        """A child has come to its end: its reward, and its weights if it is the best one."""
        self._check_reported(answer)
        trial.metrics, trial.step, trial.seconds = dict(answer.metrics), answer.step, answer.seconds
        reward = reward_of(self.job.reward, trial.metric(self.job.reward.metric), trial.cost)
        is_best = math.isfinite(reward) and (self.best is None or reward > self._reward(self.best))
        folder = TrialFolder(self.directory.path, trial.name)
        if is_best:
            try:
                folder.keep(self.host.fetch(answer.state), self.ready[trial.name])
            except LookupError:
                self._gone(trial, Gone(trial.name, "died", "its process died with its weights", "end", trial.step))
                return
        folder.finish(answer, self.job.base.log.to)
        self._leave(trial)
        trial.error = None
        trial.reward = reward if math.isfinite(reward) else None
        self._settle("finished", trial, None)
        if is_best:
            self.best = trial
            self._write_best(trial)
        self._report(trial)

    def _gone(self, trial: Trial, gone: Gone) -> None:
        """A child is lost: it is tried again, unless what it computes is not finite."""
        TrialFolder(self.directory.path, trial.name).fail(gone)
        self._leave(trial)
        step = "" if gone.step is None else f", step {gone.step}"
        trial.metrics, trial.step, trial.seconds = {}, 0, 0.0
        trial.error = f"{gone.phase}{step}: {gone.cause}"
        if gone.kind == "not_finite" or trial.tries >= self.job.retries:
            self._settle("failed", trial, trial.error)
            return
        trial.tries += 1
        self.journal.write("retried", trial, self.seconds)
        self.display.note(f"trial {trial.name} failed and is tried again ({trial.error})")
        self.again.append(trial)

    def _leave(self, trial: Trial) -> None:
        self.host.release(trial.name)
        del self.running[trial.name]
        self.ready.pop(trial.name, None)

    def _settle(self, event: Any, trial: Trial, error: str | None) -> None:
        """A child has come to its end for good: write it down, then learn from it."""
        trial.status, trial.error = event, error
        if trial.reward is None and (known := self._rewards()):
            trial.reward = worst(known)
        self.journal.write(event, trial, self.seconds)
        self._learn(trial)
        over = len(self._over())
        if over % STATE_EVERY == 0:
            values, arrays = self.controller.state()
            self.states.write_async(Checkpoint(self.journal.num_rows, {"controller": arrays} if arrays else {}, values))
        if error is not None:
            self.display.note(f"trial {trial.name} failed: {error}")
            if over >= HOPELESS and all(one.status == "failed" for one in self._over()):
                raise RunError(f"the first {over} children failed, the last one: {error}", role=f"trial {trial.name}")

    def _learn(self, trial: Trial, is_new: bool = True) -> None:
        """Let the controller learn from a child, and after the first one that has a reward from those before it.

        Args:
            is_new: False: the controller knows already.
        """
        if trial.reward is None:
            self.unrewarded.append(trial)
            return
        if is_new:
            self.controller.learn(trial.choices, trial.reward)
        for one in self.unrewarded:
            one.reward = worst([trial.reward])
            if is_new:
                self.controller.learn(one.choices, one.reward)
        self.unrewarded = []

    # ------------------------------------------------------------------------------------------------------ beginnings
    def _check_base(self) -> None:
        """What all children would fail from is found before the first one.

        Raises:
            UsageError: the task cannot be built, its images are not there, or its cost cannot be counted.
        """
        from distml.tasks.build import build_task
        from distml.tasks.cifar import check_cifar10

        job = self.base.job
        build_task(job, self.directory.path)
        if isinstance(job.task, ClassificationSpec) and job.task.data == "cifar10":
            check_cifar10(Path(job.task.path or ""))
        self._cost(job)

    def _cost(self, job: JobSpec) -> float | None:
        if self.job.reward.cost is None:
            return None
        from distml.tasks.cost import cost_of

        return float(cost_of(job, self.job.reward.cost))

    def _make_host(self) -> Host:
        job, sources, folder = self.base.job, self.context.sources, self.directory.path / FOLDER
        inject = self.context.inject
        injections = {f"{index:04d}": of_member(inject, index) for index in range(self.job.trials) if inject}
        if self.context.where == "inline":
            from distml.runtime.members import InlineHost

            return InlineHost(job, sources, folder, self.job.max_concurrent or 1, injections)
        from distml.runtime.ray_members import RayHost

        wanted = self.job.max_concurrent or self.job.trials
        if self.job.max_concurrent is None and cluster_address(self.context.address) is None:  # a Ray of our own
            wanted = max(1, len(os.sched_getaffinity(0)) // (job.resources.workers * job.resources.cpus_per_worker))
        host = RayHost(job, sources, folder, min(wanted, self.job.trials), self.context.address, injections,
                       say=self.display.note)  # fmt: skip
        self.hosts = list(host.hosts)
        return host

    def _play_back(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Bring trials and controller to where the journal ends."""
        known = trials_of(rows)
        self.again = deque(trial for trial in known.values() if trial.status == "open")
        self.trials = dict(sorted(known.items(), key=lambda item: item[1].number))
        self.earlier_s = max((row["wall_s"] for row in rows), default=0.0)
        num_known = self._load_state(len(rows))
        for index, row in enumerate(rows):
            if row["event"] == "proposed":
                if index >= num_known and list(self.controller.propose()) != row["decisions"]:
                    self.display.note(f"the controller proposes otherwise than before for trial {row['trial']}: from "
                                      "here on the search is not the one that it was")  # fmt: skip
            elif row["event"] in ("finished", "failed"):
                self._learn(self.trials[row["trial"]], index >= num_known)
        for trial in self._over():
            better = self.best is None or self._reward(trial) > self._reward(self.best)
            if trial.status == "finished" and math.isfinite(trial.metric(self.job.reward.metric)) and better:
                self.best = trial

    def _load_state(self, num_rows: int) -> int:
        """Load the newest kept state of the controller; how many rows of the journal it knows."""
        for step in reversed(self.states.steps()):
            if step > num_rows:
                continue
            try:
                kept = self.states.load(step)
            except CheckpointDamaged as error:
                self.display.note(f"{error}; the whole journal is played back")
                continue
            self.controller.load(kept.state, kept.tensors.get("controller", {}))
            return step
        return 0

    def _check_reported(self, answer: Advanced) -> None:
        metric = self.job.reward.metric
        if metric in answer.metrics or any(trial.status == "finished" for trial in self.trials.values()):
            return
        known = sorted(name for name in answer.metrics if name.startswith("eval/"))
        close = near(metric, known)
        hint = f"did you mean {close}?" if close else f"it reports {', '.join(known) or 'nothing'}"
        raise UsageError(f"reward.metric: the base's evaluation does not report {metric}; {hint}")

    # ---------------------------------------------------------------------------------------------------------- results
    @property
    def seconds(self) -> float:
        """Since the start, counted over resumes."""
        return self.earlier_s + time.perf_counter() - self.began

    def _over(self) -> list[Trial]:
        return [trial for trial in self.trials.values() if trial.status != "open"]

    def _rewards(self) -> list[float]:
        """Of those that came to something."""
        metric, finished = self.job.reward.metric, (one for one in self._over() if one.status == "finished")
        return [one.reward for one in finished if one.reward is not None and math.isfinite(one.metric(metric))]

    @staticmethod
    def _reward(trial: Trial) -> float:
        return -math.inf if trial.reward is None else trial.reward

    def front(self) -> list[Trial]:
        """The Pareto front of metric and cost, by rising cost; without a cost the best child alone."""
        done = [trial for trial in self._over() if trial.status == "finished"]
        if self.job.reward.cost is None:
            return [] if self.best is None else [self.best]
        rows = [(trial.cost, trial.metric(self.job.reward.metric)) for trial in done]
        return [done[index] for index in pareto_front(rows, ("min", "max"))]

    def _report(self, trial: Trial) -> None:
        """A row of the search's own metrics.jsonl, the result so far, and a line on the display."""
        over, metric = len(self._over()), self.job.reward.metric
        row: dict[str, Any] = {metric: trial.metric(metric)}
        if trial.reward is not None:
            row["nas/reward"] = trial.reward
        if trial.cost is not None:
            row[f"nas/{self.job.reward.cost}"] = trial.cost
        if self.best is not None:
            row["nas/best_reward"] = self.best.reward
        if self.controller.baseline is not None:
            row["nas/baseline"] = self.controller.baseline
        self.directory.metrics.append({"step": over, "wall_s": self.seconds, **row})
        if trial is self.best or time.perf_counter() - self.recorded_at >= RESULT_EVERY_S:
            self.recorded_at = time.perf_counter()
            self._record(durable=False, status="running")
        self.display.evaluated(over, row)
        self.display.report(over, over / self.job.trials, row)

    def _record(self, **changes: Any) -> None:
        best, metrics = self.best, {}
        found: dict[str, Any] | None = None
        if best is not None:
            metrics = dict(best.metrics)
            metric = self.job.reward.metric
            front = [trial.name for trial in self.front()]
            found = {"metric": metric, "value": best.metric(metric), "step": best.step, "trial": best.name,
                     "reward": best.reward, "cost": best.cost, "pareto": front}  # fmt: skip
        metrics |= changes.pop("metrics", {})
        self.directory.result.update(step=len(self._over()), wall_s=self.seconds, metrics=metrics, best=found,
                                     **changes)  # fmt: skip

    def _write_best(self, trial: Trial) -> None:
        spec = self._spec(trial)
        assert not isinstance(spec, str)
        write_atomically(self.directory.path / "best.yaml", spec.dump())

    def _finish(self) -> None:
        """Measure the best child on the test split, once, and say what was found.

        Raises:
            RunError: no child has finished with a finite metric.
        """
        self.states.wait()
        failed = [trial for trial in self._over() if trial.status == "failed"]
        if self.best is None:
            cause = failed[-1].error if failed else f"{self.job.reward.metric} was never a finite number"
            raise RunError(f"no child finished; the last one: {cause}", role="search", step=len(self._over()))
        self._write_best(self.best)
        self._record(status="done", error=None, metrics=self._test(self.best))
        for line in self._closing(failed):
            self.display.note(line)

    def _test(self, best: Trial) -> dict[str, float]:
        """Its own final weights, in this process: nothing is trained again."""
        folder = TrialFolder(self.directory.path, best.name).directory
        scores = test_scores(folder.path)
        folder.result.update(metrics={**best.metrics, **scores})
        return scores

    def _closing(self, failed: Sequence[Trial]) -> list[str]:
        metric, cost, front = self.job.reward.metric, self.job.reward.cost, self.front()
        lines: list[str] = []
        if cost is not None:
            lines.append(f"Pareto front, {metric} against {cost}: {len(front)} of {len(self._over())} children")
            shown = front if len(front) <= FRONT_SHOWN else front[-FRONT_SHOWN:]
            for trial in shown:
                lines.append(f"  {trial.name}  {metric} {number(trial.metric(metric))}  {cost} {trial.cost:,.0f}  "
                             f"reward {number(trial.reward)}")  # fmt: skip
        if failed:
            names = ", ".join(trial.name for trial in failed[:FRONT_SHOWN])
            lines.append(f"{len(failed)} children failed: {names}{' …' if len(failed) > FRONT_SHOWN else ''} "
                         f"(the last one: {failed[-1].error})")  # fmt: skip
        assert self.best is not None
        lines.append(f"best: trial {self.best.name}, reward {number(self.best.reward)}; its own final weights are "
                     f"tested; {self.directory.path / 'best.yaml'} trains it anew")  # fmt: skip
        return lines

    def fail(self, error: BaseException) -> None:
        """Record how it failed, or that it was interrupted; the journal has all else."""
        ended = record_of_end(error)
        if self.has_started:
            self._record(**ended)
        else:  # what an earlier process came to stays as it is
            self.directory.result.update(**ended)

    def close(self) -> None:
        """End children, processes, threads and files, whatever happened."""
        close_all(*self.closes, self.states.close, self.journal.close, self.directory.metrics.close)
