"""What a death is called."""

from __future__ import annotations

import pytest

from distml.memory import is_out_of_memory
from distml.runtime.deaths import allowance, cause_of_death


class OutOfMemoryError(Exception):
    """Named as Ray's."""


SIGNAL = Exception(
    "The actor is dead: Worker exit type: SYSTEM_ERROR. Worker unexpectedly exits with a connection error"
)
MONITOR = (
    "Task was killed due to the node running low on memory.\nMemory on the node (IP: 10.0.0.1, ID: ab) where the task "
    "(actor ID: cd, name=WorkerActor.__init__, pid=12) was running was 7.61GB / 8.00GB (0.951), which exceeds the "
    "memory usage threshold of 0.95. Ray killed this worker because it was the most recently scheduled task"
)
BY_RAY = "out of memory: ended by Ray's memory monitor"


@pytest.mark.parametrize(
    ("error", "kernel_killed", "said"),
    [
        (OutOfMemoryError("Task was killed"), False, BY_RAY),
        (Exception("killed due to the node running low on memory"), False, BY_RAY),
        (OutOfMemoryError(MONITOR), True, f"{BY_RAY}, its node had 7.61GB of 8.00GB in use"),
        (SIGNAL, True, f"out of memory: killed by the kernel, {allowance()}"),
        (SIGNAL, False, "the process was killed by a signal (such as SIGKILL) or crashed; see its file in logs/"),
        (Exception("the node\nhas left"), False, "the node has left"),
    ],
)
def test_the_cause_is_named_in_one_line(error, kernel_killed, said):
    cause = cause_of_death(error, kernel_killed=kernel_killed)
    assert cause == said
    assert is_out_of_memory(cause) == ("memory" in said)
