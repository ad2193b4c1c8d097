"""From recorded times to milliseconds: hand calculations."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from distml.bench import timing
from distml.bench.timing import (
    Plan,
    ProcessTimes,
    Sampler,
    Times,
    descendants,
    independent_ms,
    read_times,
    steady,
    steps_per_s,
    steps_within,
    synchronous_ms,
    window_ms,
)
from distml.errors import RunError

PLAN = Plan(warm_up=2, width=3, windows=2)


def times(*gaps):
    """A worker whose steps took these milliseconds."""
    wall = [0.0]
    for gap in gaps:
        wall.append(wall[-1] + gap / 1e3)
    return Times(wall, wall)


# Two slow steps of warm-up, one window of 10 ms and one of 20 ms per step; the other worker: 12 ms and 14 ms.
FIRST = times(500, 500, 10, 10, 10, 20, 20, 20)
SECOND = times(500, 500, 12, 12, 12, 14, 14, 14)


def test_windows_leave_the_warm_up_out():
    assert window_ms(FIRST.wall, PLAN) == pytest.approx([10, 20])
    assert window_ms(FIRST.wall, Plan(1, 3, 2))[0] == pytest.approx((500 + 10 + 10) / 3)  # the control


def test_a_plan_ends_its_last_window_with_one_more_step():
    assert PLAN.steps == len(FIRST.wall)
    assert len(window_ms(FIRST.wall[:-1], PLAN)) == 1


def test_synchronous_workers_are_as_slow_as_the_slowest_in_each_window():
    assert synchronous_ms([FIRST, SECOND], PLAN) == pytest.approx((12 + 20) / 2)


def test_a_floor_is_the_mean_over_workers():
    assert independent_ms([FIRST, SECOND], PLAN) == pytest.approx((15 + 13) / 2)
    assert independent_ms([FIRST, SECOND], PLAN) <= synchronous_ms([FIRST, SECOND], PLAN)


def test_steps_per_second_of_all_workers():
    quick, slow = times(0, 0, *[10] * 300), times(0, 0, *[30] * 100)
    assert steps_per_s([quick, slow], Plan(2, 20, 5)) == pytest.approx(100 + 100 / 3, rel=0.03)


def test_the_steady_interval_has_all_workers_in_it():
    late = Times([second + 0.01 for second in FIRST.wall], FIRST.processor)
    start, stop = steady([FIRST, late], PLAN)
    assert (start, stop) == pytest.approx((1.01, 1.09))
    assert steps_within([FIRST, late], start, stop) == 5 + 6


def test_too_few_steps_are_an_error_that_names_the_rank(tmp_path):
    line = "1.0 0.5\n"
    (tmp_path / "times-0").write_text(line * 6)
    (tmp_path / "times-1").write_text(line * 5)
    with pytest.raises(RunError, match="rank 1, bench: it recorded 5 steps, 6 are needed"):
        read_times(tmp_path, 2, PLAN)
    assert len(read_times(tmp_path, 1, PLAN)[0].wall) == 6


def test_totals_are_interpolated_between_readings():
    sampler = Sampler(dict)
    sampler.at, sampler.readings = [0.0, 1.0, 2.0], [{"x": 0.0}, {"x": 10.0}, {"x": 30.0}]
    assert sampler.grown("x", 0.5, 1.5) == pytest.approx(15.0)
    assert sampler.grown("x", -5.0, 9.0) == pytest.approx(30.0)


def test_processor_seconds_of_children_stay_counted_after_their_end():
    burn = "import time\nwhile time.process_time() < 0.3: pass\nprint(flush=True)\ninput()"
    used = ProcessTimes()
    before = used()["processor_s"]
    child = subprocess.Popen([sys.executable, "-c", burn], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    child.stdout.readline()
    during = used()["processor_s"]
    child.communicate(b"\n")
    assert during - before >= 0.25
    assert used()["processor_s"] >= during


def test_what_nobody_of_ours_used_is_others(monkeypatch):
    assert timing.busy_s() > 0
    monkeypatch.setattr(timing, "busy_s", lambda: 1000.0)
    monkeypatch.setattr(timing.os, "times", lambda: (3.0, 4.0, 0.0, 0.0, 0.0))
    found = ProcessTimes()()
    assert found["processor_s"] + found["others_s"] == pytest.approx(1000.0 - 7.0)


def test_descendants_are_children_of_children():
    assert sorted(descendants(1, {2: 1, 3: 2, 4: 9, 1: 0})) == [2, 3]


def test_a_sampler_reads_until_it_is_left():
    count = iter(range(10**6))
    with Sampler(lambda: {"n": float(next(count))}, every_s=0.001) as sampler:
        while len(sampler.at) < 5:
            time.sleep(0.001)
    assert not sampler.thread.is_alive()
    assert sampler.grown("n", sampler.at[0], sampler.at[-1]) == len(sampler.at) - 1
