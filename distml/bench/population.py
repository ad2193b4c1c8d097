"""`distml bench population`: populations, sweeps and searches against Ray Tune, Optuna and chance.

speed     4 members x 20 iterations that do nothing, with exploits, against Tune's PBT with and without `reuse_actors`
exploit   what it takes a member of 25 million parameters to copy another one, against copying these bytes once
sweep     100 trials that do nothing, against Tune's own, and Optuna alone
pbt       digits, learning rates from 1e-5 to 1e1: a population against random search at equal examples, in pairs
nas       a space whose rewards are all known: REINFORCE against chance at equal samples

Each is one part; without `--part` all run, one after the other. The peers take turns with ours on one Ray.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from distml.bench.exchange import check
from distml.bench.parts import failure, measure_parts, tables
from distml.errors import UsageError

PARTS = ("speed", "exploit", "sweep", "pbt", "nas")

__all__ = ["PARTS", "failure", "measure", "tables"]


def measure(
    *, part: Sequence[str] = (), repeats: int | None = None, seeds: int | None = None, steps: int | None = None,
    contenders: Sequence[str] = (),
) -> dict[str, Any]:  # fmt: skip
    """Run the parts, one after the other.

    Args:
        part: some of `PARTS`; none: all.
        repeats: of speed, exploit and sweep; None: as many as the part has.
        seeds: of pbt and nas.
        steps: of each member of pbt.
        contenders: of speed and sweep, by name; none: all.

    Raises:
        UsageError: no such part or contender, or a number that is not possible.
    """
    chosen = list(dict.fromkeys(part)) or list(PARTS)
    check("--part", chosen, PARTS)
    for name, value in (("repeats", repeats), ("seeds", seeds), ("steps", steps)):
        if value is not None and value < 1:
            raise UsageError(f"--{name} {value} is not possible; give at least 1")
    given = {"repeats": repeats, "seeds": seeds, "steps": steps, "contenders": list(contenders)}
    return measure_parts("population", chosen, given)
