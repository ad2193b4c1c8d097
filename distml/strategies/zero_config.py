"""What DeepSpeed is told of a job under `strategy: zero`. No torch: a plan asks here too.

DeepSpeed's own bucket sizes suit models of billions of parameters and reserve gigabytes at any size; ours follow the
model's. What the spec passes through (`strategy.deepspeed`) is laid over all of it.

Sizes are in elements, as DeepSpeed counts them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from distml.spec.schema import JobSpec
from distml.spec.zero import ZeroSpec

SMALL = 4 * 2**20  # a model up to here is reduced and gathered at once: its exchange is latency, not bandwidth
LARGEST_BUCKET = 50_000_000
LARGEST_GATHER = 200_000_000
MOST_LIVE = 1_000_000_000
MOST_PERSISTENT = 100_000
QUIET = 2**31 - 1  # steps between DeepSpeed's own reports


@dataclass(frozen=True)
class BucketSizes:
    """Elements at a time.

    Attributes:
        reduce: gradients that are summed together; so large a buffer is there in each backward.
        gather: weights that are gathered together after a step (stages 1, 2).
        prefetch: weights that are gathered ahead of their use (stage 3).
        live: gathered weights that may be there at once (stage 3), with those prefetched.
        persistent: parameters below this stay gathered (stage 3): biases and norms.
        sub_group: weights that the optimiser updates at a time (stage 3).
    """

    reduce: int
    gather: int
    prefetch: int
    live: int
    persistent: int
    sub_group: int


def bucket_sizes(num_parameters: int, largest: int) -> BucketSizes:
    """Sizes for a model of so many trained parameters, whose largest tensor has `largest`."""
    eighth = max(SMALL, num_parameters // 8)
    reduce = min(num_parameters, eighth, LARGEST_BUCKET)
    gather = min(num_parameters, LARGEST_GATHER)
    return BucketSizes(
        reduce=reduce,
        gather=2 * math.ceil(gather / 2),  # DeepSpeed asks for an even one
        prefetch=reduce,
        live=min(num_parameters, max(eighth, 4 * largest), MOST_LIVE),
        persistent=min(largest // 64, MOST_PERSISTENT),
        sub_group=min(num_parameters, max(eighth, largest), LARGEST_GATHER),
    )


def engine_config(job: JobSpec, num_parameters: int, largest: int) -> dict[str, Any]:
    """DeepSpeed's configuration of a job.

    Args:
        num_parameters: that are trained.
        largest: elements of the largest of their tensors.
    """
    assert isinstance(job.strategy, ZeroSpec)
    share = math.ceil(job.batch_size / job.resources.workers)
    micro = min(share, job.micro_batch_size or share)
    own: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": math.ceil(share / micro),
        "gradient_clipping": job.optimizer.clip_norm or 0.0,
        "steps_per_print": QUIET,
        "bf16": {"enabled": job.precision == "bf16"},
        "fp16": {"enabled": job.precision == "fp16"},
        "zero_allow_untested_optimizer": True,  # those that we offer are tested against all_reduce
        "zero_force_ds_cpu_optimizer": False,  # torch's fused one needs no compiler at the start
        "zero_optimization": zero_block(job.strategy, bucket_sizes(num_parameters, largest)),
    }
    if job.resources.gpus_per_worker:
        own["zero_optimization"]["overlap_comm"] = True
    return laid_over(own, job.strategy.deepspeed)


def ring_passes(stage: int, micro_batches: int) -> int:
    """How often (W - 1) / W of the weights' bytes leave each rank in a step (Rajbhandari et al. 2020, section 7).

    Stage 1: gradients reduced, new weights gathered. 2: the first in every micro-batch. 3: in each, weights gathered
    for forward and again for backward, and gradients reduced.
    """
    return {1: 2, 2: micro_batches + 1, 3: 3 * micro_batches}[stage]


def zero_block(strategy: ZeroSpec, sizes: BucketSizes) -> dict[str, Any]:
    """The block `zero_optimization`."""
    block: dict[str, Any] = {
        "stage": strategy.stage,
        "reduce_bucket_size": sizes.reduce,
        "allgather_bucket_size": sizes.gather,
    }
    if strategy.stage == 3:
        block |= {
            "stage3_prefetch_bucket_size": sizes.prefetch,
            "stage3_max_live_parameters": sizes.live,
            "stage3_max_reuse_distance": sizes.live,
            "stage3_param_persistence_threshold": sizes.persistent,
            "sub_group_size": sizes.sub_group,
        }
    for what, key in (("optimizer", "offload_optimizer"), ("parameters", "offload_param")):
        if what in strategy.offload:
            block[key] = {"device": "cpu", "pin_memory": True}
    return block


def laid_over(own: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """`own` with what is given in its place, block by block."""
    merged = dict(own)
    for key, value in given.items():
        before = merged.get(key)
        blocks = isinstance(value, Mapping) and isinstance(before, Mapping)
        merged[key] = laid_over(before, value) if blocks else value  # type: ignore[arg-type]
    return merged
