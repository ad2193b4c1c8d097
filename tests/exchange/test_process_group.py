"""A rank of a group: on which interface it talks, what it exchanges, and that a peer's end ends its waits."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch

from distml.exchange import process_group
from distml.exchange.channel import PeerLost
from distml.exchange.process_group import ProcessGroup, open_rendezvous

VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


@pytest.fixture
def addresses(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The addresses whose interface was asked for; both variables hold another group's interface."""
    asked: list[str] = []
    real = process_group.interface_of

    def interface_of(address: str) -> str | None:
        asked.append(address)
        return None if address == "192.0.2.7" else real("127.0.0.1")

    monkeypatch.setattr(process_group, "interface_of", interface_of)
    for variable in VARIABLES:
        monkeypatch.setenv(variable, "old0")
    return asked


def values() -> list[str | None]:
    return [os.environ.get(variable) for variable in VARIABLES]


@pytest.mark.parametrize(("own", "asked"), [(None, "127.0.0.1"), ("198.51.100.3", "198.51.100.3")])
def test_a_rank_talks_on_its_own_nodes_interface(addresses, own, asked):
    listener = open_rendezvous("127.0.0.1")
    port = listener.getsockname()[1]
    group = ProcessGroup(0, 1, "127.0.0.1", port, listener, torch.device("cpu"), 20.0, own)
    try:
        vector = torch.ones(3)
        group.all_reduce(vector)
        assert vector.tolist() == [1.0, 1.0, 1.0]
    finally:
        group.close()
    assert addresses == [asked]
    assert values() == [process_group.interface_of("127.0.0.1")] * 2


def test_an_address_of_no_interface_leaves_the_choice_to_the_libraries(addresses):
    process_group.use_interface_of("192.0.2.7")
    assert values() == [None, None]


def part(sender: int, receiver: int) -> torch.Tensor:
    """Of different lengths, some of them none at all."""
    return torch.full(((3 * sender + 5 * receiver) % 7,), 10 * sender + receiver, dtype=torch.uint8)


def exchanges(group: ProcessGroup) -> dict[str, Any]:
    found: dict[str, Any] = {"gathered": [], "bytes": []}
    for payload in (b"", bytes(range(group.rank * 100)), b"" if group.rank else b"one", b"x" * 70_000):
        before = group.bytes_sent
        found["gathered"].append(group.all_gather(payload))
        found["bytes"].append(group.bytes_sent - before)
    before = group.bytes_sent
    ranks = range(group.size)
    got = group.all_to_all([part(group.rank, to) for to in ranks], [part(of, group.rank).numel() for of in ranks])
    found["exchanged"], found["exchanged_bytes"] = [one.tolist() for one in got], group.bytes_sent - before
    return found


def loses_a_peer(group: ProcessGroup) -> str:
    group.all_gather(b"all here")
    if group.rank == 2:
        return "left"
    try:
        group.all_to_all([torch.zeros(4_000_000, dtype=torch.uint8)] * 3, [4_000_000] * 3)
    except PeerLost as lost:
        return str(lost)
    return "went on"


def member(rank: int, size: int, port: int, listener: Any, work: Callable[[ProcessGroup], Any], answers: Any) -> None:
    torch.set_num_threads(1)
    group = ProcessGroup(rank, size, "127.0.0.1", port, listener, torch.device("cpu"), 60.0)
    try:
        answers.put((rank, work(group)))
    finally:
        group.close()


def processes(size: int, work: Callable[[ProcessGroup], Any]) -> list[Any]:
    """What `work` returns in each rank's process."""
    context = multiprocessing.get_context("spawn")  # a fork would take over the threads' locks, not the threads
    listener, answers = open_rendezvous("127.0.0.1"), context.Queue()
    port = listener.getsockname()[1]
    ranks = [context.Process(target=member, args=(rank, size, port, listener if rank == 0 else None, work, answers))
             for rank in range(size)]  # fmt: skip
    for process in ranks:
        process.start()
    listener.close()
    found = dict(answers.get(timeout=60) for _ in ranks)
    for process in ranks:
        process.join(60)
    assert [process.exitcode for process in ranks] == [0] * size
    return [found[rank] for rank in range(size)]


def both(group: ProcessGroup) -> tuple[dict[str, Any], str]:
    return exchanges(group), loses_a_peer(group)


@pytest.fixture(scope="module")
def found() -> list[tuple[dict[str, Any], str]]:
    return processes(3, both)


def test_ranks_gather_and_exchange_payloads_of_any_length_and_count_what_leaves(found):
    payloads = [[b"", b"", b""], [bytes(range(0)), bytes(range(100)), bytes(range(200))], [b"one", b"", b""],
                [b"x" * 70_000] * 3]  # fmt: skip
    for rank, (answer, _) in enumerate(found):
        assert answer["gathered"] == payloads
        assert answer["bytes"] == [2 * len(row[rank]) for row in payloads]
        assert answer["exchanged"] == [part(sender, rank).tolist() for sender in range(3)]
        assert answer["exchanged_bytes"] == sum(part(rank, to).numel() for to in range(3) if to != rank)


def test_a_peer_that_leaves_ends_the_others_exchange(found):
    assert found[2][1] == "left"
    assert all("all_to_all of 3 ranks" in end for _, end in found[:2])
