"""What a job's ranks have: memory, and how fast they compute; from a cluster file, else from this machine. No torch.

Where GPUs are asked for and nothing is said of them, torch is asked for those of this machine; without any, a card is
assumed, and the plan says so.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass

from distml.launch.plan.cluster import CARDS, GIB, ClusterSpec
from distml.launch.plan.places import Places
from distml.memory import memory_bytes
from distml.spec.schema import JobSpec

ASSUMED_CARD = "a100"
UTILISATION = ClusterSpec.model_fields["utilisation"].default
CPU_PROCESS_BYTES = 0.35 * GIB  # Python, torch and Ray's part of a worker, before it has a model
GPU_PROCESS_BYTES = 0.75 * GIB  # of a card: CUDA's context, kernels, NCCL's buffers
FEW_SECONDS = 0.03


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
    """What each rank of the job has."""
    return _gpu(places, cluster) if places.gpus else _cpu(job, places, cluster)


def _gpu(places: Places, cluster: ClusterSpec | None) -> Machine:
    share, price = UTILISATION, None
    if cluster is not None and cluster.card is not None:
        card, name, source = cluster.card, cluster.card_name, "cluster file"
        memory, share, price = card.memory_gib * GIB, cluster.utilisation, cluster.price_per_gpu_hour
        tflops = card.tflops
    elif (found := card_here()) is not None:
        name, memory, source = found[0], float(found[1]), "this machine's"
        known = next((card for key, card in CARDS.items() if key in name.lower()), CARDS[ASSUMED_CARD])
        tflops = known.tflops
    else:
        card, name, source = CARDS[ASSUMED_CARD], ASSUMED_CARD, "assumed: no GPU here and no --cluster"
        memory, tflops = card.memory_gib * GIB, card.tflops
    host = None
    if cluster is not None and cluster.host_memory_gib is not None:
        host = cluster.host_memory_gib * GIB / places.ranks_on_host
    rate = f"{share:.0%} of {tflops:g} TFLOP/s"
    return Machine(memory, name, source, share * tflops * 1e12, rate, GPU_PROCESS_BYTES, host, price)


def _cpu(job: JobSpec, places: Places, cluster: ClusterSpec | None) -> Machine:
    whole, source = float(memory_bytes()), "this machine's"
    if cluster is not None and cluster.host_memory_gib is not None:
        whole, source = cluster.host_memory_gib * GIB, "cluster file"
    sharing = 1 if places.transport == "inline" else places.ranks_on_host
    if cluster is not None and cluster.cpu_tflops is not None:
        flops, rate = cluster.cpu_tflops * 1e12, f"{cluster.cpu_tflops:g} TFLOP/s"
    else:
        cores = os.cpu_count() or 1
        wanted = min(cores, job.resources.workers * job.resources.cpus_per_worker)
        flops = measured_flops() * wanted / cores / job.resources.workers
        rate = f"{flops / 1e9:.0f} GFLOP/s, from a product of matrices just now"
    each = f"host's memory / {sharing}" if sharing > 1 else "host's memory"
    return Machine(whole / sharing, each, source, flops, rate, CPU_PROCESS_BYTES)


def card_here() -> tuple[str, int] | None:
    """Name and bytes of this machine's first GPU; None: there is none."""
    import torch

    if not torch.cuda.is_available():
        return None
    found = torch.cuda.get_device_properties(0)
    return str(found.name), int(found.total_memory)


def measured_flops(seconds: float = FEW_SECONDS, size: int = 384) -> float:
    """float32 operations per second of all cores together, in products of square matrices."""
    import numpy as np

    left = np.ones((size, size), np.float32)
    out = left @ left  # once, for the threads to start
    count, started = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - started) < seconds:
        np.matmul(left, left, out=out)
        count += 1
    return 2.0 * size**3 * count / elapsed
