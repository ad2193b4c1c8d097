"""A member's own folder in a population's run directory: DIR/members/NN, which is a run directory itself.

spec.yaml (with its newest values; runs as it is)   metrics.jsonl   result.json   checkpoints/
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from distml.errors import UsageError
from distml.population.individual import Individual, Values
from distml.runs.checkpoints import CheckpointStore, folder_name
from distml.runs.directory import RunDirectory
from distml.runs.files import write_atomically
from distml.runs.tensorboard import TensorBoardRows
from distml.spec.language_rules import RUN_TOKENIZER
from distml.spec.loader import LoadedSpec, load_train, with_values
from distml.spec.population import PopulationSpec
from distml.spec.schema import JobSpec

MEMBERS = "members"
STATUS = {"goal": "goal_met", None: "done"}


class MemberFolder:
    """One member's spec, metrics, result and checkpoints.

    Args:
        loaded: the population's spec.
        root: the population's run directory.
        name: of the member, two digits or more.
    """

    def __init__(self, loaded: LoadedSpec[PopulationSpec], root: Path, name: str) -> None:
        assert loaded.base is not None
        self.base, self.job, self.name, self.root = loaded.base, loaded.job, name, root
        self.path = root / MEMBERS / name
        self.path.mkdir(parents=True, exist_ok=True)
        self.directory = RunDirectory(self.path)
        self.boards = TensorBoardRows(self.directory.tensorboard) if "tensorboard" in self.base.job.log.to else None
        # The one that population.json names stays until a newer population.json is there.
        self.store = CheckpointStore(self.directory.checkpoints, max(2, self.job.checkpoint.keep))
        self._newest: tuple[dict[str, Any], LoadedSpec[JobSpec]] | None = None
        self._written: dict[str, Any] | None = None

    def spec(self, values: Values) -> LoadedSpec[JobSpec]:
        """The member's job with these values: evaluated and cut at every decision.

        Raises:
            UsageError: the base does not take these values together.
        """
        if self._newest is not None and self._newest[0] == values:
            return self._newest[1]
        every, best = self.job.every, self.base.job.checkpoint
        checkpoint = {**best.model_dump(mode="python"), "every": every, "keep": self.job.checkpoint.keep}
        name = f"{self.job.name[:90]}-{self.name}"
        spec = with_values(self.base, values, name=name, evaluate={"every": every}, checkpoint=checkpoint)
        self._newest = dict(values), spec
        return spec

    def has_other_stop(self) -> bool:
        """Whether the member trained for another budget before than its base gives it now."""
        try:
            return load_train(self.directory.spec).job.stop != self.base.job.stop
        except UsageError:  # nothing was written yet
            return False

    def write_spec(self, values: Values) -> None:
        """Keep the spec with these values."""
        if self._written != values:
            write_atomically(self.directory.spec, self.spec(values).dump(), durable=False)
            self._written = dict(values)

    def prepare(self, files: Mapping[str, str]) -> None:
        """Put what a spec needs beside it.

        Args:
            files: the user's own: relative path -> text.
        """
        for name, text in files.items():
            (self.path / name).parent.mkdir(parents=True, exist_ok=True)
            (self.path / name).write_text(text, encoding="utf-8")
        if (self.root / RUN_TOKENIZER).exists():
            shutil.copyfile(self.root / RUN_TOKENIZER, self.path / RUN_TOKENIZER)
        self.directory.result.update(durable=False, status="running", error=None)

    def append(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Reports of training."""
        for row in rows:
            self.directory.metrics.append(dict(row))
        if self.boards is not None:
            self.boards.append(rows)

    def cut_back(self, step: int) -> None:
        """Forget the reports of what is done once more; 0: all."""
        self.directory.metrics.cut_back(step or -1)
        if self.boards is not None:
            self.boards.cut_back(step or -1)

    def finish(self, one: Individual, status: str, metric: str) -> None:
        """Say how the member ended.

        Args:
            status: of a member whose own run is not over.
            metric: the objective.
        """
        record, steps = one.record, self.store.steps()
        best = self.store.best(metric)
        error = None if record.error is None else {"rank": "member", "phase": "", "step": record.held.step,
                                                   "message": record.error}  # fmt: skip
        if record.error is not None:
            status = "failed"
        elif record.reason is not None:
            missed = self.base.job.stop.goal is not None and record.reason != "goal"
            status = "goal_missed" if missed else STATUS.get(record.reason, "done")
        self.directory.result.update(
            durable=False, status=status, step=record.held.step, wall_s=record.seconds, metrics=dict(one.metrics),
            best=None if best is None else {"metric": metric, "step": best[0], "value": best[1]}, error=error,
            checkpoint=f"checkpoints/{folder_name(steps[-1])}" if steps else None,
        )  # fmt: skip

    def prune(self, step: int) -> None:
        """Nobody needs more than what is to stay, up to `step`, any more.

        Raises:
            CheckpointFailed: one could not be removed.
        """
        if self.job.checkpoint.keep < self.store.keep:
            self.store.prune(step, self.job.checkpoint.keep)

    def close(self) -> None:
        """Close the files; checkpoints in line are written."""
        self.directory.metrics.close()
