"""Digits: a population against random search, in pairs that begin with the same values and see as many examples.

Eight members draw their learning rate from 1e-5 to 1e1. The population's copy each other; random search is the same job
with `exploit: none` and `explore: none`. Both end when every member has taken its steps. Held against each other are
the medians over members of the last validation loss: how good a member is that one did not choose, so that luck in the
best one of eight does not decide.
"""

from __future__ import annotations

import json
import math
import statistics
import tempfile
from math import comb
from pathlib import Path
from typing import Any

from distml.bench.exchange import tell
from distml.bench.parts import Table, target
from distml.launch.run import run

OPTIONS = ("seeds", "steps")
MEMBERS, EVERY, BATCH = 8, 25, 64
WANTED = 0.9
LARGE = 1e9  # what a loss that is no number counts as


def spec_of(exploit: str, seed: int, steps: int) -> dict[str, Any]:
    """The job of one side of a pair."""
    return {
        "distml": "v1", "kind": "population", "name": f"bench-{exploit}", "seed": seed,
        "base": {
            "name": "digits",
            "task": {"name": "classification", "data": "digits", "model": {"name": "mlp", "hidden": [64]}},
            "strategy": "single", "optimizer": {"name": "sgd", "lr": 0.1, "momentum": 0.9}, "batch_size": BATCH,
            "stop": {"steps": steps}, "log": {"every": 100, "to": []}, "seed": seed,
        },
        "members": MEMBERS, "every": EVERY, "space": {"optimizer.lr": {"loguniform": [1e-5, 1e1]}},
        "objective": "eval/loss", "exploit": exploit, "checkpoint": {"every": 1000},
        "explore": "none" if exploit == "none" else "perturb",  # else everybody explores alone
    }  # fmt: skip


def measure(seeds: int = 10, steps: int = 300) -> dict[str, Any]:
    """Run the pairs, one after the other, in this process."""
    pairs = []
    for seed in range(seeds):
        pair = {name: one_run(spec_of(exploit, seed, steps))
                for name, exploit in (("population", "truncation"), ("random", "none"))}  # fmt: skip
        pairs.append(pair)
        medians, bests = ([shown(pair[name][key]) for name in pair] for key in ("median", "best"))
        tell(f"pbt, seed {seed}: population and random search: median {', '.join(medians)}; best {', '.join(bests)}")
    won = sum(pair["population"]["median"] < pair["random"]["median"] for pair in pairs)
    best = sum(pair["population"]["best"] < pair["random"]["best"] for pair in pairs)
    wanted = target("share of pairs that the population wins", won / seeds, "at least", WANTED)
    return {"pairs": pairs, "won": won, "best_won": best, "seeds": seeds, "steps": steps, "p": sign_test(won, seeds),
            "targets": [wanted]}  # fmt: skip


def one_run(spec: dict[str, Any]) -> dict[str, Any]:
    """Median, best and examples over all members."""
    with tempfile.TemporaryDirectory(prefix="distml-bench-") as folder:
        run(spec, out=Path(folder) / "run", runtime="inline")
        last: dict[str, dict[str, Any]] = {}
        for line in (Path(folder) / "run" / "lineage.jsonl").read_text().splitlines():
            row = json.loads(line)
            last[row["member"]] = row
    losses = [LARGE if row["score"] is None else float(row["score"]) for row in last.values()]
    return {"median": statistics.median(losses), "best": min(losses), "losses": losses,
            "examples": BATCH * sum(row["step"] for row in last.values())}  # fmt: skip


def sign_test(won: int, of: int) -> float:
    """P of winning at least so many of so many fair coins."""
    return float(sum(comb(of, k) for k in range(won, of + 1)) / 2.0**of)


def table(found: dict[str, Any]) -> Table:
    """Title, header, body and closing lines."""
    body = []
    for seed, pair in enumerate(found["pairs"]):
        population, chance = pair["population"], pair["random"]
        body.append([f"seed {seed}", shown(population["median"]), shown(chance["median"]), shown(population["best"]),
                     shown(chance["best"]), f"{population['examples']:,}", f"{chance['examples']:,}"])  # fmt: skip
    closing = [f"{MEMBERS} members x {found['steps']} steps, a decision every {EVERY}",
               f"medians below random search's in {found['won']} of {found['seeds']} pairs (sign test: p = "
               f"{found['p']:.2g}), bests in {found['best_won']}"]  # fmt: skip
    header = ["validation loss", "median, population", "random search", "best, population", "random search", "examples",
              "random search"]  # fmt: skip
    return "Digits, learning rate from 1e-5 to 1e1", header, body, closing


def shown(loss: float) -> str:
    """A loss; what is no number is said so."""
    return "nan" if not math.isfinite(loss) or loss >= LARGE else f"{loss:.4f}"
