"""How many bytes a rank holds, by strategy, precision and optimiser: the formulas. No torch.

Ψ trained parameters, m moments of the optimiser (Adam 2, momentum or RMSprop 1, plain SGD 0), N ranks, H of them on a
host, e bytes of an element (4; a model in float64: 8), l bytes of a low-precision element (2).

    one rank's                weights       gradients   optimiser                  besides
    single, all_reduce,       eΨ            eΨ          m·eΨ                       DDP's buckets eΨ, where sums overlap
      inline                                                                       backward (GPUs, several hosts)
    all_reduce, ps sync,      eΨ/H          eΨ          m·eΨ/H                     kept states 2 (1 + m) eΨ/H
      in shared memory        (one set of weights and moments per host, `strategies/in_place.py`)
    ps async, ssp,            eΨ (H+1)/H    eΨ          m·eΨ/H                     kept states 2 (1 + m) eΨ/H
      in shared memory        (a buffer per worker and one to write, `strategies/shared_servers.py`)
    ps over the object store  eΨ            eΨ          0                          slices under way 2 eΨ
      each of S servers       eΨ/S          eΨ (N+1)/S  m·eΨ/S                     (`strategies/parameter_server.py`)
    local_sgd                 eΨ            eΨ          m·eΨ                       start eΨ, outer momentum eΨ, row of
                                                                                   the sum eΨ, and kept states
    zero/1, mixed precision   lΨ            lΨ          (4 + 4m) Ψ/N               buckets, and at the update
    zero/2                    lΨ            lΨ/N        (4 + 4m) Ψ/N               gradients in float32 4Ψ/N
    zero/3                    lΨ/N          lΨ/N        (4 + 4m) Ψ/N               buckets, and layers at work

With Adam and l = 2 the last three are 4Ψ + 12Ψ/N, 2Ψ + 14Ψ/N and 16Ψ/N, without any cut 16Ψ (Rajbhandari et al. 2020,
section 3 and figure 1; fp16 and bf16 alike). In float32 l is 4: stages 1 and 2 of DeepSpeed 0.19 keep their clone of
the weights in the optimiser's part all the same, (4 + 4m) Ψ/N; stage 3 does without, 4m Ψ/N. Outside zero bf16 is
autocast: nothing of this table changes, the casted weights are among the activations.

Offload (Ren et al. 2021): `optimizer` moves the optimiser's part and float32 gradients 4Ψ/N to the host, with stages 1
and 2 also a buffer lΨ/N through which new weights go back; `parameters` moves the weights of stage 3.
Compression's error feedback is one vector eΨ per worker (topk with momentum: two, and no momentum elsewhere).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import prod

from distml.launch.plan.places import Places
from distml.spec.schema import JobSpec, LocalSGDSpec, NesterovSpec, ParameterServerSpec, SGDSpec, TopKSpec
from distml.spec.zero import ZeroSpec
from distml.strategies.moments import moment_names
from distml.strategies.zero_config import engine_config

KEPT = 2  # states that shared memory keeps for a recovery (`exchange/segment.py`)
KEEP_FROM_BYTES = 2**20  # smaller ones are handed over instead (`runtime/ray.py`)


@dataclass(frozen=True)
class Size:
    """What formulas need of a model.

    Attributes:
        shapes: of the trained parameters, by name; a tied one stands once.
        other_bytes: buffers and frozen tensors.
        element_bytes: of a trained parameter as it is built.
    """

    shapes: Mapping[str, tuple[int, ...]]
    other_bytes: int = 0
    element_bytes: int = 4

    @cached_property
    def trained(self) -> int:
        """Trained parameters, Ψ."""
        return sum(prod(shape) for shape in self.shapes.values())

    @cached_property
    def largest(self) -> int:
        """Elements of the largest tensor."""
        return max((prod(shape) for shape in self.shapes.values()), default=0)

    def modules_above(self, limit: int) -> int:
        """Modules that have a tensor of more elements themselves."""
        return len({name.rpartition(".")[0] for name, shape in self.shapes.items() if prod(shape) > limit})

    def up_to(self, limit: int) -> int:
        """Elements in tensors of at most so many."""
        return sum(size for shape in self.shapes.values() if (size := prod(shape)) <= limit)


@dataclass(frozen=True)
class States:
    """Bytes of the rank that holds most, between two steps.

    Attributes:
        weights, gradients, optimizer: on its device; of what a host shares, this rank's part of it.
        other: buffers and frozen tensors of the model.
        buffers: named: room for exchanges, copies for a recovery.
        at_update: named: what is there only while the weights are updated, when activations are gone.
        host: named: in the host's memory, where that is not the device's.
        server: each parameter server's, where there are some.
    """

    weights: float
    gradients: float
    optimizer: float
    other: float = 0.0
    buffers: dict[str, float] = field(default_factory=dict)
    at_update: dict[str, float] = field(default_factory=dict)
    host: dict[str, float] = field(default_factory=dict)
    server: float = 0.0

    @property
    def model_states(self) -> float:
        """Weights, gradients and the optimiser's: the paper's figure."""
        return self.weights + self.gradients + self.optimizer


def model_states(
    trained: int, stage: int, ranks: int, moments: int = 2, low_bytes: int = 2, master: bool = True
) -> tuple[float, float, float]:
    """(weights, gradients, optimiser) in bytes of one rank; stage 0 cuts nothing.

    Args:
        low_bytes: of a weight that is computed with.
        master: the optimiser keeps float32 weights of its own.
    """
    optimizer = (4.0 * master + 4.0 * moments) * trained / (ranks if stage >= 1 else 1)
    gradients = low_bytes * trained / (ranks if stage >= 2 else 1)
    weights = low_bytes * trained / (ranks if stage >= 3 else 1)
    return weights, gradients, optimizer


def states_of(job: JobSpec, size: Size, places: Places) -> States:
    """A rank's states under the job's strategy, where `places` puts its workers."""
    strategy = job.strategy
    if isinstance(strategy, ZeroSpec):
        return _zero(job, strategy, size, places)
    if isinstance(strategy, LocalSGDSpec):
        return _local_sgd(job, strategy, size, places)
    if isinstance(strategy, ParameterServerSpec) and places.transport in ("object_store", "inline"):
        return _served(job, strategy, size, places)
    if places.transport == "shared_memory":
        return _shared(job, size, places)
    return _private(job, size, places)


def num_moments(job: JobSpec) -> int:
    """Vectors of the optimiser, as the update applies it: topk's workers have its momentum themselves."""
    own = isinstance(job.optimizer, SGDSpec) and _residuals(job) > 1
    return 0 if own else len(moment_names(job.optimizer))


def _residuals(job: JobSpec) -> int:
    """Vectors that compression keeps on each worker."""
    compression = getattr(job.strategy, "compression", None)
    if compression is None or not compression.error_feedback:
        return 0
    momentum = job.optimizer.momentum if isinstance(job.optimizer, SGDSpec) else 0.0
    return 2 if isinstance(compression, TopKSpec) and momentum else 1


def _copies(job: JobSpec, vector: float, places: Places) -> dict[str, float]:
    """What rank 0 copies for a checkpoint, and its driver beside it keeps until the next: weights and moments."""
    copied = {"copies for checkpoints": (1 + num_moments(job)) * vector}
    return {} if places.transport == "shared_memory" else copied


def _private(job: JobSpec, size: Size, places: Places) -> States:
    """Every rank has everything: single, all_reduce over a process group, or threads."""
    vector, m = float(size.trained * size.element_bytes), num_moments(job)
    buffers: dict[str, float] = {}
    if _residuals(job):
        buffers["not sent yet (compression)"] = _residuals(job) * vector
    elif places.overlaps:
        buffers["buckets of DDP"] = vector
    copies = _copies(job, vector, places)
    on_gpu = places.gpus
    return States(vector, vector, m * vector, size.other_bytes, buffers | ({} if on_gpu else copies),
                  host=copies if on_gpu else {})  # fmt: skip


def _shared(job: JobSpec, size: Size, places: Places) -> States:
    """One segment per host: everyone's gradients, one set of weights (async: one per worker) and of moments."""
    vector, m, local = float(size.trained * size.element_bytes), num_moments(job), places.ranks_on_host
    sets = 1 if job.strategy.is_synchronous else local + 1
    kept = KEPT * (1 + m) * vector
    buffers = {"states kept for a recovery": kept / local} if kept >= KEEP_FROM_BYTES else {}
    if _residuals(job):
        buffers["not sent yet (compression)"] = _residuals(job) * vector / local
    return States(sets * vector / local, vector, m * vector / local, size.other_bytes, buffers)


def _served(job: JobSpec, strategy: ParameterServerSpec, size: Size, places: Places) -> States:
    """Servers have the optimiser; slices of gradients and weights lie in the object store while they travel."""
    vector, m, ranks = float(size.trained * size.element_bytes), num_moments(job), places.ranks
    buffers = {"slices under way": 2 * vector}
    if _residuals(job):
        buffers["not sent yet (compression)"] = _residuals(job) * vector
    server = (1 + m + ranks + 1) * vector / strategy.servers
    buffers["servers, shared out over the ranks"] = server * strategy.servers / ranks
    if places.gpus:
        return States(vector, vector, 0.0, size.other_bytes, host=buffers, server=server)
    return States(vector, vector, 0.0, size.other_bytes, buffers, server=server)


def _local_sgd(job: JobSpec, strategy: LocalSGDSpec, size: Size, places: Places) -> States:
    """A replica of one's own, and what a round began with."""
    vector, m = float(size.trained * size.element_bytes), num_moments(job)
    outer = isinstance(strategy.outer, NesterovSpec) and strategy.outer.momentum > 0
    buffers = {"start of the round": vector}
    if outer:
        buffers["outer momentum"] = vector
    if places.transport == "shared_memory":
        buffers["row of the sum"] = vector
        kept = KEPT * (1 + m + outer) * vector
        if kept >= KEEP_FROM_BYTES:
            buffers["states kept for a recovery"] = kept / places.ranks_on_host
    copies = _copies(job, vector, places)
    on_gpu = places.gpus
    return States(vector, vector, m * vector, size.other_bytes, buffers | ({} if on_gpu else copies),
                  host=copies if on_gpu else {})  # fmt: skip


def _zero(job: JobSpec, strategy: ZeroSpec, size: Size, places: Places) -> States:
    """DeepSpeed's, cut over the ranks."""
    low = 4 if job.precision == "fp32" else 2
    stage, ranks, m = strategy.stage, places.ranks, num_moments(job)
    weights, gradients, optimizer = model_states(size.trained, stage, ranks, m, low, low < 4 or stage < 3)
    full = 4.0 * size.trained / ranks
    host: dict[str, float] = {}
    at_update = {"gradients in float32": full} if low < 4 else {}
    if "optimizer" in strategy.offload:
        host = {"optimiser": optimizer, "gradients in float32": full}
        if stage < 3:
            host["new weights on their way"] = low * size.trained / ranks
        else:
            host["gradients"] = gradients
        optimizer, at_update = 0.0, {}
        gradients = gradients if stage == 1 else 0.0
    if "parameters" in strategy.offload:
        host["weights"], weights = weights, 0.0
    states = States(
        weights, gradients, optimizer, size.other_bytes, _buckets(job, strategy, size, low, ranks), at_update, host
    )
    return states if places.gpus else _in_one_memory(states)


def _in_one_memory(states: States) -> States:
    """On CPUs what is offloaded lies in the same memory: nothing is gained."""
    moved = {f"offloaded {name}": value for name, value in states.host.items()}
    return States(states.weights, states.gradients, states.optimizer, states.other, states.buffers | moved,
                  states.at_update)  # fmt: skip


def _buckets(job: JobSpec, strategy: ZeroSpec, size: Size, low: int, ranks: int) -> dict[str, float]:
    """Room for what is reduced and gathered at one time, as DeepSpeed is told (`strategies/zero_config.py`)."""
    block = engine_config(job, size.trained, size.largest)["zero_optimization"]
    copies = 2 if block.get("overlap_comm") and strategy.stage < 3 else 1
    buckets = {"buckets of gradients": float(low * copies * min(block["reduce_bucket_size"], size.trained))}
    if strategy.stage == 3:
        small = size.up_to(block["stage3_param_persistence_threshold"])
        live = min(block["stage3_max_live_parameters"], size.trained)
        buckets["weights gathered"] = float(low * (live + small * (1 - 1 / ranks)))
    return buckets
