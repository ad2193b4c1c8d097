"""Sums that are taken while backward runs equal those that are taken after it; between real processes over gloo."""

from __future__ import annotations

import dataclasses
import multiprocessing
from typing import Any

import numpy as np
import pytest
import torch
from own.oracle import OWN, job_of, spec_of
from torch import nn

from distml.events import Event
from distml.exchange import ddp
from distml.exchange.channel import PeerLost
from distml.exchange.ddp import OverlappedReduction
from distml.exchange.flat import TAIL, FlatModel, to_numpy
from distml.exchange.process_group import ProcessGroup, open_rendezvous, ring_bytes
from distml.loop import Trainer
from distml.tasks.build import build_task
from distml.tasks.data import DataOrder, micro_batches
from distml.tasks.sources import SourceTree

CPU = torch.device("cpu")
SIZE, STEPS = 3, 6
ADAM = {"name": "adam", "lr": 0.01, "clip_norm": 0.3}
CASES: dict[str, dict[str, Any]] = {
    "whole": {"task": "small:Small"},
    "accumulated": {"task": "small:Small", "micro_batch_size": 2, "optimizer": ADAM},
    "uneven": {"task": "uneven:Uneven", "micro_batch_size": 2},
    "buffers": {"task": "bn:BN", "evaluate": {"every": 3}},
    "varied": {"task": "varied:Varied", "optimizer": {"name": "sgd", "lr": 0.01}},
    "varied, accumulated": {"task": "varied:Varied", "micro_batch_size": 2, "optimizer": ADAM},
    "two phases": {"task": "gan_1d:GAN"},
    "group mean": {"task": "centred:Centred"},
    "compressed": {"task": "small:Small", "strategy": {"name": "all_reduce", "compression": "bf16"}},
}
FLAT = ("two phases", "group mean", "compressed")  # what cannot overlap


# ------------------------------------------------------------------------------------------------------ in each process
def trainer_of(case: str, group: ProcessGroup, injections: tuple[str, ...] = ()) -> Trainer:
    spec = {"strategy": "all_reduce", "batch_size": 16, "workers": SIZE, "steps": STEPS, "log": {"every": 2, "to": []}}
    job = job_of(spec_of(**spec | CASES[case]))
    SourceTree.collect(job.task, OWN).install()
    trainer = Trainer(job, build_task(job), group.rank, SIZE, injections=injections)
    trainer.build(None)
    trainer.connect(group, None)
    return trainer


def train(case: str, group: ProcessGroup, overlaps: bool) -> dict[str, Any]:
    """What a run of this rank comes to."""
    group.overlaps, before = overlaps, group.bytes_sent
    trainer = trainer_of(case, group)
    order = watch(trainer) if case == "whole" else []
    events: list[Event] = list(trainer.advance())
    vars(group).pop("start_all_reduce", None)
    strategy = trainer.strategy
    found = {
        "weights": to_numpy(strategy.flat.weights).copy(), "bytes": group.bytes_sent - before, "order": order,
        "buffers": strategy.carried.average_vector().numpy(), "overlapped": strategy.overlapped is not None,
        "steps": strategy.progress.version, "reason": getattr(events[-1], "reason", None),
        "examples": strategy.progress.examples, "elements": strategy.flat.gradients.numel(),
    }  # fmt: skip
    if strategy.overlapped is not None:
        strategy.overlapped.close()
    return found


def watch(trainer: Trainer) -> list[str]:
    """What happens in which order: sums that are started, and the first layer's gradient, backward's last."""
    order: list[str] = []
    group, start = trainer.strategy.group, trainer.strategy.group.start_all_reduce

    def started(vector: torch.Tensor) -> Any:
        order.append("sum")
        return start(vector)

    group.start_all_reduce = started
    trainer.model[0].weight.register_post_accumulate_grad_hook(lambda _: order.append("first layer"))
    return order


def rank_of_all(rank: int, ports: Any, answers: Any) -> None:
    """One process: every case flat and overlapped; then rank 1 is killed in a step."""
    torch.set_num_threads(1)
    listener = open_rendezvous("127.0.0.1") if rank == 0 else None
    for _ in range(1, SIZE if listener else 0):
        ports.put(listener.getsockname()[1])
    port = listener.getsockname()[1] if listener else ports.get(timeout=60)
    group = ProcessGroup(rank, SIZE, "127.0.0.1", port, listener, CPU, 60.0)
    ddp.CPU_BUCKET_MB = 2000 / 2**20  # several for every model
    found = {case: [train(case, group, overlaps) for overlaps in (False, True)] for case in CASES}
    answers.put((rank, found))
    group.overlaps = True
    trainer = trainer_of("accumulated", group, ("kill:rank=1,step=3",))
    try:
        list(trainer.advance())
    except PeerLost as lost:
        answers.put((rank, f"{trainer.activity}, step {trainer.strategy.progress.version}: {lost}"))


@pytest.fixture(scope="module")
def answers() -> dict[int, list[Any]]:
    """By rank: the cases' outcomes, then what a survivor says of its peer's death."""
    context = multiprocessing.get_context("spawn")
    ports, queue = context.Queue(), context.Queue()
    processes = [context.Process(target=rank_of_all, args=(rank, ports, queue), daemon=True) for rank in range(SIZE)]
    for process in processes:
        process.start()
    found: dict[int, list[Any]] = {rank: [] for rank in range(SIZE)}
    for _ in range(2 * SIZE - 1):
        rank, answer = queue.get(timeout=40)
        found[rank].append(answer)
    for process in processes:
        process.join(timeout=30)
    return found


@pytest.mark.parametrize("case", CASES)
def test_overlapped_equals_flat(case, answers):
    for rank in range(SIZE):
        flat, overlapped = answers[rank][0][case]
        assert not flat["overlapped"]
        assert overlapped["overlapped"] == (case not in FLAT)
        assert np.abs(flat["weights"] - overlapped["weights"]).max() <= 1e-12
        assert np.abs(flat["buffers"] - overlapped["buffers"]).max(initial=0.0) <= 1e-12
        assert [overlapped[key] for key in ("steps", "reason", "examples")] == [STEPS, "steps", 16 * STEPS]
        assert np.array_equal(overlapped["weights"], answers[0][0][case][1]["weights"])


def test_the_varied_task_varies(answers):
    """Control: ranks use different parameters in a step, and last micro-batches without any gradient occur."""
    job = job_of(spec_of("varied:Varied"))
    SourceTree.collect(job.task, OWN).install()
    kinds = build_task(job).data("train")[1]
    order = DataOrder(len(kinds), job.seed)
    used, empty = [], 0
    for start in range(0, 16 * STEPS, 16):
        slices = [(start + 16 * rank // SIZE, start + 16 * (rank + 1) // SIZE) for rank in range(SIZE)]
        used.append([set(kinds[order.entries(*cut)].tolist()) - {3} for cut in slices])
        pieces = [list(micro_batches(kinds[order.entries(*cut)], 2)) for cut in slices]
        empty += sum(bool((piece[-1] == 3).all()) for piece in pieces)
    assert any(len({frozenset(kinds) for kinds in row}) > 1 for row in used)
    assert empty > 0
    flat = answers[0][0]["varied, accumulated"][0]
    assert (flat["weights"] == 1.0).sum() == 5  # the idle ones


def test_sums_begin_before_backward_has_come_to_the_first_layer(answers):
    first, later = ["first layer", "sum"], ["sum", "first layer", "sum"]  # DDP cuts its buckets after the first step
    order = answers[0][0]["whole"][1]["order"]
    assert order == first + later * (STEPS - 1), order
    assert answers[0][0]["whole"][0]["order"] == ["first layer"] * STEPS


def test_the_same_bytes_are_counted(answers):
    flat, overlapped = answers[0][0]["varied"]
    message = ring_bytes(torch.zeros(flat["elements"], dtype=torch.float64), SIZE)
    assert flat["elements"] == 3 * 4 + 5 + TAIL
    assert flat["bytes"] >= message * STEPS
    assert abs(overlapped["bytes"] - flat["bytes"]) <= 8 * STEPS  # each bucket's are rounded up


@pytest.mark.parametrize("rank", [0, 2])
def test_a_peers_death_during_backward_is_a_lost_peer(rank, answers):
    assert answers[rank][1].startswith(f"backward, step 3: rank {rank}, all_reduce during backward of {SIZE} ranks: ")


# ------------------------------------------------------------------------------------------------------ in this process
@dataclasses.dataclass
class Loss:
    total: torch.Tensor


class Fails(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: torch.Tensor) -> torch.Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("mine in backward")


class Module(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 1)

    def forward(self, mode: str) -> Loss:
        if mode == "fails":
            raise RuntimeError("mine in forward")
        hidden = self.first(torch.ones(2, 3))
        return Loss(self.second(Fails.apply(hidden) if mode == "fails later" else hidden).sum())


@pytest.fixture
def group():
    listener = open_rendezvous("127.0.0.1")
    group = ProcessGroup(0, 1, "127.0.0.1", listener.getsockname()[1], listener, CPU, 20.0)
    yield group
    group.close()


def gradients_of(flat: FlatModel, module: OverlappedReduction) -> torch.Tensor:
    flat.gradients.zero_()
    module.backward(module("works").total)
    return flat.gradients.clone()


def test_the_tasks_own_errors_stay_its_own_and_a_new_wrap_takes_a_broken_ones_place(group):
    module = Module()
    flat = FlatModel(module, ["*"])
    module("works").total.backward()
    expected = flat.gradients.clone()
    wrapped = OverlappedReduction(module, flat.parameters, group, 1e-4)
    assert torch.equal(gradients_of(flat, wrapped), expected)
    with pytest.raises(RuntimeError, match="mine in forward"):
        wrapped("fails")
    assert torch.equal(gradients_of(flat, wrapped), expected)
    loss = wrapped("fails later").total
    with pytest.raises(RuntimeError, match="mine in backward"):  # the second layer's bucket is under way
        wrapped.backward(loss)
    wrapped.close()
    again = OverlappedReduction(module, flat.parameters, group, 1e-4)
    assert torch.equal(gradients_of(flat, again), expected)
    assert torch.equal(gradients_of(flat, again), expected)
    again.close()
    assert all(p.grad.data_ptr() == view.data_ptr() for p, view in zip(flat.parameters, views(flat), strict=True))


def views(flat: FlatModel) -> list[torch.Tensor]:
    return [flat.gradients[entry.offset :] for entry in flat.layout.entries]


@pytest.mark.parametrize(("host", "overlaps"), [("127.0.0.1", False), ("10.0.0.1", True)])
def test_sums_overlap_between_hosts_only(host, overlaps, monkeypatch):
    monkeypatch.setattr("distml.exchange.process_group.TCPStore", lambda *args, **kwargs: None)
    monkeypatch.setattr("torch.distributed.init_process_group", lambda *args, **kwargs: None)
    assert ProcessGroup(1, 2, host, 1, None, CPU, 1.0).overlaps == overlaps
