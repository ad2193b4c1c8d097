"""The children of an architecture search: what is known of each, their journal, and their folders.

DIR/trials.jsonl       one object per event: the search can be played back from it, exactly
DIR/trials/NNNN/       spec.yaml, metrics.jsonl, result.json: a run directory; of those that were the best so far
                       also checkpoints/
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from distml.errors import UsageError
from distml.population.host import Advanced, Gone, Ready
from distml.runs.checkpoints import CheckpointStore, folder_name
from distml.runs.directory import MetricsFile, RunDirectory
from distml.runs.files import write_atomically
from distml.runs.tensorboard import TensorBoardRows
from distml.runtime.cut import Cut, to_checkpoint
from distml.spec.language_rules import RUN_TOKENIZER
from distml.spec.loader import LoadedSpec
from distml.spec.schema import JobSpec

FILE, FOLDER = "trials.jsonl", "trials"
Happening = Literal["proposed", "finished", "failed", "retried"]


@dataclass
class Trial:
    """One child.

    Attributes:
        choices: index of an option per decision; `values`: by path of the base.
        cost: of its model, where the reward asks for one.
        log_prob, baseline: of the controller when it was proposed, where it has them.
        tries: that failed.
        metrics: its last ones; `reward`: None until it has one.
        error: why it failed, or its last try.
    """

    number: int
    choices: tuple[int, ...]
    values: dict[str, Any]
    cost: float | None = None
    log_prob: float | None = None
    baseline: float | None = None
    tries: int = 0
    status: Literal["open", "finished", "failed"] = "open"
    metrics: dict[str, Any] = field(default_factory=dict)
    reward: float | None = None
    step: int = 0
    seconds: float = 0.0
    error: str | None = None

    @property
    def name(self) -> str:
        """As it stands in folders and files."""
        return f"{self.number:04d}"

    def metric(self, name: str) -> float:
        """One of its metrics; NaN: it has none, or it is NaN."""
        value = self.metrics.get(name)
        return math.nan if value is None else float(value)


class Journal:
    """trials.jsonl: written by one process, each event in one write."""

    def __init__(self, directory: Path) -> None:
        self.file = MetricsFile(directory / FILE)
        self.num_rows = 0

    def write(self, event: Happening, trial: Trial, wall_s: float) -> None:
        """Append an event of a trial."""
        self.file.append({
            "trial": trial.name, "event": event, "wall_s": wall_s, "values": trial.values, "step": trial.step,
            "metrics": trial.metrics, "seconds": trial.seconds, "error": trial.error, "decisions": list(trial.choices),
            "cost": trial.cost, "reward": trial.reward, "logprob": trial.log_prob, "baseline": trial.baseline,
        })  # fmt: skip
        self.num_rows += 1

    def read(self) -> list[dict[str, Any]]:
        """All events.

        Raises:
            UsageError: a line is none.
        """
        rows = self.file.read()
        for number, row in enumerate(rows, 1):
            if row.get("event") not in ("proposed", "finished", "failed", "retried") or "decisions" not in row:
                raise UsageError(f"{self.file.path}:{number}: not an event of an architecture search; "
                                 "--fresh begins anew")  # fmt: skip
        self.num_rows = len(rows)
        return rows

    def close(self) -> None:
        """Close the file."""
        self.file.close()


def trials_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, Trial]:
    """All trials as their last events leave them, in the order of these events: so an open one's place is its turn."""
    trials: dict[str, Trial] = {}
    for row in rows:
        name, event = row["trial"], row["event"]
        before = trials.pop(name, None)
        tries = 0 if before is None else before.tries + (event == "retried")
        trials[name] = Trial(
            int(name), tuple(row["decisions"]), row["values"], row["cost"], row["logprob"], row["baseline"], tries,
            event if event in ("finished", "failed") else "open", row["metrics"], row["reward"], row["step"],
            row["seconds"], row["error"],
        )  # fmt: skip
    return trials


class TrialFolder:
    """A child's own folder."""

    def __init__(self, root: Path, name: str) -> None:
        self.root, self.name = root, name
        self.directory = RunDirectory(root / FOLDER / name)

    def begin(self, spec: LoadedSpec[JobSpec], files: Mapping[str, str]) -> None:
        """Write its spec and what that needs; forget an earlier try.

        Args:
            files: the user's own: relative path -> text.
        """
        path = self.directory.path
        path.mkdir(parents=True, exist_ok=True)
        self.directory.metrics.cut_back(-1)
        shutil.rmtree(self.directory.tensorboard, ignore_errors=True)
        write_atomically(self.directory.spec, spec.dump(), durable=False)
        for name, text in files.items():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_text(text, encoding="utf-8")
        if (self.root / RUN_TOKENIZER).exists():
            shutil.copyfile(self.root / RUN_TOKENIZER, path / RUN_TOKENIZER)
        self.directory.result.update(durable=False, status="running", error=None)

    def report(self, rows: Sequence[Mapping[str, Any]], to: Sequence[str]) -> None:
        """Its reports since the last ones.

        Args:
            to: the base's `log.to`.
        """
        for row in rows:
            self.directory.metrics.append(dict(row))
        if "tensorboard" in to:
            TensorBoardRows(self.directory.tensorboard).append(rows)

    def finish(self, answer: Advanced, to: Sequence[str]) -> None:
        """Its reports and its result."""
        self.report(answer.rows, to)
        self.directory.metrics.close()
        self.directory.result.update(durable=False, status="goal_met" if answer.finished == "goal" else "done",
                                     step=answer.step, wall_s=answer.seconds, metrics=dict(answer.metrics))  # fmt: skip

    def fail(self, gone: Gone) -> None:
        """How it failed."""
        self.directory.metrics.close()
        error = {"rank": "trial", "phase": gone.phase, "step": gone.step, "message": gone.cause}
        self.directory.result.update(durable=False, status="failed", error=error)

    def keep(self, cut: Cut, ready: Ready) -> None:
        """Commit its final weights."""
        with CheckpointStore(self.directory.checkpoints, keep=1) as store:
            store.write(to_checkpoint(cut, ready.layout, ready.frozen, {"name": self.name}))
        self.directory.result.update(durable=False, checkpoint=f"checkpoints/{folder_name(cut.version)}")
