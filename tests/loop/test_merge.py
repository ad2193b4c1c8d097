"""Reports of several ranks become rows: of one version each where all report the same, else as they come."""

from __future__ import annotations

import pytest

from distml.events import Report
from distml.runtime.merge import ReportMerger, gini, staleness_summary


def report(rank: int, version: int, total: float = 1.0) -> Report:
    values = {"lr": 0.1, "steps": 10.0, "examples": 60.0, "compute_s": 0.1, "exchange_s": 0.1, "bytes": 8.0,
              "staleness_total": 0.0, "staleness_max": 0.0, "memory_bytes": 1.0}  # fmt: skip
    return Report(rank, version, version * 12, 0.5, version * 0.1, {"loss": (total, 1.0)}, values)


def test_a_synchronous_row_waits_for_every_rank_however_late():
    merger = ReportMerger(3, is_synchronous=True)
    for version in range(10, 110, 10):  # rank 2's reports do not get through for ten rows
        assert merger.add(report(0, version)) == []
        assert merger.add(report(1, version, 2.0)) == []
    rows = [row for version in range(10, 110, 10) for row in merger.add(report(2, version, 6.0))]
    assert [row["step"] for row in rows] == list(range(10, 110, 10))
    assert [row["train/loss"] for row in rows] == [3.0] * 10
    assert rows[-1]["comm/bytes"] == 10 * 3 * 8.0
    assert merger.flush() == []


def test_what_still_waits_at_the_end_is_one_row_per_version():
    merger = ReportMerger(2, is_synchronous=True)
    for version in (10, 20):
        assert merger.add(report(0, version)) == []
    (row,) = merger.add(report(1, 10, 3.0))
    assert (row["step"], row["train/loss"]) == (10, 2.0)
    (rest,) = merger.flush()
    assert (rest["step"], rest["train/loss"]) == (20, 1.0)
    assert merger.flush() == []


def test_after_a_recovery_versions_are_collected_anew():
    merger = ReportMerger(2, is_synchronous=True)
    merger.add(report(0, 20, 9.0))
    merger.restore(10, [])
    assert merger.add(report(1, 20)) == []
    (row,) = merger.add(report(0, 20))
    assert row["train/loss"] == 1.0


def test_an_asynchronous_rank_that_is_far_behind_does_not_hold_the_others_up():
    merger = ReportMerger(2, is_synchronous=False)
    rows = [row for version in range(10, 60, 10) for row in merger.add(report(0, version))]
    assert [row["step"] for row in rows] == [10, 20]
    (row,) = merger.add(report(1, 35, 3.0))
    assert row["train/loss"] == pytest.approx(2.0)


def playing(version: int, frames: int) -> Report:
    found = report(0, version)
    found.frames = frames
    return found


def test_frames_per_second_is_over_the_time_since_there_were_new_ones():
    """PPO: four updates learn from one rollout's frames, and a row comes every two updates."""
    merger = ReportMerger(1, is_synchronous=True)
    name = "throughput/frames_per_s"
    rows = [merger.add(playing(version, frames))[0] for version, frames in ((2, 64), (4, 64), (6, 128), (8, 128))]
    assert [row["rl/frames"] for row in rows] == [64, 64, 128, 128]
    assert [row.get(name) for row in rows] == [pytest.approx(64 / 0.2), None, pytest.approx(64 / 0.4), None]
    merger.restore(8, rows)
    (row,) = merger.add(playing(10, 192))
    assert row[name] == pytest.approx(64 / 0.4)  # since version 6


def lagging(rank: int, version: int, contributed: float, **staleness: int) -> Report:
    found = report(rank, version)
    found.values["contributed"] = contributed
    found.staleness = {name[1:]: number for name, number in staleness.items()}
    return found


def test_staleness_and_contributions_of_a_row_by_hand():
    merger = ReportMerger(2, is_synchronous=False)
    merger.add(lagging(0, 10, 30.0, v0=6, v1=1))
    (row,) = merger.add(lagging(1, 12, 10.0, v3=2, v9=1))
    found = {name: value for name, value in row.items() if name.startswith(("staleness/", "workers/"))}
    assert found == {
        "staleness/mean": (1 + 6 + 9) / 10, "staleness/max": 9, "staleness/p50": 0, "staleness/p95": 9,
        "staleness/count_0": 6, "staleness/count_1": 1, "staleness/count_2": 2, "staleness/count_4": 0,
        "staleness/count_8": 1, "workers/gini": 20 / (2 * 40) * 2 / 2,
    }  # fmt: skip
    merger.add(lagging(0, 20, 60.0, v0=1))
    (row,) = merger.add(lagging(1, 21, 20.0, v1=1))
    assert (row["staleness/count_8"], row["staleness/max"]) == (0, 1)  # or the last value would stay in the result
    merger.restore(0, [])
    assert merger.contributed == {}


def test_percentiles_are_the_smallest_values_that_so_many_do_not_exceed():
    assert staleness_summary({4: 1}) == {
        "staleness/mean": 4,
        "staleness/max": 4,
        "staleness/p50": 4,
        "staleness/p95": 4,
    }
    counts = {0: 50, 1: 45, 7: 5}
    assert (staleness_summary(counts)["staleness/p50"], staleness_summary(counts)["staleness/p95"]) == (0, 1)


@pytest.mark.parametrize(
    ("amounts", "expected"),
    [([5.0, 5.0, 5.0], 0.0), ([1.0, 1.0, 2.0], 1 / 6), ([0.0, 0.0, 0.0, 8.0], 3 / 4), ([0.0, 0.0], 0.0), ([3.0], 0.0)],
)
def test_gini_by_hand(amounts, expected):
    assert gini(amounts) == pytest.approx(expected)
