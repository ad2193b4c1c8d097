"""Workers' reports become rows of `metrics.jsonl`: sums and counts are added over ranks, never means. No torch."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping, Sequence
from typing import Any

from distml.events import Report


class ReportMerger:
    """Collects one report of every rank per row.

    Synchronous ranks report the same versions: a row is about one of them, and waits for all. Asynchronous ones each
    report versions of their own: a row has one report of each, and a rank that is far behind does not hold it up.

    Args:
        world_size: workers.
        is_synchronous: whether gradients are always of the newest version.
        tokens_per_example: of language models.
    """

    PATIENCE = 3  # reports of one rank that wait for another's

    def __init__(self, world_size: int, is_synchronous: bool, tokens_per_example: int | None = None) -> None:
        self.world_size, self.is_synchronous = world_size, is_synchronous
        self.tokens_per_example = tokens_per_example
        self.waiting: dict[int, deque[Report]] = {}  # asynchronous: rank -> its reports
        self.versions: dict[int, list[Report]] = {}  # synchronous: version -> the ranks' reports of it
        self.step = self.examples = self.frames = 0
        self.seconds, self.bytes = 0.0, 0.0
        self.frames_at = 0.0  # seconds when the last new frames were reported
        self.contributed: dict[int, float] = {}  # rank -> examples of its applied gradients so far
        self.buckets = 0  # of the histogram of staleness

    def restore(self, step: int, rows: list[dict[str, Any]]) -> None:
        """Go on after `step`, with the totals of the rows up to it."""
        self.waiting, self.versions, self.contributed = {}, {}, {}
        last: dict[str, Any] = next(
            (row for row in reversed(rows) if row["step"] <= step and "train/examples" in row), {}
        )
        self.step, self.examples = int(last.get("step", 0)), int(last.get("train/examples", 0))
        self.frames = int(last.get("rl/frames", 0))
        self.seconds, self.bytes = float(last.get("wall_s", 0.0)), float(last.get("comm/bytes", 0.0))
        known = [row for row in rows if row["step"] <= step and row.get("rl/frames")]
        self.frames_at = next((float(row["wall_s"]) for row in known if row["rl/frames"] == self.frames), 0.0)

    def add(self, report: Report) -> list[dict[str, Any]]:
        """The rows that this report completes."""
        if self.is_synchronous:
            found = self.versions.setdefault(report.version, [])
            found.append(report)
            return [self._row(self.versions.pop(report.version))] if len(found) == self.world_size else []
        self.waiting.setdefault(report.rank, deque()).append(report)
        rows = []
        while len(self.waiting) == self.world_size or any(len(q) > self.PATIENCE for q in self.waiting.values()):
            rows.append(self._row([queue.popleft() for queue in self.waiting.values()]))
            self.waiting = {rank: queue for rank, queue in self.waiting.items() if queue}
        return rows

    def flush(self) -> list[dict[str, Any]]:
        """Rows of what still waits."""
        rows = [self._row(self.versions.pop(version)) for version in sorted(self.versions)]
        while self.waiting:
            rows.append(self._row([queue.popleft() for queue in self.waiting.values()]))
            self.waiting = {rank: queue for rank, queue in self.waiting.items() if queue}
        return rows

    def _row(self, reports: list[Report]) -> dict[str, Any]:
        reports = sorted(reports, key=lambda report: report.rank)
        newest = max(reports, key=lambda report: report.version)
        step, examples = max(self.step, newest.version), max(self.examples, newest.examples)
        frames = max(self.frames, newest.frames)
        seconds = max(self.seconds, *(report.train_seconds for report in reports))
        sent = sum(report.values["bytes"] for report in reports)
        self.bytes += sent
        row: dict[str, Any] = {"step": step, "wall_s": seconds}
        sums: dict[str, tuple[float, float]] = {}
        for report in reports:
            for name, (total, count) in report.means.items():
                before = sums.get(name, (0.0, 0.0))
                sums[name] = before[0] + total, before[1] + count
        row |= {name if "/" in name else f"train/{name}": total / count
                for name, (total, count) in sums.items() if count}  # fmt: skip
        row |= {"train/lr": newest.values["lr"], "train/examples": examples}
        if self.tokens_per_example is not None:
            row["train/tokens"] = examples * self.tokens_per_example
        if frames:
            row["rl/frames"] = frames
        norms = [report.values["grad_norm"] for report in reports if "grad_norm" in report.values]
        if norms:
            row["train/grad_norm"] = norms[0]
        if seconds > self.seconds:
            row["throughput/examples_per_s"] = (examples - self.examples) / (seconds - self.seconds)
            if self.tokens_per_example is not None:
                row["throughput/tokens_per_s"] = row["throughput/examples_per_s"] * self.tokens_per_example
        if frames > self.frames and seconds > self.frames_at:  # some updates learn from earlier ones' frames
            row["throughput/frames_per_s"] = (frames - self.frames) / (seconds - self.frames_at)
            self.frames_at = seconds
        if not self.is_synchronous:
            row |= self._lag(reports)
        row["comm/bytes_per_step"], row["comm/bytes"] = sent / max(1, step - self.step), self.bytes
        for name in ("compute_s", "exchange_s"):
            row[f"timing/{name}"] = sum(report.values[name] for report in reports) / len(reports)
        row["memory/rank_bytes"] = max(report.values["memory_bytes"] for report in reports)
        self.step, self.examples, self.frames, self.seconds = step, examples, frames, seconds
        return row

    def _lag(self, reports: list[Report]) -> dict[str, float]:
        """How late the gradients were applied, and how unequally the workers contribute."""
        counts: Counter[int] = Counter()
        for report in reports:
            counts.update({int(versions): number for versions, number in report.staleness.items()})
            if "contributed" in report.values:
                self.contributed[report.rank] = report.values["contributed"]
        row = staleness_summary(counts) if counts else {}
        self.buckets = max(self.buckets, *(bucket(versions) for versions in counts), 0)
        for index in range(self.buckets + 1) if counts else ():
            first = 2 ** (index - 1) if index else 0
            row[f"staleness/count_{first}"] = sum(n for versions, n in counts.items() if bucket(versions) == index)
        if self.contributed:
            row["workers/gini"] = gini([self.contributed.get(rank, 0.0) for rank in range(self.world_size)])
        return row


def staleness_summary(counts: Mapping[int, int]) -> dict[str, float]:
    """Mean, largest, median and 95th percentile: the smallest value that so many of the gradients do not exceed."""
    total, values = sum(counts.values()), sorted(counts)
    row: dict[str, float] = {
        "staleness/mean": sum(versions * number for versions, number in counts.items()) / total,
        "staleness/max": values[-1],
    }
    for percent in (50, 95):
        below = 0
        for versions in values:
            below += counts[versions]
            if 100 * below >= percent * total:
                row[f"staleness/p{percent}"] = versions
                break
    return row


def bucket(versions: int) -> int:
    """Of the histogram, whose buckets begin at 0, 1, 2, 4, 8 ... versions."""
    return versions.bit_length()


def gini(amounts: Sequence[float]) -> float:
    """Gini coefficient sum_i sum_j |x_i - x_j| / (2 n sum_i x_i): 0 if all are equal, 1 - 1/n if one has everything."""
    total = sum(amounts)
    differences = sum(abs(first - second) for first in amounts for second in amounts)
    return differences / (2 * len(amounts) * total) if total else 0.0
