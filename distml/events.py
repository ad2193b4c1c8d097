"""What a worker tells the driver, in order: plain values and NumPy arrays, no torch.

Every event names the rank it comes from and the version of the weights it is about.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class Report:
    """Sums since this worker's last report.

    Attributes:
        means: name -> (total, count), the task's losses and metrics.
        staleness: versions -> how many of this worker's gradients were applied that many versions late.
        values: what is not a mean over examples (learning rate, seconds, bytes ...).
    """

    rank: int
    version: int
    examples: int
    fraction: float
    train_seconds: float
    means: dict[str, tuple[float, float]] = field(default_factory=dict)
    values: dict[str, float] = field(default_factory=dict)
    staleness: dict[str, int] = field(default_factory=dict)
    frames: int = 0


@dataclass
class FirstUpdate:
    """This worker's first step in this process is done."""

    rank: int
    version: int


@dataclass
class Evaluated:
    """`metrics` of the validation split at `version`, reduced over the workers; from one rank only."""

    rank: int
    version: int
    metrics: dict[str, float]
    seconds: float
    finished: str | None


@dataclass
class WrittenPart:
    """A rank's part of the state, which it has written to disk itself.

    Attributes:
        folder: of all ranks' parts of this version.
        files: its own files' entries in the checkpoint's manifest.
    """

    folder: str
    files: dict[str, dict[str, Any]]


@dataclass
class Snapshot:
    """This worker's state at `version`; without a shared half, its own at a pause, where no rank speaks for all.

    Attributes:
        own: position of the stream, random states, meter, seconds; JSON values and arrays.
        shared: weights, moments, carried tensors, clock; from one rank, None where servers hold them. Without
            "weights": its vectors are kept in shared memory.
        carried: for the rank that speaks for the servers' state: the buffers that belong to it.
        checkpoint: it is to be written, not only kept for recovery.
        last: the run ends at this version.
        evaluated: an evaluation of the same version follows, which may make it worth writing.
        part: where ranks keep parts of the state: that of this rank; the shared half is then the clock alone.
    """

    rank: int
    version: int
    own: dict[str, Any]
    shared: dict[str, Any] | None
    carried: dict[str, Any] | None
    checkpoint: bool
    evaluated: bool
    last: bool
    part: WrittenPart | None = None


@dataclass
class Finished:
    """This worker's loop is over: `reason` is a budget, "goal", "patience" or "requested"."""

    rank: int
    version: int
    reason: str


@dataclass
class Failed:
    """The user's code or data failed; a restart would fail again.

    Attributes:
        not_finite: its loss or weights are NaN or infinite.
    """

    rank: int
    version: int
    phase: str
    message: str
    traceback: str
    not_finite: bool = False


@dataclass
class Interrupted:
    """An exchange ended because a peer is gone; the worker waits to be told how to go on."""

    rank: int
    version: int
    message: str


Event = FirstUpdate | Report | Evaluated | Snapshot | Finished | Failed | Interrupted
