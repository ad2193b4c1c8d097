"""What a runtime is: a group of workers (and servers) that the driver starts, listens to and recovers. No torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from distml.events import Event
from distml.exchange.layout import Array, Layout
from distml.runtime.cut import Cut
from distml.spec.schema import JobSpec

DIFFERENT_MODELS = (
    "build_model gave different weights on different ranks; draw them from torch's, numpy's or Python's global "
    "generator, which distml seeds alike everywhere"
)


@dataclass
class Description:
    """What the workers built, equal on all ranks.

    Attributes:
        layout: the flat vector's index.
        frozen: the model's tensors that are not trained.
        transport: how gradients travel, and why.
    """

    layout: Layout
    frozen: dict[str, Array]
    transport: str
    hosts: list[str] = field(default_factory=list)


@dataclass
class Lost:
    """A process died or no longer answers; `phase` is what it was doing when it was last heard of."""

    role: str
    cause: str
    phase: str


class WorkerGroup(Protocol):
    """A runtime's side of a run.

    Attributes:
        size: workers, now.
        wants_more: it has asked its workers to end for now: there is room for more, with whom `regroup` goes on.
        say: told, in a line, what the group waits for.
    """

    size: int
    wants_more: bool
    say: Callable[[str], None]

    def build(self, start_weights: Mapping[str, Array] | None) -> Description:
        """Start the processes and build the task in each; UsageError for what the spec or resources explain."""
        ...

    def plan_facts(self) -> dict[str, Any]:
        """What a plan of the run wants to know of rank 0 (`tasks/traced.py`), once it is built."""
        ...

    def begin(self, cut: Cut | None, until: int | None = None) -> None:
        """Connect everyone, load `cut` (None: the weights that were built), and start to train.

        May be called again when all have finished.

        Args:
            until: the version at which the run ends for now, as `PAUSED`.
        """
        ...

    def load(self, cut: Cut | None, until: int | None = None) -> None:
        """What `begin` does, but nobody starts: `live` can be asked."""
        ...

    def take(self, job: JobSpec) -> Description:
        """Build another job with the same processes; `begin` it from a cut.

        Raises:
            UsageError: the task does not fit.
        """
        ...

    def live(self, paths: Sequence[str]) -> dict[str, Any]:
        """Path of the spec -> value as what computes has it, once a state is loaded."""
        ...

    def events(self) -> Iterator[Event | Lost]:
        """What happens, until every worker has finished; the consumer may call `recover` in between."""
        ...

    def recover(self, cut: Cut | None) -> bool:
        """Replace what was lost: True if all went back to `cut`, False if the others went on undisturbed."""
        ...

    def regroup(self, cut: Cut | None) -> None:
        """Go on from `cut` with as many workers as there is room for."""
        ...

    def whereabouts(self) -> tuple[str, list[str]]:
        """`Description.transport` and `Description.hosts` as they are now."""
        ...

    def shared_state(self, version: int, carried: dict[str, Array]) -> dict[str, Any] | None:
        """The servers' part of a cut at `version`; None if it is no longer there."""
        ...

    def kept(self, version: int) -> dict[str, Array] | None:
        """Copies of the vectors that workers kept in shared memory at `version`; None if they are no longer there."""
        ...

    @property
    def activity(self) -> tuple[str, float]:
        """What it is doing, and for how many seconds nothing has moved in this process; others it watches itself."""
        ...

    def request_stop(self) -> None:
        """Ask the run to end at its next version."""
        ...

    def evaluate(self, split: str, saved: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
        """Sums and counts of `split` over all workers, with the model of a checkpoint.

        Args:
            saved: its tensors; where each rank keeps a part, the shared half of a cut whose folder has them.
        """
        ...

    def close(self) -> None:
        """End all processes of this group."""
        ...
