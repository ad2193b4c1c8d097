"""What the spec says of places, on a real Ray: a head without CPUs and two nodes with labels (`own/placing.py`)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).parents[1]


def placed(*arguments: str) -> dict[str, Any]:
    """What the script has found, on a cluster of its own."""
    command = [sys.executable, str(TESTS / "own" / "placing.py"), *arguments]
    environment = os.environ | {"PYTHONPATH": f"{TESTS}:{os.environ.get('PYTHONPATH', '')}"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False, env=environment)
    assert "FOUND" in done.stdout, done.stdout[-2000:] + done.stderr[-2000:]
    found: dict[str, Any] = json.loads(done.stdout.split("FOUND")[1])
    return found


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    return placed()


@pytest.mark.parametrize(
    ("case", "zones"),
    [("anywhere", ["a", "b"]), ("label", ["b", "b"]), ("selector", ["a", "a"]), ("accelerator", ["a", "a"])],
)
def test_workers_go_where_labels_and_accelerators_are(found, case, zones):
    """`anywhere` is the control: both nodes would do."""
    assert found["quick"][case]["workers"] == zones


def test_servers_apart_have_a_node_without_workers(found):
    """The control, servers that may be anywhere, share one with workers."""
    apart, others = found["quick"]["apart"], found["quick"]["not apart"]
    assert not {*apart["workers"]} & {*apart["servers"]}
    assert {*others["workers"]} & {*others["servers"]}


def test_servers_go_where_their_labels_are(found):
    assert found["quick"]["servers by label"]["servers"] == ["b", "b"]


@pytest.mark.parametrize(
    ("case", "text"),
    [("no accelerator", "no node has the accelerator L40S; there is L4 (1 node); did you mean L4?"),
     ("no label", "no node has the label zone: c that the workers ask for; it is a (1 node), b (1 node)"),
     ("never", "asks for 5 CPUs (5 workers x 1), this cluster has 4"),
     ("no place apart", "server_placement apart asks for a node that has CPUs and no workers")],
)  # fmt: skip
def test_what_no_node_is_or_has_is_refused_at_once(found, case, text):
    """Not after `limits.start_s`, whose refusal has other words."""
    assert text in found["quick"][case]["refused"]


def test_a_wait_says_what_for_who_has_it_and_how_long_still(found):
    busy = found["busy"]
    assert busy["then there"]["workers"]
    assert "after 2 s still no place for 2 x 1 CPU (pack)" in busy["in vain"]["refused"]
    for line in (*busy["lines"], busy["in vain"]["refused"]):
        assert "room for 0 of them now, nothing free; held by other (4 CPUs)" in line
    assert busy["lines"][-1].startswith("waiting for a place for 2 x 1 CPU (pack): ")
    assert busy["lines"][-1].endswith(" s of limits.start_s left")


def test_a_signal_ends_the_wait_and_gives_back_what_was_asked_for(found):
    assert found["busy"]["interrupted"] == {"by": "KeyboardInterrupt", "pending": 0}


@pytest.mark.slow
def test_nodes_that_are_still_to_come_are_waited_for_at_first_and_after_a_loss():
    more = placed("more")
    assert more["growing"] == {
        "asked to end": "asked to end while it waited for a place", "again": True, "moved": True,
    }  # fmt: skip
    assert more["trial"] == "b"  # of Ray Tune, by the same labels
