"""Populations on a real Ray: the same as in one process, and what survives deaths."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from own.populations import OWN, lineage, per_member, toy

from distml.launch.run import Result, run
from distml.runs.checkpoints import CheckpointStore

FOUR = {"members": 4, "every": 5, "base__stop__steps": 20, "exploit": {"name": "truncation", "fraction": 0.34},
        "base__optimizer": {"name": "adam", "lr": 0.02}}  # fmt: skip


def go(spec: dict[str, Any], out: Path, monkeypatch: pytest.MonkeyPatch, **more: Any) -> Result:
    monkeypatch.chdir(OWN)
    return run(spec, out=out, **more)


def model(out: Path, name: str) -> Any:
    checkpoint = CheckpointStore(out / f"members/{name}/checkpoints", 1).newest_good(print)
    assert checkpoint is not None
    return checkpoint.model()["theta"]


def test_synchronous_on_ray_is_bitwise_what_it_is_inline(
    shared_ray: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go(toy(**FOUR), tmp_path / "inline", monkeypatch, runtime="inline")
    go(toy(**FOUR, max_concurrent=2), tmp_path / "ray", monkeypatch, address=shared_ray)
    inline, on_ray = (per_member(lineage(tmp_path / name)) for name in ("inline", "ray"))
    assert inline == on_ray
    assert any(event["event"] == "copy" for events in on_ray.values() for event in events)
    for name in inline:
        np.testing.assert_array_equal(model(tmp_path / "inline", name), model(tmp_path / "ray", name))


def test_a_killed_member_is_replaced(shared_ray: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = toy(**FOUR, max_concurrent=2, synchronous=False)
    result = go(spec, tmp_path / "run", monkeypatch, address=shared_ray, inject=["kill:member=2,step=7"])
    assert result.status == "done"
    events = per_member(lineage(tmp_path / "run"))
    (event,) = [event for event in events["02"] if event["event"] == "replace"]
    assert "killed by a signal" in event["cause"]
    assert event["equal"]
    for name, history in events.items():
        assert (history[-1]["event"], history[-1]["step"]) == ("finish", 20)
        rows = [json.loads(line)["step"] for line in (tmp_path / f"run/members/{name}/metrics.jsonl").open()]
        assert rows == sorted(rows)


@pytest.mark.slow
@pytest.mark.parametrize("left", [0.3, 0.7])
def test_a_killed_driver_leaves_no_process_and_the_next_run_goes_on(
    left: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its private Ray ends with it; the end is bitwise that of a run that nobody disturbed."""
    monkeypatch.chdir(OWN)
    spec = toy(**FOUR | {"base__stop__steps": 200})
    for file in ("surrogate.py",):
        (tmp_path / file).write_text((OWN / file).read_text())
    (tmp_path / "spec.yaml").write_text(json.dumps(spec))
    out = tmp_path / "run"
    command = [sys.executable, "-m", "distml", "run", str(tmp_path / "spec.yaml"), "--out", str(out)]
    driver = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    ends = time.monotonic() + 120.0
    while not (out / "population.json").exists() or steps_of(out) < left * 200:
        assert time.monotonic() < ends
        assert driver.poll() is None
        time.sleep(0.01)
    driver.kill()
    driver.wait()
    on_the_way = steps_of(out)
    assert on_the_way < 200
    found = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert found.returncode == 0, found.stdout + found.stderr
    assert "ended without finishing" in found.stdout
    assert "resuming at" in found.stdout
    go(spec, tmp_path / "inline", monkeypatch, runtime="inline")
    assert per_member(lineage(out)) == per_member(lineage(tmp_path / "inline"))
    for name in ("00", "01", "02", "03"):
        np.testing.assert_array_equal(model(tmp_path / "inline", name), model(out, name))


def steps_of(out: Path) -> int:
    """How far the members are that a resume would go on from."""
    members = json.loads((out / "population.json").read_text())["members"]
    return min(member["step"] for member in members.values())
