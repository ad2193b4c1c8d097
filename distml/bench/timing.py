"""From the times at which workers began their steps to milliseconds per step; processor time of all processes."""

from __future__ import annotations

import bisect
import itertools
import os
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from distml.errors import RunError


@dataclass(frozen=True)
class Plan:
    """How long a contender trains.

    Attributes:
        warm_up: steps of each worker that do not count.
        width: steps of a window.
        windows: how many of them.
    """

    warm_up: int
    width: int
    windows: int

    @property
    def steps(self) -> int:
        """Steps of each worker; the last one only ends the window before it."""
        return self.warm_up + self.width * self.windows + 1


@dataclass(frozen=True)
class Times:
    """When one worker began its steps, in seconds, and its processor seconds then."""

    wall: list[float]
    processor: list[float]


def read_times(folder: Path, workers: int, plan: Plan) -> list[Times]:
    """What every worker recorded.

    Raises:
        RunError: one has recorded less than the warm-up and one window.
    """
    found = []
    for rank in range(workers):
        path = folder / f"times-{rank}"
        rows = [line.split() for line in path.read_text().splitlines()] if path.exists() else []
        if len(rows) <= plan.warm_up + plan.width:
            raise RunError(f"it recorded {len(rows)} steps, {plan.warm_up + plan.width + 1} are needed",
                           role=f"rank {rank}", phase="bench")  # fmt: skip
        found.append(Times([float(row[0]) for row in rows], [float(row[1]) for row in rows]))
    return found


def window_ms(wall: Sequence[float], plan: Plan) -> list[float]:
    """Milliseconds per step in each whole window after the warm-up."""
    edges = wall[plan.warm_up :: plan.width]
    return [(after - before) / plan.width * 1e3 for before, after in itertools.pairwise(edges)]


def synchronous_ms(times: Sequence[Times], plan: Plan) -> float:
    """Milliseconds per step: the median window, each window as its slowest worker had it."""
    slowest = [max(row) for row in zip(*(window_ms(one.wall, plan) for one in times), strict=False)]
    return float(statistics.median(slowest))


def independent_ms(times: Sequence[Times], plan: Plan) -> float:
    """Milliseconds per step of workers that do not wait for each other: the mean over workers of their median window.

    It is never above what `synchronous_ms` would say of the same times, so that a floor taken like this is a floor.
    """
    return statistics.mean(statistics.median(window_ms(one.wall, plan)) for one in times)


def least_ms(times: Sequence[Times], plan: Plan) -> float:
    """Milliseconds per step in the quickest window of any worker: what an undisturbed machine might do."""
    return min(min(window_ms(one.wall, plan)) for one in times)


def steady(times: Sequence[Times], plan: Plan) -> tuple[float, float]:
    """The interval in which every worker is past its warm-up and none has begun its last step."""
    return max(one.wall[plan.warm_up] for one in times), min(one.wall[-1] for one in times)


def steps_within(times: Sequence[Times], start: float, stop: float) -> int:
    """Steps that workers began in [start, stop)."""
    return sum(bisect.bisect_left(one.wall, stop) - bisect.bisect_left(one.wall, start) for one in times)


def steps_per_s(times: Sequence[Times], plan: Plan) -> float:
    """Steps of all workers together per second: the median over slices of the steady interval."""
    start, stop = steady(times, plan)
    size = (stop - start) / max(1, plan.windows)
    rates = [steps_within(times, start + k * size, start + (k + 1) * size) / size for k in range(max(1, plan.windows))]
    return statistics.median(rates)


class Sampler:
    """Readings of growing totals while something runs, to be asked for their difference later.

    Args:
        read: the totals now, by name.
        every_s: seconds between readings.
    """

    def __init__(self, read: Callable[[], dict[str, float]], every_s: float = 0.25) -> None:
        self.read, self.every_s = read, every_s
        self.at: list[float] = []
        self.readings: list[dict[str, float]] = []
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._loop, name="distml-bench-sampler", daemon=True)

    def __enter__(self) -> Sampler:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.done.set()
        self.thread.join(10.0)

    def _loop(self) -> None:
        while not self.done.is_set():
            reading = self.read()
            self.readings.append(reading)
            self.at.append(time.monotonic())
            self.done.wait(self.every_s)

    def grown(self, name: str, start: float, stop: float) -> float:
        """By how much a total has grown between two times, by linear interpolation between readings."""
        return self._value(name, stop) - self._value(name, start)

    def _value(self, name: str, when: float) -> float:
        after = min(max(1, bisect.bisect_left(self.at, when)), len(self.at) - 1)
        before = max(0, after - 1)
        low, high = self.readings[before][name], self.readings[after][name]
        span = self.at[after] - self.at[before]
        return low + (high - low) * min(1.0, max(0.0, (when - self.at[before]) / span)) if span else low


class ProcessTimes:
    """Processor seconds of this process's descendants, of those that have ended meanwhile too, and of everybody else.

    `processor_s` is the descendants' and `others_s` what all other processes of the machine have used besides them
    and this one: a disturbed measurement shows there.
    """

    TICK_S = 1.0 / os.sysconf("SC_CLK_TCK")

    def __init__(self) -> None:
        self.seconds: dict[tuple[int, str], float] = {}

    def __call__(self) -> dict[str, float]:
        """The total so far."""
        parents, seconds = {}, {}
        for entry in os.listdir("/proc"):
            fields = stat_fields(entry) if entry.isdigit() else None
            if fields is not None:
                parents[int(entry)] = int(fields[1])
                seconds[int(entry)] = fields[19], (int(fields[11]) + int(fields[12])) * self.TICK_S
        for pid in descendants(os.getpid(), parents):
            started, used = seconds[pid]
            self.seconds[pid, started] = used
        ours = sum(self.seconds.values())
        return {"processor_s": ours, "others_s": busy_s() - ours - sum(os.times()[:2])}


def busy_s() -> float:
    """Processor seconds that the machine has not been idle: /proc/stat without idle, iowait and the guests' double."""
    with open("/proc/stat", encoding="ascii") as file:
        ticks = [int(value) for value in file.readline().split()[1:9]]
    return (sum(ticks) - ticks[3] - ticks[4]) * ProcessTimes.TICK_S


def stat_fields(entry: str) -> list[str] | None:
    """/proc/PID/stat from the state on (proc_pid_stat(5), field 3); None: it has ended."""
    try:
        with open(f"/proc/{entry}/stat", encoding="utf-8", errors="replace") as file:
            return file.read().rpartition(")")[2].split()
    except OSError:
        return None


def descendants(root: int, parents: dict[int, int]) -> list[int]:
    """Children of `root`, their children and so on."""
    children: dict[int, list[int]] = {}
    for child, parent in parents.items():
        children.setdefault(parent, []).append(child)
    found, waiting = [], [root]
    while waiting:
        own = children.get(waiting.pop(), [])
        found += own
        waiting += own
    return found
