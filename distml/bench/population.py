"""`distml bench population`: populations, sweeps and searches against Ray Tune, Optuna and chance.

speed     4 members x 20 iterations that do nothing, with exploits, against Tune's PBT with and without `reuse_actors`
exploit   what it takes a member of 25 million parameters to copy another one, against copying these bytes once
sweep     100 trials that do nothing, against Tune's own, and Optuna alone
pbt       digits, learning rates from 1e-5 to 1e1: a population against random search at equal examples, in pairs
nas       a space whose rewards are all known: REINFORCE against chance at equal samples

Each is one part; without `--part` all run, one after the other. The peers take turns with ours on one Ray.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import Any

from distml.bench.exchange import check, target_line, tell
from distml.bench.table import conditions
from distml.errors import RunError, UsageError

PARTS = ("speed", "exploit", "sweep", "pbt", "nas")
Table = tuple[str, list[str], list[list[str]], list[str]]


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
    about = conditions(parts=chosen, torch_threads=1)
    given = {"repeats": repeats, "seeds": seeds, "steps": steps, "contenders": list(contenders)}
    found, errors = {}, {}
    for name in chosen:
        module = importlib.import_module(f"distml.bench.population_{name}")
        options = {key: given[key] for key in module.OPTIONS if given[key] not in (None, [])}
        try:
            found[name] = module.measure(**options)
        except RunError as error:
            errors[name] = str(error)
            tell(f"{name}: {error}")
    return {"bench": "population", "conditions": about, "parts": found, "errors": errors}


def tables(report: Mapping[str, Any]) -> list[Table]:
    """One table for each part."""
    about, made = report["conditions"], []
    for name, found in report["parts"].items():
        title, header, body, lines = importlib.import_module(f"distml.bench.population_{name}").table(found)
        made.append((title, header, body, [*map(target_line, found["targets"]), *lines]))
    if made:
        made[-1][3].append(
            f"{about['cpus']} CPUs, load before {about['load_before']}, torch {about['torch']}, ray {about['ray']}"
        )
    return made


def failure(report: Mapping[str, Any]) -> str | None:
    """Which parts failed, in one line; None: none."""
    return "; ".join(f"{name}: {error}" for name, error in report["errors"].items()) or None


def target(what: str, value: float, bound: str, wanted: float) -> dict[str, Any]:
    """A target, and whether it is met."""
    met = value <= wanted if bound == "at most" else value >= wanted
    return {"what": what, "value": value, "bound": bound, "target": wanted, "met": met}
