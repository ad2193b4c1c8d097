"""Why a process of a run died: what Ray says of it, and kills for lack of memory as the kernel counts them."""

from __future__ import annotations

import re

from distml.memory import OUT_OF_MEMORY, binary_size, group_limit, memory_bytes

CONNECTION_BROKE = "the connection to it broke: it died, or its node or the network did"
NODE_LOST = "its node was lost"


def cause_of_death(error: Exception, *, kernel_killed: bool) -> str:
    """One line on why a process died.

    Args:
        error: what Ray raised for a call to it.
        kernel_killed: whether the kernel has killed a process here for memory since the last look.
    """
    text = " ".join(str(error).split())
    if "OutOfMemory" in type(error).__name__ or "memory monitor" in text or "running low on memory" in text:
        found = re.search(r"was ([\d.]+ ?\w?B) / ([\d.]+ ?\w?B)", text)
        used = f", its node had {found[1]} of {found[2]} in use" if found else ""
        return f"{OUT_OF_MEMORY}: ended by Ray's memory monitor{used}"
    if kernel_killed:
        return f"{OUT_OF_MEMORY}: killed by the kernel, {allowance()}"
    if type(error).__name__ == "ActorUnavailableError":
        return CONNECTION_BROKE
    if "node has died" in text:
        return NODE_LOST
    if "creation task" in text:
        return text[-300:]
    if "connection error" in text or "SYSTEM_ERROR" in text:
        return "the process was killed by a signal (such as SIGKILL) or crashed; see its file in logs/"
    return text[:200]


def allowance() -> str:
    """What the processes of this host may have together."""
    what = "this host has" if group_limit() is None else "the control group's limit is"
    return f"{what} {binary_size(memory_bytes())}"
