"""What a death is called."""

from __future__ import annotations

import pytest

from distml.runtime.deaths import cause_of_death, out_of_memory_kills


class OutOfMemoryError(Exception):
    """Named as Ray's."""


SIGNAL = Exception(
    "The actor is dead: Worker exit type: SYSTEM_ERROR. Worker unexpectedly exits with a connection error"
)


@pytest.mark.parametrize(
    ("error", "kernel_killed", "said"),
    [
        (OutOfMemoryError("Task was killed"), False, "out of memory: ended by Ray's memory monitor"),
        (
            Exception("killed due to the node running low on memory"),
            False,
            "out of memory: ended by Ray's memory monitor",
        ),
        (SIGNAL, True, "out of memory: killed by the kernel"),
        (SIGNAL, False, "the process was killed by a signal (such as SIGKILL) or crashed; see its file in logs/"),
        (Exception("the node\nhas left"), False, "the node has left"),
    ],
)
def test_the_cause_is_named_in_one_line(error, kernel_killed, said):
    assert cause_of_death(error, kernel_killed=kernel_killed) == said


def test_kills_are_counted_or_zero():
    assert out_of_memory_kills() >= 0
