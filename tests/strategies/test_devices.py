"""What goes over the CPU and what stays where the replica is."""

from __future__ import annotations

import pytest
import torch
from own.oracle import OWN, job_of, spec_of
from torch import Tensor, nn

from distml.exchange.flat import Carried
from distml.strategies.all_reduce import AllReduce
from distml.strategies.parameter_server import ServerGroup
from distml.tasks.build import build_task
from distml.tasks.sources import SourceTree


class Twice:
    """A group of two ranks that hold the same."""

    rank, size, bytes_sent = 0, 2, 0

    def all_reduce(self, vector: Tensor) -> None:
        vector.mul_(2)

    def all_gather(self, payload: bytes) -> list[bytes]:
        return [payload, payload]


def test_buffers_are_averaged_on_the_device_that_holds_them():
    job = job_of(spec_of("bn:BN", workers=2, strategy="all_reduce"))
    SourceTree.collect(job.task, OWN).install()
    strategy = AllReduce(job, 0, 2, torch.device("cpu"))
    strategy.prepare(build_task(job), None, 40)
    strategy.connect(Twice(), None)
    strategy.since_average = 3.0
    before = strategy.carried.average_vector()
    with torch.device("meta"):  # stands for any device other than the replica's
        strategy.average_carried()
    assert torch.equal(strategy.carried.average_vector(), before)
    assert strategy.since_average == 0.0


@pytest.mark.gpu
def test_sums_through_the_servers_end_on_the_vectors_own_device():
    vector = torch.arange(3.0, device="cuda")
    ServerGroup(Twice(), 0, 2).all_reduce(vector)
    assert torch.equal(vector.cpu(), torch.tensor([0.0, 2.0, 4.0]))


@pytest.mark.gpu
def test_buffers_on_a_gpu_are_one_vector_there():
    model = nn.BatchNorm1d(2).cuda()
    carried = Carried(model)
    carried.set_average(carried.average_vector() + 1.0)
    assert model.running_var.tolist() == [2.0, 2.0]
