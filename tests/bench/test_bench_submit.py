"""`distml bench submit`: what it reads off run directories, and its tables; the measurements themselves are slow."""

from __future__ import annotations

import subprocess
import sys

import pytest

from distml.bench import bench_command, submit, submit_faults, submit_start
from distml.bench.network import missing
from distml.bench.submit_watch import Watched
from distml.bench.table import summary
from distml.errors import RunError, UsageError


def rows(directory, *steps):
    with (directory / "metrics.jsonl").open("a") as file:
        file.writelines(f'{{"step": {step}}}\n' for step in steps)


def test_reports_are_seen_once_and_a_torn_one_later(tmp_path):
    watched = Watched(tmp_path)
    watched.look()
    assert watched.seen == []
    rows(tmp_path, 1, 2)
    (tmp_path / "metrics.jsonl").open("a").write('{"st')
    watched.look()
    watched.look()
    assert [step for _, step in watched.seen] == [1, 2]
    (tmp_path / "metrics.jsonl").open("a").write('ep": 3}\n')
    watched.look()
    assert [step for _, step in watched.seen] == [1, 2, 3]


def test_reports_after_a_file_was_cut_back_are_seen(tmp_path):
    watched = Watched(tmp_path)
    rows(tmp_path, 10, 20, 30)
    watched.look()
    (tmp_path / "metrics.jsonl").write_text('{"step": 10}\n')
    watched.look()
    rows(tmp_path, 20)
    watched.look()
    assert [step for _, step in watched.seen] == [10, 20, 30, 20]


def test_the_longest_gap_counts_from_a_moment_on(tmp_path):
    watched = Watched(tmp_path)
    watched.seen = [(0.0, 1), (50.0, 2), (51.0, 3), (71.5, 4), (72.0, 5)]
    assert watched.longest_gap(51.0) == 20.5
    assert watched.longest_gap(80.0) == float("inf")  # never again


def test_waiting_ends_with_the_process(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", "raise SystemExit(3)"])
    with pytest.raises(RunError, match=r"no report in .*: exit code 3"):
        Watched(tmp_path).first(process)


def test_tables_say_whether_targets_are_met():
    seconds = {"run": summary([4.0]), "submit": summary([13.5]), "status": summary([1.0]), "logs": summary([2.5])}
    start = {"seconds": seconds, "repeats": 1, "targets": submit_start.targets(seconds)}
    assert [one["met"] for one in start["targets"]] == [True, False]
    lost = {"noticed": summary([31.0]), "again": summary([16.0]), "cut": summary([22.0])}
    faults = {"seconds": lost, "restarts": [1], "repeats": 1, "targets": submit_faults.targets(lost, [1])}
    assert [one["met"] for one in faults["targets"]] == [False, True, False]
    about = {"cpus": 2, "load_before": 0.1, "torch": "2", "ray": "2"}
    parts = {"start": start, "faults": faults}
    made = submit.tables({"bench": "submit", "parts": parts, "conditions": about, "errors": {}})
    assert [len(header) for _, header, _, _ in made] == [4, 4]
    assert "missed" in "".join(made[1][3])


def test_wrong_parts_are_refused():
    with pytest.raises(UsageError, match="--part gpu is not known; choose from start, faults, placement"):
        bench_command("submit", json=False, part=["gpu"])


@pytest.mark.slow
@pytest.mark.skipif(missing() is not None, reason=str(missing()))
def test_the_start_is_measured_for_real(capsys):
    assert bench_command("submit", json=False, part=["start"], repeats=1) == 0
    assert "distml submit, first update" in capsys.readouterr().out
