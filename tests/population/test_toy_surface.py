"""The paper's toy surface: only copying and exploring together find the optimum (Jaderberg et al. 2017, figure 2)."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from own.populations import OWN, lineage, per_member, run_with, toy

from distml.population.explore import sample
from distml.spec.loader import load_spec
from distml.spec.search_rules import space_of

H0, H1 = "task.args.h0", "task.args.h1"
SPACE = {path: {"loguniform": [1e-6, 1.0]} for path in (H0, H1)}
SEEDS = (1105, 5419, 12872)  # of those where each member begins with one of the two directions hidden from it


def surface(seed: int, **changes: Any) -> dict[str, Any]:
    return toy(seed=seed, space=SPACE, base__optimizer__lr=0.1, checkpoint={"every": 1000}, **changes)


def quality(seed: int, out: Path, **changes: Any) -> float:
    return float(run_with(surface(seed, **changes), out)[1].metrics["eval/quality"])


@pytest.mark.parametrize("seed", SEEDS)
def test_each_member_begins_with_one_direction(seed: int) -> None:
    space = space_of(load_spec(surface(seed), directory=OWN).job)
    first, second = (sample(space, random.Random(f"{seed}/start/{name}")) for name in ("00", "01"))
    assert min(first[H0], second[H1]) > 0.3
    assert max(first[H1], second[H0]) < 1e-5


@pytest.mark.parametrize("seed", SEEDS)
def test_a_population_reaches_the_optimum(seed: int, tmp_path: Path) -> None:
    assert quality(seed, tmp_path / "run") > 1.199
    copies = [event for event in lineage(tmp_path / "run") if event["event"] == "copy"]
    assert copies
    assert all(event["equal"] and event["applied"] == event["requested"] for event in copies)


@pytest.mark.parametrize(
    "changes",
    [{"explore": "none"}, {"exploit": "none"}, {"exploit": "none", "explore": "none"}],
    ids=["exploit only", "explore only", "neither"],
)
@pytest.mark.parametrize("seed", [SEEDS[0], *(pytest.param(seed, marks=pytest.mark.slow) for seed in SEEDS[1:])])
def test_half_of_it_does_not(seed: int, changes: dict[str, Any], tmp_path: Path) -> None:
    assert quality(seed, tmp_path / "run", **changes) < 0.6


def test_exploring_without_copying_changes_values_and_keeps_weights(tmp_path: Path) -> None:
    run_with(surface(1105, exploit="none", base__stop__steps=24), tmp_path / "run")
    for events in per_member(lineage(tmp_path / "run")).values():
        explored = [event for event in events if event["event"] == "decide"]
        assert len(explored) == 5
        assert all("from" not in event and event["before"] != event["requested"] for event in explored)
        scores = [event["score"] for event in events[1:]]
        assert scores == sorted(scores)  # its own weights only climb


def test_random_search_changes_nothing(tmp_path: Path) -> None:
    run_with(surface(1105, exploit="none", explore="none", base__stop__steps=24), tmp_path / "run")
    for events in per_member(lineage(tmp_path / "run")).values():
        assert all(event["values"] == events[0]["values"] for event in events)
        assert [event["event"] for event in events] == ["start", *["decide"] * 5, "finish"]
