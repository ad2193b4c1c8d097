"""An architecture search on Ray: the same children as in one process, also the one that was killed and tried again."""

from __future__ import annotations

import json

from own.searches import journal, search

import distml

SPEC = search(controller="random", trials=4)


def ends(out):
    """What each child came to."""
    finished = [row for row in journal(out) if row["event"] == "finished"]
    return {row["trial"]: (row["values"], row["metrics"], row["reward"]) for row in finished}


def test_children_on_ray_are_those_of_one_process_also_a_killed_one(shared_ray, tmp_path):
    alone = distml.run(SPEC, out=tmp_path / "inline", runtime="inline")
    result = distml.run({**SPEC, "max_concurrent": 2}, out=tmp_path / "ray", runtime="ray", address=shared_ray,
                        inject=["kill:member=1,step=3"])  # fmt: skip
    rows = journal(tmp_path / "ray")
    assert [row["event"] for row in rows if row["trial"] == "0001"] == ["proposed", "retried", "finished"]
    assert [row["trial"] for row in rows if row["event"] == "retried"] == ["0001"]
    assert (result.status, result.step) == ("done", 4)
    assert ends(tmp_path / "ray") == ends(tmp_path / "inline")
    assert result.metrics["test/loss"] == alone.metrics["test/loss"]
    assert json.loads((tmp_path / "ray/trials/0001/result.json").read_text())["status"] == "done"
