"""Synchronous strategies equal one plain torch loop over the whole batch, for every optimiser."""

from __future__ import annotations

import pytest
import torch
from own.oracle import distance, oracle, spec_of, train

GROUPS = [{"match": "*.bias", "weight_decay": 0.0}, {"match": "2.*", "lr": 0.02}]
OPTIMIZERS = {
    "sgd": {"name": "sgd", "lr": 0.2, "weight_decay": 0.01, "schedule": {"name": "linear", "warmup": 5}},
    "sgd+momentum": {"name": "sgd", "lr": 0.1, "momentum": 0.9, "clip_norm": 0.3, "groups": GROUPS},
    "nesterov": {"name": "sgd", "lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.05, "groups": GROUPS},
    "adam": {"name": "adam", "lr": 0.01, "weight_decay": 0.1, "clip_norm": 0.2,
             "schedule": {"name": "cosine", "warmup": 3, "final": 0.1}},
    "adamw": {"name": "adamw", "lr": 0.01, "weight_decay": 0.1, "groups": GROUPS, "betas": [0.8, 0.95],
              "schedule": {"name": "step", "every": 10, "factor": 0.5}},
    "rmsprop": {"name": "rmsprop", "lr": 0.005, "weight_decay": 0.01, "groups": GROUPS},
    "rmsprop+momentum": {"name": "rmsprop", "lr": 0.002, "momentum": 0.9, "clip_norm": 0.3, "alpha": 0.9},
}  # fmt: skip
STRATEGIES = {
    "single": (1, {"name": "single"}),
    "all_reduce-2": (2, {"name": "all_reduce"}),
    "all_reduce-3": (3, {"name": "all_reduce"}),
    "server-2-1": (2, {"name": "parameter_server"}),
    "server-3-2": (3, {"name": "parameter_server", "servers": 2}),
    "server-2-3": (2, {"name": "parameter_server", "servers": 3}),
}


def spec(optimizer: str, strategy: str, dtype: str = "float64", steps: int = 32, **changes) -> dict:
    workers, block = STRATEGIES[strategy]
    task = {"name": "small:Small", "args": {"dtype": dtype}}
    return spec_of(task, workers=workers, strategy=block, optimizer=OPTIMIZERS[optimizer], steps=steps, batch_size=14,
                   **changes)  # fmt: skip


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_equals_one_plain_loop_in_float64(optimizer, strategy):
    job = spec(optimizer, strategy)
    trained = train(job)
    assert distance(trained.named, oracle(job, 32)) <= 1e-12
    assert all(s.progress.version == 32 and s.progress.examples == 32 * 14 for s in trained.strategies)


@pytest.mark.parametrize("strategy", ["all_reduce-2", "server-3-2"])
def test_the_oracle_tells_mechanisms_apart(strategy):
    """Control: without clipping, schedule, groups or with another batch the same comparison fails."""
    clipped, scheduled, grouped = spec("adam", strategy), spec("sgd", strategy), spec("nesterov", strategy)
    for with_it, key in ((clipped, "clip_norm"), (scheduled, "schedule"), (grouped, "groups")):
        without = with_it | {"optimizer": {k: v for k, v in with_it["optimizer"].items() if k != key}}
        assert distance(train(with_it).named, oracle(without, 32)) > 1e-6, key
    assert distance(train(scheduled).named, oracle(scheduled | {"batch_size": 13}, 32)) > 1e-6


@pytest.mark.parametrize(
    ("optimizer", "strategy"),
    list(zip(OPTIMIZERS, ["single", "all_reduce-2", "server-3-2", "server-2-1", "all_reduce-3", "server-2-3", "single"],
             strict=True)),
)  # fmt: skip
def test_equals_one_plain_loop_in_float32_after_100_steps(optimizer, strategy):
    job = spec(optimizer, strategy, "float32", steps=100)
    assert distance(train(job).named, oracle(job, 100)) <= 1e-4


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("workers", [2, 3])
def test_any_number_of_servers_gives_the_same_bits_and_so_does_all_reduce(optimizer, workers):
    job = spec(optimizer, "all_reduce-2", "float32") | {"resources": {"workers": workers}}
    reduced = train(job).weights
    for servers in (1, 2, 5):
        served = train(job | {"strategy": {"name": "parameter_server", "servers": servers}})
        assert torch.equal(served.weights, reduced), servers
        assert all(torch.equal(s.flat.weights, reduced) for s in served.strategies)


def test_workers_hold_equal_replicas():
    trained = train(spec("adamw", "all_reduce-3", "float32"))
    first, *others = [s.flat.weights for s in trained.strategies]
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize(("strategy", "micro"), [("single", 4), ("all_reduce-3", 2), ("server-2-3", 3)])
def test_accumulation_equals_the_whole_batch(strategy, micro):
    job = spec("adam", strategy)
    assert distance(train(job | {"micro_batch_size": micro}).named, oracle(job, 32)) <= 1e-12


def test_frozen_parameters_stay():
    job = spec("adam", "server-2-3") | {"init": {"freeze": ["0.*"]}}
    trained = train(job)
    assert set(trained.named) == {"2.weight", "2.bias"}
    assert distance(trained.named, oracle(job, 32)) <= 1e-12


def test_the_reported_gradient_norm_is_the_mean_gradients():
    job = spec("sgd", "single", steps=10)
    norms = [report.values["grad_norm"] for name in STRATEGIES for report in train(job | {
        "strategy": STRATEGIES[name][1], "resources": {"workers": STRATEGIES[name][0]}}).reports]  # fmt: skip
    assert len(norms) == sum(workers for workers, _ in STRATEGIES.values())
    assert max(norms) - min(norms) <= 1e-12
    assert norms[0] > 0
