"""Who runs members: the contract between those who decide (population, search) and the processes that train.

A *member* is one training job that stays alive between two decisions about it. A *host* has a number of slots, each of
which holds one member at a time. What it is told to do it does in the order in which it was told, member by member, and
no call waits: answers come from `wait`, in the order in which they happen.

    decide ── start, advance, copy, release ──▶ host ──▶ member (in this process, or one Ray actor per slot)
    decide ◀── Ready, Advanced, Copied, Gone ── wait ◀── member

State travels as a *handle*: a reference to where it is (in the object store), which may be passed to another member
without ever coming through the process that decides. `fetch` brings it here, for a checkpoint.

`distml/runtime/members.py` has two hosts: `InlineHost` (this process, one command at a time, deterministic) and
`RayHost`. No ray and no torch here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from distml.exchange.layout import Layout
from distml.runtime.cut import Cut
from distml.spec.schema import JobSpec

Handle = Any  # opaque: a Ray object reference, or the object itself


@dataclass(frozen=True)
class Ready:
    """A member was built, with its state loaded where it was given one.

    Attributes:
        layout: of its weights; members of a population have the same one.
        frozen: its tensors that are not trained, as a checkpoint needs them.
        parameters: trained elements.
        live: path -> value, read back from the live optimiser and task; see `Copied`.
    """

    member: str
    layout: Layout
    frozen: Mapping[str, Any]
    parameters: int
    live: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Advanced:
    """A member has reached the step that it was sent to, or the end of its own budget.

    Attributes:
        step: its version now.
        metrics: the last value of each metric, with `eval/…` of an evaluation at this very step.
        rows: what belongs into its metrics.jsonl since the last answer.
        finished: why its own run is over (a budget, "goal", "patience"), or None.
        state: handle of its whole state (a `Cut`) at this step; None: it was not asked to keep it. The state stays as
            long as somebody refers to the handle, whatever the member does meanwhile, or until its process dies.
        seconds: of training, all in all.
    """

    member: str
    step: int
    metrics: Mapping[str, float]
    rows: Sequence[Mapping[str, Any]]
    finished: str | None
    state: Handle | None
    seconds: float


@dataclass(frozen=True)
class Copied:
    """A member has taken another one's shared half, and after that new values.

    Attributes:
        applied: path -> value as it is *read back* from the live optimiser, loss or loop after loading.
        seconds: what it took.
        state: handle of its whole state after both, as in `Advanced`; None: it was not asked to keep it.
    """

    member: str
    applied: Mapping[str, Any]
    seconds: float
    state: Handle | None = None


@dataclass(frozen=True)
class Gone:
    """A member is no longer there.

    Attributes:
        kind: "died": its process is gone; "failed": an exception; "not_finite": its loss or weights are NaN or inf.
        cause: one line.
        phase: what it was doing; `step`: where, as far as is known.
    """

    member: str
    kind: Literal["died", "failed", "not_finite"]
    cause: str
    phase: str
    step: int | None = None


Answer = Ready | Advanced | Copied | Gone


class Host(Protocol):
    """Slots that members are put into."""

    @property
    def slots(self) -> int:
        """Members at the same time."""
        ...

    @property
    def hosts(self) -> Sequence[str]:
        """Names of the machines that members run on."""
        ...

    def start(self, member: str, job: JobSpec, state: Handle | None = None, watch: Sequence[str] = ()) -> None:
        """Build a member in a free slot: answered by `Ready`.

        Args:
            job: its own spec. A slot's process stays when its member changes.
            state: its whole state to go on from.
            watch: paths of the spec that are read back in `Ready` and `Copied`.

        Raises:
            RuntimeError: there is no free slot.
        """
        ...

    def advance(self, member: str, until: int | None, keep: bool) -> None:
        """Train until version `until` (None: to the end of its own budget), evaluate there: answered by `Advanced`.

        Args:
            keep: keep a copy of the whole state at that step, for `Advanced.state`.
        """
        ...

    def copy(self, member: str, state: Handle, job: JobSpec, keep: bool = False) -> None:
        """Take the shared half (weights, moments, carried tensors) of another member's state, *then* `job`'s values.

        The member keeps its own budget, stream and random state. Answered by `Copied`; by `Gone` also where the state
        was lost with the process that had it.

        Args:
            keep: keep a copy of the whole state after both, for `Copied.state`.
        """
        ...

    def release(self, member: str) -> None:
        """End a member, if it is still there; its slot is free again. What it kept stays as long as its handle."""
        ...

    def fetch(self, state: Handle) -> Cut:
        """A state, here; may be called on another thread than the rest.

        Raises:
            LookupError: it was lost with the process that had it.
        """
        ...

    def put(self, state: Cut) -> Handle:
        """The inverse: a handle for a state that was read from a checkpoint."""
        ...

    def wait(self, timeout_s: float) -> list[Answer]:
        """What has happened; empty after `timeout_s` seconds without anything.

        A member that does not answer a heartbeat for `limits.lost_after_s` is `Gone`; so is one that blocks.
        """
        ...

    def close(self) -> None:
        """End all members and processes."""
        ...
