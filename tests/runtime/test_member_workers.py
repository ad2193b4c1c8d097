"""Members with workers of their own on Ray: they fill its CPUs, so that no other host's slots may hold any."""

from __future__ import annotations

import pytest
from own.members import same_tree
from own.oracle import OWN
from test_member_hosts import ASYNC, answers, exploited, job_of

from distml.population.host import Advanced
from distml.runtime.ray_members import RayHost
from distml.tasks.sources import SourceTree


@pytest.mark.slow
@pytest.mark.parametrize("changes", [
    {"strategy": ASYNC}, {"strategy": ASYNC, "transport": "object_store"}, {"strategy": "all_reduce"},
    {"strategy": {"name": "local_sgd", "inner_steps": 5}},
], ids=str)  # fmt: skip
def test_members_with_workers_of_their_own(shared_ray, tmp_path, changes):
    job = job_of(workers=2, **changes)
    (tmp_path / "logs").mkdir()
    kill = {"b": ("kill:rank=1,step=22",)}
    one = RayHost(job, SourceTree.collect(job.task, OWN), tmp_path / "members", 2, injections=kill)
    try:
        found, end = exploited(one, job)
        assert same_tree(found[2].shared["weights"], found[0].shared["weights"])
        assert found[2].shared["clock"]["version"] == 10
        assert (end("a").step, end("b").step) == (20, 20)
        for name in "ab":
            one.advance(name, 40, True)
        last = answers(one, 2)
        assert isinstance(last["a"], Advanced)
        assert (last["b"].kind, last["b"].step) == ("died", 20)
        assert last["b"].cause.startswith("rank 1: the process was killed by a signal")
    finally:
        one.close()
