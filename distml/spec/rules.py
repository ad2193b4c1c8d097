"""Rules across the spec's keys: each says the values and the fix, none repairs anything."""

from __future__ import annotations

import math
from collections.abc import Iterator

from distml.spec.base import StrategyBlock
from distml.spec.elastic_rules import check_elastic
from distml.spec.image_rules import check_images
from distml.spec.language_rules import TextTaskSpecs, check_text, task_tokens
from distml.spec.matrix import refusal
from distml.spec.messages import Problem
from distml.spec.placement_rules import check_placement
from distml.spec.rl import ActingBlock
from distml.spec.rl_rules import check_acting, check_bandit
from distml.spec.schema import (
    ClassificationSpec,
    JobSpec,
    OwnTaskSpec,
    ParameterServerSpec,
    ScheduleSpec,
    SGDSpec,
    SingleSpec,
)
from distml.spec.tabular import BanditSpec
from distml.spec.zero import ZeroSpec
from distml.spec.zero_rules import check_precision, check_zero

MAX_SERVERS = 64

TRANSPORTS: dict[str, tuple[str, ...]] = {
    "single": ("auto",),
    "all_reduce": ("auto", "shared_memory", "process_group"),
    "parameter_server": ("auto", "shared_memory", "object_store"),
    "local_sgd": ("auto", "shared_memory", "process_group"),
    "zero": ("auto", "process_group"),
}


def check_rules(job: JobSpec, own_needs: frozenset[str] | None = None) -> Iterator[Problem]:
    """Every rule across keys that the job breaks.

    Args:
        job: valid key by key.
        own_needs: what a user's own task says that it needs, where that is known.
    """
    yield from _strategy(job)
    yield from _needs(job, own_needs)
    yield from _batch(job)
    yield from _optimizer(job)
    yield from _schedule(job, job.optimizer.schedule)
    yield from _stop(job)
    yield from _inline(job)
    yield from check_elastic(job)
    yield from check_placement(job)
    if isinstance(job.task, ActingBlock):
        yield from check_acting(job, job.task)
    if isinstance(job.task, BanditSpec):
        yield from check_bandit(job, job.task)
    if isinstance(job.task, TextTaskSpecs):
        yield from check_text(job.task)
    if isinstance(job.task, ClassificationSpec):
        yield from check_images(job.task)


def _strategy(job: JobSpec) -> Iterator[Problem]:
    strategy, workers = job.strategy, job.resources.workers
    if isinstance(strategy, SingleSpec) and workers > 1:
        yield Problem(
            f"strategy single has one worker, resources.workers is {workers}; "
            "set workers to 1 or strategy to all_reduce",
            (("resources", "workers"), ("strategy",)),
        )
    if isinstance(strategy, ParameterServerSpec):
        if strategy.mode == "ssp" and strategy.max_staleness is None:
            yield Problem(
                "mode ssp needs strategy.max_staleness, the bound in versions; add it, for example max_staleness: 4",
                (("strategy", "mode"),),
            )
        if strategy.mode != "ssp" and strategy.max_staleness is not None:
            yield Problem(
                f"max_staleness {strategy.max_staleness} is for mode ssp, the mode is {strategy.mode}; "
                "remove it or set mode: ssp",
                (("strategy", "max_staleness"),),
            )
        for key in ("prefetch", "staleness_scaling"):
            if strategy.is_synchronous and getattr(strategy, key):
                yield Problem(
                    f"{key} is for modes async and ssp, the mode is sync; remove it or change the mode",
                    (("strategy", key),),
                )
        if strategy.servers > MAX_SERVERS:
            yield Problem(
                f"strategy.servers is {strategy.servers}, at most {MAX_SERVERS} are possible; lower it",
                (("strategy", "servers"),),
            )
    if isinstance(strategy, ZeroSpec):
        yield from check_zero(job, strategy)
    yield from check_precision(job)
    yield from _transport(job)


def _transport(job: JobSpec) -> Iterator[Problem]:
    strategy, here = job.strategy, (("transport",),)
    fitting = TRANSPORTS[strategy.name]
    if job.transport not in fitting:
        yield Problem(f"transport {job.transport} does not fit strategy {strategy.name}; use {listed(fitting)}", here)
    if job.transport != "shared_memory":
        return
    wire = fitting[-1]
    if job.resources.gpus_per_worker:
        yield Problem(f"transport shared_memory is for gradients on CPUs, not on GPUs; set {wire} or auto", here)
    for key in ("compression", "prefetch"):
        if getattr(strategy, key, None):
            yield Problem(
                f"strategy.{key} is for a wire, and shared_memory has none; remove it, or set transport to {wire}",
                (("strategy", key), *here),
            )


def listed(names: tuple[str, ...]) -> str:
    """As in a sentence: `a, b or c`."""
    return " or ".join(part for part in (", ".join(names[:-1]), names[-1]) if part)


def _needs(job: JobSpec, own_needs: frozenset[str] | None) -> Iterator[Problem]:
    needs = (own_needs or frozenset()) if isinstance(job.task, OwnTaskSpec) else job.task.all_needs
    strategy: StrategyBlock = job.strategy
    num_phases = 1 if isinstance(job.task, OwnTaskSpec) else job.task.num_phases
    reason = refusal(job.task.name, needs, strategy, num_phases)
    if reason is not None:
        yield Problem(reason, (("strategy",), ("task",)))
    if isinstance(strategy, ZeroSpec):
        yield from _equal_micro_batches(job, "strategy zero adds up gradients")
    elif reason is None and "group_mean" in needs:
        yield from _equal_micro_batches(job, f"task {job.task.name} needs group_mean")


def _equal_micro_batches(job: JobSpec, why: str) -> Iterator[Problem]:
    """A collective in every micro-batch must be called equally often by every worker."""
    elastic, largest = job.resources.elastic, job.resources.workers
    for workers in range(elastic.min if elastic is not None else largest, largest + 1):
        problem = _unequal(job, why, workers)
        if problem is not None:
            yield problem
            return


def _unequal(job: JobSpec, why: str, workers: int) -> Problem | None:
    batch_size, size = job.batch_size, job.micro_batch_size
    if size is None or batch_size < workers:
        return None
    fewest, most = math.ceil(batch_size // workers / size), math.ceil(math.ceil(batch_size / workers) / size)
    if fewest == most:
        return None
    return Problem(
        f"{why} in every micro-batch, but batch_size {batch_size} over {workers} "
        f"workers in pieces of {size} is {most} micro-batches on some and {fewest} on others; "
        "set batch_size to a multiple of the workers or change micro_batch_size",
        (("micro_batch_size",),),
    )


def _batch(job: JobSpec) -> Iterator[Problem]:
    workers, batch_size = job.resources.workers, job.batch_size
    if batch_size < workers:
        yield Problem(
            f"batch_size {batch_size} is shared out over {workers} workers, each needs at least one example; "
            f"set batch_size to at least {workers} or lower resources.workers",
            (("batch_size",), ("resources", "workers")),
        )
    share = math.ceil(batch_size / workers)
    if job.micro_batch_size is not None and job.micro_batch_size > share:
        yield Problem(
            f"micro_batch_size {job.micro_batch_size} is larger than a worker's share of the batch, "
            f"{share} (batch_size {batch_size} / {workers} workers); set at most {share} or null",
            (("micro_batch_size",),),
        )


def _optimizer(job: JobSpec) -> Iterator[Problem]:
    optimizer = job.optimizer
    if isinstance(optimizer, SGDSpec) and optimizer.nesterov and optimizer.momentum == 0:
        yield Problem(
            "nesterov: true needs momentum, optimizer.momentum is 0; set it, for example momentum: 0.9",
            (("optimizer", "nesterov"),),
        )


def _schedule(job: JobSpec, schedule: ScheduleSpec) -> Iterator[Problem]:
    here, stop = ("optimizer", "schedule"), job.stop
    ramp = schedule.name in ("linear", "cosine")
    by_frames = stop.frames is not None and job.task.uses_per_frame is not None
    if ramp and schedule.steps is None and not (stop.steps or stop.examples or stop.epochs or stop.tokens or by_frames):
        yield Problem(
            f"schedule {schedule.name} must know where it ends; set optimizer.schedule.steps, "
            "or one of stop.steps, stop.examples, stop.epochs, stop.tokens",
            ((*here, "name"),),
        )
    if schedule.name == "step" and schedule.every is None:
        yield Problem(
            "schedule step needs optimizer.schedule.every, the steps between two falls; add it", ((*here, "name"),)
        )
    # A setting that the chosen schedule never reads would look as if it did something.
    for key, readers in (("steps", ("linear", "cosine")), ("final", ("linear", "cosine")), ("every", ("step",)),
                         ("factor", ("step",))):  # fmt: skip
        value = getattr(schedule, key)
        if schedule.name not in readers and value != ScheduleSpec.model_fields[key].default:
            yield Problem(
                f"schedule.{key} {value} is for schedule {' and '.join(readers)}, the schedule is {schedule.name}; "
                "remove it or change the schedule's name",
                ((*here, key),),
            )
    if stop.steps is not None and schedule.warmup > stop.steps:
        yield Problem(
            f"schedule.warmup {schedule.warmup} is longer than the run, stop.steps {stop.steps}; lower it",
            ((*here, "warmup"),),
        )


def _stop(job: JobSpec) -> Iterator[Problem]:
    stop = job.stop
    if not (stop.steps or stop.examples or stop.epochs or stop.frames or stop.tokens or stop.seconds):
        yield Problem("stop has no budget; set one of steps, examples, epochs, frames, tokens, seconds", (("stop",),))
    if stop.tokens is not None and task_tokens(job.task) is None:
        yield Problem(
            f"stop.tokens counts a language model's tokens, and task {job.task.name} has none; "
            "set one of steps, examples, epochs, seconds",
            (("stop", "tokens"),),
        )
    if stop.frames is not None and not (isinstance(job.task, OwnTaskSpec) or job.task.counts_frames):
        yield Problem(
            f"stop.frames counts environment steps, and task {job.task.name} takes none; "
            "set one of steps, examples, epochs, seconds",
            (("stop", "frames"),),
        )
    if stop.epochs is not None and isinstance(job.task, ActingBlock):
        yield Problem(
            f"stop.epochs needs a dataset, and task {job.task.name} acts in environments; set stop.frames",
            (("stop", "epochs"),),
        )
    goal = stop.goal
    if goal is not None and (goal.at_least is None) == (goal.at_most is None):
        found = "neither at_least nor at_most" if goal.at_least is None else "both at_least and at_most"
        yield Problem(f"stop.goal has {found}; give exactly one of them", (("stop", "goal"),))


def _inline(job: JobSpec) -> Iterator[Problem]:
    speeds, workers = job.inline.speeds, job.resources.workers
    if speeds is None:
        return
    here = (("inline", "speeds"),)
    if job.strategy.is_synchronous:
        label = job.strategy.label
        yield Problem(
            f"inline.speeds is for async and ssp, under {label} all workers wait for each other; remove it", here
        )
    if len(speeds) != workers:
        yield Problem(
            f"inline.speeds has {len(speeds)} entries, resources.workers is {workers}; give one speed per worker", here
        )
