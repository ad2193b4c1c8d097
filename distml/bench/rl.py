"""`distml bench rl`: frames per second, and frames and seconds until it is solved, against SB3 and RLlib.

Each contender trains once per seed, in turn, alone on the machine, as a user would start it: ours are the shipped jobs,
peers have the settings that their projects publish. All keep copies of their weights every 4,000 frames (`rl_kept.py`),
which afterwards play 20 greedy episodes, the same for all. Solved is at the first of three copies in a row that reach
the threshold. Seconds are those of training alone: start-up of processes, copies and evaluations are outside, what an
algorithm starts in its first iteration is inside; frames per second count from the first copy to the last.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import math
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from distml.bench import rl_figure
from distml.bench.contenders import terminable
from distml.bench.exchange import check, in_turn, target_line, tell
from distml.bench.rl_contenders import SUITES, Ask, Contender, Suite, missing, train
from distml.bench.rl_kept import EPISODES, EVERY, Kept, first_solved
from distml.bench.table import cells, conditions, summary
from distml.bench.timing import ProcessTimes, Sampler
from distml.errors import RunError, UsageError

PAPER_SPEEDUPS = {1: 1.0, 2: 2.1, 4: 3.7, 8: 6.9, 16: 12.5}  # A3C, Mnih et al. 2016, table 2: time to a given score
Measured = Mapping[str, Any]


def measure(
    *, environment: str = "cartpole", contenders: Sequence[str] = (), seeds: int | None = None,
    frames: int | None = None, workers: Sequence[int] = (), overrides: Sequence[str] = (),
) -> dict[str, Any]:  # fmt: skip
    """Let the contenders take turns.

    Args:
        environment: one of `SUITES`.
        contenders: some of that suite's; none: all.
        seeds: how many; each contender trains once with each.
        frames: of every contender; None: what its job or its project gives.
        workers: of A3C. With several it is measured with each of them, against the paper's speed-ups.
        overrides: `KEY=VALUE` texts, laid over the specs of our jobs.

    Raises:
        UsageError: there is no such environment or contender, or a number is not possible.
    """
    check("--environment", [environment], SUITES)
    suite = SUITES[environment]
    check("--contenders", contenders, suite.contenders)
    seeds = suite.seeds if seeds is None else seeds
    check_numbers(suite, seeds, frames, workers)
    chosen = {name: one for name, one in suite.contenders.items() if name in (contenders or suite.contenders)}
    if workers:
        chosen = with_workers(chosen if contenders or len(workers) == 1 else {"a3c": chosen["a3c"]}, workers)
    about = conditions(environment=suite.environment, seeds=seeds, frames=frames, torch_threads=1,
                       overrides=list(overrides))  # fmt: skip
    found, errors, skipped = measure_all(suite, chosen, seeds, Ask(frames, tuple(overrides)))
    report = {"bench": "rl", "environment": environment, "threshold": suite.threshold, "returns": suite.returns,
              "conditions": about, "contenders": found, "errors": errors, "skipped": skipped}  # fmt: skip
    return {**report, "targets": targets(environment, found)}


def check_numbers(suite: Suite, seeds: int, frames: int | None, workers: Sequence[int]) -> None:
    """Refuse numbers that cannot be."""
    if seeds < 1:
        raise UsageError(f"--seeds {seeds} is not possible; give at least 1")
    if frames is not None and frames < 3 * EVERY:
        raise UsageError(f"--frames {frames} is not possible; give at least {3 * EVERY}")
    for number in workers:
        if number < 1:
            raise UsageError(f"--workers {number} is not possible; give at least 1")
    if workers and "a3c" not in suite.contenders:
        raise UsageError(f"--workers is for A3C, which is not measured on {suite.environment}; leave it out")


def with_workers(chosen: Mapping[str, Contender], workers: Sequence[int]) -> dict[str, Contender]:
    """The contenders, with A3C once for each number of workers."""
    found = {}
    for name, one in chosen.items():
        if name != "a3c":
            found[name] = one
            continue
        for number in workers:
            label = f"{one.label}, {number} worker{'s' if number > 1 else ''}"
            key = name if len(workers) == 1 else f"{name}_{number}"
            found[key] = replace(one, label=label, workers=number)
    return found


# ------------------------------------------------------------------------------------------------------------ measuring
def measure_all(
    suite: Suite, chosen: Mapping[str, Contender], seeds: int, ask: Ask
) -> tuple[dict[str, dict[str, Any]], dict[str, str], dict[str, str]]:
    """What was found of each contender, why others failed, and what others would need."""
    skipped = {one.label: needs for one in chosen.values() if (needs := missing(one)) is not None}
    for label, needs in skipped.items():
        tell(f"{label} is left out: {needs}")
    names = [name for name, one in chosen.items() if one.label not in skipped]
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    errors: dict[str, str] = {}
    with terminable(), Sampler(ProcessTimes()) as sampler:
        for index in range(seeds):
            for name in in_turn(names, index, seeds):
                one = chosen[name]
                if one.label in errors:
                    continue
                try:
                    runs[name].append(one_run(suite, one, replace(ask, seed=index + 1), sampler))
                except (RunError, UsageError) as error:
                    errors[one.label] = str(error)
                    tell(f"{one.label}: {error}")
    found = {name: over_seeds(chosen[name], runs[name]) for name in names if chosen[name].label not in errors}
    return found, errors, skipped


def one_run(suite: Suite, one: Contender, ask: Ask, sampler: Sampler) -> dict[str, Any]:
    """Train, then evaluate all that was kept."""
    with tempfile.TemporaryDirectory(prefix="distml-bench-") as folder:
        kept = train(suite, one, ask, Path(folder))
    first, last = kept.at[0], kept.at[-1]
    run = numbers(kept, kept.returns(suite.environment), suite.threshold)
    run |= {
        "seed": ask.seed,
        "cpu_us_per_frame": sampler.grown("processor_s", first, last) / (kept.frames[-1] - kept.frames[0]) * 1e6,
        "others_cpus": sampler.grown("others_s", first, last) / (last - first),
    }
    tell(f"seed {ask.seed}, {one.label}: {run_line(run)}")
    return run


def numbers(kept: Kept, returns: Sequence[float], threshold: float) -> dict[str, Any]:
    """The numbers of one run."""
    first = first_solved(returns, threshold)
    return {
        "frames_per_s": kept.frames_per_s,
        "frames_to_solved": None if first is None else int(kept.frames[first]),
        "seconds_to_solved": None if first is None else float(kept.seconds[first]),
        "frames": [int(value) for value in kept.frames],
        "seconds": [round(float(value), 4) for value in kept.seconds],
        "returns": [None if math.isnan(value) else round(value, 2) for value in returns],
    }


def run_line(run: Mapping[str, Any]) -> str:
    """A run in a line, for somebody who waits."""
    solved = "not solved"
    if run["frames_to_solved"] is not None:
        solved = f"solved at {run['frames_to_solved']:,} frames, {run['seconds_to_solved']:.1f} s"
    returns = [value for value in run["returns"] if value is not None]
    ends = f"; returns up to {max(returns):.1f}, the last 10: {statistics.fmean(returns[-10:]):.1f}" if returns else ""
    return f"{run['frames_per_s']:,.0f} frames/s, {run['cpu_us_per_frame']:.0f} us of processors each, {solved}{ends}"


def over_seeds(one: Contender, runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A contender's numbers over all seeds."""
    solved = [run["frames_to_solved"] is not None for run in runs]
    last = [value for run in runs for value in run["returns"][-10:] if value is not None]
    return {
        "label": one.label,
        "workers": one.workers,
        "ours": one.job is not None,
        "frames_per_s": summary([run["frames_per_s"] for run in runs]),
        "solved": sum(solved),
        "frames_to_solved": [run["frames_to_solved"] for run in runs],
        "seconds_to_solved": [run["seconds_to_solved"] for run in runs],
        "last_returns": statistics.fmean(last) if last else None,
        "cpu_us_per_frame": summary([run["cpu_us_per_frame"] for run in runs]),
        "others_cpus": max(run["others_cpus"] for run in runs),
        "runs": list(runs),
    }


# -------------------------------------------------------------------------------------------------------------- targets
def targets(environment: str, found: Mapping[str, Measured]) -> list[dict[str, Any]]:
    """What it should have come to; nothing for contenders that were not measured.

    A value is None where somebody did not solve it with every seed.
    """
    wanted = {"cartpole": cartpole_targets, "pendulum": pendulum_targets, "pong": pong_targets}[environment]
    return [
        {"what": what, "value": value, "target": target, "bound": bound,
         "met": value is not None and (value <= target if bound == "at most" else value >= target)}
        for names, what, value_of, bound, target in wanted()
        if all(name in found for name in names)
        for value in [value_of(*(found[name] for name in names))]
    ]  # fmt: skip


def cartpole_targets() -> list[tuple[Any, ...]]:
    """(contenders, what, their value, bound, target)."""
    solved = [("a3c", 200_000), ("a2c", 200_000), ("ppo", 150_000), ("trpo", 150_000), ("reinforce", 500_000)]
    return [
        (("a3c", "sb3_a2c"), "A3C, frames/s over SB3 A2C's (8 would be fine)", rate_ratio, "at least", 6.0),
        (("a3c", "rllib_impala"), "A3C, frames/s over RLlib IMPALA's", rate_ratio, "at least", 25.0),
        (("a3c", "sb3_a2c"), "A3C, seconds to solved over SB3 A2C's, worst seed", time_ratio, "at most", 0.7),
        *(((name,), f"{name}, frames to solved, worst seed", worst_frames, "at most", most) for name, most in solved),
    ]


def pendulum_targets() -> list[tuple[Any, ...]]:
    """The same for Pendulum."""
    return [(("ppo",), "ppo, frames to solved, worst seed", worst_frames, "at most", 300_000)]


def pong_targets() -> list[tuple[Any, ...]]:
    """The same for Pong."""
    return [(("a3c", "sb3_a2c"), "A3C, frames/s over SB3 A2C's", rate_ratio, "at least", 2.0)]


def rate_ratio(ours: Measured, theirs: Measured) -> float:
    """Median frames per second over median frames per second."""
    return float(ours["frames_per_s"]["median"] / theirs["frames_per_s"]["median"])


def worst_frames(one: Measured) -> float | None:
    """Frames to solved with the seed that needed most; None: not solved with all."""
    return None if None in one["frames_to_solved"] else float(max(one["frames_to_solved"]))


def time_ratio(ours: Measured, theirs: Measured) -> float | None:
    """The largest ratio of seconds to solved over the seeds; None: ours did not solve it with all.

    Where they have not solved it, they have needed their whole training time at least.
    """
    if None in ours["seconds_to_solved"]:
        return None
    needed = [run["seconds_to_solved"] or run["seconds"][-1] for run in theirs["runs"]]
    return float(max(own / other for own, other in zip(ours["seconds_to_solved"], needed, strict=True)))


# ---------------------------------------------------------------------------------------------------------------- table
def tables(report: Mapping[str, Any]) -> list[tuple[str, list[str], list[list[str]], list[str]]]:
    """The contenders, and A3C by its workers where there are several: title, header, body, closing lines."""
    found: Mapping[str, Measured] = report["contenders"]
    about = report["conditions"]
    header = ["", "frames/s", "min", "max", "x SB3 A2C", "processor us", "solved", "frames to it", "seconds to it",
              "last returns"]  # fmt: skip
    peer = found.get("sb3_a2c")
    title = f"{about['environment']}, {about['seeds']} seed{'s' if about['seeds'] > 1 else ''}"
    lines = [
        *map(verdict_line, report["targets"]),
        *(f"{label} failed: {error}" for label, error in report["errors"].items()),
        *(f"{label} was left out: {needs}" for label, needs in report["skipped"].items()),
        *closing(report),
        *(f"our jobs with --set {text}" for text in about["overrides"]),
    ]
    made = [(title, header, [row(one, peer) for one in found.values()], lines)]
    scaled = [one for name, one in found.items() if name.startswith("a3c_")]
    return [*made, scaling_table(scaled, about["cpus"])] if scaled else made


def row(one: Measured, peer: Measured | None) -> list[str]:
    """A contender's line; medians over the seeds that were solved."""
    frames = [value for value in one["frames_to_solved"] if value is not None]
    seconds = [value for value in one["seconds_to_solved"] if value is not None]
    last = one["last_returns"]
    return [
        one["label"],
        *cells(one["frames_per_s"], 0),
        f"{rate_ratio(one, peer):.2f}" if peer else "",
        f"{one['cpu_us_per_frame']['median']:.0f}",
        f"{one['solved']} of {len(one['runs'])}",
        f"{statistics.median(frames):,.0f}" if frames else "-",
        f"{statistics.median(seconds):.2f}" if seconds else "-",
        "-" if last is None else f"{last:.1f}",
    ]


def scaling_table(found: Sequence[Measured], cpus: int) -> tuple[str, list[str], list[list[str]], list[str]]:
    """A3C by its number of workers, against the first of them."""
    first = found[0]
    body = []
    for one in found:
        rate, time_ = rate_ratio(one, first), speedup(one, first)
        paper = PAPER_SPEEDUPS.get(one["workers"])
        base = PAPER_SPEEDUPS.get(first["workers"])
        body.append([one["label"], f"{one['frames_per_s']['median']:,.0f}", f"{rate:.2f}",
                     "-" if time_ is None else f"{time_:.2f}",
                     "-" if paper is None or base is None else f"{paper / base:.1f}"])  # fmt: skip
    header = ["", "frames/s", "times the frames/s", "times faster to solved", "the paper's, on 16 cores"]
    return "A3C by its workers", header, body, [f"this machine has {cpus} CPUs for workers, servers and environments"]


def speedup(one: Measured, first: Measured) -> float | None:
    """By how much the median time to solved is shorter; None: not solved with every seed."""
    if None in one["seconds_to_solved"] or None in first["seconds_to_solved"]:
        return None
    return float(statistics.median(first["seconds_to_solved"]) / statistics.median(one["seconds_to_solved"]))


def verdict_line(target: Mapping[str, Any]) -> str:
    """A target's verdict."""
    if target["value"] is None:
        return f"{target['what']}: not solved with every seed (target {target['bound']} {target['target']:g}: missed)"
    return target_line(target)


def closing(report: Mapping[str, Any]) -> list[str]:
    """How to read the table, and the conditions."""
    about, found = report["conditions"], report["contenders"].values()
    others = max((one["others_cpus"] for one in found), default=0.0)
    return [
        f"solved: the first of three copies in a row, {EVERY:,} frames apart, whose return is {report['threshold']:g} "
        f"or more; return: {report['returns']}",
        "processor us: of all its processes and threads, per frame; last returns: of the last 10 copies, all seeds",
        f"{EPISODES} episodes have seeds that nobody trains with; seconds of training alone; one torch thread each",
        f"{about['cpus']} CPUs, load before {about['load_before']}, strangers used up to {max(0.0, others):.2f} of "
        f"them meanwhile; torch {about['torch']}, ray {about['ray']}{version('stable-baselines3')}",
    ]


def version(package: str) -> str:
    """Its name and version, or nothing."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return f", {package} {importlib.metadata.version(package)}"
    return ""


def failure(report: Mapping[str, Any]) -> str | None:
    """Which contenders failed, in one line; None: none."""
    failed = ", ".join(report["errors"])
    return f"{failed} did not come to an end; the rest was measured" if failed else None


def draw(report: Mapping[str, Any]) -> bytes:
    """The report as a picture, PNG."""
    return rl_figure.draw(report)
