"""The worker's half that all strategies share: a model, phases, accumulation, precision, progress, evaluation, clock.

A strategy says how the workers' gradients become one update; it implements `_exchange`. It never knows what the task
is, and never imports ray. What it holds of the model is one of two things:

    whole   every worker has all weights, as views of one flat vector (`strategies/replica.py`). One of them hands over
            the state: `shared_state`, `load_shared`.
    parts   each rank has a part of weights and moments that no other has (`keeps_parts`). Nobody ever gathers them:
            each rank gives its own (`pieces`), and reads what it needs of others' (`load_pieces`).

Both are indexed alike, by a parameter's name and the elements within it (`layout`), so one's state is the other's.
"""

from __future__ import annotations

import contextlib
import fnmatch
import json
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from distml.errors import UsageError
from distml.exchange.channel import Channel, Group
from distml.exchange.flat import FRAMES, ROWS, VOTE, Carried, from_numpy, to_numpy
from distml.exchange.layout import Array, Layout
from distml.spec.schema import JobSpec, OptimizerSpec
from distml.strategies.agenda import Agenda, Spent, crossed, stronger
from distml.strategies.optimizer import schedule_factor
from distml.tasks.base import Loss, Mean, Progress, Task, as_loss
from distml.tasks.data import Batch, num_rows

# (kind, parameter's name, its first element of these, the elements: 1-D float32). Kind is "model" for weights, else a
# moment's name as `FlatOptimizer` has them.
Piece = tuple[str, str, int, Tensor]
# (kind, parameter's name, start, stop) -> elements [start, stop) of the flattened parameter in float32; None: the state
# that is read has no such moment.
ReadPiece = Callable[[str, str, int, int], Array | None]

MODEL = "model"
LOW_PRECISION = {"bf16": torch.bfloat16, "fp16": torch.float16}

# Votes to end the run at the next version. They are added up over workers: whoever sees 1 or more knows of a request.
REQUESTED, TIMED_OUT = 1.0, 2.0**-12


class BadLossError(ValueError):
    """A loss that is NaN or infinite."""


class TaskModule(nn.Module):
    """The one module that is wrapped: its forward is the task's loss, under the run's precision."""

    def __init__(self, task: Task, model: nn.Module, precision: str, device: torch.device) -> None:
        super().__init__()
        self.task, self.model = task, model
        self.precision, self.device_type = precision, device.type

    def forward(self, method: str, batch: Batch, progress: Progress) -> Loss:
        """The loss of one micro-batch."""
        low = LOW_PRECISION.get(self.precision)
        with contextlib.nullcontext() if low is None else torch.autocast(self.device_type, low):
            return as_loss(getattr(self.task, method)(self.model, batch, progress), batch, method)


@dataclass
class Meter:
    """Sums since the last report."""

    means: dict[str, Mean] = field(default_factory=dict)
    steps: int = 0
    examples: float = 0.0
    compute_s: float = 0.0
    exchange_s: float = 0.0
    bytes_sent: int = 0
    staleness_total: int = 0
    staleness_max: int = 0
    staleness_counts: dict[str, int] = field(default_factory=dict)  # staleness (as JSON's keys are) -> gradients
    contributed: float | None = None  # examples of this worker's applied gradients so far; None: nobody has said
    grad_norm: float | None = None

    def add(self, name: str, mean: Mean) -> None:
        """Add to a named mean."""
        self.means[name] = self.means[name] + mean if name in self.means else mean

    def add_staleness(self, versions: int) -> None:
        """A gradient of this worker was applied."""
        self.staleness_total += versions
        self.staleness_max = max(self.staleness_max, versions)
        self.staleness_counts[str(versions)] = self.staleness_counts.get(str(versions), 0) + 1


class Strategy(ABC):
    """The worker's half.

    Args:
        job: the spec.
        rank: of this worker.
        world_size: workers.
        device: where the replica lives.
        snapshot_every: steps between snapshots for recovery; None: only checkpoints.

    Attributes:
        layout: the index of the trained parameters.
        model: what the task computes with; `connect` may replace it.
    """

    layout: Layout
    model: nn.Module

    def __init__(
        self, job: JobSpec, rank: int, world_size: int, device: torch.device, snapshot_every: int | None = None
    ) -> None:
        self.job, self.rank, self.world_size, self.device = job, rank, world_size, device
        self.snapshot_every = snapshot_every
        self.finished: str | None = None
        self.duties: tuple[str, ...] = ()
        self.progress = Progress()
        self.train_seconds = 0.0
        self.stop_requested = False
        self.meter = Meter()
        self.since_average = 0.0  # count of this worker's gradients since the carried tensors were averaged
        self._count = 0.0  # what this phase's gradient is a sum over: examples, tokens or frames
        self._rows = 0.0  # examples of this step, whatever its losses count
        self._frames = 0.0  # environment steps that this step is the first to use
        self._mark = time.perf_counter()
        self.is_waiting, self.waited_until = False, 0.0  # for others, in the middle of own work; `time.monotonic()`

    # ------------------------------------------------------------------------------------------------------- building
    def prepare(self, task: Task, start_weights: Mapping[str, Array] | None, dataset_size: int | None) -> nn.Module:
        """Build the model under the run's seed, with `init` and freezing applied, and index what is trained of it."""
        self.task = task
        self.model = self._build_model(start_weights)
        self.phases = list(range(len(task.phases)))
        patterns = [group.match for group in self.job.optimizer.groups]
        self._take_parameters([pattern for _, pattern in task.phases], patterns)
        self.carried = Carried(self.model)
        self.module = TaskModule(task, self.model, self.job.precision, self.device)
        updates = 1 if self.job.strategy.is_synchronous else self.world_size
        self.agenda_arguments: dict[str, Any] = {"updates_per_round": updates, "dataset_size": dataset_size,
                                 "snapshot_every": self.snapshot_every}  # fmt: skip
        self.agenda = Agenda(self.job, **self.agenda_arguments)
        if "group_mean" in task.needs:
            task.group_mean = self.group_mean  # type: ignore[method-assign]
        self._build()
        return self.model

    def _build_model(self, start_weights: Mapping[str, Array] | None) -> nn.Module:
        """The model as the run begins with it."""
        seed_everything(self.job.seed)
        model: nn.Module = self.task.build_model()
        if not isinstance(model, nn.Module):
            raise TypeError(f"build_model must return an nn.Module, not {type(model).__name__}")
        if not any(parameter.is_meta for parameter in model.parameters()):  # those have no values to move
            model.to(self.device)
        model.train()
        if start_weights is not None:
            take_start_weights(model, start_weights, self.job.init.only if self.job.init else ["*"])
        freeze(model, self.job.init.freeze if self.job.init else [])
        return model

    @abstractmethod
    def _take_parameters(self, phase_patterns: list[str], group_patterns: list[str]) -> None:
        """Index the trained parameters (`layout`), and take them into one's own storage."""

    def _build(self) -> None:  # noqa: B027
        """What a strategy adds to `prepare`."""

    @property
    def keeps_parts(self) -> bool:
        """Whether each rank has a part of the state that no other has, and gives and takes it by `pieces`."""
        return self.job.strategy.keeps_parts

    @abstractmethod
    def frozen(self) -> dict[str, Tensor]:
        """The model's parameters that are not trained."""

    @abstractmethod
    def fingerprint(self) -> str:
        """A hash of all that must be equal on every rank at the start."""

    @abstractmethod
    def connect(self, group: Group | None, channel: Channel | None) -> None:
        """Take the way to the other processes; called again after a recovery."""

    # ------------------------------------------------------------------------------------------------------- one step
    def loss(self, phase: int, batch: Batch, last: bool) -> Loss:
        """The task's loss of a micro-batch, under the run's precision.

        Args:
            last: of this step and phase: an exchange follows its backward.

        Raises:
            BadLossError: it is NaN or infinite.
        """
        method = self.task.phases[phase][0]
        loss = self._forward(last, method, batch, self.progress)
        value = float(loss.total.detach())
        if not math.isfinite(value):
            raise BadLossError(f"{method} is {value}")
        if phase == self.phases[-1]:  # every phase sees the same batch
            self._rows += num_rows(batch, loss.count)
            self._frames += loss.frames
        self.meter.add(method, Mean(value, loss.count))
        for name, mean in loss.metrics.items():
            self.meter.add(name, mean)
        return loss

    def backward(self, loss: Loss) -> None:
        """Add the gradients of a micro-batch's sum to those of the step."""
        if loss.total.requires_grad:
            self._backward(loss.total)
        self._count += loss.count

    def _forward(self, last: bool, *arguments: Any) -> Loss:
        loss: Loss = self.module(*arguments)
        return loss

    def _backward(self, total: Tensor) -> None:
        total.backward()  # type: ignore[no-untyped-call]

    def exchange(self, phase: int) -> None:
        """Let all workers' gradients of this phase become one update of its weights."""
        started, before = self._mark, time.perf_counter()
        self.meter.compute_s += before - started
        last = phase == self.phases[-1]
        if last:
            self.meter.examples += self._rows
            self.since_average += self._count
        with torch.no_grad():
            self._exchange(phase, self._count, last)
        self._count = self._rows = self._frames = 0.0
        self._mark = time.perf_counter()
        self.meter.exchange_s += self._mark - before
        self.train_seconds += self._mark - started

    @abstractmethod
    def _exchange(self, phase: int, count: float, last: bool) -> None:
        """Sum, divide by the summed counts, clip, update, refresh the weights; on the last phase `_advance`."""

    def step(self) -> None:
        """The step is complete: the task follows the new weights."""
        with torch.no_grad():
            self.task.after_update(self.model, self.progress)
        self.meter.steps += 1

    def _tail(self) -> list[float]:
        """What travels with this worker's gradients, in the order of COUNT, VOTE, ROWS, FRAMES."""
        return [self._count, self.vote, self._rows, self._frames]

    @property
    def spent(self) -> Spent:
        """What the run has used up at this version."""
        return Spent(self.progress.version, self.progress.examples, self.progress.frames)

    def _end_step(self, tail: list[float]) -> None:
        """A synchronous step is done: the next version, by the sum of what travelled with all workers' gradients."""
        done = self.progress
        spent = Spent(done.version + 1, done.examples + round(tail[ROWS]), done.frames + round(tail[FRAMES]))
        finished = self.agenda.spent(spent) or self.verdict(tail[VOTE])
        self._advance(spent, finished, self.agenda.duties(spent.version, finished))

    def _advance(self, spent: Spent, finished: str | None, duties: tuple[str, ...]) -> None:
        fraction = self.agenda.fraction(Spent(spent.version, spent.examples, spent.frames, self.train_seconds))
        self.progress = Progress(spent.version, spent.examples, spent.frames, fraction)
        self.finished, self.duties = finished, duties

    @property
    def vote(self) -> float:
        """This worker's vote to end at the next version: it was asked to, or its time budget is used up."""
        seconds = self.job.stop.seconds
        if self.stop_requested:
            return REQUESTED
        return TIMED_OUT if seconds is not None and self.train_seconds >= seconds else 0.0

    @staticmethod
    def verdict(votes: float) -> str | None:
        """Why the run is over by the sum of all workers' votes, the same on every worker; or None."""
        return "requested" if votes >= REQUESTED else "seconds" if votes > 0 else None

    def _needs_norm(self, version: int, last: bool) -> bool:
        """Whether the mean gradient's norm is needed: to clip it, or for the report."""
        return self.job.optimizer.clip_norm is not None or (last and crossed(version, version + 1, self.job.log.every))

    def learning_rate(self) -> float:
        """Of parameter group 0, for the next update."""
        spec = self.job.optimizer
        return spec.lr * schedule_factor(spec.schedule, self.progress.version, self.agenda.budget_steps)

    # -------------------------------------------------------------------------------------------------- evaluation etc.
    @property
    @abstractmethod
    def group(self) -> Group:
        """The ranks that evaluate and average together."""

    def group_mean(self, tensor: Tensor) -> Tensor:
        """The mean over all workers (offer `group_mean`)."""
        total = tensor.detach().clone()
        with self._waiting():
            self.group.all_reduce(total)
        return total / self.group.size

    @contextlib.contextmanager
    def _waiting(self) -> Iterator[None]:
        """Inside, others may be waited for: who does so is not blocked itself."""
        self.is_waiting = True
        try:
            yield
        finally:
            self.is_waiting, self.waited_until = False, time.monotonic()

    def average_carried(self) -> None:
        """Floating buffers become their average by count over the group, integer ones rank 0's; sums are absorbed."""
        vector, sums = self.carried.average_vector(), self.carried.sums_vector()
        if self.group.size > 1 and self.carried.tensors:
            weighted = torch.cat([vector * self.since_average, vector.new_tensor([self.since_average]), sums])
            self.group.all_reduce(weighted)
            total, sums = weighted[vector.numel()], weighted[vector.numel() + 1 :]
            if total > 0:
                self.carried.set_average(weighted[: vector.numel()] / total)
            integers = {n: a.tolist() for n, a in self.carried.integers().items()} if self.rank == 0 else {}
            first = json.loads(self.group.all_gather(json.dumps(integers).encode())[0])
            dtypes = {name: to_numpy(self.carried.tensors[name]).dtype for name in first}
            self.carried.load({name: _array(value, dtypes[name]) for name, value in first.items()})
        self.carried.absorb(sums)
        self.since_average = 0.0

    def own_buffers(self) -> dict[str, Array]:
        """Copies of the buffers as this worker has them, for its own half."""
        return self.carried.arrays()

    def reduce_means(self, means: Mapping[str, Mean]) -> dict[str, Mean]:
        """Sum named means over the group, in rank order."""
        payload = json.dumps({name: [float(mean.total), float(mean.count)] for name, mean in means.items()})
        summed: dict[str, Mean] = {}
        with self._waiting():
            parts = self.group.all_gather(payload.encode())
        for part in parts:
            for name, (total, count) in json.loads(part).items():
                summed[name] = summed.get(name, Mean(0.0, 0.0)) + Mean(total, count)
        return summed

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[tuple[int, int]]:
        """(index, count) of the part that this worker evaluates; nobody's weights change meanwhile."""
        yield self.rank, self.world_size

    @property
    def computes_together(self) -> bool:
        """Whether every forward is a collective, so that all ranks must make as many of them."""
        return False

    def reading(self) -> contextlib.AbstractContextManager[None]:
        """Inside, the task may read the model's weights outside its loss."""
        return contextlib.nullcontext()

    def mark(self) -> None:
        """Time from here on is training (called after evaluations and the like)."""
        self._mark = time.perf_counter()

    def judge(self, metrics: dict[str, float]) -> None:
        """Take an evaluation of the current version into account; may finish the run."""
        self.finished = stronger(self.finished, self.agenda.judge(self.progress.version, metrics))

    def rejoin(self) -> None:  # noqa: B027
        """Take part again after an evaluation, where others went on meanwhile."""

    def leave(self) -> None:  # noqa: B027
        """The run is over for this worker: nobody waits for it."""

    def close(self) -> None:  # noqa: B027
        """Give back what belongs to the whole process, where another run may follow in it."""

    # ----------------------------------------------------------------------------------------------------------- state
    def shared_state(self) -> dict[str, Any] | None:
        """The shared half (copies): weights, moments, carried and frozen tensors, clock; None: servers have it."""
        return None

    def own_state(self) -> dict[str, Any]:
        """What this worker alone has besides its stream: JSON values and arrays (copies).

        When a run goes on with another number of workers, arrays under `sums` (such as residuals) are added up over
        the workers that one takes the place of, and what is under `common` is given to all; the rest stays with its
        rank.
        """
        return {}

    def load_own(self, state: Mapping[str, Any]) -> None:  # noqa: B027
        """The inverse of `own_state`; an empty state is a worker that is new."""

    def kept_state(self) -> dict[str, Any] | None:
        """Keep the state of now in shared memory: the shared half without its vectors, which the driver finds there.

        Every worker is asked, and keeps its part. None: there is no such place, `shared_state` hands it over.
        """
        return None

    def pieces(self) -> Iterator[Piece]:
        """This rank's own part of the state, for those that keep parts.

        Every element of every trained parameter is in the pieces of exactly one rank, for each kind. They are on the
        CPU, and only good until the next one is asked for.
        """
        raise NotImplementedError(f"{type(self).__name__} keeps no parts")

    def load_pieces(self, read: ReadPiece, clock: Mapping[str, Any]) -> None:
        """Continue from a state that others may have written: fill this rank's part, and take the clock.

        A moment that the state does not have begins at zero.
        """
        raise NotImplementedError(f"{type(self).__name__} keeps no parts")

    def load_shared(self, shared: Mapping[str, Any]) -> None:
        """Continue from a shared half: the model and the clock."""
        raise NotImplementedError(f"{type(self).__name__} keeps parts")

    @abstractmethod
    def is_finite(self) -> bool:
        """Whether the weights that this rank holds are."""

    def load_clock(self, clock: Mapping[str, Any]) -> None:
        """Continue from what `clock_state` gave, at the beginning of a step."""
        self.agenda.load_state(clock["agenda"])
        self._count = self._rows = self._frames = 0.0
        spent = Spent.of(clock)
        self._advance(spent, self.agenda.over(spent), ())

    def pause_at(self, version: int | None) -> None:
        """End for now at this version (None: only at the run's end), and go on if that is what it had ended for."""
        if version != self.agenda.until:
            self.agenda.until = self.agenda_arguments["until"] = version
            self.load_clock(self.clock_state())

    def retune(self, job: JobSpec) -> None:
        """Go on with another optimiser's block: moments that both rules have stay, others begin at zero."""
        raise NotImplementedError(f"{type(self).__name__} cannot change its optimiser in place")

    def live_optimizer(self) -> OptimizerSpec:
        """The block by which weights are updated, as the update itself reads it."""
        raise NotImplementedError(f"{type(self).__name__} does not show its optimiser")

    def clock_state(self) -> dict[str, Any]:
        """JSON values: version, examples, frames and the evaluations so far."""
        progress = self.progress
        return {"version": progress.version, "examples": progress.examples, "frames": progress.frames,
                "agenda": self.agenda.state()}  # fmt: skip


def seed_everything(seed: int) -> None:
    """Seed torch, numpy and random."""
    import random

    import numpy as np

    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def take_start_weights(model: nn.Module, tensors: Mapping[str, Array], patterns: list[str]) -> None:
    """Copy the tensors whose names match into the model.

    Raises:
        UsageError: none matches, or a shape differs.
    """
    own = model.state_dict()
    chosen = [name for name in own if name in tensors and any(fnmatch.fnmatchcase(name, p) for p in patterns)]
    if not chosen:
        raise UsageError(f"init: no tensor of the source matches both {patterns} and the model ({sorted(own)[:4]} ...)")
    for name in chosen:
        if tuple(own[name].shape) != tensors[name].shape:
            raise UsageError(
                f"init: {name} has shape {tensors[name].shape} in the source, {tuple(own[name].shape)} here"
            )
        own[name].copy_(from_numpy(tensors[name]))


def freeze(model: nn.Module, patterns: list[str]) -> None:
    """Take matching parameters out of training.

    Raises:
        UsageError: a pattern matches nothing.
    """
    for pattern in patterns:
        matching = [p for name, p in model.named_parameters() if fnmatch.fnmatchcase(name, pattern)]
        if not matching:
            raise UsageError(f"init.freeze: {pattern!r} matches no parameter of the model")
        for parameter in matching:
            parameter.requires_grad_(False)


def _array(value: Any, dtype: Any) -> Array:
    import numpy as np

    return np.asarray(value, dtype=dtype)
