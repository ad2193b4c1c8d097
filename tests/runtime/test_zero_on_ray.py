"""`strategy: zero` on Ray comes to what all_reduce comes to inline, for what learns from text and for what acts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from own.oracle import OWN, spec_of

import distml
from distml.errors import RunError, UsageError

pytestmark = pytest.mark.usefixtures("shared_ray")
ALL_REDUCE = {"name": "all_reduce"}
TEXT = spec_of(
    {"name": "language_model", "data": {"path": "rhymes.txt", "validation": 0.2, "test": 0.2}, "block": 8,
     "model": {"name": "gpt", "layers": 2, "heads": 2, "width": 8, "dropout": 0.2}},
    workers=2, steps=12, batch_size=8, micro_batch_size=2, evaluate={"every": 6}, log={"every": 1, "to": []},
    optimizer={"name": "adamw", "lr": 0.02, "clip_norm": 1.0},
)  # fmt: skip
ACTING = spec_of(
    {"name": "actor_critic", "environment": "CartPole-v1", "envs_per_worker": 2, "n_steps": 8,
     "evaluation": {"episodes": 3, "max_frames": 50}},
    workers=2, steps=12, log={"every": 1, "to": []}, optimizer={"name": "adamw", "lr": 0.01},
)  # fmt: skip
del ACTING["batch_size"], ACTING["checkpoint"]


@pytest.fixture(autouse=True)
def _in_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(OWN)


def rows(out: Path, spec: dict[str, Any], strategy: dict[str, Any], runtime: str) -> dict[str, list[float]]:
    """The run's metrics by name."""
    result = distml.run(spec | {"strategy": strategy}, out=out, runtime=runtime)
    assert (result.status, result.step) == ("done", 12)
    found: dict[str, list[float]] = {}
    for line in (out / "metrics.jsonl").read_text().splitlines():
        for name, value in json.loads(line).items():
            found.setdefault(name, []).append(value)
    return found


@pytest.mark.parametrize(("spec", "stage"), [
    (TEXT, 3),
    pytest.param(ACTING, 1, marks=pytest.mark.slow),
    pytest.param(ACTING, 2, marks=pytest.mark.slow),
])  # fmt: skip
def test_a_run_is_that_of_all_reduce(tmp_path, capfd, spec, stage):
    expected = rows(tmp_path / "inline", spec, ALL_REDUCE, "inline")
    capfd.readouterr()
    found = rows(tmp_path / "ray", spec, {"name": "zero", "stage": stage}, "ray")
    assert "DeepSpeed" not in "".join(capfd.readouterr())
    for name in ("train/loss", "train/grad_norm", "train/lr", "train/examples"):
        assert np.allclose(found[name], expected[name], rtol=1e-4), name
    evaluated = [name for name in expected if name.startswith("eval/")]
    assert evaluated
    assert all(np.allclose(found[name], expected[name], rtol=1e-4) for name in evaluated)
    assert min(found["comm/bytes_per_step"]) > 0
    log = (tmp_path / "ray" / "logs" / "worker-0.log").read_text()
    assert "Traceback" not in log


@pytest.mark.slow
def test_an_evaluation_of_unequal_forwards_ends_the_run_and_is_not_restarted(tmp_path):
    spec = spec_of("walking:Walking", strategy={"name": "zero", "stage": 3}, workers=2, steps=8, evaluate={"every": 4})
    with pytest.raises(RunError, match="rank 1 makes 2 forwards or more in evaluate, rank 0 1") as caught:
        distml.run(spec, out=tmp_path / "run", runtime="ray")
    assert (caught.value.phase, caught.value.step) == ("evaluate", 4)
    assert "runtime/restarts" not in json.loads((tmp_path / "run" / "result.json").read_text())["metrics"]


def test_several_workers_are_several_processes(tmp_path):
    with pytest.raises(UsageError, match=r"zero/2 with 2 workers needs as many processes, .* use --runtime ray"):
        distml.run(TEXT | {"strategy": {"name": "zero"}}, out=tmp_path, runtime="inline")
