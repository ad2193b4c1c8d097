"""Batches, datasets and the order in which they are visited.

The order depends on seed and epoch alone: round k of the run takes entries [k·B, (k+1)·B) of the epochs' permutations
laid end to end, and rank r of W takes the r-th of W nearly equal slices. Results therefore do not depend on W, any W
works, and the position is one integer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol, TypeAlias, TypeGuard, TypeVar

import torch
from torch import Tensor

Batch: TypeAlias = Any
Dataset: TypeAlias = Any
T = TypeVar("T")


class SelfSplitting(Protocol):
    """A batch whose examples do not lie along the first dimension of its tensors: it is cut and moved by itself."""

    def __len__(self) -> int:
        """Examples in it."""
        ...

    def micro_batches(self, size: int) -> Iterator[Batch]:
        """Pieces of at most `size` examples, or of the fewest that belong together, that cover it once."""
        ...

    def to(self, device: torch.device) -> Batch:
        """The same on `device`."""
        ...


class Placed(Protocol):
    """A dataset that gives whole batches at once, and may let them depend on their place in the data order."""

    def __len__(self) -> int:
        """Examples in it."""
        ...

    def batch_at(self, indices: Tensor, place: int) -> Batch:
        """The examples at `indices` (int64 [B]), which have the places from `place` on in the data order."""
        ...


def splits_itself(batch: Batch) -> TypeGuard[SelfSplitting]:
    """Whether a batch is `SelfSplitting`; by one name only, since every step asks (isinstance would take 50 us)."""
    return hasattr(type(batch), "micro_batches")


def length(batch: Batch) -> int:
    """Examples in a batch or dataset: the length of its first tensor, or of the object itself."""
    if splits_itself(batch):
        return len(batch)
    if isinstance(batch, Mapping):
        return length(next(iter(batch.values()))) if batch else 0
    if isinstance(batch, (tuple, list)):
        return length(batch[0]) if batch else 0
    return len(batch)


def num_rows(batch: Batch, otherwise: float) -> float:
    """Examples in a batch; `otherwise` for a batch of a kind that has no length."""
    try:
        return float(length(batch))
    except TypeError:
        return otherwise


def map_tensors(batch: Batch, function: Any) -> Batch:
    """`batch` with `function` applied to each of its tensors."""
    if isinstance(batch, Tensor):
        return function(batch)
    if isinstance(batch, Mapping):
        return {key: map_tensors(value, function) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(map_tensors(value, function) for value in batch))
    if isinstance(batch, (tuple, list)):
        return type(batch)(map_tensors(value, function) for value in batch)
    return batch


def take(dataset: Dataset, indices: Tensor, place: int = 0) -> Batch:
    """The examples at `indices` (int64 [B]) as one batch.

    Args:
        place: of the first of them in the data order; of a held-out split, whose order is its own, the first index.
    """
    if isinstance(dataset, (tuple, list, Mapping, Tensor)):
        return map_tensors(dataset, lambda tensor: tensor[indices])
    if hasattr(dataset, "batch_at"):
        return dataset.batch_at(indices, place)
    from torch.utils.data import default_collate

    if hasattr(dataset, "__getitems__"):
        return default_collate(dataset.__getitems__(indices.tolist()))
    return default_collate([dataset[index] for index in indices.tolist()])


def to_device(batch: Batch, device: torch.device) -> Batch:
    """`batch` on `device`."""
    if splits_itself(batch):
        return batch.to(device)
    if device.type == "cpu":
        return batch
    return map_tensors(batch, lambda tensor: tensor.to(device, non_blocking=True))


def micro_batches(batch: Batch, size: int | None) -> Iterator[Batch]:
    """`batch` in pieces of at most `size` examples, along the first dimension or as it splits itself; None: whole."""
    count = length(batch) if size is not None else 0
    if size is None or count <= size:
        yield batch
    elif splits_itself(batch):
        yield from batch.micro_batches(size)
    else:
        yield from _rows(batch, count, size)


def _rows(batch: Batch, count: int, size: int) -> Iterator[Batch]:
    for start in range(0, count, size):
        yield map_tensors(batch, lambda tensor, start=start: tensor[start : start + size])


def check_dataset(dataset: Dataset, split: str) -> None:
    """Refuse a dataset that cannot be indexed, is empty, or whose tensors differ in length.

    Raises:
        ValueError, TypeError: with what is wrong.
    """
    if not hasattr(dataset, "__len__"):
        raise TypeError(f"data({split!r}) must return a tuple of tensors or a map-style dataset, not {type(dataset)}")
    if isinstance(dataset, (tuple, list, Mapping)):
        lengths = [len(tensor) for tensor in (dataset.values() if isinstance(dataset, Mapping) else dataset)]
        if len(set(lengths)) > 1:
            raise ValueError(f"data({split!r}) has tensors of different lengths: {lengths}")
    if length(dataset) == 0:
        raise ValueError(f"data({split!r}) is empty")


class DataOrder:
    """Indices of a dataset of `count` examples in the order of training; a function of seed and epoch alone."""

    def __init__(self, count: int, seed: int) -> None:
        self.count, self.seed = count, seed
        self._epoch, self._permutation = -1, torch.empty(0, dtype=torch.int64)

    def entries(self, start: int, stop: int) -> Tensor:
        """Entries [start, stop) of the epochs' permutations laid end to end (int64)."""
        pieces = []
        while start < stop:
            epoch, offset = divmod(start, self.count)
            size = min(stop - start, self.count - offset)
            pieces.append(self.permutation(epoch)[offset : offset + size])
            start += size
        return torch.cat(pieces) if pieces else torch.empty(0, dtype=torch.int64)

    def permutation(self, epoch: int) -> Tensor:
        """The order of one epoch (int64 [count])."""
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(mix(self.seed, epoch))
            self._epoch, self._permutation = epoch, torch.randperm(self.count, generator=generator)
        return self._permutation


class DatasetStream:
    """The r-th slice of each round's global batch, in the data order."""

    def __init__(self, dataset: Dataset, seed: int, batch_size: int, rank: int, world_size: int) -> None:
        self.dataset, self.batch_size = dataset, batch_size
        self.order = DataOrder(length(dataset), seed)
        self.start, self.stop = batch_size * rank // world_size, batch_size * (rank + 1) // world_size
        self.round = 0

    def next(self, model: object, progress: object) -> Batch:
        """This worker's slice of the next round's batch."""
        first = self.round * self.batch_size
        self.round += 1
        start, stop = first + self.start, first + self.stop
        return take(self.dataset, self.order.entries(start, stop), start)

    def state(self) -> dict[str, Any]:
        """The position: one integer."""
        return {"round": self.round}

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue at the round that `state` names."""
        self.round = int(state["round"])


def mix(*numbers: int) -> int:
    """A 63-bit seed from several integers (splitmix64 over them)."""
    state = 0
    for number in numbers:
        state = (state + number + 0x9E3779B97F4A7C15) & (2**64 - 1)
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
        state ^= state >> 31
    return state >> 1
