"""The worker's loop: one text for every task, every strategy and both runtimes.

`Trainer.advance` is the file's heart: a generator that trains and yields `Event`s. Between two of them its state can be
taken or replaced, in two halves: *shared* (weights, moments, version) and *own* (stream position, random states, sums
since the last report). Where each rank keeps a part of weights and moments, it writes and reads that on the disk
itself, and the shared half is what all know: the clock, and the folder. It consumes a task's batches and a strategy's
exchange, produces events for the driver, and waits only inside `strategy.exchange`; when a peer is gone that wait ends
with `PeerLost`, and the runtime decides.
"""

from __future__ import annotations

import itertools
import random
import time
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from distml.errors import UsageError
from distml.events import Evaluated, Event, Failed, Finished, FirstUpdate, Report, Snapshot, WrittenPart
from distml.exchange.channel import Channel, Group
from distml.exchange.flat import from_numpy, to_numpy
from distml.exchange.layout import Array
from distml.inject import Injector
from distml.memory import resident_bytes
from distml.runs.checkpoints import ranks_folder_name
from distml.runs.parts import MODEL, PartReader, Piece, write_part
from distml.spec.schema import JobSpec
from distml.strategies.agenda import PAUSED, crossed
from distml.strategies.base import BadLossError, Meter, seed_everything
from distml.strategies.build import build_strategy
from distml.tasks.base import Mean, Part, Stream, Task, as_means
from distml.tasks.build import describe
from distml.tasks.data import (
    Batch,
    Dataset,
    DatasetStream,
    check_dataset,
    length,
    micro_batches,
    mix,
    to_device,
)

BEGINS_ANEW = "begins anew"
OWN_WORK = ("stream", "loss", "evaluate")  # what waits for nobody
TENSOR = "__tensor__"


class Trainer:
    """One worker: a task, its stream, and the strategy's half.

    Args:
        job: the spec.
        task: what is learned.
        rank: of this worker.
        world_size: workers.
        device: where the replica lives.
        snapshot_every: steps between snapshots for recovery; None: only checkpoints.
        injections: failures to cause, as `--inject` gives them.
        in_shared_memory: the workers share their hosts' memory.
    """

    def __init__(
        self, job: JobSpec, task: Task, rank: int, world_size: int, device: torch.device | None = None,
        snapshot_every: int | None = None, injections: tuple[str, ...] = (), in_shared_memory: bool = False,
    ) -> None:  # fmt: skip
        self.job, self.task, self.rank, self.world_size = job, task, rank, world_size
        self.device = device or torch.device("cpu")
        self.activity = "start"
        self.strategy = build_strategy(job, rank, world_size, self.device, snapshot_every, in_shared_memory)
        self.injector = Injector(injections, role="rank", index=rank)
        self.datasets: dict[str, Dataset] = {}
        self.has_updated = False
        self.speaks = False  # whether this worker's evaluations and shared state are the ones that count
        self.parts_in: tuple[Path, str] | None = None
        self.hands_over = True  # its state when a checkpoint is due; False: who holds it takes it whenever he wants

    @property
    def activity(self) -> str:
        """What it is doing."""
        return self._activity

    @activity.setter
    def activity(self, name: str) -> None:
        self._activity, self.active_since = name, time.monotonic()

    def motionless_s(self) -> float:
        """How long it has been in the same piece of its own work; 0 while it waits for others."""
        if self._activity not in OWN_WORK or self.strategy.is_waiting:
            return 0.0
        return time.monotonic() - max(self.active_since, self.strategy.waited_until)

    def build(self, start_weights: Mapping[str, Array] | None = None) -> nn.Module:
        """Build stream and replica.

        Raises:
            UsageError: the task or `init` does not fit.
        """
        self.stream, dataset_size = self._build_stream()
        self.model = self.strategy.prepare(self.task, start_weights, dataset_size)
        seed_everything(mix(self.job.seed, self.rank, 1))
        return self.model

    def _build_stream(self) -> tuple[Stream, int | None]:
        job, version = self.job, self.strategy.progress.version
        share = job.batch_size * (self.rank + 1) // self.world_size - job.batch_size * self.rank // self.world_size
        part = Part(self.rank, self.world_size, mix(job.seed, self.rank, version), "train", share, device=self.device)
        states = random_states()
        try:  # like the model: the same on every rank, and whenever it is built
            seed_everything(part.seed)
            stream = self.task.stream(part)
            dataset = self._dataset("train") if stream is None else None
        finally:
            set_random_states(states)
        if stream is not None:
            if job.stop.epochs is not None:
                raise UsageError("stop.epochs needs a task with data(split); this one has a stream of its own")
            return stream, None
        check_dataset(dataset, "train")
        return DatasetStream(dataset, job.seed, job.batch_size, self.rank, self.world_size), length(dataset)

    def begin_stream_anew(self) -> None:
        """What a stream does at a checkpoint whose position cannot be saved exactly."""
        self.stream, _ = self._build_stream()

    def retune(self, job: JobSpec) -> None:
        """Go on with another optimiser's block; the rest of `job` is as before. Between two calls of `advance`."""
        self.strategy.retune(job)
        self.job = job

    def _dataset(self, split: str) -> Dataset:
        """The task's data of a split, asked for once, under the run's seed: it may be drawn or loaded at length."""
        if split not in self.datasets:
            seed_everything(self.job.seed)
            self.datasets[split] = self.task.data(split)
        return self.datasets[split]

    def save_parts_in(self, checkpoints: Path, token: str) -> None:
        """Where this rank writes its part of the state, if its strategy keeps parts.

        Args:
            checkpoints: the run's folder of them, which all ranks and the driver see.
            token: of all ranks that were started together.
        """
        self.parts_in = checkpoints, token

    def connect(self, group: Group | None, channel: Channel | None) -> None:
        """Take the way to the other processes."""
        states = random_states()  # a model may be built in there, from the run's seed
        self.strategy.connect(group, channel)
        set_random_states(states)
        self.model = self.strategy.model

    # ------------------------------------------------------------------------------------------------------- the loop
    def advance(self, until: int | None = None) -> Iterator[Event]:
        """Train until `until` steps or the end of the run, yielding what the driver should know."""
        strategy = self.strategy
        yield from self._rejoin()
        strategy.mark()
        while strategy.finished is None and (until is None or strategy.progress.version < until):
            before = strategy.progress.version
            self.injector.reach(before)
            batch = self._next_batch()
            for phase in strategy.phases:
                pieces = list(micro_batches(batch, self.job.micro_batch_size))
                for index, micro_batch in enumerate(pieces, start=1):
                    self.activity = "loss"
                    loss = self.injector.spoil(strategy.loss(phase, micro_batch, index == len(pieces)), before)
                    self.activity = "backward"
                    strategy.backward(loss)
                self.activity = "exchange"
                strategy.exchange(phase)
            self.activity = "after_update"
            strategy.step()
            yield from self._after_step(before)
        if strategy.finished == PAUSED and not self.job.strategy.is_synchronous:
            yield Snapshot(self.rank, strategy.progress.version, self.own_state(), None, None, False, False, True)
        if strategy.finished is not None:
            yield Finished(self.rank, strategy.progress.version, strategy.finished)

    def _next_batch(self) -> Batch:
        self.activity = "stream"
        return to_device(self.stream.next(self.model, self.strategy.progress), self.device)

    def _rejoin(self) -> Iterator[Event]:
        """Take part from the newest version; an answer that was still under way may ask for something first."""
        before = self.strategy.progress.version
        self.activity = "exchange"
        self.strategy.rejoin()
        if self.strategy.duties:
            yield from self._after_step(before)

    def _after_step(self, before: int) -> Iterator[Event]:
        strategy, duties = self.strategy, self.strategy.duties
        strategy.duties = ()
        version = strategy.progress.version
        if not self.has_updated:
            self.has_updated = True
            yield FirstUpdate(self.rank, version)
        if crossed(before, version, self.job.log.every) or strategy.finished not in (None, "requested"):
            yield self._report()
        if not duties:
            return
        synchronous = self.job.strategy.is_synchronous
        self.speaks = not synchronous or self.rank == 0
        if "evaluate" in duties or "checkpoint" in duties:
            self.activity = "exchange"
            strategy.average_carried()
        if self.hands_over and strategy.agenda.captures(duties):
            self.activity = "checkpoint"
            yield self._snapshot("checkpoint" in duties, "evaluate" in duties)
        if "evaluate" in duties:
            self.activity = "evaluate"
            started = time.perf_counter()
            metrics = self.evaluate("validation")
            strategy.judge(metrics)
            if self.speaks:
                yield Evaluated(self.rank, version, metrics, time.perf_counter() - started, strategy.finished)
        if "checkpoint" in duties and strategy.finished is None and self.stream.state() is None:
            self.activity = "stream"  # not before: its environments may fail, and the checkpoint is due
            self.begin_stream_anew()
        if "evaluate" in duties and not synchronous and strategy.finished is None:
            yield from self._rejoin()
        strategy.mark()

    def _report(self) -> Report:
        meter, strategy = self.strategy.meter, self.strategy
        steps = max(1, meter.steps)
        values = {
            "lr": strategy.learning_rate(), "steps": float(meter.steps), "examples": meter.examples,
            "compute_s": meter.compute_s / steps, "exchange_s": meter.exchange_s / steps,
            "bytes": float(meter.bytes_sent), "staleness_total": float(meter.staleness_total),
            "staleness_max": float(meter.staleness_max), "memory_bytes": float(resident_bytes()),
        }  # fmt: skip
        if meter.grad_norm is not None:
            values["grad_norm"] = meter.grad_norm
        if meter.contributed is not None:
            values["contributed"] = meter.contributed
        means = {name: (mean.total, mean.count) for name, mean in meter.means.items()}
        self.strategy.meter = Meter()
        progress = strategy.progress
        return Report(self.rank, progress.version, progress.examples, progress.fraction, strategy.train_seconds,
                      means, values, meter.staleness_counts, progress.frames)  # fmt: skip

    # ------------------------------------------------------------------------------------------------------ evaluation
    def evaluate(self, split: str) -> dict[str, float]:
        """The task's evaluation of `split`, reduced over the workers that take part, as `eval/NAME`."""
        with self.strategy.evaluating() as (index, count):
            means = self.strategy.reduce_means(self.evaluate_part(split, index, count))
        prefix = "eval" if split == "validation" else split
        return {f"{prefix}/{name}": mean.value for name, mean in sorted(means.items())}

    def evaluate_part(self, split: str, index: int, count: int) -> dict[str, Mean]:
        """Sums and counts of one part; training's random states are left as they were."""
        states, seed = random_states(), mix(self.job.seed, index, 2)
        self.model.eval()
        try:
            dataset = self._dataset(split) if type(self.task).data is not Task.data else None
            if dataset is not None and self.strategy.computes_together and type(self.task).evaluate is Task.evaluate:
                check_parts(split, length(dataset), count)
            seed_everything(seed)
            part = Part(index, count, seed, split, self.job.rows_at_once, dataset, self.device)
            with torch.no_grad(), self.strategy.reading():
                means = self.task.evaluate(self.model, part, self.strategy.progress)
        finally:
            self.model.train()
            set_random_states(states)
        return as_means(means, "what evaluate returns")

    # ----------------------------------------------------------------------------------------------------------- state
    def _snapshot(self, checkpoint: bool, evaluated: bool) -> Snapshot:
        strategy, part = self.strategy, None
        shared = None if checkpoint or evaluated else strategy.kept_state()
        if shared is None and not strategy.is_finite():
            raise FloatingPointError(f"the weights are not finite at step {strategy.progress.version}")
        if strategy.keeps_parts:
            shared, part = {"clock": strategy.clock_state()}, self._write_part()
        elif self.speaks and shared is None:
            shared = strategy.shared_state()
        if not self.speaks:
            shared = None
        carried = strategy.carried.arrays() if self.speaks else None
        return Snapshot(self.rank, strategy.progress.version, self.own_state(), shared, carried, checkpoint,
                        evaluated, strategy.finished is not None, part)  # fmt: skip

    def _write_part(self) -> WrittenPart | None:
        """Write this rank's part of the state; rank 0's has the tensors that are not trained too.

        None: nobody keeps this run's checkpoints.
        """
        if self.parts_in is None:
            return None
        strategy, (checkpoints, token) = self.strategy, self.parts_in
        folder = checkpoints / ranks_folder_name(strategy.progress.version, token)
        others: dict[str, Array] = {}
        if self.rank == 0:
            others = {name: to_numpy(tensor) for name, tensor in strategy.frozen().items()} | strategy.carried.arrays()
        shapes = {entry.name: entry.shape for entry in strategy.layout.entries}
        passes = itertools.count()

        def pieces() -> Iterator[Piece]:
            if next(passes) > 0:  # the first one is for the header
                self.injector.at("save")
            for kind, name, first, values in strategy.pieces():
                yield kind, name, first, to_numpy(values)

        return WrittenPart(str(folder), write_part(folder, self.rank, self.world_size, pieces, shapes, others))

    def own_state(self) -> dict[str, Any]:
        """This worker's half: stream position, random states, buffers, the meter."""
        stream = self.stream.state()
        meter = self.strategy.meter
        return {
            "stream": BEGINS_ANEW if stream is None else savable(stream, "the stream's state()"),
            "random": random_states(),
            "carried": self.strategy.own_buffers(),
            "strategy": self.strategy.own_state(),
            "since_average": self.strategy.since_average,
            "train_seconds": self.strategy.train_seconds,
            "meter": {**vars(meter), "means": {n: [m.total, m.count] for n, m in meter.means.items()}},
        }

    def load(self, shared: Mapping[str, Any], own: Mapping[str, Any] | None) -> None:
        """Continue from a state; without an own half (more workers than before) the stream starts at the version."""
        strategy = self.strategy
        if strategy.keeps_parts:
            self._load_part(shared)
        else:
            strategy.load_shared(shared)
        strategy.meter = Meter()
        strategy.load_own(own.get("strategy", {}) if own is not None else {})
        if own is None or "stream" not in own:
            rounds = strategy.progress.version if self.job.strategy.is_synchronous else (
                strategy.progress.examples // self.job.batch_size)  # fmt: skip
            if isinstance(self.stream, DatasetStream):
                self.stream.load_state({"round": rounds})
            else:
                self.stream, _ = self._build_stream()
            return
        if own["stream"] == BEGINS_ANEW:
            self.stream, _ = self._build_stream()
        else:
            try:
                self.stream.load_state(restore_tensors(own["stream"]))
            except Exception as error:
                cause = f"rank {self.rank}: its stream cannot go on from the state that it gave: {describe(error)}"
                raise UsageError(cause) from error
        set_random_states(own["random"])
        strategy.carried.load(own["carried"])
        strategy.since_average, strategy.train_seconds = own["since_average"], own["train_seconds"]
        means = {name: Mean(*pair) for name, pair in own["meter"]["means"].items()}
        strategy.meter = Meter(**{**own["meter"], "means": means})

    def _load_part(self, shared: Mapping[str, Any], *, moments: bool = True) -> None:
        """Read this rank's part from a checkpoint's folder, however many ranks of whatever strategy have written it."""
        strategy = self.strategy
        with PartReader(Path(shared["folder"])) as reader:

            def read(kind: str, name: str, start: int, stop: int) -> Array | None:
                return reader.read(kind, name, start, stop) if moments or kind == MODEL else None

            strategy.load_pieces(read, shared["clock"])
            there = reader.shapes(MODEL)
            strategy.carried.load(
                {name: reader.whole(MODEL, name) for name in strategy.carried.tensors if name in there}
            )

    def load_for_test(self, saved: Mapping[str, Any]) -> None:
        """Take a checkpoint's model for an evaluation after training: its tensors, or where this rank finds its own."""
        if self.strategy.keeps_parts:
            self._load_part(saved, moments=False)
            return
        state = {name: from_numpy(array) for name, array in saved.items()}
        with torch.no_grad():
            for name, tensor in self.model.state_dict().items():
                if name in state:
                    tensor.copy_(state[name])


def check_parts(split: str, examples: int, workers: int) -> None:
    """Where forwards are collectives, `Task.evaluate` must make one on every worker, and makes none of nothing."""
    if examples < workers:
        raise ValueError(f"the {split} split has {examples} examples for {workers} workers, who evaluate together; "
                         "take fewer workers, or zero's stage 2")  # fmt: skip


def failure(trainer: Trainer, error: Exception) -> Failed:
    """A worker's exception as an event that names rank, phase and step."""
    text = "".join(traceback.format_exception(error))
    version = trainer.strategy.progress.version
    not_finite = isinstance(error, (BadLossError, FloatingPointError))
    return Failed(trainer.rank, version, trainer.activity, describe(error), text, not_finite)


def savable(tree: Any, place: str) -> Any:
    """A copy of a stream's state for a checkpoint: tensors are marked, tuples become lists as they do in JSON.

    Raises:
        TypeError: something in it cannot be saved; named by its place.
    """
    if isinstance(tree, Mapping):
        for key in tree:
            if not isinstance(key, str):
                raise TypeError(f"{place} has the key {key!r}; keys must be text")
        return {key: savable(value, f"{place}[{key!r}]") for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [savable(value, f"{place}[{index}]") for index, value in enumerate(tree)]
    if isinstance(tree, torch.Tensor) and tree.layout == torch.strided and not tree.is_complex():
        return {TENSOR: to_numpy(tree).copy()}
    if isinstance(tree, (np.ndarray, np.generic)) and tree.dtype.kind in "biuf" and tree.dtype.itemsize <= 8:
        return tree.copy() if isinstance(tree, np.ndarray) else tree.item()
    if tree is None or isinstance(tree, (bool, int, float, str)):
        return tree
    kind = f" of {tree.dtype}" if isinstance(tree, (torch.Tensor, np.ndarray)) else ""
    raise TypeError(f"{place} is a {type(tree).__name__}{kind}; only JSON values, tensors and arrays can be saved")


def restore_tensors(tree: Any) -> Any:
    """The inverse of what `savable` does to tensors."""
    if isinstance(tree, Mapping):
        if set(tree) == {TENSOR}:
            return from_numpy(np.array(tree[TENSOR]))
        return {key: restore_tensors(value) for key, value in tree.items()}
    return [restore_tensors(value) for value in tree] if isinstance(tree, list) else tree


def random_states() -> dict[str, Any]:
    """The states of torch's, numpy's and Python's generators as JSON values and arrays."""
    kind, keys, position, has_gauss, cached = np.random.get_state()
    version, words, gauss = random.getstate()
    states: dict[str, Any] = {
        "torch": to_numpy(torch.get_rng_state()).copy(),
        "numpy": [str(kind), np.asarray(keys), int(position), int(has_gauss), float(cached)],
        "python": [version, list(words), gauss],
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states["cuda"] = to_numpy(torch.cuda.get_rng_state()).copy()
    return states


def set_random_states(states: Mapping[str, Any]) -> None:
    """The inverse of `random_states`."""
    torch.set_rng_state(from_numpy(np.asarray(states["torch"], np.uint8)))
    kind, keys, position, has_gauss, cached = states["numpy"]
    np.random.set_state((kind, np.asarray(keys, np.uint32), position, has_gauss, cached))
    version, words, gauss = states["python"]
    random.setstate((version, tuple(words), gauss))
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(from_numpy(np.asarray(states["cuda"], np.uint8)))
