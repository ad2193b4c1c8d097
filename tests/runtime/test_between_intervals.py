"""A member with workers of its own stands still between two intervals, and nobody listens to them: who died is said."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from own.members import changed, small_job
from own.oracle import OWN

from distml.population.member import Member, MemberError
from distml.runtime.ray import RayRuntime
from distml.tasks.sources import SourceTree

LIMITS = {"heartbeat_s": 0.3, "lost_after_s": 10.0, "start_s": 120.0}
ASYNC = {"name": "parameter_server", "mode": "async"}
THEN: dict[str, Callable[[Member], object]] = {
    "advance": lambda member: member.advance(20),
    "copy": lambda member: member.copy(member.state(), changed(member.job, batch_size=6), ["batch_size"]),
}
GROUP = {"strategy": "all_reduce", "transport": "process_group"}


def standing(tmp_path: Path, **changes: Any) -> tuple[Member, int]:
    """A member with two workers after its first interval, and rank 1's process."""
    job = small_job(workers=2, limits=LIMITS, **changes)
    made: list[RayRuntime] = []

    def make(job: Any) -> RayRuntime:
        made.append(RayRuntime(job, SourceTree.collect(job.task, OWN), None, tmp_path, recovers=False))
        return made[0]

    member = Member(job, SourceTree.collect(job.task, OWN), tmp_path, make_group=make)
    member.build()
    assert member.advance(10, keep=True).step == 10
    return member, made[0].places["rank 1"][1]


@pytest.mark.parametrize("then", ["advance", pytest.param("copy", marks=pytest.mark.slow)])
@pytest.mark.parametrize("changes", [
    GROUP, pytest.param({"strategy": ASYNC}, marks=pytest.mark.slow),
    pytest.param({"strategy": ASYNC, "transport": "object_store"}, marks=pytest.mark.slow),
], ids=str)  # fmt: skip
def test_a_worker_that_died_meanwhile_is_named(shared_ray, tmp_path, changes, then):
    """Rank 0 would wait for it, for much longer than this test is given: who died must not wait for its turn."""
    member, pid = standing(tmp_path, **changes)
    try:
        assert member.activity == ("train", 0.0)  # nobody listens, and nothing is the matter
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(MemberError) as found:
            THEN[then](member)
    finally:
        member.close()
    assert (found.value.kind, found.value.step) == ("died", 10)
    assert found.value.cause.startswith("rank 1: the process was killed by a signal")
