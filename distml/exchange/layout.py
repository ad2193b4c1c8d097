"""The logical index: where each trained parameter lies in the flat vector, and where that vector may be cut.

The vector is ordered by phase, then by parameter group, then as the model names its parameters. A *segment* is the
contiguous range of one phase and group. Segments are divided into *blocks* counted from their own start, and shards
are cut at blocks only. Whatever is computed block by block, in order, therefore does not depend on the number of
shards, and a vectorised kernel meets the same elements in the same lanes. No torch here: the driver reads it too.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

MAX_BLOCK = 65_536
MIN_BLOCK = 256
Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Entry:
    """One trained parameter: elements [offset, offset + numel) of the flat vector."""

    name: str
    shape: tuple[int, ...]
    phase: int
    group: int
    offset: int
    numel: int


@dataclass(frozen=True)
class Segment:
    """Elements [start, stop): one phase, one parameter group."""

    start: int
    stop: int
    phase: int
    group: int


@dataclass(frozen=True)
class Layout:
    """The flat vector's index; a function of the model and the parameter groups alone."""

    entries: tuple[Entry, ...]

    @classmethod
    def build(cls, parameters: Iterable[tuple[str, Sequence[int], int, int]]) -> Layout:
        """From (name, shape, phase, group) in the model's order."""
        entries, offset = [], 0
        for name, shape, phase, group in sorted(parameters, key=lambda row: (row[2], row[3])):
            numel = int(np.prod(shape, dtype=np.int64))
            entries.append(Entry(name, tuple(shape), phase, group, offset, numel))
            offset += numel
        return cls(tuple(entries))

    @property
    def numel(self) -> int:
        """Elements of the whole vector."""
        return self.entries[-1].offset + self.entries[-1].numel if self.entries else 0

    @cached_property
    def segments(self) -> tuple[Segment, ...]:
        """The contiguous ranges of one phase and group, in order."""
        found: list[Segment] = []
        for entry in self.entries:
            stop = entry.offset + entry.numel
            if found and (found[-1].phase, found[-1].group) == (entry.phase, entry.group):
                found[-1] = Segment(found[-1].start, stop, entry.phase, entry.group)
            else:
                found.append(Segment(entry.offset, stop, entry.phase, entry.group))
        return tuple(found)

    @cached_property
    def block_size(self) -> int:
        """Elements of a block: 65,536, smaller for small models so that they can be cut at all."""
        size = MIN_BLOCK
        while size < MAX_BLOCK and size * 64 < self.numel:
            size *= 2
        return size

    @cached_property
    def blocks(self) -> tuple[tuple[int, int], ...]:
        """All blocks [start, stop) in order."""
        return tuple(
            (start, min(start + self.block_size, segment.stop))
            for segment in self.segments
            for start in range(segment.start, segment.stop, self.block_size)
        )

    def phase_range(self, phase: int) -> tuple[int, int]:
        """Elements [start, stop) of one phase; of one without parameters [x, x), where the next one begins."""
        own = [segment for segment in self.segments if segment.phase == phase]
        if own:
            return own[0].start, own[-1].stop
        before = max((segment.stop for segment in self.segments if segment.phase < phase), default=0)
        return before, before

    def shard(self, index: int, count: int) -> tuple[int, int]:
        """Elements [start, stop) of shard `index` of `count`: nearly equal runs of whole blocks, possibly empty."""
        starts = [start for start, _ in self.blocks] + [self.numel]

        def cut(position: int) -> int:
            target = self.numel * position / count
            return (
                min(starts, key=lambda start: abs(start - target)) if 0 < position < count else position and self.numel
            )

        return cut(index), cut(index + 1)

    def names(self, vector: Array) -> dict[str, Array]:
        """Views of a flat vector under the parameters' names, in their shapes."""
        return {e.name: vector[e.offset : e.offset + e.numel].reshape(e.shape) for e in self.entries}

    def flatten(self, tensors: Mapping[str, Array]) -> Array:
        """The flat vector of named tensors; the inverse of `names`."""
        if not self.entries:
            return np.zeros(0, np.float32)
        return np.concatenate([np.ravel(tensors[entry.name]) for entry in self.entries])

    def to_json(self) -> list[dict[str, Any]]:
        """As JSON values."""
        return [asdict(entry) for entry in self.entries]

    @classmethod
    def from_json(cls, rows: Iterable[Mapping[str, Any]]) -> Layout:
        """The inverse of `to_json`."""
        return cls(tuple(Entry(**{**row, "shape": tuple(row["shape"])}) for row in rows))
