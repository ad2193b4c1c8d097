"""From a strategy's block to its worker's half."""

from __future__ import annotations

import torch

from distml.spec.schema import AllReduceSpec, JobSpec, ParameterServerSpec
from distml.strategies.base import Strategy


def build_strategy(
    job: JobSpec, rank: int, world_size: int, device: torch.device, snapshot_every: int | None
) -> Strategy:
    """The worker's half of the job's strategy."""
    if isinstance(job.strategy, ParameterServerSpec):
        from distml.strategies.parameter_server import ParameterServer

        return ParameterServer(job, rank, world_size, device, snapshot_every)
    if isinstance(job.strategy, AllReduceSpec):
        from distml.strategies.all_reduce import AllReduce

        return AllReduce(job, rank, world_size, device, snapshot_every)
    from distml.strategies.single import Single

    return Single(job, rank, world_size, device, snapshot_every)
