"""Reduction while backward runs: torch's DistributedDataParallel (Li et al. 2020) over a process group.

DDP wraps one module, the strategy's, whose forward is the task's loss. Its reducer copies gradients into buckets as
they become ready and starts a bucket's all-reduce when it is full, while backward goes on to the layers below. Three
things differ from its defaults:

    the sum     DDP divides by the number of ranks, our update is the sum divided by the summed counts. A comm hook
                adds up and divides by nothing. (Here is the place for compressed sums, too.)
    the place   When a bucket has been summed, the reducer copies it into the gradients that are there, which are
                views of our flat vector. `gradient_as_bucket_view` would put views of its own in their place.
    taking part Every parameter hangs on the loss by an edge that brings no gradient. So every bucket fills up in every
                backward: also where a rank's batch does not use a parameter, or its loss has no gradient at all.
                DDP's own search for unused parameters would walk the graph, need one more collective per step, and
                leave out what earlier micro-batches brought.

Only the last micro-batch of a step goes through DDP (others go past it, as under `no_sync`): what they have left in the
flat vector is summed with its gradients.

Measured with gloo, 2 ranks, 4.2 M parameters: over a link of 1 Gbit/s a step of 62 ms computing takes 183 ms instead
of 218, one of 16 ms the same as without; between processes of one host, whose cores sums and backward share, a step
takes 5 to 7 % longer. Hence `ProcessGroup.overlaps`.
"""

# Without `from __future__ import annotations`: DDP compares the hook's annotations with its own types.
import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import GradBucket  # type: ignore[attr-defined]

from distml.exchange.process_group import ProcessGroup

CPU_BUCKET_MB = 4.0  # torch's 25 suit GPUs; a whole model fits in one where nothing then overlaps


class _Touch(torch.autograd.Function):
    """The loss as it is, with an edge to every parameter."""

    @staticmethod
    def forward(ctx: Any, total: Tensor, *parameters: Tensor) -> Tensor:
        ctx.num_parameters = len(parameters)
        return total.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return (*gradients, *[None] * ctx.num_parameters)


class _Whole(nn.Module):
    """The wrapped module, with a loss that depends on every trained parameter."""

    def __init__(self, module: nn.Module, trained: Sequence[Tensor]) -> None:
        super().__init__()
        self.module, self.trained = module, trained
        self.is_running = False

    def forward(self, *arguments: Any) -> Any:
        self.is_running = True  # and stays so when it raises: the error is the module's own
        loss = self.module(*arguments)
        self.is_running = False
        touch: Any = _Touch
        return dataclasses.replace(loss, total=touch.apply(loss.total, *self.trained))


class OverlappedReduction:
    """A module in DDP; called like it.

    Args:
        module: its forward gives a dataclass with a loss, `total`.
        trained: its parameters that are; each has a gradient already, where sums are put.
        group: of all ranks.
        bucket_mb: mebibytes of a bucket; None: torch's choice on GPUs, ours on CPUs.
    """

    def __init__(
        self, module: nn.Module, trained: Sequence[Tensor], group: ProcessGroup, bucket_mb: float | None = None
    ) -> None:
        self.group = group
        self.failure: RuntimeError | None = None
        self._whole = _Whole(module, trained)
        if bucket_mb is None and trained[0].device.type == "cpu":
            bucket_mb = CPU_BUCKET_MB
        wrapped = nn.parallel.DistributedDataParallel
        self._ddp = wrapped(self._whole, forward_sync_buffers=False, init_sync=False, bucket_cap_mb=bucket_mb)
        self._ddp.register_comm_hook(self, _sum_bucket)

    def __call__(self, *arguments: Any) -> Any:
        """The module's forward; the backward of its loss will sum over the ranks.

        Raises:
            PeerLost: a rank is gone (DDP orders its buckets anew in the second forward, together with all others).
        """
        self._whole.is_running = False
        try:
            return self._ddp(*arguments)
        except RuntimeError as error:
            if self._whole.is_running:
                raise
            raise self.group.lost("forward", error) from error

    def backward(self, total: Tensor) -> None:
        """The loss's backward; after it, all gradients are sums over the ranks.

        Raises:
            PeerLost: a rank is gone.
        """
        try:
            total.backward()  # type: ignore[no-untyped-call]
        except RuntimeError as error:
            if self.failure is None:
                raise
            raise self.group.lost("all_reduce during backward", self.failure) from error

    def close(self) -> None:
        """Take DDP's hooks off the parameters: a backward that was broken off has left it waiting for more."""
        del self._ddp.logger, self._ddp.reducer


def _sum_bucket(own: OverlappedReduction, bucket: GradBucket) -> torch.futures.Future[Tensor]:
    """DDP's comm hook: the sum of a bucket over all ranks."""

    def taken(summed: torch.futures.Future[list[Tensor]]) -> Tensor:
        try:
            return summed.value()[0]
        except RuntimeError as error:
            own.failure = error
            raise

    try:
        return own.group.start_all_reduce(bucket.buffer()).then(taken)
    except RuntimeError as error:
        own.failure = error
        raise
