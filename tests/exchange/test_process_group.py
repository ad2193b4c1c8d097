"""A rank of a group: on which interface it talks."""

from __future__ import annotations

import os

import pytest
import torch

from distml.exchange import process_group
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
