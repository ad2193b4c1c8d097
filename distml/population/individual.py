"""What a population knows of one of its members."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from distml.population.host import Handle

Values = Mapping[str, Any]


@dataclass(frozen=True)
class Held:
    """A state of a member that it can go on from, or that others can copy.

    Attributes:
        step: its version.
        values: by path, which it was made with.
        state: None: as a member is before its first step.
        score: the objective, measured on exactly these weights; None: on others, or not at all.
        metrics: of that evaluation.
    """

    step: int
    values: Values
    state: Handle | None
    score: float | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Record:
    """A member as it is after a decision about it: what a resume goes on from.

    Attributes:
        held: its state and values then.
        score: as it was measured before the decision.
        decisions: so far; `events`: of it in the lineage; `losses` and `copies`: so far.
        seconds: of training.
        reason: why its own run is over, or None.
        error: why it was given up, or None.
    """

    held: Held
    score: float | None = None
    decisions: int = 0
    events: int = 0
    losses: int = 0
    copies: int = 0
    seconds: float = 0.0
    reason: str | None = None
    error: str | None = None


@dataclass(frozen=True)
class Order:
    """What is to be done with a member before it trains on.

    Attributes:
        event: of the lineage, when it is done.
        requested: values to apply, after loading `state`.
        state: whose shared half is loaded first; None: nobody's.
        source: whose state that is, at which step and with which score; None: its own.
        cause: of a replacement.
    """

    event: Literal["decide", "copy", "replace"]
    requested: Values
    state: Handle | None
    source: tuple[str, int, float | None] | None = None
    cause: str | None = None


Phase = Literal["parked", "idle", "starting", "training", "copying", "lost", "over"]


@dataclass
class Individual:
    """One member.

    Attributes:
        own: its newest state.
        measured: its newest state with a score, as it was evaluated; what others copy.
        record: as of its last decision.
        phase: "parked": in no slot; "idle": in a slot, with nothing to do; "lost": gone, and to be replaced; "over".
        order: to be carried out next.
        losses_in_a_row: without a decision in between.
        cause: of its last loss; `died`: whether that was its process's death, and not its own doing.
    """

    name: str
    own: Held
    record: Record
    measured: Held | None = None
    phase: Phase = "parked"
    order: Order | None = None
    decisions: int = 0
    events: int = 0
    losses: int = 0
    losses_in_a_row: int = 0
    copies: int = 0
    seconds: float = 0.0
    metrics: Mapping[str, float] = field(default_factory=dict)
    reason: str | None = None
    cause: str | None = None
    died: bool = False

    @property
    def score(self) -> float | None:
        """The newest one."""
        return self.measured.score if self.measured is not None else self.record.score

    @property
    def is_in_slot(self) -> bool:
        """Whether a slot holds it."""
        return self.phase in ("idle", "starting", "training", "copying")

    @property
    def is_busy(self) -> bool:
        """Whether an answer of it is to come."""
        return self.phase in ("starting", "training", "copying")

    @property
    def is_over(self) -> bool:
        """Whether it will not train any more."""
        return self.phase == "over"

    def settle(self, held: Held, error: str | None = None) -> None:
        """A decision about it has been carried out."""
        self.own = held
        self.record = Record(held, self.score, self.decisions, self.events, self.losses, self.copies, self.seconds,
                             self.reason, error)  # fmt: skip
