"""`kind: rllib`: RLlib trains, distml keeps the run directory, resumes, evaluates and decides when it is over.

    RLlibRun.train:  algorithm.train() -> result -> row of metrics.jsonl
                     every evaluate.every: greedy episodes -> row, goal, best checkpoint
                     every checkpoint.every: algorithm.save_to_path -> sealed, verified, committed

One process drives: what RLlib runs besides are its own Ray actors, whose deaths it handles by its own settings
(`restart_failed_env_runners`). A step is a training iteration. Signals are looked at between iterations: the first asks
for a checkpoint and the end, the second ends at once. Whatever the end is, it passes `close`.
"""

from __future__ import annotations

import math
import tempfile
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ray.rllib.algorithms.algorithm import Algorithm

from distml.adapters.rllib_build import EVALUATION, TEST, greedy_episodes, training_metrics
from distml.adapters.rllib_seal import RLLIB_FOLDER, make_key, opened, seal
from distml.adapters.rllib_session import Session, explain
from distml.errors import DistmlError, RunError, UsageError
from distml.runs.checkpoints import Checkpoint, CheckpointStore, folder_name
from distml.runs.directory import RunDirectory
from distml.runs.display import Display
from distml.runs.history import Goal
from distml.runs.tensorboard import TensorBoardWriter
from distml.runtime.endings import StopSignals, close_all, record_of_end
from distml.spec.rllib import EVALUATED, OFFLINE, RLlibSpec
from distml.tasks.sources import SourceTree

RESULT_EVERY_S = 1.0
BUDGETS = ("steps", "frames", "seconds")


class RLlibRun:
    """One run.

    Args:
        job: the spec.
        directory: its run directory, locked.
        sources: the file of a user's own environment.
        address: of a running cluster; None: RAY_ADDRESS, the surrounding job's cluster, else a private Ray.
        display: where progress is shown.
        started: `time.perf_counter()` when the command began.
    """

    def __init__(
        self, job: RLlibSpec, directory: RunDirectory, sources: SourceTree, address: str | None, display: Display,
        started: float,
    ) -> None:  # fmt: skip
        self.job, self.directory, self.sources, self.address = job, directory, sources, address
        self.display, self.started = display, started
        self.store = CheckpointStore(directory.checkpoints, job.checkpoint.keep)
        self.session = Session(job, sources, address, directory.logs)
        self.boards: TensorBoardWriter | None = None
        self.metrics: dict[str, Any] = {}
        self.best: dict[str, Any] | None = None
        self.start_step, self.step, self.frames, self.seconds = 0, 0, 0, 0.0
        self.scores: dict[str, Any] | None = None  # the evaluation of the step that the run goes on from
        self.saved: set[int] = set()
        self.reported, self.heard, self.result_written_at = (0, 0.0), 0.0, 0.0
        self.has_started, self.signals = False, StopSignals()

    @property
    def algorithm(self) -> Algorithm:
        """RLlib's algorithm."""
        return self.session.algorithm

    # ------------------------------------------------------------------------------------------------------- starting
    def build(self, resume: bool) -> None:
        """Start Ray and the algorithm; go on from the newest good checkpoint where there is one.

        Raises:
            UsageError: the spec, the environment, the checkpoint or the resources do not fit.
        """
        checkpoint = self.store.newest_good(self.display.note) if resume else None
        folder = opened(self.directory.path, checkpoint.step) if checkpoint is not None else None
        if folder is None:
            make_key(self.directory.path)
        self.session.build(checkpoint.step if checkpoint is not None else 0)
        self.signals.take()
        if checkpoint is not None and folder is not None:
            self.session.restore(folder, checkpoint.step)
            self.start_step = self.step = checkpoint.step
            self.saved = {self.step}
            self.frames, self.seconds = int(checkpoint.state["frames"]), float(checkpoint.state["wall_s"])
            self.best = self._stored_best()
        self.reported, self.heard = (self.frames, self.seconds), self.seconds
        self.directory.metrics.cut_back(self.step if self.step else -1)
        for row in self.directory.metrics.read():
            self.metrics |= {name: value for name, value in row.items() if "/" in name}
            if row["step"] == self.step and EVALUATED[0] in row:
                self.scores = row

    def _stored_best(self) -> dict[str, Any] | None:
        best = self.job.checkpoint.best
        found = self.store.best(best.metric) if best is not None else None
        if best is None or found is None or found[0] > self.step:
            return None
        return {"metric": best.metric, "step": found[0], "value": found[1]}

    # ------------------------------------------------------------------------------------------------------- training
    def train(self) -> str:
        """Train to the end; the run's status."""
        if "tensorboard" in self.job.log.to:
            self.boards = TensorBoardWriter(self.directory.tensorboard, resumed_at=self.start_step or None)
        self.signals.is_training = True
        scores = self.scores
        while (reason := self._over(scores)) is None or (reason in BUDGETS and scores is None):
            if reason is not None:  # there is always an evaluation at the end
                scores = self._evaluate()
                continue
            if self.step and self.step % self.job.checkpoint.every == 0:
                self._checkpoint()
            self._iterate()
            scores = self._evaluate() if self.step % self.job.evaluate.every == 0 else None
        if not self.frames and self.job.algorithm not in OFFLINE and reason != "requested":
            raise self._silent(f"not a single frame in {self.step} iterations")
        self._checkpoint()
        self.signals.is_training = False
        return self._finish(reason)

    def _iterate(self) -> None:
        began = time.perf_counter()
        try:
            result = self.algorithm.train()
        except Exception as error:
            raise self._failure(error, "train") from error
        self.seconds += time.perf_counter() - began
        self.step = int(result["training_iteration"])
        if self.job.algorithm not in OFFLINE:  # for those RLlib counts what it has read
            self._count(int(result.get("num_env_steps_sampled_lifetime", 0)))
        row: dict[str, Any] = {}
        if not self.has_started:
            self.has_started = True
            row["timing/start_s"] = began - self.started
        if self.step % self.job.log.every == 0 or self._over(None) is not None or row:
            self._report(row | training_metrics(result))

    def _count(self, frames: int) -> None:
        """RLlib goes on when its env runners fail, restarts them for hours, and only logs why."""
        if frames > self.frames:
            self.frames, self.heard = frames, self.seconds
        limit = self.job.limits.lost_after_s
        if self.seconds - self.heard > limit:
            raise self._silent(f"no new frame for {limit:g} s of training (limits.lost_after_s)")

    def _silent(self, what: str) -> RunError:
        return RunError(f"{what} from the env runners; RLlib only logs why, see {self.directory.logs}/rllib.log",
                        role="rllib", phase="train", step=self.step)  # fmt: skip

    def _report(self, row: dict[str, Any]) -> None:
        frames, seconds = self.reported
        if self.frames:
            row["rl/frames"] = self.frames
            row["throughput/frames_per_s"] = (self.frames - frames) / max(self.seconds - seconds, 1e-9)
        self.reported = self.frames, self.seconds
        self._write(row)
        self.display.report(self.step, min(1.0, max(self._shares().values())), row)

    def _evaluate(self) -> dict[str, float]:
        began = time.perf_counter()
        try:
            scores = greedy_episodes(self.algorithm, self.job.evaluate.max_frames)
        except Exception as error:
            raise self._failure(error, "evaluate") from error
        found = {f"eval/{name}": value for name, value in scores.items()}
        self._write({**found, "timing/evaluate_s": time.perf_counter() - began})
        self.display.evaluated(self.step, found)
        if self._is_best(found):
            assert self.best is not None
            self.store.mark_best(self.step, self.best["metric"], self.best["value"])
            self._checkpoint()
        return found

    def _is_best(self, scores: dict[str, float]) -> bool:
        best = self.job.checkpoint.best
        if best is None:
            return False
        value, before = scores[best.metric], self.best["value"] if self.best is not None else None
        sign = 1 if best.mode == "max" else -1
        if not math.isfinite(value) or (before is not None and sign * value <= sign * before):
            return False
        self.best = {"metric": best.metric, "value": value, "step": self.step}
        return True

    def _over(self, scores: Mapping[str, Any] | None) -> str | None:
        """Why the run is over now: the goal, a budget, a signal; None: it is not."""
        goal = self.job.stop.goal
        value = scores[goal.metric] if goal is not None and scores is not None else None
        if goal is not None and value is not None and Goal(goal.metric, goal.at_least, goal.at_most).is_met(value):
            return "goal"
        spent = (name for name, share in self._shares().items() if share >= 1.0)
        return next(spent, "requested" if self.signals.asked else None)

    def _shares(self) -> dict[str, float]:
        """How much of each budget is spent."""
        stop, spent = self.job.stop, (self.step, self.frames, self.seconds)
        budgets = zip(BUDGETS, spent, (stop.steps, stop.frames, stop.seconds), strict=True)
        return {name: used / budget for name, used, budget in budgets if budget is not None}

    # ---------------------------------------------------------------------------------------------------- what is kept
    def _write(self, row: dict[str, Any]) -> None:
        row = {"step": self.step, "wall_s": self.seconds, **row}
        self.directory.metrics.append(row)
        values = {name: value for name, value in row.items() if "/" in name}
        self.metrics |= values
        if self.boards is not None:
            self.boards.scalars(self.step, values, time.time())
        if time.monotonic() - self.result_written_at >= RESULT_EVERY_S:
            self.result_written_at = time.monotonic()
            self.directory.result.update(durable=False, status="running", step=self.step, wall_s=self.seconds,
                                         metrics=self.metrics, best=self.best)  # fmt: skip

    def _checkpoint(self) -> None:
        """Commit a checkpoint of this step, once."""
        if self.step in self.saved or not self.step:
            return
        state = {"name": self.job.name, "algorithm": self.job.algorithm, "frames": self.frames, "wall_s": self.seconds}
        self.store.write(Checkpoint(self.step, state=state, more=self._save))
        self.saved.add(self.step)
        self.directory.result.update(checkpoint=f"checkpoints/{folder_name(self.step)}")

    def _save(self, folder: Path) -> None:
        self.algorithm.save_to_path(str((folder / RLLIB_FOLDER).resolve()))
        seal(self.directory.path, folder, self.step)

    # ---------------------------------------------------------------------------------------------------------- the end
    def _finish(self, reason: str) -> str:
        ends = {"goal": "goal_met", "requested": "interrupted"}
        status = ends.get(reason, "goal_missed" if self.job.stop.goal is not None else "done")
        self._record(status=status, error=None)
        return status

    def _record(self, **changes: Any) -> None:
        steps = self.store.steps()
        checkpoint = f"checkpoints/{folder_name(steps[-1])}" if steps else None
        self.directory.result.update(step=self.step, wall_s=self.seconds, metrics=self.metrics, best=self.best,
                                     checkpoint=checkpoint, **changes)  # fmt: skip

    def _failure(self, error: Exception, phase: str) -> DistmlError:
        """What a failure of RLlib's becomes: before the first iteration is done, a matter of the spec."""
        self.directory.logs.mkdir(exist_ok=True)
        trace = "".join(traceback.format_exception(error))
        (self.directory.logs / "rllib-error.txt").write_text(trace, encoding="utf-8")
        text = f"{explain(error)} (traceback in {self.directory.logs / 'rllib-error.txt'})"
        if self.step == 0:
            return UsageError(f"{self.job.algorithm} on {self.job.environment.id} cannot {phase}: {text}")
        return RunError(text, role="rllib", phase=phase, step=self.step)

    def fail(self, error: BaseException) -> None:
        """Record how the run failed, or that it was interrupted before it began; committed checkpoints stay."""
        ended = record_of_end(error, self.step)
        if self.has_started:
            self._record(**ended)
        else:  # what an earlier run came to stays as it is
            self.directory.result.update(**ended)

    def close(self) -> None:
        """End the algorithm, a Ray of our own, and files, whatever happened."""
        close_all(self.session.close, self.store.close, self.directory.metrics.close)
        if self.boards is not None:
            self.boards.close()


# ------------------------------------------------------------------------------------------------------------- evaluate
def score(job: RLlibSpec, directory: RunDirectory, sources: SourceTree, step: int, split: str) -> dict[str, float]:
    """Greedy episodes of a checkpoint: the evaluation's own (`validation`), or others that no run has seen (`test`).

    Raises:
        UsageError: another split, or a checkpoint that this run did not write.
    """
    if split == "train":
        raise UsageError(f"{job.algorithm} of RLlib has no train split; known: validation, test")
    folder = opened(directory.path, step)
    with tempfile.TemporaryDirectory() as logs:
        session = Session(job, sources, None, Path(logs))
        try:
            session.build(step, TEST if split == "test" else EVALUATION)
            session.restore(folder, step)
            return greedy_episodes(session.algorithm, job.evaluate.max_frames)
        finally:
            session.close()
