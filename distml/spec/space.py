"""Search spaces: typed, bounded dimensions, each over one path of a job spec.

    space:
      optimizer.lr: {loguniform: [1.0e-5, 1.0e-1]}
      task.model.hidden.0: {lograndint: [16, 512]}
      optimizer.name: {choice: [sgd, adamw]}

Both ends of an interval belong to it. A dimension keeps its type: integers stay integers, choices stay what was listed.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from distml.spec.messages import Problem, describe, near, shorten
from distml.spec.yaml import KeyPath, dotted

Kind = Literal["uniform", "loguniform", "randint", "lograndint", "choice"]
MOST = 1e300  # an end beyond this has no float, or overflows where one is stretched
KINDS: tuple[str, ...] = get_args(Kind)


@dataclass(frozen=True)
class Dimension:
    """One path of a spec and the values that it may take.

    Attributes:
        path: dotted, below the base, for example `optimizer.lr`.
        low, high: the ends of an interval, both included; None for a choice.
        values: of a choice, in the order in which they are listed; empty for an interval.
    """

    path: str
    kind: Kind
    low: float | int | None = None
    high: float | int | None = None
    values: tuple[Any, ...] = ()

    @property
    def ends(self) -> tuple[float, float]:
        """Of an interval."""
        assert self.low is not None
        assert self.high is not None
        return self.low, self.high

    @property
    def is_integer(self) -> bool:
        """Whether its values are integers of an interval."""
        return self.kind in ("randint", "lograndint")

    @property
    def is_log(self) -> bool:
        """Whether equal ratios are equally likely."""
        return self.kind in ("loguniform", "lograndint")

    def sample(self, generator: random.Random) -> Any:
        """A value drawn from the whole dimension."""
        if self.kind == "choice":
            return generator.choice(self.values)
        low, high = self.ends
        if self.kind == "randint":
            return generator.randint(int(low), int(high))
        if self.kind == "lograndint":  # each integer has the interval of half a step on both sides
            return self.clip(round(math.exp(generator.uniform(math.log(low - 0.5), math.log(high + 0.5)))))
        if self.kind == "loguniform":
            return self.clip(math.exp(generator.uniform(math.log(low), math.log(high))))
        return self.clip(generator.uniform(low, high))

    def clip(self, value: float) -> float | int:
        """The nearest value of an interval, of its type."""
        low, high = self.ends
        inside = min(max(value, low), high)
        return round(inside) if self.is_integer else float(inside)

    def contains(self, value: Any) -> bool:
        """Whether a value belongs to it, type included."""
        if self.kind == "choice":
            return any(type(value) is type(known) and value == known for known in self.values)
        if isinstance(value, bool) or not isinstance(value, int if self.is_integer else (int, float)):
            return False
        low, high = self.ends
        return bool(low <= value <= high)


Space = tuple[Dimension, ...]


def parse_space(raw: Mapping[str, Any], at: KeyPath = ("space",)) -> tuple[Space, list[Problem]]:
    """The dimensions of a `space:` block, and what is wrong with it; paths are looked up elsewhere."""
    found: list[Dimension] = []
    problems: list[Problem] = []
    for path, value in raw.items():
        entry = _dimension(path, value, (*at, path))
        if isinstance(entry, Problem):
            problems.append(entry)
        else:
            found.append(entry)
    if not raw:
        problems.append(Problem("space has no dimension; add one, for example optimizer.lr: {loguniform: [1e-4, 1e-1]}",
                                (at,), "value"))  # fmt: skip
    return tuple(found), problems


def _dimension(path: str, value: Any, at: KeyPath) -> Dimension | Problem:
    if not isinstance(value, Mapping) or len(value) != 1:
        return Problem(f"{dotted(at)} must be one of {', '.join(f'{{{kind}: […]}}' for kind in KINDS)}, "
                       f"got {describe(value)}", (at,), "value")  # fmt: skip
    ((kind, arguments),) = value.items()
    if kind not in KINDS:
        if isinstance(arguments, Mapping):
            return Problem(f"{dotted(at)} is no dimension; write its path with dots, as {path}.{kind}: …", (at,))
        close = near(str(kind), KINDS)
        hint = f"did you mean {close!r}?" if close else f"known: {', '.join(KINDS)}"
        return Problem(f"{dotted(at)}: unknown kind of dimension {kind!r}; {hint}", ((*at, kind),))
    text = next(_wrong(str(kind), arguments), None)
    if text is not None:
        return Problem(f"{dotted(at)}: {text}", ((*at, kind), at), "value")
    if kind == "choice":
        return Dimension(path, "choice", values=tuple(arguments))
    return Dimension(path, kind, arguments[0], arguments[1])


def _wrong(kind: str, arguments: Any) -> Iterator[str]:
    if kind == "choice":
        if not isinstance(arguments, list) or len(arguments) < 2:
            yield f"choice must be a list of at least two values, got {describe(arguments)}"
            return
        for index, value in enumerate(arguments):
            if any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in arguments[:index]):
                yield f"choice lists {shorten(value)} twice; each value may stand there once"
        return
    integer = kind in ("randint", "lograndint")
    what = "integers" if integer else "numbers"
    if not isinstance(arguments, list) or len(arguments) != 2:
        yield f"{kind} must be [lower, upper], got {describe(arguments)}"
        return
    for end in arguments:
        if isinstance(end, bool) or not isinstance(end, int if integer else (int, float)) or not abs(end) < MOST:
            yield f"{kind} must be two {what}, got {describe(end)}"
            return
    low, high = arguments
    if low >= high:
        yield f"{kind}: the lower end {low!r} is not below the upper end {high!r}; swap them or use a fixed value"
    elif kind.startswith("log") and low <= 0:
        yield f"{kind}: the lower end must be above 0, got {low!r}; use {kind[3:]} or a positive end"
