"""What goes over the CPU and what stays where the replica is."""

from __future__ import annotations

import contextlib

import pytest
import torch
from own.oracle import OWN, job_of, spec_of
from torch import Tensor, nn

from distml.exchange.flat import Carried
from distml.exchange.process_group import ProcessGroup, open_rendezvous
from distml.loop import Trainer
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


def trained_on_gpu(group: ProcessGroup | None) -> tuple[Trainer, torch.Tensor]:
    spec = spec_of("small:Small", strategy="all_reduce", steps=20, micro_batch_size=5, log={"every": 5, "to": []},
                   optimizer={"name": "adam", "lr": 0.01, "clip_norm": 0.5})  # fmt: skip
    job = job_of(spec)
    SourceTree.collect(job.task, OWN).install()
    trainer = Trainer(job, build_task(job), 0, 1, torch.device("cuda", 0))
    trainer.build(None)
    trainer.connect(group, None)
    list(trainer.advance())
    return trainer, trainer.strategy.flat.weights


@pytest.mark.gpu
def test_all_reduce_over_nccl_sums_while_backward_runs_and_comes_to_the_same():
    torch.cuda.set_device(0)
    _, alone = trained_on_gpu(None)
    listener = open_rendezvous("127.0.0.1")
    port = listener.getsockname()[1]
    with contextlib.closing(ProcessGroup(0, 1, "127.0.0.1", port, listener, torch.device("cuda", 0), 60.0)) as group:
        trainer, weights = trained_on_gpu(group)
        assert trainer.strategy.overlapped is not None
    assert weights.is_cuda
    assert (weights - alone).abs().max() <= 1e-12
    assert trainer.strategy.progress.version == 20
