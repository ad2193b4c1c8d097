"""One job's plan: formulas applied to its size, its places and its machine. No torch: a run's driver plans too.

    job, Size, Traced, Places, Machine ── estimate ──▶ Plan ── text.py ──▶ a screen, or JSON

The most that a rank has at one time is

    states + buffers + process + max(activations' peak, what is there only at the update)

and a step takes between max(compute, wire) and their sum: how much of the exchange is hidden behind backward is not
known beforehand.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from distml.launch.plan.cluster import ClusterSpec
from distml.launch.plan.flops import flops_per_token, product_parameters
from distml.launch.plan.machine import Machine
from distml.launch.plan.places import Places
from distml.launch.plan.states import Size, States, model_states, num_moments, states_of
from distml.launch.plan.wire import bytes_per_step, collectives_per_step, links_of, wire_seconds
from distml.spec.language import TextBlock
from distml.spec.schema import JobSpec
from distml.spec.zero import ZeroSpec

RECOMPUTED = 4 / 3  # activation checkpointing: forward twice, backward once
DEEPSPEED_S = 300e-6  # assumed: hooks and buffers of the library around each of its collectives
SMALL_STEP_S = 0.1


@dataclass(frozen=True)
class Traced:
    """A micro-batch's activations in bytes, as traced; or why they are not known.

    Attributes:
        saved: kept by the graph when forward is done.
        peak: the most at one time in forward and backward.
    """

    saved: float = 0.0
    peak: float = 0.0
    unknown: str | None = None


@dataclass(frozen=True)
class Memory:
    """Bytes of the rank that holds most."""

    states: States
    activations: Traced
    process: float

    @property
    def total(self) -> float:
        """The most at one time, as far as it is known."""
        states = self.states
        varying = max(self.activations.peak, sum(states.at_update.values()))
        return states.model_states + states.other + sum(states.buffers.values()) + varying + self.process

    @property
    def host(self) -> float:
        """In the host's memory, where that is another one."""
        return sum(self.states.host.values())


@dataclass(frozen=True)
class Step:
    """What a step takes.

    Attributes:
        sent: bytes that a rank sends.
        flops: of a rank: the model's, and what is computed again.
        compute_s: for these, and for what DeepSpeed does around each collective.
        examples, tokens: of all ranks; tokens 0 where examples have none.
        collectives: exchanges that wait for all ranks; 0 where nothing is sent.
    """

    sent: float
    wire_s: float
    flops: float
    compute_s: float
    examples: int
    tokens: int
    collectives: float = 0.0

    @property
    def is_small(self) -> bool:
        """What is not calculated, such as the interpreter's and the optimiser's share, may be most of it."""
        return self.least_s < SMALL_STEP_S

    @property
    def least_s(self) -> float:
        """If all of the exchange is hidden."""
        return max(self.compute_s, self.wire_s)

    @property
    def most_s(self) -> float:
        """If none of it is."""
        return self.compute_s + self.wire_s


@dataclass(frozen=True)
class Plan:
    """All that is said of a job.

    Attributes:
        devices_for_states: how many devices the undivided states fill, at least.
        all_states: their bytes.
        steps: of the whole run; None: its budget does not say.
        lacks: why it cannot run at all, besides memory.
        notes: what was assumed or left out.
    """

    job: JobSpec
    size: Size
    places: Places
    machine: Machine
    micro_batch: int
    accumulation: int
    memory: Memory
    step: Step
    all_states: float
    steps: int | None
    notes: tuple[str, ...] = field(default=())

    @property
    def devices_for_states(self) -> int:
        """Devices that it takes for the states alone, cut evenly."""
        return math.ceil(self.all_states / self.machine.memory)

    @property
    def over(self) -> str | None:
        """What is too large, or None."""
        if self.memory.total > self.machine.memory:
            return "device"
        limit = self.machine.host_memory
        return "host" if limit is not None and self.memory.host > limit else None

    @property
    def fits(self) -> bool:
        """Whether nothing is too large."""
        return self.over is None

    @property
    def host_wanted(self) -> float | None:
        """Bytes that a host must have for all its ranks, where what it has is not known; None: nothing is open."""
        known = self.machine.host_memory is not None
        return None if known or not self.memory.host else self.memory.host * self.places.ranks_on_host

    @property
    def hours(self) -> tuple[float, float] | None:
        """The least and the most of the whole run."""
        return None if self.steps is None else (self.steps * self.step.least_s / 3600,
                                                self.steps * self.step.most_s / 3600)  # fmt: skip

    def to_json(self) -> dict[str, Any]:
        """All numbers, in bytes, seconds and operations."""
        memory, states = self.memory, asdict(self.memory.states)
        return {
            "name": self.job.name, "task": self.job.task.name, "strategy": self.job.strategy.label,
            "precision": self.job.precision, "parameters": self.size.trained, **asdict(self.places),
            "micro_batch_size": self.micro_batch, "accumulation": self.accumulation,
            "memory": {**states, "model_states": memory.states.model_states, "activations": asdict(memory.activations),
                       "process": memory.process, "total": memory.total, "host_total": memory.host},
            "device": asdict(self.machine), "fits": self.fits, "over": self.over, "host_wanted": self.host_wanted,
            "all_states": self.all_states, "devices_for_states": self.devices_for_states,
            "step": {**asdict(self.step), "least_s": self.step.least_s, "most_s": self.step.most_s},
            "steps": self.steps, "hours": self.hours, "notes": list(self.notes),
        }  # fmt: skip


def estimate(
    job: JobSpec, size: Size, traced: Traced, places: Places, machine: Machine, cluster: ClusterSpec | None
) -> Plan:
    """The plan of a job."""
    micro, accumulation = micro_batches_of(job)
    memory = Memory(states_of(job, size, places), traced, machine.process)
    low = 2 if isinstance(job.strategy, ZeroSpec) and job.precision != "fp32" else size.element_bytes
    whole = sum(model_states(size.trained, 0, 1, num_moments(job), low, master=low < size.element_bytes))
    step = step_of(job, size, places, machine, cluster, accumulation)
    return Plan(job, size, places, machine, micro, accumulation, memory, step, whole, steps_of(job), notes_of(
        job, traced, places, machine, cluster))  # fmt: skip


def micro_batches_of(job: JobSpec) -> tuple[int, int]:
    """(examples of a rank's micro-batch, micro-batches of its step), of the rank that has most."""
    share = math.ceil(job.batch_size / job.resources.workers)
    micro = min(share, job.micro_batch_size or share)
    return micro, math.ceil(share / micro)


def step_of(
    job: JobSpec, size: Size, places: Places, machine: Machine, cluster: ClusterSpec | None, accumulation: int
) -> Step:
    """Bytes, operations and seconds of a step."""
    share = math.ceil(job.batch_size / job.resources.workers)
    sent = bytes_per_step(job, size, places, accumulation)
    calls = collectives_per_step(job, size, places, accumulation)
    wire_s = wire_seconds(sent, places, links_of(places, cluster), calls / 2)
    own_s = calls * DEEPSPEED_S if isinstance(job.strategy, ZeroSpec) else 0.0
    flops = share * example_flops(job, size)
    tokens = job.batch_size * (job.task.tokens_per_example or 0) if isinstance(job.task, TextBlock) else 0
    return Step(sent, wire_s, flops, flops / machine.flops + own_s, job.batch_size, tokens, calls)


def example_flops(job: JobSpec, size: Size) -> float:
    """Forward and backward of one example; of tasks other than language models 6 Ψ, which is the least."""
    task = job.task
    if not isinstance(task, TextBlock):
        return 6.0 * size.trained
    model = task.model  # type: ignore[attr-defined]
    per_token = flops_per_token(product_parameters(size.shapes), model.layers, task.block, model.width)
    return per_token * task.block * (RECOMPUTED if model.activation_checkpointing else 1.0)


def steps_of(job: JobSpec) -> int | None:
    """Of the whole run, by the first budget that says."""
    stop, tokens = job.stop, job.task.tokens_per_example if isinstance(job.task, TextBlock) else None
    found = [stop.steps] if stop.steps else []
    if stop.examples:
        found.append(math.ceil(stop.examples / job.batch_size))
    if stop.tokens and tokens:
        found.append(math.ceil(stop.tokens / (job.batch_size * tokens)))
    return min(found) if found else None


def notes_of(
    job: JobSpec, traced: Traced, places: Places, machine: Machine, cluster: ClusterSpec | None
) -> tuple[str, ...]:
    """What was assumed or left out."""
    notes = []
    if traced.unknown is not None:
        notes.append(f"activations are not counted: {traced.unknown}")
    if not isinstance(job.task, TextBlock):
        notes.append("compute is the least: 6 operations per parameter and example")
    if places.gpus and machine.source.startswith("assumed"):
        notes.append(f"device {machine.source}; name yours in a cluster file")
    if places.ranks > 1 and places.gpus and (cluster is None or cluster.links.intra is None):
        notes.append("links are assumed; give theirs in a cluster file (links)")
    if isinstance(job.strategy, ZeroSpec) and job.strategy.offload and not places.gpus:
        notes.append("offload saves nothing on CPUs: device and host are one memory")
    return tuple(notes)
