"""Bytes that a rank sends per step, and how long they take: a latency-bandwidth model of the links. No torch.

Ψ trained parameters, e bytes of one, N ranks, G micro-batches of a step, K inner steps of a round.

    single                              0
    all_reduce, parameter_server sync   2 (N-1)/N · eΨ          a ring's reduce-scatter and all-gather; in shared memory
      in shared memory                                          what others read of it
    parameter_server over servers       eΨ pushed + eΨ pulled   (async in shared memory: eΨ pushed, nothing pulled)
    local_sgd                           2 (N-1)/N · eΨ / K
    zero/1                              2 (N-1)/N · lΨ          gradients reduced, new weights gathered
    zero/2                              (G+1) (N-1)/N · lΨ      the first in every micro-batch
    zero/3                              3G (N-1)/N · lΨ         weights gathered for forward and again for backward

(Rajbhandari et al. 2020, section 7: 2Ψ for stages 1 and 2, 3Ψ for stage 3 with G = 1. l is 2 in mixed precision. The
library's own way of reducing buckets may send more: these are what must be sent.)

Compression replaces e by what an element takes: bf16 2, int8 1 + 4/1024, topk 6 of each element sent (a value and its
place; sums of them are not sent, but every rank's to every other), powersgd the factors.

A collective waits for its slowest message, however short: of small models these waits are most of the exchange. In a
step there are, B being Ψ / reduce_bucket_size, A Ψ / allgather_bucket_size (rounded up) and M the modules with a tensor
above stage3_param_persistence_threshold, which are gathered one by one:

    all_reduce over a process group     2 eΨ / 25 MB, at least 2: a sum is a reduce-scatter and an all-gather
    zero/1                              B + A, and two: of counts, of the gradients' norm
    zero/2                              G B + A, and two
    zero/3                              G (2 M + B), one for the tensors that stay gathered, and two; fewer where
                                        weights are used again before they are dropped (of 4 layers, G = 2: 42, not 77)

A message of b bytes takes latency + b / bandwidth. A ring over N equal ranks of one node takes 2 (N-1) messages of an
Nth each. Over several nodes: a reduce-scatter within each node; rings between the nodes, one for each of a node's ranks
and its share; an all-gather within the nodes (as NCCL's hierarchical rings).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, prod

from distml.launch.plan.cluster import ClusterSpec, LinkSpec
from distml.launch.plan.places import INLINE, Places
from distml.launch.plan.states import Size
from distml.spec.schema import (
    BF16Spec,
    CompressionSpec,
    Int8Spec,
    JobSpec,
    LocalSGDSpec,
    ParameterServerSpec,
    PowerSGDSpec,
    TopKSpec,
)
from distml.spec.zero import ZeroSpec
from distml.strategies.zero_config import engine_config

MEMORY = LinkSpec(latency_us=50.0, gb_per_s=8.0)  # shared memory: a barrier; a copy of one core
LOOPBACK = LinkSpec(latency_us=200.0, gb_per_s=1.0)  # gloo between processes of one host
NVLINK_LATENCY_US = 5.0
GROUP = "process_group"
BUCKET_BYTES = 25e6  # of DDP, and roughly of what else is sent in pieces
OF_A_STEP = 2  # collectives of zero besides those of weights and gradients


@dataclass(frozen=True)
class Links:
    """Of each rank, to those of its host and to others."""

    intra: LinkSpec
    inter: LinkSpec


def links_of(places: Places, cluster: ClusterSpec | None) -> Links:
    """The cluster's; what it does not say is assumed: NVLink as the card has it, memory or gloo's loopback on CPUs."""
    inter = cluster.links.inter if cluster is not None else LinkSpec(latency_us=20.0, gb_per_s=12.5)
    if cluster is not None and cluster.links.intra is not None:
        return Links(cluster.links.intra, inter)
    if places.gpus:
        card = cluster.card if cluster is not None else None
        return Links(LinkSpec(latency_us=NVLINK_LATENCY_US, gb_per_s=card.gb_per_s if card else 32.0), inter)
    return Links(MEMORY if places.transport == "shared_memory" else LOOPBACK, inter)


def bytes_per_step(job: JobSpec, size: Size, places: Places, accumulation: int = 1) -> float:
    """What one rank sends for one step: its part of `comm/bytes_per_step`, which is of all."""
    strategy, ranks = job.strategy, places.ranks
    ring, shared = (ranks - 1) / ranks, places.transport == "shared_memory"
    compression = getattr(strategy, "compression", None)
    whole = payload_bytes(compression, size)
    if isinstance(strategy, ZeroSpec):
        low = 4 if job.precision == "fp32" else 2
        passes = {1: 2, 2: accumulation + 1, 3: 3 * accumulation}[strategy.stage]
        return passes * ring * low * size.trained
    if isinstance(strategy, LocalSGDSpec):
        return 2 * ring * whole / strategy.inner_steps
    if isinstance(strategy, ParameterServerSpec) and not (shared and strategy.is_synchronous):
        pulled = 0 if shared else size.trained * size.element_bytes
        return float(whole + pulled)
    return (ranks - 1) * whole if isinstance(compression, TopKSpec) else 2 * ring * whole


def collectives_per_step(job: JobSpec, size: Size, places: Places, accumulation: int = 1) -> float:
    """Sums and gathers that all ranks wait for in one step."""
    strategy = job.strategy
    if places.ranks == 1:
        return 0.0
    if not isinstance(strategy, ZeroSpec):  # in pieces: DDP's buckets; a sum is two of what is counted here
        pieces = max(1.0, size.trained * size.element_bytes / BUCKET_BYTES) if places.transport == GROUP else 1.0
        return 2 * pieces / (strategy.inner_steps if isinstance(strategy, LocalSGDSpec) else 1)
    block: dict[str, int] = engine_config(job, size.trained, size.largest)["zero_optimization"]
    reduced = ceil(size.trained / block["reduce_bucket_size"])
    if strategy.stage == 3:
        gathered = size.modules_above(block["stage3_param_persistence_threshold"])
        return accumulation * (2 * gathered + reduced) + 1 + OF_A_STEP
    passes = accumulation if strategy.stage == 2 else 1
    return passes * reduced + ceil(size.trained / block["allgather_bucket_size"]) + OF_A_STEP


def payload_bytes(compression: CompressionSpec | None, size: Size) -> float:
    """What a rank's whole gradient takes when it is sent once."""
    if isinstance(compression, BF16Spec):
        return 2.0 * size.trained
    if isinstance(compression, Int8Spec):
        return (1.0 + 4.0 / 1024) * size.trained
    if isinstance(compression, TopKSpec):
        return compression.fraction * (size.element_bytes + 2) * size.trained
    if isinstance(compression, PowerSGDSpec):
        return float(size.element_bytes * sum(_factored(shape, compression.rank) for shape in size.shapes.values()))
    return float(size.element_bytes * size.trained)


def _factored(shape: tuple[int, ...], rank: int) -> int:
    """Elements that powersgd sends of a tensor: two factors, unless it is a vector or they are no smaller."""
    whole = prod(shape)
    if len(shape) < 2 or not whole:
        return whole
    rows, columns = shape[0], whole // shape[0]
    return min(whole, min(rank, rows, columns) * (rows + columns))


def wire_seconds(sent: float, places: Places, links: Links, messages: float = 1.0) -> float:
    """How long a rank's share of a step's sums and gathers takes, if nothing else goes on.

    Args:
        sent: bytes per rank, of rings: 2 (N-1)/N of the vector.
        messages: that the vector is cut into.
    """
    if places.ranks == 1 or places.transport in (INLINE, "none"):
        return 0.0
    ranks, hosts, local = places.ranks, places.hosts, places.ranks_on_host
    vector = sent * ranks / (ranks - 1)  # what is sent of it in all passes
    seconds = 0.0
    if local > 1:
        seconds += _ring(vector, local, links.intra, messages)
    if hosts > 1:
        seconds += _ring(vector / local, hosts, links.inter, messages)
    return seconds


def _ring(vector: float, ranks: int, link: LinkSpec, messages: float) -> float:
    """Reduce-scatter and all-gather of `vector` / 2 bytes: 2 (N-1) messages of an Nth each."""
    latency = 2 * (ranks - 1) * link.latency_us * 1e-6 * messages
    return latency + (ranks - 1) / ranks * vector / (link.gb_per_s * 1e9)
