"""What all blocks of the spec are made of: the strict base, the kinds of numbers, the base of every task's block."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

Need = Literal["group_mean", "whole_weights", "one_version"]
Offers = frozenset[str]

Count = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]

ALL_OFFERS: Offers = frozenset({"group_mean", "whole_weights", "one_version"})
OWN = "module:Class"
NUMBER, RANGE = "a number", "a range"  # what a key that takes either has got
OWN_PATTERN = r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*$"


class Block(BaseModel):
    """A mapping of the spec: strict, closed, frozen.

    `shorthand`: the key that a plain string in the block's place stands for, where it is not the block's own name.
    """

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, populate_by_name=True)
    shorthand: ClassVar[str | None] = None


class OwnBlock(Block):
    """A user's own class by import path; its file lies beside the spec or is installed."""

    name: Annotated[str, Field(pattern=OWN_PATTERN)]
    args: dict[str, Any] = Field({}, description="keyword arguments of the class")


class TaskBlock(Block):
    """What every built-in task has.

    Attributes:
        needs: held against what the strategy offers.
        summary: one line for `distml list tasks`.
        num_phases: losses of a step, each with an update of its own.
        counts_frames: whether it acts in environments, so that `stop.frames` ends it.
    """

    needs: ClassVar[Offers] = frozenset()
    summary: ClassVar[str] = ""
    counts_frames: ClassVar[bool] = False
    num_phases: ClassVar[int] = 1

    @property
    def tokens_per_example(self) -> int | None:
        """Tokens of each example; None: it has none."""
        return None

    @property
    def uses_per_frame(self) -> float | None:
        """How many examples of `batch_size` each environment step becomes; None: not known beforehand."""
        return 1.0

    @property
    def all_needs(self) -> Offers:
        """`needs`, with those that its settings add."""
        return self.needs


class StrategyBlock(Block):
    """How gradients travel."""

    @property
    def offers(self) -> Offers:
        """What tasks may rely on under this strategy."""
        return ALL_OFFERS

    @property
    def is_synchronous(self) -> bool:
        """Whether one step is one averaged update of `batch_size` examples over all workers."""
        return True

    @property
    def max_phases(self) -> int | None:
        """Losses that a step may have, each with an update of its own; None: any number."""
        return None

    @property
    def keeps_parts(self) -> bool:
        """Whether each worker holds a part of weights or moments that no other has: it alone writes and reads it."""
        return False

    @property
    def label(self) -> str:
        """The name by which matrices and messages call it."""
        return str(getattr(self, "name"))  # noqa: B009 (each strategy declares its own literal)


def own_or_name(value: Any) -> Any:
    """A union's tag for a value: a colon in the name means a user's own class."""
    name = value.get("name") if isinstance(value, dict) else getattr(value, "name", None)
    return OWN if isinstance(name, str) and ":" in name else name
