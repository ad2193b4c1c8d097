"""An elastic group's room: what it holds, what it gives back, and what it says while it waits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from own.on_ray import SPEC
from own.oracle import job_of

from distml.errors import UsageError
from distml.runtime import nodes, seats
from distml.runtime.nodes import wait_for_verdict
from distml.runtime.placement import place, reserve
from distml.runtime.seats import Room, Seat, nodes_of

JOB = job_of({**SPEC, "resources": {"workers": {"min": 1, "max": 4}}, "limits": {**SPEC["limits"], "start_s": 2.0}})


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def room(shared_ray, said) -> Iterator[Room]:
    found = Room(JOB, said.append, lambda: False)
    yield found
    found.close()


def state_of(group: Any) -> str:
    return str(seats.placement_group_table(group)["state"])


def test_a_group_is_asked_for_its_nodes_once(room, monkeypatch):
    calls = []
    table = seats.placement_group_table
    found = room.at_least(4)
    assert len(found) == 4
    monkeypatch.setattr(seats, "placement_group_table", lambda group: calls.append(group) or table(group))
    assert len(set(nodes_of(found))) == 1
    assert len(calls) == len(room.groups)


def test_what_is_no_longer_wanted_is_not_asked_for(room):
    """Else Ray would give it later, to nobody."""
    assert len(room.at_least(4)) == 4
    asked = room.asked = reserve(JOB.with_workers(1))
    assert state_of(asked) == "PENDING"
    room.at_least(1)
    assert room.asked is None
    assert state_of(asked) == "REMOVED"


def test_a_wait_says_what_is_asked_what_is_free_and_who_has_the_rest(room, said):
    other = place(JOB.model_copy(update={"name": "other"}).with_workers(4))
    try:
        with pytest.raises(UsageError, match=r"room for 0 of at least 1 workers .*held by other \(4 CPUs\)"):
            room.at_least(1)
    finally:
        seats.remove_placement_group(other)
    assert said[0].startswith("waiting for room: 0 of at least 1 workers have a place, each asks for 1 CPU; ")
    assert "held by other (4 CPUs)" in said[0]
    assert "s of limits.start_s left" in said[0]


def test_seats_that_were_given_up_are_not_taken_again(room):
    room.groups = [place(JOB.with_workers(1)), place(JOB.with_workers(1))]
    kept, new = Seat(room.groups[0], 0), Seat(room.groups[1], 0)
    room.give_up([new], [kept])
    assert room.seats() == [kept]
    assert state_of(new.group) == "REMOVED"
    assert room.clear_of == []  # others of the group are there
    assert room._free() > 0
    room.give_up([kept], [])
    assert len(room.clear_of) == 1
    assert room._free() == 0  # no node is left that may be asked


def test_nobody_waits_for_a_verdict_once_the_run_is_asked_to_end(shared_ray, monkeypatch):
    monkeypatch.setattr(nodes, "stays", lambda *where: False)
    node = next(iter(seats.living_nodes()))
    with pytest.raises(UsageError, match="asked to end while it waited to hear whether a node lives"):
        wait_for_verdict({node: 0.0}, 60.0, lambda: True)
