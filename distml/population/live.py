"""What a live trainer really computes with: values of a spec's paths, read back from optimiser, module, task, stream.

Nothing is taken from what was asked for. Where an object keeps no such value itself (a loss's coefficient in a user's
own task under another name, say), it is that of the spec that the live object was built from.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from distml.loop import Trainer
from distml.population.applied import Missing, at, plain
from distml.spec.base import Block
from distml.spec.schema import JobSpec
from distml.tasks.base import Task
from distml.tasks.data import DatasetStream

PLAIN = (bool, int, float, str, type(None))


def live_values(trainer: Trainer, paths: Sequence[str]) -> dict[str, Any]:
    """Path -> value now; `optimizer.lr` is the rate before the schedule's factor. What is not there is left out."""
    found: dict[str, Any] = {}
    for path in paths:
        with contextlib.suppress(Missing):
            found[path] = _live(trainer, path)
    return found


def _live(trainer: Trainer, path: str) -> Any:
    first, *rest = path.split(".")
    if first == "optimizer":
        return plain(at(trainer.strategy.live_optimizer(), rest))
    if path == "batch_size" and isinstance(trainer.stream, DatasetStream):
        return trainer.stream.batch_size
    written = plain(at(trainer.job, [first, *rest]))
    if first == "task":
        return _of_task(trainer.task, trainer.model, trainer.job, rest, written)
    return written


def _of_task(task: Task, model: nn.Module, job: JobSpec, rest: list[str], written: Any) -> Any:
    """A value below `task`: of dropout layers, of a block or an argument that the task keeps; else as written."""
    if rest[-1] == "dropout":
        rates = {module.p for module in model.modules() if isinstance(module, nn.Dropout)}
        if len(rates) == 1:
            return rates.pop()
    kept = vars(task)
    for value in kept.values():
        if type(value) is type(job.task):
            return plain(at(value, rest))
    own = rest[1:] if rest[0] == "args" else rest
    for name in (own[0], f"{own[0]}_spec") if own else ():
        if name in kept and isinstance(kept[name], (*PLAIN, Block, Mapping, list, tuple)):
            found = plain(at(kept[name], own[1:]))
            if type(found) is type(written):
                return found
    return written
