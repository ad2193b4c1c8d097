"""The shipped populations train, and a population is better than the random search that it began as."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import pytest

from distml.launch.run import Result, run


def last_scores(result: Result) -> list[float]:
    """Of all members."""
    members = json.loads((result.directory / "population.json").read_text())["members"]
    return [member["score"] if member["score"] is not None else float("inf") for member in members.values()]


def digits(out: Path, **changes: Any) -> Result:
    return run("pbt-digits", {"base.stop.steps": 160, "base.log.to": [], **changes}, out=out, runtime="inline")


def test_pbt_digits(tmp_path: Path) -> None:
    """The median member learns only where it can leave its values behind."""
    population = digits(tmp_path / "population")
    assert population.metrics["test/accuracy"] > 0.94
    chance = digits(tmp_path / "chance", exploit="none", explore="none")
    assert statistics.median(last_scores(population)) < 0.6 * statistics.median(last_scores(chance))


@pytest.mark.slow
def test_pbt_a3c_cartpole(tmp_path: Path) -> None:
    """Members of two asynchronous workers: copies arrive, and the goal is met."""
    result = run("pbt-a3c-cartpole", {"base.log.to": []}, out=tmp_path / "run", runtime="inline")
    assert result.status == "goal_met"
    assert result.metrics["test/return_greedy_mean"] > 400
