"""How much memory there is here and how much of it a process has, as the kernel says; and what says that there is none.

No torch, no ray: errors are told by their names and texts.
"""

from __future__ import annotations

import os
import re
import resource
from pathlib import Path

GROUPS = Path("/sys/fs/cgroup")
OUT_OF_MEMORY = "out of memory"  # how every message about it begins
UNITS = {"bytes": 1, "B": 1, **{f"{prefix}iB": 2 ** (10 * power) for power, prefix in enumerate("KMGTP", start=1)}}
SIZE = rf"([\d.]+) ({'|'.join(UNITS)})"
ERRORS = ("OutOfMemoryError", "MemoryError", "_ArrayMemoryError")
TEXTS = ("DefaultCPUAllocator: can't allocate memory", "CUDA out of memory", "std::bad_alloc", "Cannot allocate memory")


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


# --------------------------------------------------------------------------------------------------------------- errors
def is_out_of_memory(message: str) -> bool:
    """Whether a message is one of those made here, or holds one."""
    return OUT_OF_MEMORY in message


def out_of_memory(error: BaseException) -> str | None:
    """One line on an allocation that failed: what was needed, and what there was; None: it is another error.

    torch's (on CPUs a plain RuntimeError), numpy's and Python's own are known.
    """
    text = " ".join(str(error).split())
    if type(error).__name__ not in ERRORS and not any(known in text for known in TEXTS):
        return None
    asked = re.search(rf"(?:[Tt]ried to|Unable to) allocate {SIZE}", text)
    needed = f"{_size(asked)} more were needed" if asked else "more was needed"
    card = re.search(rf"total capacity of {SIZE} of which {SIZE} is free", text)
    if card is not None:
        return f"{OUT_OF_MEMORY}: {needed}, {_size(card, 3)} of the GPU's {_size(card)} were free"
    return (
        f"{OUT_OF_MEMORY}: {needed}, the process had {binary_size(resident_bytes())} of {binary_size(allowed_bytes())}"
    )


def _size(found: re.Match[str], group: int = 1) -> str:
    """A number of bytes and its unit, which are two groups of a match."""
    return binary_size(float(found[group]) * UNITS[found[group + 1]])


def allowed_bytes() -> int:
    """What this process may have: all that there is, or the limit on its address space if that is less."""
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    return memory_bytes() if limit == resource.RLIM_INFINITY else min(limit, memory_bytes())


def binary_size(count: float) -> str:
    """Bytes as `512.0 KiB`, `1.50 MiB`, `79.6 GiB`."""
    for unit, power in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        value = count / 2**power
        if value >= 1 or unit == "KiB":
            break
    digits = 0 if value >= 1000 else 1 if value >= 10 else 2
    return f"{value:,.{digits}f} {unit}"
