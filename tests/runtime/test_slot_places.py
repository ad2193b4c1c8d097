"""Members where others have the room: waited for, never burnt; more of them train as room comes free."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from own.oracle import OWN
from test_member_hosts import job_of

from distml.cli import main
from distml.errors import UsageError
from distml.population.host import Ready
from distml.runtime.placement import PLACED
from distml.runtime.ray_members import RayHost
from distml.spec.schema import JobSpec
from distml.tasks.sources import SourceTree

PATIENCE_S = 120.0


@pytest.fixture
def others(shared_ray: str) -> Iterator[Callable[[int], Any]]:
    """Takes CPUs, and gives them back."""
    from ray.util.placement_group import placement_group, remove_placement_group

    groups = []

    def take(cpus: int) -> Any:
        groups.append(placement_group([{"CPU": 1.0}] * cpus))
        assert groups[-1].wait(PATIENCE_S)
        return groups[-1]

    yield take
    for group in groups:
        remove_placement_group(group)


def host_of(job: JobSpec, folder: Path, lines: list[str], slots: int = 2) -> RayHost:
    return RayHost(job, SourceTree.collect(job.task, OWN), folder / "members", slots, say=lines.append)


def waiting(start_s: float) -> JobSpec:
    job = job_of()
    return job.model_copy(update={"limits": job.limits.model_copy(update={"start_s": start_s})})


def until(host: RayHost, is_so: Callable[[list[Any]], bool]) -> list[Any]:
    found: list[Any] = []
    deadline = time.monotonic() + PATIENCE_S
    while not is_so(found):
        assert time.monotonic() < deadline, f"only {found}"
        found += host.wait(0.2)
    return found


def test_where_nobody_has_a_place_it_is_waited_for_and_then_refused(others, tmp_path):
    from ray.util.placement_group import placement_group_table

    others(4)
    lines: list[str] = []
    with pytest.raises(UsageError, match=r"after 2 s still no place for 1 x 1 CPU .*held by others .4 CPUs") as caught:
        host_of(waiting(2.0), tmp_path, lines)
    assert "raise limits.start_s" in str(caught.value)
    assert lines[0].startswith("waiting for a place for 1 x 1 CPU (pack): room for 0 of them now")
    states = [row["state"] for row in placement_group_table().values() if row["name"]]
    assert not {"PENDING", PLACED} & {*states}  # what was asked for is given back


def test_a_sweep_waits_for_its_first_place_in_the_same_way(others, tmp_path, capsys):
    """Ray Tune alone would wait without a limit or a word."""
    base = {"task": {"name": "classification", "data": "digits", "model": {"name": "mlp", "hidden": [8]}},
            "stop": {"steps": 2}}  # fmt: skip
    spec = {"distml": "v1", "kind": "sweep", "name": "waits", "base": {"distml": "v1", "name": "b", **base},
            "space": {"optimizer.lr": {"uniform": [0.1, 0.2]}}, "objective": {"metric": "eval/loss", "mode": "min"},
            "sampler": "random", "trials": 2, "limits": {"start_s": 2.0}}  # fmt: skip
    (tmp_path / "sweep.yaml").write_text(json.dumps(spec))
    others(4)
    assert main(["run", str(tmp_path / "sweep.yaml"), "--out", str(tmp_path / "out")]) == 2
    assert "after 2 s still no place for 1 x 1 CPU (pack)" in capsys.readouterr().err


@pytest.mark.slow
def test_slots_count_from_when_they_have_a_place_and_a_start_from_when_its_process_is_there(others, tmp_path):
    import ray
    from ray.util.placement_group import remove_placement_group

    first, second, lines = others(2), others(2), []
    threading.Timer(1.5, lambda: remove_placement_group(first)).start()
    host = host_of(job_of(), tmp_path, lines, slots=3)
    try:
        assert lines[0].startswith("waiting for a place")
        assert host.slots == 2
        assert "2 of 3 slots for members have a place, the others wait for theirs: room for 0 of them now" in lines[-1]
        host.start("a", job_of())
        slot = host.all_slots[0]
        ray.get(slot.hello, timeout=PATIENCE_S)
        slot.started -= 2 * job_of().limits.start_s  # what came before its process takes nothing from its own time
        host._hear_hello(slot)
        host._look_at(slot)
        assert slot.member == "a"
        assert [type(answer) for answer in until(host, bool)] == [Ready]
        remove_placement_group(second)
        assert until(host, lambda _: host.slots == 3) == []
        assert lines[-1] == "3 of 3 slots for members have a place"
    finally:
        host.close()
