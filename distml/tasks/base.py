"""What is learned: the `Task` that a user writes, and the small values that it takes and gives.

A task knows a model, a stream of batches, a loss and an evaluation. It never knows ray, other ranks or optimisers.

Shapes: B examples of a batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor, nn

from distml.tasks.data import Batch, Dataset, length, take, to_device


@dataclass(frozen=True, slots=True)
class Progress:
    """The only clock a task may use.

    Attributes:
        version: changes of the model's weights so far.
        examples: examples in those changes, over all workers.
        frames: environment steps in them, as the agent sees them.
        fraction: share of the budget that is spent, 0 to 1.
    """

    version: int = 0
    examples: int = 0
    frames: int = 0
    fraction: float = 0.0


@dataclass(slots=True)
class Mean:
    """A sum and the count it is over: they travel together, so that means of unequal parts stay exact."""

    total: float
    count: float

    def __add__(self, other: Mean) -> Mean:
        return Mean(self.total + other.total, self.count + other.count)

    @property
    def value(self) -> float:
        """The mean; NaN over nothing."""
        return self.total / self.count if self.count else math.nan


@dataclass(slots=True)
class Loss:
    """A loss as a sum over examples, tokens or frames.

    Attributes:
        total: scalar tensor, the sum over `count` examples; its gradient is what workers add up.
        count: how many the sum is over. The update divides the workers' summed gradients by their summed counts.
        metrics: further means, reported as `train/NAME`; a name with a slash (`rl/episode_return_mean`) as it is.
        frames: environment steps that this batch is the first to use; 0 where it comes from a dataset, or again. Of
            several phases, the last one's are counted.
    """

    total: Tensor
    count: float
    metrics: Mapping[str, Mean] = field(default_factory=dict)
    frames: float = 0.0


@dataclass(frozen=True)
class Part:
    """One consumer's part of a split.

    Attributes:
        index: which part, 0 to count - 1.
        count: how many parts there are.
        seed: this consumer's own seed.
        split: `train`, `validation` or `test`.
        batch_size: examples of this part in one batch; 0: not said.
    """

    index: int
    count: int
    seed: int
    split: str
    batch_size: int = 0
    dataset: Dataset | None = field(default=None, repr=False)
    device: torch.device = field(default=torch.device("cpu"), repr=False)

    def data(self) -> Batch:
        """This part of the task's dataset for the split, as one batch: parts are nearly equal and cover it once."""
        if self.dataset is None:
            raise ValueError("part.data() needs the task's own data(split)")
        total = length(self.dataset)
        start, stop = total * self.index // self.count, total * (self.index + 1) // self.count
        return to_device(take(self.dataset, torch.arange(start, stop), start), self.device)

    def batches(self) -> Iterator[Batch]:
        """What `data` gives, in batches of at most `batch_size` rows (0: in one).

        There are as many of them in every part, the last of some parts empty: where the weights are cut over the
        workers, each use of the model is a collective.
        """
        if self.dataset is None:
            raise ValueError("part.batches() needs the task's own data(split)")
        total = length(self.dataset)
        start, stop = total * self.index // self.count, total * (self.index + 1) // self.count
        longest = -(-total // self.count)
        size = self.batch_size or longest
        for first in range(start, start + longest, size):
            rows = torch.arange(min(first, stop), min(first + size, stop))
            yield to_device(take(self.dataset, rows, first), self.device)


@runtime_checkable
class Stream(Protocol):
    """Where batches come from when they are not a dataset's: it may act with the current model."""

    def next(self, model: nn.Module, progress: Progress) -> Batch:
        """The next batch of this part."""
        ...

    def state(self) -> dict[str, Any] | None:
        """JSON values and tensors that `load_state` continues from exactly; None: it begins anew at checkpoints."""
        ...

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from what `state` gave."""
        ...


class Accumulator(nn.Module):
    """A module that counts what it sees, such as running moments: workers' counts are summed, where buffers that
    are not its own are averaged.

    Its persistent buffers (floating, best float64) are of two kinds:

        sums    named in `sums`: additive in what this worker alone has seen since they were last taken. They may be
                relative to the base (squares about its mean).
        base    all others: what everyone agrees on. Only `absorb` and the exchange change them, so that they are the
                same on every worker, bit for bit.

    A module adds to `sums` whenever it sees something. When they are taken, they are written into the buffers summed
    over workers, and `absorb` is called: everything that was seen is in the base once and only once. What it computes
    with in between (say, the moments of base and sums together, frozen for a rollout) is its own affair, in tensors
    that are not persistent.

    When they are taken:

        synchronous strategies, a single worker   at every evaluation and checkpoint, on all workers
        async, ssp                                with every gradient. The clock keeps the order in which the workers'
                                                  sums arrived, each answer brings what is new in it, and every worker
                                                  absorbs one after the other. So a base is always the fold of all sums
                                                  up to some place in that order; the evaluating worker's is the newest.
                                                  What a worker has seen since its last gradient dies with it, as that
                                                  gradient would.
    """

    sums: ClassVar[tuple[str, ...]] = ()

    def absorb(self) -> None:
        """Fold `sums` into the base and zero them; zero sums change nothing. A function of the buffers alone."""
        raise TypeError(f"{type(self).__name__} must define absorb(self)")

    def rebase(self, before: Mapping[str, Tensor]) -> None:
        """`sums` are relative to the base `before` (by buffer's name): express them relative to the base of now.

        Nothing to do by default: for sums that do not refer to the base.
        """


Phase: TypeAlias = tuple[str, str]


class Task:
    """What is learned. Constructed as `MyTask(**args)` in every process: cheap, no device, no network.

    Attributes:
        needs: what the task relies on, out of `group_mean`, `whole_weights`, `one_version`; a strategy that does not
            offer it is refused before anything starts.
        phases: ordered (loss method, parameter pattern). Each phase is one backward and one exchange over the
            parameters that match its pattern; the first phase that matches a parameter owns it.
        builds_in_pieces: `build_model` draws each parameter in the submodule that owns it, so that submodules can be
            cut over the workers as they are built.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    phases: ClassVar[tuple[Phase, ...]] = (("loss", "*"),)
    builds_in_pieces: ClassVar[bool] = False

    def build_model(self) -> nn.Module:
        """The model, with the same weights on every rank: it is called under the run's seed."""
        raise TypeError(f"{type(self).__name__} must define build_model(self)")

    def data(self, split: str) -> Dataset:
        """The dataset of a split: a tuple or dict of tensors of equal length, or a map-style torch dataset."""
        raise TypeError(f"{type(self).__name__} must define data(self, split) or stream(self, part)")

    def stream(self, part: Part) -> Stream | None:
        """Batches of this part, for tasks without a dataset; None: `data` is used."""
        return None

    def loss(self, model: nn.Module, batch: Batch, progress: Progress) -> Loss | Tensor:
        """A `Loss`, or a scalar tensor that is taken as the mean over the batch's examples."""
        raise TypeError(f"{type(self).__name__} must define loss(self, model, batch, progress)")

    def after_update(self, model: nn.Module, progress: Progress) -> None:
        """Called after each change of the weights; must be a function of the weights alone (a target network)."""

    def evaluate(self, model: nn.Module, part: Part, progress: Progress) -> dict[str, Mean]:
        """Sums and counts over this part of `part.split`; by default the mean loss.

        Where the weights are cut over the workers (zero/3) each use of the model is a collective: every worker must
        make the same, in the same order, also for a part with fewer rows or none. `part.batches()` gives each as many.
        """
        batch = part.data()
        if not length(batch):
            return {}
        loss = as_loss(self.loss(model, batch, progress), batch, "loss")
        return {"loss": Mean(float(loss.total), loss.count)}

    def group_mean(self, tensor: Tensor) -> Tensor:
        """The mean of `tensor` over all workers, a constant; only for tasks whose `needs` name `group_mean`."""
        return tensor.detach()


def as_loss(value: Loss | Tensor, batch: Batch, method: str) -> Loss:
    """What a loss method returned as a `Loss`.

    Raises:
        TypeError: it is neither a `Loss` nor a scalar tensor, or what it holds is of a wrong type.
        ValueError: its count, or its frames, are negative or not finite.
    """
    if isinstance(value, Loss):
        metrics = as_means(value.metrics, f"the metrics of {method}")
        count, frames = as_number(value.count, f"the count of {method}"), as_number(value.frames, f"frames of {method}")
        loss = Loss(value.total, count, metrics, frames)
    elif isinstance(value, Tensor):
        count = length(batch)
        loss = Loss(value * count if value.ndim == 0 else value, float(count))
    else:
        raise TypeError(f"{method} must return a scalar tensor or a distml.Loss, not {type(value).__name__}")
    if not isinstance(loss.total, Tensor) or loss.total.ndim != 0:
        shape = tuple(loss.total.shape) if isinstance(loss.total, Tensor) else type(loss.total).__name__
        raise TypeError(f"{method} must return a scalar, not {shape}; return its mean, or distml.Loss(sum, count)")
    if not (math.isfinite(loss.count) and loss.count >= 0):
        raise ValueError(f"the count of {method} is {loss.count:g}; it is how many examples the sum is over")
    if not (math.isfinite(loss.frames) and loss.frames >= 0):
        raise ValueError(
            f"the frames of {method} are {loss.frames:g}; they are environment steps used for the first time"
        )
    return loss


def as_means(values: object, what: str) -> dict[str, Mean]:
    """Named means with plain numbers in them; tensors of one element are numbers.

    Raises:
        TypeError: it is not a dict of `Mean`s.
    """
    if not isinstance(values, Mapping):
        raise TypeError(f"{what} must be a dict of distml.Mean(total, count), not {type(values).__name__}")
    means = {}
    for name, mean in values.items():
        if not isinstance(name, str):
            raise TypeError(f"{what} must be named by text, not {name!r}")
        if not isinstance(mean, Mean):
            raise TypeError(f"{what} must be distml.Mean(total, count) values; {name!r} is {type(mean).__name__}")
        where = f"{name!r} in {what}"
        means[name] = Mean(
            as_number(mean.total, f"the total of {where}"), as_number(mean.count, f"the count of {where}")
        )
    return means


def as_number(value: object, what: str) -> float:
    """A number, or a tensor or array of one element, as a float.

    Raises:
        TypeError: it is something else.
    """
    try:
        return float(value.detach() if isinstance(value, Tensor) else value)  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError):
        shape = getattr(value, "shape", None)
        kind = type(value).__name__ + (f" of shape {tuple(shape)}" if shape is not None else "")
        raise TypeError(f"{what} must be a number, not {kind}") from None
