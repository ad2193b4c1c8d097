"""How much memory there is here, and how much of it a process has: read from the kernel. No torch, no ray."""

from __future__ import annotations

import os
from pathlib import Path

GROUPS = Path("/sys/fs/cgroup")


def out_of_memory_kills(groups: Path = GROUPS) -> int:
    """Processes that the kernel has killed for memory in this control group; 0 where that is not known."""
    for file in (groups / "memory.events", groups / "memory" / "memory.oom_control"):
        try:
            lines = file.read_text().splitlines()
        except OSError:
            continue
        for line in lines:
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return 0


def group_limit(groups: Path = GROUPS) -> int | None:
    """Bytes that the processes of this control group may have together; None: as much as there is."""
    for file in (groups / "memory.max", groups / "memory" / "memory.limit_in_bytes"):
        try:
            limit = file.read_text().strip()
        except OSError:
            continue
        if limit.isdecimal() and int(limit) < 2**60:  # the older kind has a huge number for no limit
            return int(limit)
    return None


def memory_bytes(groups: Path = GROUPS) -> int:
    """What the processes here can have together: the machine's memory, or the control group's limit if that is less."""
    installed = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = group_limit(groups)
    return installed if limit is None else min(installed, limit)


def resident_bytes() -> int:
    """Memory of this process that is in RAM."""
    with open("/proc/self/statm", encoding="ascii") as pages:
        return int(pages.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
