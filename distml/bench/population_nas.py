"""REINFORCE against chance on a space whose rewards are all known: how often each finds the optimum at equal samples.

The table is drawn from a seed; every repeat has another table and another controller's seed. Held against each other by
Fisher's exact test, one-sided: the chance that as many or more of all successes fall to REINFORCE if both were alike.
"""

from __future__ import annotations

from math import comb
from typing import Any

import torch

from distml.bench.parts import Table, target
from distml.population.tabulated import make_table, tabulated
from distml.spec.nas import EvolutionSpec, RandomControllerSpec, ReinforceControllerSpec

OPTIONS = ("seeds",)
OPTIONS_EACH = (4, 4, 4, 4)
SAMPLES = 100
SIGNIFICANT = 0.05
CONTROLLERS: dict[str, Any] = {
    "reinforce": ReinforceControllerSpec(name="reinforce"),
    "evolution": EvolutionSpec(name="evolution"),
    "random": RandomControllerSpec(name="random"),
}


def measure(seeds: int = 60) -> dict[str, Any]:
    """How many of the repeats each controller finds the optimum in."""
    found: dict[str, list[int | None]] = {name: [] for name in CONTROLLERS}
    best: dict[str, list[float]] = {name: [] for name in CONTROLLERS}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the controller is small: others would only be waited for
    try:
        for seed in range(seeds):
            table_ = make_table(OPTIONS_EACH, seed)
            for name, spec in CONTROLLERS.items():
                one = tabulated(spec, table_, SAMPLES, seed)
                found[name].append(one.found_at)
                best[name].append(one.best)
    finally:
        torch.set_num_threads(threads)
    times = {name: sum(at is not None for at in ats) for name, ats in found.items()}
    p = fisher(times["reinforce"], times["random"], seeds)
    return {"found": times, "found_at": found, "mean_best": {name: sum(all_) / seeds for name, all_ in best.items()},
            "seeds": seeds, "samples": SAMPLES, "entries": len(make_table(OPTIONS_EACH, 0)), "p": p,
            "targets": [target("p of REINFORCE finding the optimum no more often than chance", p, "at most",
                               SIGNIFICANT)]}  # fmt: skip


def fisher(first: int, second: int, each: int) -> float:
    """P that of all successes at least `first` fall to the first of two groups of `each` if both were alike."""
    both = first + second
    ways = sum(comb(each, k) * comb(each, both - k) for k in range(first, min(each, both) + 1))
    return ways / comb(2 * each, both)


def table(found: dict[str, Any]) -> Table:
    """Title, header, body and closing lines."""
    body = [[name, f"{found['found'][name]} of {found['seeds']}", f"{found['mean_best'][name]:.3f}"]
            for name in CONTROLLERS]  # fmt: skip
    closing = [f"each repeat has a table of its own; p = {found['p']:.2g} by Fisher's exact test, one-sided"]
    title = f"{found['entries']} architectures, all rewards known, {found['samples']} samples"
    return title, ["", "found the optimum", "mean of the best rewards (1: the optimum)"], body, closing
