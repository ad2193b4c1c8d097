"""From a strategy's block to its worker's half."""

from __future__ import annotations

import importlib

import torch

from distml.exchange.compression.build import compression_of
from distml.spec.schema import AllReduceSpec, JobSpec, LocalSGDSpec, ParameterServerSpec
from distml.spec.zero import ZeroSpec
from distml.strategies.base import Strategy


def import_libraries(job: JobSpec, device: torch.device) -> None:
    """Import what the strategy would import when it is first used, which takes seconds, while others do the same."""
    if isinstance(job.strategy, ZeroSpec):
        from distml.exchange import deepspeed

        deepspeed.library(device)
        importlib.import_module("torch._dynamo")  # as torch's optimisers do when they are first used


def build_strategy(
    job: JobSpec, rank: int, world_size: int, device: torch.device, snapshot_every: int | None,
    in_shared_memory: bool = False,
) -> Strategy:  # fmt: skip
    """The worker's half of the job's strategy; in shared memory synchronous workers are the servers of their shards.

    With compression a recovery goes back to a checkpoint, not to a snapshot: each of those would carry all workers'
    residuals, as many bytes as an uncompressed gradient, over the wire that is to be spared.
    """
    if compression_of(job) is not None:
        snapshot_every = None
    servers = isinstance(job.strategy, ParameterServerSpec) and not (in_shared_memory and job.strategy.is_synchronous)
    if servers:
        from distml.strategies.parameter_server import ParameterServer

        return ParameterServer(job, rank, world_size, device, snapshot_every)
    if isinstance(job.strategy, (AllReduceSpec, ParameterServerSpec)):
        from distml.strategies.all_reduce import AllReduce

        return AllReduce(job, rank, world_size, device, snapshot_every)
    if isinstance(job.strategy, LocalSGDSpec):
        from distml.strategies.local_sgd import LocalSGD

        return LocalSGD(job, rank, world_size, device, snapshot_every)
    if isinstance(job.strategy, ZeroSpec):
        from distml.strategies.zero import Zero

        return Zero(job, rank, world_size, device)  # never goes back to a snapshot: its state is not in one place
    from distml.strategies.single import Single

    return Single(job, rank, world_size, device, snapshot_every)
