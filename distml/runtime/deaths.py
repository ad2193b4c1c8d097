"""Why a process of a run died: what Ray says of it, and kills for lack of memory as the kernel counts them."""

from __future__ import annotations

from pathlib import Path


def out_of_memory_kills() -> int:
    """Processes that the kernel has killed for memory in this control group; 0 where that is not known."""
    for file in (Path("/sys/fs/cgroup/memory.events"), Path("/sys/fs/cgroup/memory/memory.oom_control")):
        try:
            lines = file.read_text().splitlines()
        except OSError:
            continue
        for line in lines:
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return 0


def cause_of_death(error: Exception, *, kernel_killed: bool) -> str:
    """One line on why a process died.

    Args:
        error: what Ray raised for a call to it.
        kernel_killed: whether the kernel has killed a process here for memory since the last look.
    """
    text = " ".join(str(error).split())
    if "OutOfMemory" in type(error).__name__ or "memory monitor" in text or "running low on memory" in text:
        return "out of memory: ended by Ray's memory monitor"
    if kernel_killed:
        return "out of memory: killed by the kernel"
    if "creation task" in text:
        return text[-300:]
    if "connection error" in text or "SYSTEM_ERROR" in text:
        return "the process was killed by a signal (such as SIGKILL) or crashed; see its file in logs/"
    return text[:200]
