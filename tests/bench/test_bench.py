"""The measurements' mechanics; how long anything takes is not looked at."""

from __future__ import annotations

import json

import pytest

import distml
from distml.bench import BENCHES, bench_command, loop, start
from distml.bench.table import summary, verdict
from distml.cli import main
from distml.errors import RunError


def test_loop_trains_the_same_on_both_sides():
    report = loop.measure(repeats=1, steps=100)
    losses = report["last_train_loss"]
    assert losses["ours"] == pytest.approx(losses["plain"], rel=1e-3)
    assert losses["ours"] < 1.5
    assert all(report["ms_per_step"][name]["min"] > 0 for name in ("ours", "plain"))
    difference = report["ms_per_step"]["ours"]["all"][0] - report["ms_per_step"]["plain"]["all"][0]
    assert report["overhead_ms"]["median"] == difference


def test_the_stopwatch_counts_from_the_first_report():
    watch = loop.Stopwatch()
    for step in (10, 20, 40):
        watch.report(step)
    assert watch.first[0] == 10
    assert watch.latest[0] == 40
    wall, _ = watch.ms_per_step()
    assert wall == pytest.approx((watch.latest[1] - watch.first[1]) / 30 * 1e3)


def test_table_and_json(monkeypatch, capsys):
    measure = loop.measure
    monkeypatch.setattr(loop, "measure", lambda: measure(repeats=2, steps=20))
    assert main(["bench", "loop"]) == 0
    out = capsys.readouterr().out
    assert "plain PyTorch" in out
    assert "target at most 0.5" in out
    assert bench_command("loop", json=True) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["conditions"]["repeats"] == 2
    assert len(report["overhead_ms"]["all"]) == 2


def test_an_unknown_measurement_is_refused_with_the_known_ones(capsys):
    assert main(["bench", "everything"]) == 2
    assert f"known: {', '.join(BENCHES)}" in capsys.readouterr().err


def test_summary_and_verdict():
    assert summary([3.0, 1.0, 2.0]) == {"median": 2.0, "min": 1.0, "max": 3.0, "all": [3.0, 1.0, 2.0]}
    assert verdict(0.5, 0.5) == "0.50 (target at most 0.5: met)"
    assert verdict(0.61, 0.5).endswith("missed)")


def test_start_reports_ratios_within_one_invocation(monkeypatch):
    monkeypatch.setattr(start, "local_ray", nothing)
    monkeypatch.setattr(start, "start_ours", lambda name, address, folder: ({"first_update": 2.0}, []))
    monkeypatch.setattr(start, "start_peer", lambda address, folder: {"entered": 8.0, "returned": 10.0})
    report = start.measure(repeats=2)
    assert report["ratio_to_entered"] == {"all_reduce": 0.25, "parameter_server": 0.25}
    assert report["ratio_to_returned"] == {"all_reduce": 0.2, "parameter_server": 0.2}
    assert report["driver_imported_torch"] is False
    _, header, body, closing = start.rows(report)
    assert all(len(row) == len(header) for row in body)
    assert "did not import torch" in " ".join(closing)


def nothing():
    """A context that gives an address."""
    from contextlib import nullcontext

    return nullcontext("127.0.0.1:1")


def test_the_driver_says_when_the_first_update_was(tmp_path, monkeypatch):
    trace = tmp_path / "trace.json"
    monkeypatch.setenv("DISTML_TRACE_START", str(trace))
    distml.run({**loop.SPEC, "stop": {"steps": 3}}, out=tmp_path / "run")
    first = json.loads(trace.read_text())
    assert first["imported"] == ["torch"]  # the control: inline runs train in the driver's process
    assert trace.stat().st_mtime == pytest.approx(first["time"], abs=60)


def test_a_contender_that_fails_is_named_with_its_last_line():
    with pytest.raises(RunError, match="ended with 3: it broke"):
        start.spawn(["-c", "import sys; print('it broke', file=sys.stderr); sys.exit(3)"], {})
