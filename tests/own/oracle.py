"""Plain torch beside distml: a job trained in one loop over the whole batch, with torch.optim's classes.

Also `train`, which drives a job inline without a run directory.
"""

from __future__ import annotations

import copy
import fnmatch
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from distml.events import Evaluated, Event, Failed, Finished, Report, Snapshot
from distml.exchange.flat import to_numpy
from distml.runs.checkpoints import CheckpointStore
from distml.runtime.inline import InlineRuntime
from distml.spec.loader import load_spec
from distml.spec.schema import JobSpec
from distml.strategies.base import freeze, seed_everything
from distml.tasks.build import build_task
from distml.tasks.data import DataOrder, length, take
from distml.tasks.sources import SourceTree

OWN = Path(__file__).parent


def spec_of(task: Any = "small:Small", **changes: Any) -> dict[str, Any]:
    """A small job as a dict; `changes` replace top-level keys, `workers` and `steps` are short for theirs."""
    workers, steps = changes.pop("workers", 1), changes.pop("steps", 30)
    base: dict[str, Any] = {
        "distml": "v1", "name": "test", "task": {"name": task} if isinstance(task, str) else task,
        "optimizer": {"name": "sgd", "lr": 0.1}, "batch_size": 12, "stop": {"steps": steps},
        "evaluate": {"every": 1000}, "checkpoint": {"every": 1000}, "log": {"every": 10, "to": []},
        "resources": {"workers": workers},
    }  # fmt: skip
    return copy.deepcopy(base | changes)


def job_of(spec: dict[str, Any]) -> JobSpec:
    """The checked job; own tasks lie beside this file."""
    return load_spec(spec, directory=OWN).job


@dataclass
class Trained:
    """What an inline run left."""

    runtime: InlineRuntime
    events: list[Event] = field(default_factory=list)

    @property
    def weights(self) -> torch.Tensor:
        """The flat vector: the servers', else rank 0's replica."""
        servers = self.runtime.servers
        return servers.weights() if servers is not None else self.runtime.trainers[0].strategy.flat.weights

    @property
    def strategies(self) -> list[Any]:
        return [trainer.strategy for trainer in self.runtime.trainers]

    @property
    def named(self) -> dict[str, np.ndarray]:
        return self.runtime.trainers[0].strategy.flat.layout.names(to_numpy(self.weights))

    def of(self, kind: type) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]

    @property
    def reports(self) -> list[Report]:
        return self.of(Report)

    @property
    def finished(self) -> list[Finished]:
        return self.of(Finished)

    @property
    def evaluated(self) -> list[Evaluated]:
        return self.of(Evaluated)

    @property
    def snapshots(self) -> list[Snapshot]:
        return self.of(Snapshot)


def train(spec: dict[str, Any], injections: tuple[str, ...] = ()) -> Trained:
    """Run a job inline and keep its events; a worker's failure is raised."""
    job = job_of(spec)
    runtime = InlineRuntime(job, SourceTree.collect(job.task, OWN), injections)
    trained = Trained(runtime)
    runtime.build(None)
    runtime.begin(None)
    try:
        for event in runtime.events():
            trained.events.append(event)
            if isinstance(event, Failed):
                raise AssertionError(f"{event.message}\n{event.traceback}")
    finally:
        runtime.close()
    return trained


def make_optimizer(job: JobSpec, model: nn.Module) -> torch.optim.Optimizer:
    """torch's own class; fused where torch has it."""
    spec = job.optimizer
    rows: list[dict[str, Any]] = [{"params": [], "lr": spec.lr, "weight_decay": spec.weight_decay}]
    rows += [{"params": [], "lr": spec.lr if group.lr is None else group.lr,
              "weight_decay": spec.weight_decay if group.weight_decay is None else group.weight_decay}
             for group in spec.groups]  # fmt: skip
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            first = next((k + 1 for k, group in enumerate(spec.groups) if fnmatch.fnmatchcase(name, group.match)), 0)
            rows[first]["params"].append(parameter)
    rows = [row for row in rows if row["params"]]
    if spec.name == "sgd":
        return torch.optim.SGD(rows, lr=spec.lr, momentum=spec.momentum, nesterov=spec.nesterov, fused=True)
    if spec.name == "rmsprop":
        return torch.optim.RMSprop(rows, lr=spec.lr, alpha=spec.alpha, eps=spec.eps, momentum=spec.momentum)
    rule = torch.optim.Adam if spec.name == "adam" else torch.optim.AdamW
    return rule(rows, lr=spec.lr, betas=tuple(spec.betas), eps=spec.eps, fused=True)


def factor(job: JobSpec, version: int) -> float:
    """The schedule, written down once more."""
    schedule = job.optimizer.schedule
    if version < schedule.warmup:
        return (version + 1) / schedule.warmup
    if schedule.name == "step":
        return schedule.factor ** (version // schedule.every)
    if schedule.name == "constant":
        return 1.0
    end = schedule.steps or job.stop.steps
    share = min(1.0, (version - schedule.warmup) / (end - schedule.warmup))
    fall = 1 - share if schedule.name == "linear" else (1 + math.cos(math.pi * share)) / 2
    return schedule.final + (1 - schedule.final) * fall


def clip_and_step(job: JobSpec, model: nn.Module, optimizer: Any, base: list[float], version: int) -> None:
    """Apply the gradients that are there, at the schedule's share of the rates `base`."""
    if job.optimizer.clip_norm is not None:
        nn.utils.clip_grad_norm_(model.parameters(), job.optimizer.clip_norm)
    for group, lr in zip(optimizer.param_groups, base, strict=True):
        group["lr"] = lr * factor(job, version)
    optimizer.step()


def oracle(spec: dict[str, Any], steps: int) -> dict[str, np.ndarray]:
    """The weights after `steps` updates on the whole batch in the data order, under their names."""
    job = job_of(spec)
    SourceTree.collect(job.task, OWN).install()
    task = build_task(job)
    seed_everything(job.seed)
    model = task.build_model().train()
    freeze(model, job.init.freeze if job.init else [])
    optimizer = make_optimizer(job, model)
    base = [group["lr"] for group in optimizer.param_groups]
    dataset = task.data("train")
    order = DataOrder(length(dataset), job.seed)
    for version in range(steps):
        first = version * job.batch_size
        batch = take(dataset, order.entries(first, first + job.batch_size), first)
        loss = task.loss(model, batch, None)
        optimizer.zero_grad()
        (loss.total / loss.count).backward()
        clip_and_step(job, model, optimizer, base, version)
    return {name: to_numpy(parameter) for name, parameter in model.named_parameters() if parameter.requires_grad}


def distance(first: dict[str, np.ndarray], second: dict[str, np.ndarray]) -> float:
    """Largest absolute difference of named arrays."""
    assert first.keys() == second.keys()
    return max(float(np.abs(first[name] - second[name]).max()) for name in first)


def saved(out: Path, step: int | None = None) -> dict[str, dict[str, np.ndarray]]:
    """The tensors of a run directory's checkpoint, by default its newest."""
    store = CheckpointStore(out / "checkpoints", keep=1)
    return store.load(store.steps()[-1] if step is None else step).tensors


def same(first: dict[str, np.ndarray], second: dict[str, np.ndarray]) -> bool:
    """Bitwise equality of named arrays."""
    return first.keys() == second.keys() and all(
        first[name].dtype == second[name].dtype and first[name].tobytes() == second[name].tobytes() for name in first
    )
