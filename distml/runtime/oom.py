"""Kills for lack of memory, as the kernel counts them."""

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
