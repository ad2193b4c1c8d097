"""A worker that blocks in its own work still answers; it is found by its standing still, named, and replaced."""

from __future__ import annotations

import json
import shutil

import pytest
from own.on_ray import SPEC, Notes
from own.oracle import OWN

import distml
from distml.errors import RunError

pytestmark = pytest.mark.usefixtures("shared_ray")

ASYNC = {"name": "parameter_server", "mode": "async"}


@pytest.fixture(autouse=True)
def _impatient(monkeypatch):
    monkeypatch.setattr("distml.runtime.actors.PATIENCE_S", 4.0)
    monkeypatch.setattr("distml.runtime.actors.PATIENCE_FACTOR", 0.1)


def job(directory, times: int, strategy="all_reduce", **limits):
    """A job whose environments block at their 30th step, which is in the stream."""
    shutil.copy(OWN / "blocking.py", directory)
    environment = {"id": "blocking:Blocking", "args": {"directory": str(directory), "at": 30, "times": times}}
    spec = {
        **{key: SPEC[key] for key in ("distml", "log", "resources")}, "name": "blocked", "strategy": strategy,
        "task": {"name": "actor_critic", "environment": environment, "envs_per_worker": 2, "n_steps": 4,
                 "evaluation": {"episodes": 2, "modes": ["greedy"]}},
        "stop": {"steps": 20}, "evaluate": {"every": 1000}, "limits": {**SPEC["limits"], **limits},
    }  # fmt: skip
    (directory / "job.yaml").write_text(json.dumps(spec))
    return directory / "job.yaml"


@pytest.mark.parametrize("strategy", ["all_reduce", pytest.param(ASYNC, marks=pytest.mark.slow)], ids=["sync", "async"])
def test_one_that_blocks_once_is_replaced_and_the_run_goes_on(strategy, tmp_path):
    notes = Notes()
    result = distml.run(job(tmp_path, 1, strategy), out=tmp_path / "run", runtime="ray", display=notes)
    assert (result.status, result.step) == ("done", 20)
    lost = [line for line in notes.lines if "was lost" in line]
    assert len(lost) == 1
    assert "it has not moved in stream for" in lost[0]
    assert (tmp_path / "blocked-0").exists()


@pytest.mark.slow
def test_one_that_blocks_again_and_again_ends_the_run(tmp_path):
    with pytest.raises(RunError, match=r"rank \d.* it has not moved in stream for \d+ s .*max_restarts: 1") as caught:
        distml.run(job(tmp_path, 99, max_restarts=1), out=tmp_path / "run", runtime="ray")
    assert caught.value.exit_code == 3
