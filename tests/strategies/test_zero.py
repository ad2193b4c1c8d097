"""ZeRO between real processes comes to what all_reduce comes to, at every stage, and its state to the same elements."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from own.oracle import spec_of, train
from own.ranks import on_ranks, trainer_of

from distml.events import Report

STEPS = 50
SMALL = {"name": "small:Small", "args": {"dtype": "float32"}}
ADAMW = {"name": "adamw", "lr": 0.02, "weight_decay": 0.1, "schedule": {"name": "cosine", "warmup": 5, "steps": 60}}
NESTEROV = {"name": "sgd", "lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}
GROUPS = [{"match": "*.bias", "weight_decay": 0.0, "lr": 0.05}]
CASES: dict[str, dict[str, Any]] = {
    "adamw": {"optimizer": ADAMW},
    "adam, clipped": {"optimizer": {"name": "adam", "lr": 0.02, "clip_norm": 0.05}},
    "nesterov, groups": {"optimizer": {**NESTEROV, "groups": GROUPS}},
    "rmsprop, accumulated": {"optimizer": {"name": "rmsprop", "lr": 0.005, "momentum": 0.5}, "micro_batch_size": 2},
    "uneven": {"optimizer": {**ADAMW, "clip_norm": 0.5}, "task": {"name": "uneven32:Uneven32"}, "micro_batch_size": 3},
}
STAGES = (1, 2, 3)


def spec(case: str, strategy: Any) -> dict[str, Any]:
    more = {"evaluate": {"every": 100}, "log": {"every": 5, "to": []}}
    return spec_of(**{"task": SMALL, "steps": STEPS + 1, "strategy": strategy, "workers": 2} | more | CASES[case])


def losses(reports: list[Report]) -> list[tuple[float, float]]:
    return [report.means["loss"] for report in reports]


def trained(rank: int, join: Any) -> dict[Any, Any]:
    """What each case comes to on this rank."""
    found = {}
    for stage in STAGES:
        for case in CASES:
            trainer = trainer_of(spec(case, {"name": "zero", "stage": stage}), rank, 2)
            trainer.connect(join(), None)
            reports = [event for event in trainer.advance(STEPS) if isinstance(event, Report)]
            pieces = [(kind, name, start, tensor.clone().numpy()) for kind, name, start, tensor in
                      trainer.strategy.pieces()]  # fmt: skip
            found[case, stage] = losses(reports), pieces, trainer.strategy.clock_state(), reports[-1].values
            trainer.strategy.close()
    return found


@pytest.fixture(scope="module")
def zero() -> list[dict[Any, Any]]:
    return on_ranks(2, trained)


@pytest.fixture(scope="module")
def replicas() -> dict[str, Any]:
    return {case: train(spec(case, "all_reduce") | {"stop": {"steps": STEPS}}) for case in CASES}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("case", CASES)
def test_the_losses_are_those_of_all_reduce(zero, replicas, case, stage):
    sums = np.array([losses([r for r in replicas[case].reports if r.rank == rank]) for rank in range(2)]).sum(0)
    found = np.array([zero[rank][case, stage][0] for rank in range(2)]).sum(0)
    assert len(found) == STEPS // 5
    assert np.array_equal(found[:, 1], sums[:, 1])
    print(case, stage, np.abs(found[:, 0] / found[:, 1] - sums[:, 0] / sums[:, 1]).max())
    assert np.abs(found[:, 0] / found[:, 1] - sums[:, 0] / sums[:, 1]).max() <= 1e-4
