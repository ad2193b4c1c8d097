"""Rules of jobs over jobs: whether a space fits its base, and how the keys go together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any

from distml.errors import UsageError
from distml.spec.elastic_rules import refuse_elastic
from distml.spec.messages import Problem, near, shorten
from distml.spec.nas import NasSpec, RewardSpec
from distml.spec.nas_rules import check_nas
from distml.spec.over_jobs import OverJobs
from distml.spec.population import NoExploitSpec, PopulationSpec
from distml.spec.rl import ActingBlock
from distml.spec.schema import BestSpec, JobSpec, LimitsSpec, LocalSGDSpec
from distml.spec.space import Dimension, Space, parse_space
from distml.spec.sweep import SweepSpec
from distml.spec.sweep_rules import sweep_rules
from distml.spec.yaml import dotted

# All members are placed alike: what one of them needs is the base's.
FIXED = ("distml", "kind", "name", "storage", "resources")
# How long, where and with whom a member trains does not change while it does; nor does what has weights or data.
FIXED_IN_POPULATIONS = (
    *FIXED, "seed", "init", "stop", "evaluate", "checkpoint", "log", "limits", "inline", "transport",
    "precision", "strategy", "optimizer.groups.*.match", "task.name", "task.data", "task.tokenizer",
    "task.block", "task.environment", "task.evaluation", "task.envs_per_worker", "task.normalise", "task.policy.name",
    "task.policy.hidden", "task.model.name", "task.model.hidden", "task.model.channels",
)  # fmt: skip
MUTATING = ("pbt", "pb2")  # Tune's own population-based schedulers: they change values while a trial trains
SHOWN_PATHS = 6

Variant = Callable[[Mapping[str, Any]], object]


def space_of(job: PopulationSpec | SweepSpec | NasSpec) -> Space:
    """The dimensions of a checked job."""
    return parse_space(job.space)[0]


def check_search(job: OverJobs, variant: Variant) -> list[Problem]:
    """Every rule that a job over jobs breaks.

    Args:
        job: valid key by key, its base whole.
        variant: makes the base with other values at some paths, or raises `UsageError`.
    """
    return list(_problems(job, variant))


def check_own_limits(job: OverJobs) -> list[Problem]:
    """What is wrong with the limits of a job over jobs as they are written, before the base's are taken in."""
    own, of_base = job.limits.max_restarts, job.base.limits.max_restarts
    if isinstance(job, PopulationSpec) or own in (LimitsSpec().max_restarts, of_base):
        return []
    return [Problem(f"limits.max_restarts is {own}, and how often a trial that failed is run again is said by retries; "
                    "set retries instead", (("limits", "max_restarts"),))]  # fmt: skip


def _problems(job: OverJobs, variant: Variant) -> Iterator[Problem]:
    assert isinstance(job, (PopulationSpec, SweepSpec, NasSpec))
    yield from refuse_elastic(job.base, job.kind)
    space: Space = ()
    if not (isinstance(job, NasSpec) and "name" in job.space):
        space, problems = parse_space(job.space)
        yield from problems
        yield from _paths(job, space, variant)
    if isinstance(job, PopulationSpec):
        yield from _population(job)
    elif isinstance(job, SweepSpec):
        yield from _sweep(job, space)
    else:
        yield from _reward(job)
        yield from check_nas(job)


# ---------------------------------------------------------------------------------------------------------------- paths
def _paths(job: PopulationSpec | SweepSpec | NasSpec, space: Space, variant: Variant) -> Iterator[Problem]:
    live = isinstance(job, PopulationSpec) or (isinstance(job, SweepSpec) and job.scheduler.name in MUTATING)
    fixed = FIXED_IN_POPULATIONS if live else FIXED
    known = [path for path in paths_of(job.base.model_dump(mode="python", by_alias=True)) if not within(path, fixed)]
    for dimension in space:
        below = [path for path in known if path.startswith(f"{dimension.path}.")]
        if within(dimension.path, fixed) and below:  # what may not be searched is only a part of it
            yield Problem(f"space.{dimension.path} is a whole block, and not all in it may be searched; name a single "
                          f"value below it, for example {below[0]}", (("space", dimension.path),))  # fmt: skip
        elif within(dimension.path, fixed):
            why = "a member keeps it while it trains" if live else "it is the same for all"
            yield Problem(f"space.{dimension.path} may not be searched: {why}; remove it (what may, for example: "
                          f"{', '.join(_shown(known))})", (("space", dimension.path),))  # fmt: skip
        else:
            choosers = [one for one in space if one is not dimension and _chooses_for(one, dimension)]
            yield from _takes(dimension, choosers, known, variant)


def within(path: str, patterns: Iterable[str]) -> bool:
    """Whether a dotted path is one of these, lies below one or has one below it; `*` is any entry."""
    parts = path.split(".")
    return any(all(map(fnmatchcase, parts, pattern.split("."))) for pattern in patterns)


def _shown(known: list[str]) -> list[str]:
    """Some paths worth a hint: of the optimiser, then of the task."""
    first = [path for path in known if path.startswith("optimizer.") and path.count(".") == 1]
    return [*first, *(path for path in known if path.startswith("task."))][:SHOWN_PATHS]


def _chooses_for(chooser: Dimension, dimension: Dimension) -> bool:
    """Whether a dimension decides which block the other one lies in."""
    block = chooser.path.removesuffix(".name")
    return chooser.kind == "choice" and dimension.path.startswith(f"{block}.")


def _takes(dimension: Dimension, choosers: list[Dimension], known: list[str], variant: Variant) -> Iterator[Problem]:
    """The first value that the base refuses, under each of the blocks that the space may choose around it."""
    at = ("space", dimension.path)
    around = [{one.path: value} for one in choosers for value in one.values] or [{}]
    values = dimension.values if dimension.kind == "choice" else map(dimension.clip, dimension.ends)
    for value in values:
        for others in around:
            try:
                variant({**others, dimension.path: value})
            except UsageError as error:
                yield Problem(f"{dotted(at)}: {_why_not(dimension, value, others, known, error)}", (at,))
                return


def _why_not(
    dimension: Dimension, value: Any, others: Mapping[str, Any], known: list[str], error: UsageError
) -> str:  # fmt: skip
    said = str(error).partition(": ")[2] or str(error)
    if dimension.path not in known and not any(path.startswith(f"{dimension.path}.") for path in known) and not others:
        close = near(dimension.path, known)
        hint = f"did you mean {close!r}?" if close else f"there are, for example: {', '.join(_shown(known))}"
        return f"the base has no such path; {hint}"
    beside = "".join(f" where {path} is {shorten(one)}" for path, one in others.items())
    text = f"the base does not take {shorten(value)} there{beside}: {said}"
    if "must be an integer" in said and dimension.kind in ("uniform", "loguniform"):
        text += f"; use {'lograndint' if dimension.is_log else 'randint'}"
    return text


def paths_of(tree: Any, prefix: str = "") -> Iterator[str]:
    """The dotted paths of all single values in a spec."""
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from paths_of(value, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(tree, (list, tuple)):
        for index, value in enumerate(tree):
            yield from paths_of(value, f"{prefix}.{index}")
    else:
        yield prefix


# ----------------------------------------------------------------------------------------------------------- population
def _population(job: PopulationSpec) -> Iterator[Problem]:
    steps = steps_of(job.base)
    decides = not isinstance(job.exploit, NoExploitSpec)
    if steps is not None and decides and job.every >= steps:
        yield Problem(f"every is {job.every}, and a member ends at step {steps} (base.stop): nothing would ever be "
                      f"decided; lower every or raise base.stop", (("every",),), "value")  # fmt: skip
    whole = job.stop.steps
    first = job.every * job.members
    if whole is not None and decides and whole < first:
        yield Problem(f"stop.steps is {whole}, of all {job.members} members together, and every is {job.every}: it "
                      f"ends before all had their first decision; raise stop.steps to at least {first}, or lower every",
                      (("stop", "steps"), ("every",)), "value")  # fmt: skip
    yield from _rounds(job.base, job.every, "every")
    if job.base.strategy.keeps_parts:
        yield Problem(f"base.strategy: {job.base.strategy.label} keeps each rank's part of the state on disk, and a "
                      "population copies states in memory; use strategy: all_reduce",
                      (("base", "strategy", "name"), ("base", "strategy"), ("base",)), "value")  # fmt: skip
    if job.max_concurrent is not None and job.max_concurrent > job.members:
        yield Problem(f"max_concurrent is {job.max_concurrent}, and there are {job.members} members; lower it or leave "
                      "it out", (("max_concurrent",),), "value")  # fmt: skip
    if job.stop.goal is not None and (job.stop.goal.at_least is None) == (job.stop.goal.at_most is None):
        yield Problem("stop.goal needs exactly one of at_least and at_most", (("stop", "goal"),), "value")


def steps_of(base: JobSpec) -> int | None:
    """The step at which the base ends by its own budget, as far as steps and examples say; None: not known."""
    found = [base.stop.steps] if base.stop.steps is not None else []
    if base.stop.examples is not None and base.strategy.is_synchronous and not isinstance(base.task, ActingBlock):
        found.append(-(-base.stop.examples // base.batch_size))
    return min(found) if found else None


def _rounds(base: JobSpec, every: int, key: str) -> Iterator[Problem]:
    """Local SGD's workers have one model at a round's end only."""
    if isinstance(base.strategy, LocalSGDSpec) and every % base.strategy.inner_steps:
        inner = base.strategy.inner_steps
        yield Problem(
            f"{key} is {every}, no multiple of {inner}, the base's strategy.inner_steps: between two rounds "
            f"every worker has weights of its own; use {-(-every // inner) * inner}",
            ((key,),),
            "value",
        )


# ---------------------------------------------------------------------------------------------------------------- sweep
def _sweep(job: SweepSpec, space: Space) -> Iterator[Problem]:
    yield from _sampler(job, space)
    yield from _objectives(job)
    yield from sweep_rules(job, space, steps_of(job.base))
    every, steps = job.every or job.base.evaluate.every, steps_of(job.base)
    key = "every" if job.every is not None else "scheduler"
    if job.scheduler.name != "fifo":
        yield from _rounds(job.base, every, key)
        if steps is not None and every >= steps:
            yield Problem(f"the scheduler looks at a trial every {every} steps ({_where_every(job)}), and a trial ends "
                          f"at step {steps} (base.stop): nothing would ever be decided; set every to less",
                          ((key,),), "value")  # fmt: skip
    grace = job.scheduler.grace
    if grace is not None and job.scheduler.name != "asha":
        yield Problem(f"scheduler.grace is for asha, the scheduler is {job.scheduler.name}; remove it",
                      (("scheduler", "grace"),))  # fmt: skip
    elif grace is not None and steps is not None and grace >= steps:
        yield Problem(f"scheduler.grace is {grace}, and a trial ends at step {steps} (base.stop): none would be ended "
                      "early; lower it", (("scheduler", "grace"),), "value")  # fmt: skip


def _where_every(job: SweepSpec) -> str:
    return "every" if job.every is not None else "base.evaluate.every"


def _sampler(job: SweepSpec, space: Space) -> Iterator[Problem]:
    intervals = [one for one in space if one.kind != "choice"]
    if job.sampler.name == "grid":
        for one in intervals:
            yield Problem(f"space.{one.path}: grid takes every combination, and {one.kind} has no list of values; use "
                          "choice, or sampler: random", (("space", one.path),), "value")  # fmt: skip
    elif job.trials is None:
        yield Problem(f"the key 'trials' is missing; with sampler {job.sampler.name} it says how many to run",
                      ((),), "value", absent=True)  # fmt: skip
    if job.scheduler.name in MUTATING and job.sampler.name == "optuna":
        yield Problem(f"scheduler {job.scheduler.name} changes values itself and cannot follow optuna; use sampler: "
                      "random", (("sampler",),), "value")  # fmt: skip
    if job.scheduler.name == "pb2":
        for one in space:
            if one.kind == "choice":
                yield Problem(f"space.{one.path}: scheduler pb2 models intervals only; use uniform or loguniform, or "
                              "scheduler: pbt", (("space", one.path),), "value")  # fmt: skip


def _objectives(job: SweepSpec) -> Iterator[Problem]:
    several = job.objective if isinstance(job.objective, list) else None
    if several is None:
        if job.tie_break is not None:
            yield Problem("tie_break is for several objectives, and there is one; remove it", (("tie_break",),))
        return
    metrics = [one.metric for one in several]
    if len(several) < 2:
        yield Problem(f"objective is a list of {len(several)}; give one metric, or a list of at least two",
                      (("objective",),), "value")  # fmt: skip
    for index, one in enumerate(several):
        if one.metric in metrics[:index]:
            yield Problem(f"objective names {one.metric} twice; name it once", (("objective", index), ("objective",)),
                          "value")  # fmt: skip
    if job.scheduler.name != "fifo":
        yield Problem(f"scheduler {job.scheduler.name} ranks trials by one metric, and objective has {len(several)}; "
                      "use scheduler: fifo", (("scheduler",),), "value")  # fmt: skip


def objectives_of(job: SweepSpec) -> list[BestSpec]:
    """The objectives, one or several."""
    return list(job.objective) if isinstance(job.objective, list) else [job.objective]


# ------------------------------------------------------------------------------------------------------------------ nas
def _reward(job: NasSpec) -> Iterator[Problem]:
    reward = job.reward
    if reward.cost is not None and reward.target is None:
        yield Problem(f"reward.cost is {reward.cost}, and there is no reward.target, the cost at which the reward is "
                      "the metric itself; add it", (("reward", "cost"),), "value")  # fmt: skip
    if reward.cost is None and reward.target is not None:
        yield Problem("reward.target is of reward.cost, which is null; add cost: flops or cost: parameters",
                      (("reward", "target"),))  # fmt: skip
    if reward.cost is None and reward.doubling_is_worth != RewardSpec().doubling_is_worth:
        yield Problem("reward.doubling_is_worth is of reward.cost, which is null; add cost: flops or cost: parameters",
                      (("reward", "doubling_is_worth"),))  # fmt: skip
    yield from _controller(job)


def _controller(job: NasSpec) -> Iterator[Problem]:
    controller = job.controller
    if controller.name == "reinforce" and controller.batch > job.trials:
        yield Problem(f"controller.batch is {controller.batch} rewards per update, and trials is {job.trials}: it "
                      "would never learn; lower it, raise trials, or use controller: random",
                      (("controller", "batch"), ("trials",)), "value")  # fmt: skip
    if controller.name == "evolution" and controller.population >= job.trials:
        yield Problem(f"controller.population is {controller.population}, all drawn by chance, and trials is "
                      f"{job.trials}: nobody would ever be mutated; lower it, raise trials, or use controller: random",
                      (("controller", "population"), ("trials",)), "value")  # fmt: skip
    if controller.name == "evolution" and controller.sample > controller.population:
        yield Problem(f"controller.sample is {controller.sample} of a population of {controller.population}; lower it",
                      (("controller", "sample"), ("controller",)), "value")  # fmt: skip
