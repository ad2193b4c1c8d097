"""A cut's form on disk: strict JSON and arrays, whatever the numbers are."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from own.oracle import OWN, saved, spec_of

import distml
from distml.runs.checkpoints import CheckpointStore
from distml.runtime.cut import pack, unpack


def test_numbers_that_json_does_not_know_come_back():
    arrays: dict = {}
    tree = {"a": [math.nan, math.inf, -math.inf, 0.5], "b": np.float32("-inf"), "c": np.arange(3), "d": (1, None)}
    packed = pack(tree, "x", arrays)
    back = unpack(json.loads(json.dumps(packed, allow_nan=False)), arrays)
    assert math.isnan(back["a"][0])
    assert (back["a"][1:], back["b"], back["d"]) == ([math.inf, -math.inf, 0.5], -math.inf, [1, None])
    assert back["c"].tolist() == [0, 1, 2]


@pytest.mark.parametrize(("workers", "strategy"), [
    (1, {"name": "single"}), (2, {"name": "all_reduce"}), (2, {"name": "parameter_server"}),
])  # fmt: skip
def test_metrics_that_are_not_finite_neither_end_a_run_nor_bend_a_resume(tmp_path, monkeypatch, workers, strategy):
    monkeypatch.chdir(OWN)
    spec = spec_of("odd:Odd", workers=workers, strategy=strategy, evaluate={"every": 2}, checkpoint={"every": 5},
                   stop={"steps": 12, "patience": 50}, log={"every": 3, "to": []})  # fmt: skip

    def run(name: str, steps: int) -> distml.Result:
        stop = {"steps": steps, "patience": 50}
        return distml.run(spec | {"stop": stop}, out=tmp_path / name, runtime="inline")

    whole = run("whole", 12)
    assert whole.step == 12
    run("parts", 5)
    resumed = run("parts", 12)
    assert resumed.metrics["eval/loss"] == whole.metrics["eval/loss"] < math.inf
    first, second = (saved(tmp_path / name)["model"] for name in ("whole", "parts"))
    assert all(np.array_equal(first[name], second[name]) for name in first)
    assert evaluations(tmp_path / "parts") == evaluations(tmp_path / "whole")
    assert [step for step, value in evaluations(tmp_path / "whole") if value == "nan"] == [2, 4, 6]


def evaluations(out: Path) -> list:
    """What the newest checkpoint knows of the watched metric, as text."""
    store = CheckpointStore(out / "checkpoints", keep=1)
    clock = unpack(store.load(store.steps()[-1]).state["clock"], {})
    assert isinstance(clock["examples"], int)
    return [(step, repr(value)) for step, value in clock["agenda"]["evaluations"] if step % 2 == 0]
