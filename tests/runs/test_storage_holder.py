"""Who may write into a place: a live driver keeps it, a dead one loses it, whatever clocks say."""

from __future__ import annotations

import subprocess
import sys
import threading
from dataclasses import replace

import pytest

from distml.errors import UsageError
from distml.runs.holder import HOLDER, Holder
from distml.runs.storage import FolderPlace


@pytest.fixture
def place(tmp_path) -> FolderPlace:
    return FolderPlace(tmp_path / "run")


def elsewhere(place: FolderPlace) -> Holder:
    """A holder on another machine."""
    holder = Holder(place)
    holder.own = replace(holder.own, host="far", machine="far", pid=7)
    return holder


def test_free_then_released(place):
    notes: list[str] = []
    one = Holder(place, look_s=0.05)
    one.acquire(notes.append)
    assert one.beat() is None
    assert one.release() is None
    assert place.read(HOLDER) is None
    assert notes == []


def test_a_live_one_elsewhere_is_refused(place):
    other = elsewhere(place)
    other.renew()
    over = threading.Event()

    def beat() -> None:
        while not over.wait(0.05):
            other.beat()

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(UsageError, match=r"held by process 7 on host far, heard of less than 1 s ago; wait until"):
            Holder(place, watch_s=20.0, look_s=0.1).acquire(lambda line: None)
    finally:
        over.set()
        thread.join()
    assert other.beat() is None


def test_a_silent_one_elsewhere_is_taken_over_and_learns_of_it(place):
    notes: list[str] = []
    other = elsewhere(place)
    other.renew()
    one = Holder(place, watch_s=0.3, look_s=0.05)
    one.acquire(notes.append)
    assert len(notes) == 2
    assert "taken over from process 7 on host far" in notes[-1]
    taken = other.beat()
    assert taken is not None
    assert taken.token == one.own.token
    assert other.release() is None  # not its own to give up any more
    assert one.beat() is None


def test_a_dead_one_of_this_machine_needs_no_watching(place):
    notes: list[str] = []
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    dead = Holder(place)
    dead.own = replace(dead.own, pid=gone.pid)
    dead.renew()
    Holder(place, watch_s=1e6, look_s=0.05).acquire(notes.append)
    assert len(notes) == 1


def test_one_that_came_between_the_look_and_the_write_is_found(place):
    one, two = Holder(place, look_s=0.05), elsewhere(place)
    read, found = one.read, []

    def read_as_two_comes():
        found.append(read())
        if len(found) == 1:  # free; now the other one takes it
            two.renew()
        return found[-1]

    one.read = read_as_two_comes  # type: ignore[method-assign]
    with pytest.raises(UsageError, match="held by process 7 on host far"):
        one.acquire(lambda line: None)
    assert found[0] is None
    assert two.beat() is None


def test_the_first_to_write_finds_the_other_one(place):
    one, two = Holder(place, look_s=0.05), elsewhere(place)
    renew = one.renew

    def renew_then_the_other():
        renew()
        two.renew()

    one.renew = renew_then_the_other  # type: ignore[method-assign]
    with pytest.raises(UsageError, match="held by process 7 on host far"):
        one.acquire(lambda line: None)
    assert two.beat() is None


def test_a_beat_after_the_end_holds_nothing(place):
    one = Holder(place, look_s=0.05)
    one.acquire(lambda line: None)
    assert one.release() is None
    assert one.beat() is None
    assert place.read(HOLDER) is None


def test_what_is_no_holder_holds_nothing(place):
    place.write(HOLDER, b"[1]")
    Holder(place, watch_s=1e6, look_s=0.05).acquire(lambda line: None)
    assert place.read(HOLDER) != b"[1]"
