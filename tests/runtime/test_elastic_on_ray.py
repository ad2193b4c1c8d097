"""Groups of workers that shrink with a node that is lost and grow with one that comes.

Real nodes of a cluster on this machine go and come while a run reports to the test. The oracle of the weights is a run
in one process that nobody disturbed: the batch is of the whole group, and its data order depends on the seed alone.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from own.on_ray import SPEC, weights

import distml

TESTS = Path(__file__).resolve().parents[1]
STEPS = 120
WHY = "(its node was lost|the connection to it broke: .*)"  # whatever is heard first
REFUSAL = "no such file on this node: train.bin"
SUMMATION = 1e-4  # float32, other orders of sums


def spec(name: str, **keys: Any) -> dict[str, Any]:
    workers = {"workers": {"min": 2, "max": 3}}
    return {**SPEC, "name": name, "task": "paced:Paced", "stop": {"steps": STEPS}, "evaluate": {"every": 60},
            "checkpoint": {"every": 60}, "resources": workers, **keys}  # fmt: skip


@pytest.fixture(autouse=True)
def _beside_the_task(monkeypatch):
    monkeypatch.chdir(TESTS / "own")


def case(name: str, goes: int | None = 30, comes: bool = True, **keys: Any) -> dict[str, Any]:
    return {"name": name, "spec": spec(name, **keys), "goes": goes, "comes": comes}


def on_cluster(cases: list[dict[str, Any]], out: Path) -> dict[str, dict[str, Any]]:
    """What the cases have come to, by name; all on one cluster with two CPUs on its head and one on another node."""
    command = [sys.executable, "-m", "own.elastic", json.dumps(cases), str(out)]
    path = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(command, capture_output=True, text=True, timeout=80 * len(cases) + 60, check=False,
                          cwd=TESTS / "own", env={**os.environ, "PYTHONPATH": path})  # fmt: skip
    assert "FOUND " in done.stdout, done.stdout[-2000:] + done.stderr[-6000:]
    found: dict[str, dict[str, Any]] = json.JSONDecoder().raw_decode(done.stdout.split("FOUND ")[1])[0]
    return found


def went_on(notes: list[str]) -> list[tuple[int, int, int]]:
    """(step, workers before, workers from there on) of each change of the size."""
    found = [re.search(r"all go on from step (\d+) with (\d+) workers? in place of (\d+)", line) for line in notes]
    return [(int(one[1]), int(one[3]), int(one[2])) for one in found if one is not None]


def apart(one: Path, other: Path) -> float:
    """The largest difference between the two runs' last weights."""
    first, second = weights(one, STEPS), weights(other, STEPS)
    assert first.keys() == second.keys()
    return max(float(np.abs(first[name] - second[name]).max()) for name in first)


@pytest.fixture(scope="module")
def changed(tmp_path_factory) -> tuple[Path, dict[str, Any]]:
    """An all_reduce run that has lost a node and got another: its directory, and what it has come to."""
    out = tmp_path_factory.mktemp("elastic")
    return out / "all_reduce", on_cluster([case("all_reduce")], out)["all_reduce"]


def test_a_lost_node_shrinks_the_group_and_a_new_one_lets_it_grow(changed):
    out, found = changed
    assert found["ended"] == "done"
    (lost_at, *lost), (grown_at, *grown) = went_on(found["notes"])
    assert (lost, grown) == ([3, 2], [2, 3])
    assert 20 <= lost_at <= grown_at < STEPS
    line = next(line for line in found["notes"] if "was lost" in line)
    assert re.match(rf"rank 2 was lost at step \d+ \({WHY}\): all go on from step", line)
    assert "(restart 1 of 3)" in line
    sizes = dict(found["sizes"])
    assert (sizes[10], sizes[STEPS]) == (3, 3)
    assert {size for step, size in found["sizes"] if lost_at < step <= grown_at} <= {2}
    assert [step for step, _ in found["sizes"]] == sorted(step for step, _ in found["sizes"])
    metrics = json.loads((out / "result.json").read_text())["metrics"]
    assert (metrics["runtime/restarts"], metrics["runtime/workers"]) == (1, 3)  # growth is no restart
    assert metrics["train/examples"] == STEPS * 64  # of `batch_size`, whoever was there
    assert json.loads((out / "environment.json").read_text())["workers"] == {"min": 2, "max": 3, "start": 3}


def test_the_weights_are_those_of_a_run_whose_size_never_changed(changed, tmp_path):
    """And with another data order they are others: the bound is one that can fail."""
    out, _ = changed
    distml.run(spec("twin"), out=tmp_path / "twin", runtime="inline")
    assert apart(out, tmp_path / "twin") <= SUMMATION
    distml.run(spec("other", seed=1), out=tmp_path / "other", runtime="inline")
    assert apart(out, tmp_path / "other") > 10 * SUMMATION


def test_they_are_bitwise_those_of_fixed_groups_of_the_same_sizes_one_after_the_other(changed, tmp_path):
    out, found = changed
    changes = went_on(found["notes"])
    for steps, workers in [(step, before) for step, before, _ in changes] + [(STEPS, changes[-1][2])]:
        piece = spec("chain", stop={"steps": steps}, resources={"workers": workers})
        distml.run(piece, out=tmp_path / "chain", runtime="inline")
    assert apart(out, tmp_path / "chain") == 0.0


@pytest.fixture(scope="module")
def more(tmp_path_factory) -> tuple[Path, dict[str, dict[str, Any]]]:
    """Other strategies, and a group that is too small without its lost node."""
    out = tmp_path_factory.mktemp("more")
    limits = {**SPEC["limits"], "start_s": 40.0}
    fixed = {"resources": {"workers": {"min": 3, "max": 3}}, "limits": limits}
    cases = [
        case("async", strategy={"name": "parameter_server", "mode": "async"}),
        case("local", strategy={"name": "local_sgd", "inner_steps": 4}),
        case(
            "zero",
            strategy={"name": "zero", "stage": 1},
            checkpoint={"every": 20},
            limits={**SPEC["limits"], "start_s": 120.0},
        ),
        case("below", comes=False, **fixed),
    ]
    return out, on_cluster(cases, out)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["async", "local", "zero"])
def test_other_strategies_follow(more, tmp_path, name):
    out, found = more
    assert found[name]["ended"] == "done"
    changes = [tuple(sizes) for _, *sizes in went_on(found[name]["notes"])]
    assert changes[-2:] == [(3, 2), (2, 3)]  # the run before may hold its places for a moment: it may begin with two
    if name == "zero":
        distml.run(spec("twin"), out=tmp_path / "twin", runtime="inline")
        assert apart(out / name, tmp_path / "twin") <= SUMMATION


@pytest.mark.slow
def test_below_the_fewest_the_run_waits_says_so_and_fails_with_the_cause(more):
    found = more[1]["below"]
    assert any(line.startswith("waiting for room: 2 of at least 3 workers have a place") for line in found["notes"])
    why = rf"rank 2, \w+, step \d+: {WHY}; not recovered: after 40 s there is room for 2 of at least 3 workers"
    assert re.match(why, found["ended"])


@pytest.fixture(scope="module")
def joined(tmp_path_factory) -> tuple[Path, dict[str, dict[str, Any]]]:
    out = tmp_path_factory.mktemp("joined")
    cases = [
        {**case("refused", goes=None, comes=False), "nodes": [], "joins": [30, {"REFUSES": REFUSAL}]},
    ]
    return out, on_cluster(cases, out)


@pytest.mark.slow
def test_a_new_node_where_the_task_cannot_be_built_ends_no_healthy_run(joined, tmp_path):
    """It is said once, and that node is not asked again."""
    out, found = joined
    assert found["refused"]["ended"] == "done"
    said = [line for line in found["refused"]["notes"] if "no more than 2 workers" in line]
    assert len(said) == 1
    assert REFUSAL in said[0]
    assert {size for _, size in found["refused"]["sizes"]} == {2}
    distml.run(spec("twin"), out=tmp_path / "twin", runtime="inline")
    assert apart(out / "refused", tmp_path / "twin") <= SUMMATION


@pytest.mark.slow
def test_places_that_ray_has_moved_are_other_hosts_for_a_fixed_group(tmp_path):
    """Two of a host go on two: shared memory, which they had, is now each one's own; and the record says so."""
    limits = {**SPEC["limits"], "start_s": 90.0}
    fixed = case("moved", comes=False, resources={"workers": 4, "placement": "pack"}, limits=limits)
    found = on_cluster([{**fixed, "nodes": [2], "come": [1, 1]}], tmp_path)["moved"]
    assert found["ended"] == "done", found
    environment = json.loads((tmp_path / "moved" / "environment.json").read_text())
    assert "4 workers on 3 hosts" in environment["transport"]
