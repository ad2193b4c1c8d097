"""`distml bench exchange`: milliseconds per training step, by how gradients travel, against peers.

Every contender trains the same multi-layer perceptron (`peers/blocks.py`), batch 16 per worker, one thread per
process, as real processes on real data in memory. Each worker records when its steps begin; the first ones do not
count, and a step's time is the median over windows of steps. Ours log every 10 steps and take snapshots for recovery
as any run does; peers do neither. Repeats take turns, each in another order. One local Ray serves all that need one.

With two hosts (`hosts.py`) each worker has a network namespace of its own, and the link between them a limited rate.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from distml.bench import figure
from distml.bench.contenders import (
    EVERYWHERE,
    INDEPENDENT,
    INNER_STEPS,
    LABELS,
    ONE_HOST,
    SLOW,
    TWO_HOSTS,
    Cell,
    Site,
    start,
    terminable,
)
from distml.bench.table import cells, conditions, summary
from distml.bench.timing import (
    Plan,
    ProcessTimes,
    Sampler,
    Times,
    independent_ms,
    least_ms,
    read_times,
    steady,
    steps_per_s,
    steps_within,
    synchronous_ms,
)
from distml.errors import RunError, UsageError

SIZES = {"0.1M": 40, "4.2M": 256, "25M": 624}  # parameters -> width of the model
WINDOWS = {"0.1M": 40, "4.2M": 10, "25M": 3}
RATES = ("1gbit", "100mbit")
FULL: dict[str, list[Any]] = {"size": list(SIZES), "workers": [2, 4], "optimizer": ["sgd", "adam"]}
Contender = Mapping[str, Any]


def measure(
    *, size: Sequence[str] = ("4.2M",), workers: Sequence[int] = (2,), optimizer: Sequence[str] = ("sgd",),
    contenders: Sequence[str] = (), repeats: int = 3, transport: str = "auto", full: bool = False, hosts: int = 1,
    rate: str = "1gbit",
) -> dict[str, Any]:  # fmt: skip
    """Let the contenders take turns.

    Args:
        size: of the models, names of `SIZES`.
        workers: how many.
        optimizer: `sgd`, `adam`.
        contenders: some of `LABELS`; none: all that the number of hosts allows.
        repeats: of each.
        transport: of distml's strategies.
        full: all sizes, numbers of workers and optimisers.
        hosts: 1, or 2 with a link of `rate` between them.
        rate: one of `RATES`.

    Raises:
        UsageError: there is no such size, contender and so on, or two hosts cannot be made here.
        RunError: a contender failed.
    """
    if full:
        size, workers, optimizer = FULL["size"], FULL["workers"], FULL["optimizer"]
    everyone = ONE_HOST if hosts == 1 else TWO_HOSTS
    for what, given, known in (("--size", size, SIZES), ("--optimizer", optimizer, ("sgd", "adam")),
                               ("--contenders", contenders, everyone), ("--rate", [rate], RATES)):  # fmt: skip
        check(what, given, known)
    check_numbers(hosts, workers, repeats)
    chosen = [name for name in everyone if name in (contenders or everyone)]
    about = conditions(repeats=repeats, batch_per_worker=16, torch_threads=1, hosts=hosts,
                       rate=rate if hosts > 1 else None)  # fmt: skip
    grid = [Cell(s, SIZES[s], w, o, transport) for s, w, o in product(size, workers, optimizer)]
    with the_site(hosts, rate, max(workers)) as (site, sampler):
        found = [measure_cell(cell, chosen, repeats, site, sampler, rate) for cell in grid]
    for cell in found:
        cell["targets"] = targets(cell, hosts, rate)
    return {"bench": "exchange", "conditions": about, "cells": found}


def check(what: str, given: Sequence[Any], known: Any) -> None:
    """Refuse what is not known."""
    for value in given:
        if value not in known:
            raise UsageError(f"{what} {value} is not known; choose from {', '.join(map(str, known))}")


def check_numbers(hosts: int, workers: Sequence[int], repeats: int) -> None:
    """Refuse numbers that cannot be."""
    if hosts not in (1, 2):
        raise UsageError(f"--hosts {hosts} is not possible; choose 1 or 2")
    for number in workers:
        if number < 1 or number % hosts:
            there = "at least 1" if hosts == 1 else "a multiple of the 2 hosts"
            raise UsageError(f"--workers {number} is not possible; give {there}")
    if repeats < 1:
        raise UsageError(f"--repeats {repeats} is not possible; give at least 1")


@contextlib.contextmanager
def the_site(hosts: int, rate: str, workers: int) -> Iterator[tuple[Site, Sampler]]:
    """Where the contenders run, and what reads processor time and the link's bytes meanwhile."""
    from distml.bench.start import local_ray

    os.environ |= EVERYWHERE  # before Ray starts: its workers inherit them
    used = ProcessTimes()
    if hosts == 1:
        with local_ray(cpus=2 * workers + 2) as address, terminable(), Sampler(used) as sampler:
            yield Site(address), sampler
        return
    from distml.bench.hosts import two_hosts

    with two_hosts(rate, workers // 2) as pair, Sampler(lambda: {**used(), **pair.bytes_sent()}) as sampler:
        yield Site(pair.ray, pair.hosts, pair.environment), sampler


def plan_for(name: str, cell: Cell, hosts: int, rate: str) -> Plan:
    """Steps of a contender: enough for a median, less of it where a step takes long."""
    if hosts > 1 and rate == "100mbit" and name != "compute":
        return Plan(5, 10, 2)
    width = 3 * INNER_STEPS if name == "local_sgd" else 20  # windows hold whole rounds
    windows = WINDOWS[cell.size]
    return Plan(width, width, max(2, windows // 2) if name in SLOW or hosts > 1 else windows)


def measure_cell(
    cell: Cell, names: Sequence[str], repeats: int, site: Site, sampler: Sampler, rate: str
) -> dict[str, Any]:
    """All contenders in turn on one point of the grid."""
    hosts = len(site.hosts)
    taken: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    errors: dict[str, str] = {}
    for repeat in range(repeats):
        for name in in_turn(names, repeat, repeats):
            if name in errors:
                continue
            plan = plan_for(name, cell, hosts, rate)
            tell(f"{repeat + 1}/{repeats} {cell.size}, {cell.workers} workers, {cell.optimizer}: {LABELS[name]}")
            try:
                taken[name].append(measure_one(name, cell, plan, site, sampler))
            except RunError as error:
                errors[name] = str(error)
                tell(f"{LABELS[name]}: {error}")
    found = {name: over_repeats(rows) for name, rows in taken.items() if name not in errors}
    return {"size": cell.size, "workers": cell.workers, "optimizer": cell.optimizer,
            "contenders": with_ratios(found), "errors": errors}  # fmt: skip


def in_turn(names: Sequence[str], repeat: int, repeats: int) -> list[str]:
    """The names in the order of a repeat: each repeat begins with another."""
    shift = repeat * max(1, len(names) // repeats) % len(names)
    return [*names[shift:], *names[:shift]]


def tell(text: str) -> None:
    """What is going on, for somebody who waits for it; the results go to standard output."""
    print(text, file=sys.stderr, flush=True)


def measure_one(name: str, cell: Cell, plan: Plan, site: Site, sampler: Sampler) -> dict[str, Any]:
    """Run a contender once; its numbers."""
    with tempfile.TemporaryDirectory(prefix="distml-bench-") as folder:
        said = start(name, cell, plan, site, Path(folder))
        times = read_times(Path(folder), cell.workers, plan)
    return {**said, **one_repeat(name, times, plan, sampler, len(site.hosts))}


def one_repeat(name: str, times: Sequence[Times], plan: Plan, sampler: Sampler, hosts: int) -> dict[str, float]:
    """The numbers of one contender's run."""
    start_s, stop_s = steady(times, plan)
    steps = max(1, steps_within(times, start_s, stop_s))
    spent = sum(one.processor[-1] - one.processor[plan.warm_up] for one in times)
    counted = sum(len(one.wall) - 1 - plan.warm_up for one in times)
    alone = name in INDEPENDENT
    found = {
        "ms_per_step": independent_ms(times, plan) if name == "compute" else synchronous_ms(times, plan),
        "least_ms_per_step": least_ms(times, plan),
        "worker_cpu_ms_per_step": spent / counted * 1e3,
        "cpu_ms_per_step": sampler.grown("processor_s", start_s, stop_s) / steps * 1e3,
        "others_cpus": sampler.grown("others_s", start_s, stop_s) / max(1e-9, stop_s - start_s),
    }
    if alone and name != "compute":
        found["updates_per_s"] = steps_per_s(times, plan)
        found["ms_per_step"] = len(times) / found["updates_per_s"] * 1e3
    if hosts > 1:
        found["link_bytes_per_step"] = sampler.grown("link_bytes", start_s, stop_s) / (steps / len(times))
    return found


def over_repeats(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Summaries of numbers; what is text as the last repeat had it."""
    return {
        key: summary([row[key] for row in rows]) if isinstance(value, float) else value
        for key, value in rows[-1].items()
    }


def with_ratios(found: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Each contender with its time over that of the floor."""
    floor = found["compute"]["ms_per_step"]["median"] if "compute" in found else None
    for one in found.values():
        one["ratio_to_compute"] = one["ms_per_step"]["median"] / floor if floor else None
    return found


# -------------------------------------------------------------------------------------------------------------- targets
def targets(cell: Mapping[str, Any], hosts: int, rate: str) -> list[dict[str, Any]]:
    """What the measured cell should have come to; nothing for those that no target was set for."""
    if (cell["size"], cell["workers"], cell["optimizer"]) != ("4.2M", 2, "sgd"):
        return []
    found: Mapping[str, Contender] = cell["contenders"]
    wanted = one_host_targets(found) if hosts == 1 else two_host_targets(found, rate)
    return [
        {"what": what, "value": value, "target": target, "bound": bound,
         "met": value <= target if bound == "at most" else value >= target}
        for what, value, bound, target in wanted if value is not None
    ]  # fmt: skip


def one_host_targets(found: Mapping[str, Contender]) -> list[tuple[str, float | None, str, float]]:
    """(what, value, bound, target); a value is None where one of its contenders was not measured."""
    rate = ratio(found, "compute", "ps_async")  # (workers / async round) / (workers / compute step)
    return [
        ("all_reduce, ms per step over compute only", ratio(found, "all_reduce", "compute"), "at most", 1.15),
        ("all_reduce, times faster than DDP", ratio(found, "ddp", "all_reduce"), "at least", 2.8),
        ("parameter_server sync, ms per step over compute only", ratio(found, "ps_sync", "compute"), "at most", 1.35),
        ("parameter_server sync, times faster than the documented pattern",
         ratio(found, "pattern_sync", "ps_sync"), "at least", 4.0),
        ("parameter_server async, updates per second over workers / compute only", rate, "at least", 0.8),
    ]  # fmt: skip


def two_host_targets(found: Mapping[str, Contender], rate: str) -> list[tuple[str, float | None, str, float]]:
    """The same for two hosts."""
    if rate == "1gbit":
        return [("all_reduce uncompressed, ms per step over DDP", ratio(found, "all_reduce", "ddp"), "at most", 1.05)]
    compressed = [name for name in found if name.startswith("all_reduce_")]
    best = min(compressed, key=lambda name: found[name]["ms_per_step"]["median"], default="none")
    return [(f"{LABELS.get(best, best)}: times faster than DDP", ratio(found, "ddp", best), "at least", 10.0)]


def ratio(found: Mapping[str, Contender], above: str, below: str) -> float | None:
    """One contender's milliseconds per step over another's; None where one is missing."""
    if above not in found or below not in found:
        return None
    return float(found[above]["ms_per_step"]["median"] / found[below]["ms_per_step"]["median"])


# ---------------------------------------------------------------------------------------------------------------- table
def tables(report: Mapping[str, Any]) -> list[tuple[str, list[str], list[list[str]], list[str]]]:
    """One table for each cell: title, header, body, closing lines."""
    about = report["conditions"]
    made = [cell_table(cell, about) for cell in report["cells"]]
    others = [one["others_cpus"]["max"] for cell in report["cells"] for one in cell["contenders"].values()]
    made[-1][3].extend(closing(about, max(others, default=0.0)))
    return made


def cell_table(cell: Mapping[str, Any], about: Mapping[str, Any]) -> tuple[str, list[str], list[list[str]], list[str]]:
    """The table of one cell."""
    found: Mapping[str, Contender] = cell["contenders"]
    header = ["", "ms per step", "min", "max", "x compute", "processor ms", "updates/s", "MB/step", "transport"]
    if about["hosts"] > 1:
        header.insert(8, "MB on the link")
    body = [row(LABELS[name], one, cell["workers"], about["hosts"]) for name, one in found.items()]
    where = "one host" if about["hosts"] == 1 else f"two hosts, {figure.rate_name(about['rate'])}"
    title = f"{cell['size']} parameters, {cell['workers']} workers, {cell['optimizer']}, {where}"
    failures = [f"{LABELS[name]} failed: {error}" for name, error in cell["errors"].items()]
    return title, header, body, [*map(target_line, cell["targets"]), *failures]


def failure(report: Mapping[str, Any]) -> str | None:
    """Which contenders failed, in one line; None: none."""
    failed = [LABELS[name] for cell in report["cells"] for name in cell["errors"]]
    return f"{', '.join(dict.fromkeys(failed))} did not come to an end; the rest was measured" if failed else None


def draw(report: Mapping[str, Any]) -> bytes:
    """The report as a picture, PNG."""
    return figure.draw(report)


def row(label: str, one: Contender, workers: int, hosts: int) -> list[str]:
    """A contender's line."""
    rate = one["updates_per_s"]["median"] if "updates_per_s" in one else 1e3 / one["ms_per_step"]["median"]
    sent = f"{one['bytes_per_step']['median'] / 1e6:.2f}" if "bytes_per_step" in one else ""
    link = [f"{one['link_bytes_per_step']['median'] / 1e6:.2f}"] if hosts > 1 else []
    floor = f"{one['ratio_to_compute']:.2f}" if one["ratio_to_compute"] is not None else ""
    return [label, *cells(one["ms_per_step"], 2), floor, f"{one['cpu_ms_per_step']['median']:.1f}", f"{rate:.1f}",
            sent, *link, str(one.get("transport") or "").split(" ")[0]]  # fmt: skip


def target_line(target: Mapping[str, Any]) -> str:
    """A target's verdict."""
    verdict = "met" if target["met"] else "missed"
    return f"{target['what']}: {target['value']:.2f} (target {target['bound']} {target['target']:g}: {verdict})"


def closing(about: Mapping[str, Any], others: float) -> list[str]:
    """How to read the tables, and the conditions; `others`: CPUs that strangers' processes used at the most."""
    return [
        "ms per step: all workers once, the slowest of them; async and ssp: workers / (updates per second)",
        "processor ms: of all processes, servers and Ray too, per step of one worker; MB: as distml counts them",
        f"{about['repeats']} repeats, taking turns; {about['cpus']} CPUs, load before {about['load_before']}, "
        f"strangers used up to {max(0.0, others):.2f} of them meanwhile; torch {about['torch']}, ray {about['ray']}",
    ]
