"""The smallest change that makes a job fit: a search in the order of how much each change disturbs.

    a smaller micro-batch   same updates, more passes         activation checkpointing   same updates, a third more work
    a higher zero stage     same updates, more exchange       offload                    same updates, slower ones
    more workers            more machines

First every change alone, in this order; then together, level by level; and of those that fit together, what is not
needed is taken out again. Each candidate is loaded as `--set` would lay it over the spec; what its rules
refuse is none.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence

from distml.launch.plan.estimate import Plan, micro_batches_of
from distml.spec.language import TextBlock
from distml.spec.schema import JobSpec
from distml.spec.zero import ZeroSpec

MOST_WORKERS = 4096
Change = tuple[str, ...]
"""What stands behind one or more `--set`."""
Try = Callable[[Sequence[str]], Plan | None]
"""The plan with these changes laid over the spec; None: the spec's rules refuse them."""


def smallest_change(levels: Iterable[list[Change]], attempt: Try) -> list[str] | None:
    """What to lay over the spec so that it fits, or None if nothing does."""
    levels = list(levels)
    alone = gentlest(levels, attempt, lambda plan: plan.fits)
    if alone is not None:
        return alone
    chosen: list[Change] = []
    for level in levels:
        best = None
        for change in level:
            plan = attempt(_together([*chosen, change]))
            if plan is not None and plan.fits:
                return _needed([*chosen, change], attempt)
            best = change if plan is not None else best
        chosen += [best] if best is not None else []
    return None


def gentlest(levels: Iterable[list[Change]], attempt: Try, enough: Callable[[Plan], bool]) -> list[str] | None:
    """The first single change whose plan is good enough."""
    for level in levels:
        for change in level:
            plan = attempt(change)
            if plan is not None and enough(plan):
                return list(change)
    return None


def _together(changes: Iterable[Change]) -> list[str]:
    return [part for change in changes for part in change]


def _needed(changes: list[Change], attempt: Try) -> list[str]:
    """Those without which it does not fit."""
    for change in list(changes):
        others = [one for one in changes if one is not change]
        plan = attempt(_together(others))
        if plan is not None and plan.fits:
            changes = others
    return _together(changes)


def levels_of(job: JobSpec, most_workers: int | None) -> Iterator[list[Change]]:
    """Levels of changes, the gentlest first, each from gentle to harsh.

    Args:
        most_workers: that there is room for; None: as many as one likes.
    """
    micro, _ = micro_batches_of(job)
    sizes: list[Change] = []
    while micro > 1:
        micro = micro // 2
        sizes.append((f"micro_batch_size={micro}",))
    yield sizes
    if isinstance(job.task, TextBlock) and not job.task.model.activation_checkpointing:  # type: ignore[attr-defined]
        yield [("task.model.activation_checkpointing=true",)]
    yield list(_stages(job))
    if job.resources.gpus_per_worker:
        yield list(_offloads(job))
    workers = job.resources.workers
    more: list[Change] = []
    limit = MOST_WORKERS if most_workers is None else most_workers
    while workers * 2 <= min(limit, job.batch_size):
        workers *= 2
        more.append((f"resources.workers={workers}",))
    yield more


def _stages(job: JobSpec) -> Iterator[Change]:
    before = job.strategy.stage if isinstance(job.strategy, ZeroSpec) else 0
    for stage in range(before + 1, 4):
        if before:
            yield (f"strategy.stage={stage}",)
        else:
            yield (f"strategy={{name: zero, stage: {stage}}}",)


def _offloads(job: JobSpec) -> Iterator[Change]:
    """From zero only: what the spec's strategy is by then is not known, a change that does not fit it is refused."""
    offload = job.strategy.offload if isinstance(job.strategy, ZeroSpec) else []
    for wanted in (["optimizer"], ["optimizer", "parameters"]):
        if len(wanted) > len(offload):
            yield (f"strategy.offload={json.dumps(wanted)}",)
