"""A part of the flat vector and what is done to it in the order of updates; whoever owns it is a server of that part.

A server actor owns one shard of the weights; in shared memory each worker owns one, and updates it for all.

Shapes: S elements of a shard, N of all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from distml.exchange.channel import PULL, Reply
from distml.exchange.compression.base import Decoder
from distml.exchange.compression.build import build_decoder
from distml.exchange.flat import to_numpy
from distml.exchange.layout import Layout
from distml.spec.schema import JobSpec
from distml.strategies.optimizer import FlatOptimizer, applied_optimizer, block_square_norms, clip_scale


@dataclass
class Entry:
    """One ordered update; or (`dropped`) an answer in its place: to who joins, or whose gradient comes after the end.

    Attributes:
        number: position in the order; shards apply entries in it, without gaps.
        members: (rank, ticket) of the gradients, in rank order: sums are taken in this order.
        count: what their sum is over: examples, tokens or frames.
        rows, frames: examples that they came from, and environment steps that are new in them.
        version: of the weights before.
        capture: keep the shard's state after this entry under the new version.
        clock: the clock's state after it, if it is captured.
        lasting: somebody will come for the capture, maybe late: it is evaluated, or becomes a checkpoint.
        lr_factor: what the learning rate is multiplied by (`staleness_scaling`).
        factors: of each member's gradient in the sum, where they differ; `count` is then of the sum that they weight.
        replies: by member: a worker that prefetches may have two gradients in one entry.
    """

    number: int
    phase: int
    members: list[tuple[int, int]]
    count: float
    rows: float
    frames: float
    version: int
    last_phase: bool
    needs_norm: bool = False
    capture: bool = False
    clock: dict[str, Any] | None = None
    lasting: bool = False
    dropped: bool = False
    lr_factor: float = 1.0
    factors: list[float] | None = None
    replies: dict[tuple[int, int], Reply] = field(default_factory=dict)


class Shard:
    """Elements [start, stop) of the flat vector: weights, moments, and gradients that wait to be applied.

    Args:
        job: the spec.
        layout: the whole vector's index.
        shard: [start, stop).
        budget: steps of the run, for schedules without an end of their own.
    """

    def __init__(self, job: JobSpec, layout: Layout, shard: tuple[int, int], budget: int | None) -> None:
        self.job, self.layout, self.range, self.budget = job, layout, shard, budget
        self.gradients: dict[tuple[int, int], Tensor] = {}
        self.reduced: Tensor | None = None
        self.captures: dict[int, dict[str, Any]] = {}
        self.lasting: set[int] = set()
        self.decoder: Decoder | None = None
        self.sums: Tensor | None = None  # where sums are taken; None: in the place of an entry's first gradient

    def load(self, weights: Tensor, moments: Mapping[str, Tensor], updates: int) -> None:
        """Take this shard's slices of whole vectors [N]; missing moments start at zero."""
        start, stop = self.range
        own = weights[start:stop].clone()
        optimizer = FlatOptimizer(applied_optimizer(self.job), self.layout, self.range, own, self.budget)
        for name, vector in optimizer.moments.items():
            if name in moments:
                vector.copy_(moments[name][start:stop])
        self.attach(own, optimizer, updates)
        self.decoder = build_decoder(self.job, self.layout, own)

    def attach(self, weights: Tensor, optimizer: FlatOptimizer, updates: int) -> None:
        """Work in place on these weights [S] and the optimiser's moments [S]."""
        self.weights, self.optimizer = weights, optimizer
        self.optimizer.updates = updates
        self.gradients, self.captures, self.reduced = {}, {}, None
        self.joined: dict[int, int] = {}

    def phase_slice(self, phase: int) -> slice:
        """Where this shard's part of a phase lies within the phase's own vector."""
        return shard_slice(self.layout, self.range, phase)

    def decoded(self, phase: int, pushed: Tensor) -> Tensor:
        """This shard's part [n] of a worker's gradient: what was pushed, or what the payload says."""
        if self.decoder is None:
            return pushed
        start, stop = shard_range(self.layout, self.range, phase)
        gradient = self.weights.new_empty(stop - start)
        if start < stop:
            self.decoder.decode((start, stop), [pushed], gradient)
        return gradient

    def hold(self, rank: int, ticket: int, gradient: Tensor) -> None:
        """Keep a gradient's slice until its entry comes."""
        if ticket >= self.joined.get(rank, ticket):
            self.gradients[rank, ticket] = gradient

    def discard(self, rank: int) -> None:
        """Drop what a worker that left has pushed."""
        self.gradients = {key: value for key, value in self.gradients.items() if key[0] != rank}

    def admit(self, rank: int, ticket: int) -> None:
        """A worker joins with this ticket: what was pushed under its rank before, or still arrives, is of the dead."""
        self.joined[rank] = ticket
        self.gradients = {key: value for key, value in self.gradients.items() if key[0] != rank or key[1] >= ticket}

    def reduce(self, entry: Entry) -> list[float]:
        """Sum the entry's gradients in rank order, divide by the count; the blocks' squared norms, if needed."""
        if entry.dropped:
            for rank, ticket in entry.members:
                self.gradients.pop((rank, ticket), None)
                if entry.phase == PULL:
                    self.admit(rank, ticket)
            return []
        parts = [self.gradients.pop(member) for member in entry.members]
        out = parts[0] if self.sums is None else self.sums[: parts[0].numel()]
        self.reduced = mean(parts, entry.count, entry.factors, out)
        return block_square_norms(self.layout, self.reduced, self.range, entry.phase) if entry.needs_norm else []

    def apply(self, entry: Entry, norm: float | None) -> None:
        """Update this shard; under sync `norm` is the mean gradient's global norm, and clips it."""
        if entry.dropped or self.reduced is None:
            return
        if norm is not None and self.job.strategy.is_synchronous:
            scale = clip_scale(norm, self.job.optimizer.clip_norm)
            if scale < 1.0:
                self.reduced.mul_(scale)
        self.optimizer.update(self.weights, self.reduced, entry.phase, entry.version, entry.lr_factor)
        self.reduced = None
        if entry.last_phase:
            self.optimizer.step_done()
        if entry.capture:
            self.capture(entry.version + 1, entry.clock, lasting=entry.lasting)

    def capture(self, version: int, clock: Mapping[str, Any] | None, lasting: bool) -> None:
        """Keep a copy of the state under its version: until it is taken if `lasting`, else while it is among the last.

        Only the few last of either sort stay: somebody who does not come to take them must not fill the memory.
        """
        self.captures[version] = {
            "clock": clock,
            "weights": to_numpy(self.weights).copy(),
            "moments": {name: to_numpy(vector).copy() for name, vector in self.optimizer.moments.items()},
            "updates": self.optimizer.updates,
        }
        if lasting:
            self.lasting.add(version)
        self.lasting &= self.captures.keys()
        passing = sorted(self.captures.keys() - self.lasting)
        for old in [*passing[:-KEPT_CAPTURES], *sorted(self.lasting)[: -2 * KEPT_CAPTURES]]:
            del self.captures[old]

    def take_capture(self, version: int) -> dict[str, Any] | None:
        """The state at a version, if it is still there; it is handed over once."""
        return self.captures.pop(version, None)


KEPT_CAPTURES = 4


def mean(parts: list[Tensor], count: float, factors: list[float] | None, out: Tensor) -> Tensor:
    """The sum of gradients, each times its factor, in their order, divided by `count`; in `out`, maybe the first."""
    if factors is not None:
        torch.mul(parts[0], factors[0], out=out)
        for part, factor in zip(parts[1:], factors[1:], strict=True):
            out.add_(part, alpha=factor)
        return out.div_(count)
    if len(parts) > 1:
        torch.add(parts[0], parts[1], out=out)
        for part in parts[2:]:
            out.add_(part)
        return out.div_(count) if count else out
    return torch.div(parts[0], count, out=out) if count else out.copy_(parts[0])


def shard_range(layout: Layout, shard: tuple[int, int], phase: int) -> tuple[int, int]:
    """Elements [start, stop) of a phase that lie in a shard, in the flat vector."""
    first, last = layout.phase_range(phase)
    start, stop = max(shard[0], first), min(shard[1], last)
    return start, max(start, stop)


def shard_slice(layout: Layout, shard: tuple[int, int], phase: int) -> slice:
    """The same elements in the phase's own vector."""
    first, (start, stop) = layout.phase_range(phase)[0], shard_range(layout, shard, phase)
    return slice(start - first, stop - first)
