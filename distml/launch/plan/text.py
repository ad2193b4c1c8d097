"""A plan as people read it: one screen, aligned, the same for the same numbers. No torch.

Memory is in GiB (2^30) or MiB, as devices have it; what goes over a wire in powers of 1000.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from math import prod

from distml.launch.plan.estimate import Plan
from distml.memory import binary_size
from distml.runs.units import byte_size, duration
from distml.spec.language import TextBlock

LABEL, NUMBER = 34, 12


def plan_lines(
    plan: Plan, change: list[str] | None = None, changed: Plan | None = None, searched: bool = False
) -> Iterator[str]:
    """The whole text.

    Args:
        change: what makes it fit, as `--set` takes it; `changed` is the plan with it.
        searched: such a change was looked for.
    """
    yield from _head(plan)
    yield ""
    yield from _memory(plan)
    yield ""
    yield from _step(plan)
    for note in plan.notes:
        yield f"note: {note}"
    yield verdict(plan)
    if change:
        yield f"smallest change that fits{condition(changed) if changed else ''}: {settings(change)}"
    elif searched:
        yield "no smaller micro-batch, checkpointing, zero stage, offload or number of workers makes it fit"


def _head(plan: Plan) -> Iterator[str]:
    job, places = plan.job, plan.places
    workers = f"{places.ranks} worker{'s' if places.ranks > 1 else ''}"
    hosts = f" on {places.hosts} nodes" if places.hosts > 1 else ""
    carried = places.transport.replace("_", " ")
    yield f"{job.name}: {job.task.name}, {job.strategy.label}, {job.precision}, {workers}{hosts} ({carried})"
    model = f"{plan.size.trained:,} parameters"
    if isinstance(job.task, TextBlock):
        shape = job.task.model  # type: ignore[attr-defined]
        model += f": {shape.layers} layers, {shape.width} wide, {shape.heads} heads, blocks of {job.task.block} tokens"
    yield model


def _row(label: str, value: str, remark: str = "") -> str:
    return f"  {label:<{LABEL}}{value:>{NUMBER}}{'   ' + remark if remark else ''}"


def _memory(plan: Plan) -> Iterator[str]:
    memory, states = plan.memory, plan.memory.states
    yield "memory of a rank"
    yield _row("weights", binary_size(states.weights))
    yield _row("gradients", binary_size(states.gradients))
    yield _row("optimiser", binary_size(states.optimizer))
    if states.other:
        yield _row("buffers and frozen", binary_size(states.other))
    for name, value in states.buffers.items():
        yield _row(name, binary_size(value))
    traced = memory.activations
    if traced.unknown is None:
        yield _row("activations", binary_size(traced.peak), f"micro-batch of {plan.micro_batch}; "
                   f"{binary_size(traced.saved)} kept for backward")  # fmt: skip
    else:
        yield _row("activations", "unknown")
    for name, value in states.at_update.items():
        yield _row(f"({name})", binary_size(value), "at the update, when activations are gone")
    yield _row("process", binary_size(memory.process))
    device = f"of {binary_size(plan.machine.memory)}, {plan.machine.device} ({plan.machine.source})"
    yield _row("the most at one time", binary_size(memory.total), device)
    if states.host:
        limit = plan.machine.host_memory
        yield "of its host"
        for name, value in states.host.items():
            yield _row(name, binary_size(value))
        of = f"of {binary_size(limit)}, its share" if limit else "its share is not known: host_memory_gib"
        yield _row("in all", binary_size(memory.host), of)
    if states.server:
        yield _row("each parameter server", binary_size(states.server))
    yield _row("states, undivided", binary_size(plan.all_states),
               f"at least {plan.devices_for_states} of {binary_size(plan.machine.memory)}")  # fmt: skip


def _step(plan: Plan) -> Iterator[str]:
    step = plan.step
    passes = f", in {plan.accumulation} micro-batches" if plan.accumulation > 1 else ""
    what = f"{step.tokens:,} tokens" if step.tokens else f"{step.examples:,} examples"
    yield f"a step of {what}{passes}"
    calls = f" in {step.collectives:,.0f} collectives" if step.wire_s and step.collectives >= 1 else ""
    yield _row("each rank sends", byte_size(step.sent), f"{seconds(step.wire_s)}{calls}")
    yield _row("each rank computes", operations(step.flops), f"{seconds(step.compute_s)} at {plan.machine.rate}")
    taken, bound = (step.least_s, "most") if step.is_small else (step.most_s, "least")
    rate = f"{step.tokens / taken:,.0f} tokens/s at {bound}" if step.tokens else ""
    yield _row("takes at least" if step.is_small else "takes", span(step.least_s, step.most_s), rate)
    if plan.hours is not None:
        least, most = (hours * plan.places.ranks for hours in plan.hours)
        price = plan.machine.price_per_hour
        cost = f"; {between(amount(least * price), amount(most * price))} in money" if price else ""
        whole = span(*(3600 * hours for hours in plan.hours))
        yield _row(f"{plan.steps:,} steps", whole, f"{worked(least, most, worker_name(plan))}{cost}")


def verdict(plan: Plan) -> str:
    """Whether it fits, in a line."""
    memory, machine = plan.memory, plan.machine
    if plan.over == "host":
        return (f"does not fit: {binary_size(memory.host)} per rank in the host's memory, "
                f"{binary_size(machine.host_memory or 0)} are there")  # fmt: skip
    has = f"{binary_size(memory.total)} of {binary_size(machine.memory)} per rank"
    if not plan.fits:
        return f"does not fit: {has}"
    least = "" if memory.activations.unknown is None else ", activations not counted"
    return f"fits{condition(plan)}: {has}{least}"


def condition(plan: Plan) -> str:
    """What must be true besides, where a plan fits only as far as is known; "" where nothing must."""
    if plan.host_wanted is None:
        return ""
    whose = "it" if plan.places.ranks_on_host == 1 else f"its {plan.places.ranks_on_host} ranks"
    each = "the host" if plan.places.hosts == 1 else "each host"
    return f", if {each} has {binary_size(plan.host_wanted)} for {whose}"


def key_lines(plan: Plan) -> tuple[str, str]:
    """What a run says first: memory and whether it fits; bytes and seconds of a step."""
    step = plan.step
    about = "about" if step.tokens and not step.is_small else "at least"  # other tasks' operations are not known
    return (
        f"plan: {verdict(plan)}; states {binary_size(plan.memory.states.model_states)}",
        f"plan: each step sends {byte_size(step.sent)} per rank and takes {about} {span(step.least_s, step.most_s)}",
    )


def shape_lines(shapes: Mapping[str, tuple[int, ...]]) -> Iterator[str]:
    """A table of the parameters; those of equal layers stand once, with `*` for their numbers."""
    times: dict[tuple[str, tuple[int, ...]], int] = {}
    for name, shape in shapes.items():
        key = ".".join("*" if part.isdecimal() else part for part in name.split(".")), shape
        times[key] = times.get(key, 0) + 1
    width = max((len(name) for name, _ in times), default=0)
    for (name, shape), count in times.items():
        size = " x ".join(map(str, shape)) or "1"
        yield f"  {name:<{width}}  {size:>16}  {prod(shape):>15,}{f'  x {count}' if count > 1 else ''}"
    yield f"  {'in all':<{width}}  {'':>16}  {sum(map(prod, shapes.values())):>15,}"


def operations(count: float) -> str:
    """Floating-point operations as `3.2 TFLOP`."""
    for unit in ("", "k", "M", "G", "T", "P", "E"):
        if count < 1000 or unit == "E":
            break
        count /= 1000
    return f"{count:.3g} {unit}FLOP"


def seconds(value: float) -> str:
    """Seconds, down to microseconds."""
    if value >= 1:
        return duration(value) if value < 48 * 3600 else f"{value / 86400:,.1f} days"
    return f"{value * 1e3:.3g} ms" if value >= 1e-3 or value == 0 else f"{value * 1e6:.3g} us"


def span(least: float, most: float) -> str:
    """`3 to 5 s`; one number where both read alike."""
    return between(seconds(least), seconds(most))


def between(first: str, last: str) -> str:
    """A range; one text where both are alike."""
    return first if first == last else f"{first} to {last}"


def amount(value: float) -> str:
    """Three digits, never as a power of ten: `0.00`, `0.0123`, `2.4`, `2,620,000`."""
    if value < 0.01:
        return f"{value:.2f}"
    return f"{float(f'{value:.3g}'):,.0f}" if value >= 100 else f"{value:.3g}"


def worked(least: float, most: float, worker: str) -> str:
    """Hours of all workers together, in the unit that gives them a digit: `14.2 to 15.1 GPU-hours`."""
    if 3600 * most < 1:
        return f"less than a {worker}-second"
    unit, length = next(
        ((name, hours) for name, hours in (("hours", 1.0), ("minutes", 1 / 60)) if most >= hours), ("seconds", 1 / 3600)
    )
    return f"{between(amount(least / length), amount(most / length))} {worker}-{unit}"


def worker_name(plan: Plan) -> str:
    """What a rank occupies."""
    return "GPU" if plan.places.gpus else "worker"


def settings(changes: list[str]) -> str:
    """As a shell takes them."""
    return " ".join(f"--set {shlex.quote(change)}" for change in changes)
