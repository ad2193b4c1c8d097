"""What a job's ranks have: memory, and how fast they compute; from a cluster file, else from this machine. No torch.

Where GPUs are asked for and nothing is said of them, torch is asked for those of this machine; without any, a card is
assumed, and the plan says so.
"""

from __future__ import annotations

import math
import os
import time
from dataclasses import dataclass, replace

from distml.errors import UsageError
from distml.launch.plan.cluster import CARDS, GIB, Card, ClusterSpec
from distml.launch.plan.places import Places
from distml.memory import memory_bytes
from distml.spec.accelerators import ACCELERATORS, canonical_accelerator
from distml.spec.schema import JobSpec
from distml.spec.zero import ZeroSpec

ASSUMED_CARD = "a100"
CARD_OF = {canonical_accelerator(name): name for name in CARDS} | {"A100-80G": "a100"}  # by Ray's names
UTILISATION = ClusterSpec.model_fields["utilisation"].default
CPU_PROCESS_BYTES = 0.35 * GIB  # Python, torch and Ray's part of a worker, before it has a model
GPU_PROCESS_BYTES = 0.75 * GIB  # of a card: CUDA's context, kernels, NCCL's buffers
DEEPSPEED_BYTES = 0.13 * GIB  # what its import adds
SIDE, PRODUCTS = 64, 200  # a few milliseconds


@dataclass(frozen=True)
class Machine:
    """Of one rank.

    Attributes:
        memory: bytes; `device` is what has them, `source` who says so.
        flops: operations per second that training reaches.
        rate: how that was come by.
        process: bytes that a process takes before it has a model.
        host_memory: bytes of a rank's share of its host's memory, where that is another one; None: not known.
        price_per_hour: of one rank's device.
    """

    memory: float
    device: str
    source: str
    flops: float
    rate: str
    process: float
    host_memory: float | None = None
    price_per_hour: float | None = None


def machine_of(job: JobSpec, places: Places, cluster: ClusterSpec | None) -> Machine:
    """What each rank of the job has.

    Raises:
        UsageError: the job asks for another card than the cluster has.
    """
    return _gpu(job.resources.accelerator, places, cluster) if places.gpus else _cpu(job, places, cluster)


def _gpu(accelerator: str | None, places: Places, cluster: ClusterSpec | None) -> Machine:
    host, asked = None, CARD_OF.get(accelerator or "")
    if cluster is not None and cluster.host_memory_gib is not None:
        host = cluster.host_memory_gib * GIB / places.ranks_on_host
    if cluster is not None and cluster.card is not None:
        there = canonical_accelerator(cluster.card_name)
        if accelerator is not None and there in ACCELERATORS and accelerator != there and asked != cluster.card_name:
            raise UsageError(f"resources.accelerator is {accelerator}, and the cluster file's GPUs are {there}; change "
                             "one of them")  # fmt: skip
        return _with_card(cluster.card, cluster.card_name, "cluster file", cluster.utilisation, host,
                          cluster.price_per_gpu_hour)  # fmt: skip
    if asked is not None:
        return _with_card(CARDS[asked], asked, "resources.accelerator", UTILISATION, host)
    if (found := card_here()) is not None:
        return gpu_machine(*found, "this machine's")
    return _with_card(CARDS[ASSUMED_CARD], ASSUMED_CARD, "assumed: no GPU here and no --cluster", UTILISATION, host)


def gpu_machine(name: str, num_bytes: float, source: str) -> Machine:
    """A card that was found: its memory is known, its rate if its name is."""
    known = next((card for key, card in CARDS.items() if key in name.lower()), CARDS[ASSUMED_CARD])
    return _with_card(replace(known, memory_gib=num_bytes / GIB), name, source, UTILISATION, None)


def _with_card(
    card: Card, name: str, source: str, share: float, host_memory: float | None, price: float | None = None
) -> Machine:
    rate = f"{share:.0%} of {card.tflops:g} TFLOP/s"
    flops = share * card.tflops * 1e12
    return Machine(card.memory_gib * GIB, name, source, flops, rate, GPU_PROCESS_BYTES, host_memory, price)


def _cpu(job: JobSpec, places: Places, cluster: ClusterSpec | None) -> Machine:
    whole, source = float(memory_bytes()), "this machine's"
    if cluster is not None and cluster.host_memory_gib is not None:
        whole, source = cluster.host_memory_gib * GIB, "cluster file"
    sharing = 1 if places.transport == "inline" else places.ranks_on_host
    if cluster is not None and cluster.cpu_tflops is not None:
        flops, rate = cluster.cpu_tflops * 1e12, f"{cluster.cpu_tflops:g} TFLOP/s"
    else:
        cores = min(job.resources.cpus_per_worker, (os.cpu_count() or 1) / places.ranks_on_host)
        flops = flops_of_a_core() * cores
        rate = f"{flops / 1e9:.0f} GFLOP/s, as a product of matrices just had"
    each = f"host's memory / {sharing}" if sharing > 1 else "host's memory"
    process = CPU_PROCESS_BYTES + (DEEPSPEED_BYTES if isinstance(job.strategy, ZeroSpec) else 0.0)
    return Machine(whole / sharing, each, source, flops, rate, process)


def card_here() -> tuple[str, float] | None:
    """Name and bytes of this machine's first GPU; None: there is none."""
    import torch

    if not torch.cuda.is_available():
        return None
    found = torch.cuda.get_device_properties(0)
    return str(found.name), float(found.total_memory)


def flops_of_a_core() -> float:
    """float32 operations per second of one core: those of the fastest of some small products of matrices.

    Small enough that OpenBLAS leaves them to one core: where others are at work its threads wait for each other.
    """
    import numpy as np

    left = np.ones((SIDE, SIDE), np.float32)
    out, fastest = left @ left, math.inf
    for _ in range(PRODUCTS):
        started = time.perf_counter()
        np.matmul(left, left, out=out)
        fastest = min(fastest, time.perf_counter() - started)
    return 2.0 * SIDE**3 / fastest
