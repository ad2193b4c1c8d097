"""What strategies need of whoever carries their bytes: two Protocols that every runtime implements.

`Group` joins equal ranks (a collective); `Channel` joins workers to parameter servers. Every wait in an implementation
has a timeout whose message names what was awaited, and ends with `PeerLost` when a peer is gone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from distml.exchange.layout import Array

if TYPE_CHECKING:
    from torch import Tensor

    from distml.spec.schema import OptimizerSpec


class PeerLost(Exception):
    """An exchange ended because a peer died, was lost or asked everyone to stop; the runtime decides what follows."""


class Group(Protocol):
    """Equal ranks."""

    rank: int
    size: int
    bytes_sent: int

    def all_reduce(self, vector: Tensor) -> None:
        """Replace `vector` by its sum over all ranks."""
        ...

    def all_gather(self, payload: bytes) -> list[bytes]:
        """Every rank's payload, in rank order."""
        ...


class WireGroup(Group, Protocol):
    """Ranks between whom compressed gradients travel."""

    def all_to_all(self, parts: Sequence[Tensor], lengths: Sequence[int]) -> list[Tensor]:
        """Send `parts[p]` to rank p; what each rank sent here, in rank order.

        Args:
            parts: one for each rank: uint8 [L_p] on this rank's device. They may be overwritten after the call.
            lengths: bytes that each rank sends here.
        """
        ...


PULL = -1


@dataclass
class Head:
    """What goes to the clock with a gradient: who pushes, what it was computed from, and what is carried along.

    `phase` is `PULL` for a worker that joins: it pushes nothing, and is answered in the order of the updates.
    `count` is what the gradient is a sum over, `rows` the examples that it came from and `frames` the environment steps
    that are new in them (both with the last phase only).
    `place`, `base` [M] and `sums` [S] are of the model's accumulators: see `strategies/tally.py`.
    """

    rank: int
    ticket: int
    phase: int
    read_version: int
    count: float
    vote: float = 0.0
    carried: Array | None = None
    integers: dict[str, Array] = field(default_factory=dict)
    rows: float = 0.0
    frames: float = 0.0
    place: int = 0
    base: Array | None = None
    sums: Array | None = None


@dataclass
class News:
    """What others have counted: a worker folds it into its base.

    Attributes:
        place: of the base before `parts`.
        base: [M]; None: the worker's own.
        parts: (base [M] that they are relative to, sums [S]), in order.
    """

    place: int
    base: Array | None
    parts: list[tuple[Array, Array]]


@dataclass
class Reply:
    """The state of the servers after a worker's gradient was applied.

    Attributes:
        version: of the weights.
        examples, frames: consumed so far over all workers.
        staleness: versions between reading and applying this gradient.
        applied: whether it was; else it came after the end, or brought no gradient.
        contributed: examples of this worker's applied gradients so far.
        grad_norm: of the applied mean gradient, where it was needed.
        finished: why the run is over, or None.
        duties: what this worker does at this version: "evaluate", "snapshot".
        carried: the workers' average, for whoever has a duty.
        news: of the model's accumulators, where it has any.
    """

    version: int
    examples: int
    frames: int
    staleness: int = 0
    grad_norm: float | None = None
    finished: str | None = None
    duties: tuple[str, ...] = ()
    carried: Array | None = None
    integers: dict[str, Array] = field(default_factory=dict)
    applied: bool = False
    contributed: float = 0.0
    news: News | None = None


Gradient: TypeAlias = "Tensor | list[Tensor]"
"""One phase's whole gradient [n]; or, compressed, a payload (uint8) for each server."""


class Channel(Protocol):
    """A worker's way to the servers.

    `clears_gradients`: an exchange leaves zeros where the gradient was.
    """

    bytes_sent: int
    clears_gradients: bool

    def exchange(self, head: Head, gradient: Gradient, weights: Tensor) -> Reply:
        """Push one phase's gradient, wait until it is applied, overwrite `weights` [N]."""
        ...

    def join(self, head: Head, weights: Tensor) -> Reply:
        """Take part from now on: overwrite `weights` [N] by the newest version. `head.phase` is `PULL`."""
        ...

    def leave(self) -> None:
        """Take no part until the next `join`: nobody waits for this worker."""
        ...

    def judge(self, version: int, metrics: dict[str, float]) -> str | None:
        """Report an evaluation of `version`; why the run is over by it, or None."""
        ...

    def all_gather(self, payload: bytes) -> list[bytes]:
        """Every worker's payload, in rank order (synchronous mode only)."""
        ...

    def load(self, shared: Mapping[str, Any]) -> None:
        """Begin from a shared half, where the workers themselves are the servers."""
        ...

    def captured(self, version: int, carried: dict[str, Array]) -> dict[str, Any] | None:
        """The shared half at the version that this worker reads; None: the driver asks the servers for it."""
        ...

    def kept(self, version: int, carried: dict[str, Array]) -> dict[str, Any] | None:
        """The same without its vectors, which stay in shared memory for the driver; None: there is no such place."""
        ...

    def live_optimizer(self) -> OptimizerSpec:
        """The block by which the servers update."""
        ...


class Wire(Channel, Protocol):
    """A channel whose exchange takes its time, and can be done in two halves (`prefetch`)."""

    def push(self, head: Head, gradient: Gradient) -> Any:
        """The first half of `exchange`, what `take` is to be called with. `gradient` may then change."""
        ...

    def take(self, pushed: Any, weights: Tensor) -> Reply:
        """The second half: wait until it is applied, overwrite `weights` [N]."""
        ...


State = dict[str, Any]
