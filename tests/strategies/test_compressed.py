"""Training with compressed gradients: what is reached, what is lost without feedback, and what a resume keeps."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from own.oracle import OWN, job_of, same, saved, spec_of, train
from torch import nn

import distml
from distml.errors import RunError
from distml.exchange.compression.base import Compressor
from distml.exchange.flat import TAIL
from distml.exchange.layout import Layout
from distml.runs.checkpoints import CheckpointStore
from distml.runtime.cut import from_checkpoint, reshard
from distml.strategies.base import seed_everything
from distml.strategies.optimizer import FlatOptimizer, applied_optimizer
from distml.tasks.build import build_task
from distml.tasks.data import DataOrder, take

METHODS = {
    "bf16": {"name": "bf16"},
    "int8": {"name": "int8"},
    "topk": {"name": "topk", "fraction": 0.05},
    "powersgd": {"name": "powersgd", "rank": 1},
}
MOMENTUM = {"name": "sgd", "lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}
NESTEROV = {"name": "sgd", "lr": 0.1, "momentum": 0.9, "nesterov": True}
ADAM = {"name": "adam", "lr": 0.01, "clip_norm": 0.3}
FLOAT32 = {"name": "small:Small", "args": {"dtype": "float32"}}


def strategy(compression: dict | None, name: str = "all_reduce", **keys) -> dict:
    return {"name": name, "compression": compression, **keys}


# -------------------------------------------------------------------------------------------------------- what it costs
DIGITS = {"name": "classification", "data": "digits", "model": {"name": "mlp", "hidden": [64]}}


def digits_loss(compression: dict | None, name: str = "all_reduce", steps: int = 200, seed: int = 0, **keys) -> float:
    optimizer = {"name": "sgd", "lr": 0.2}
    block = strategy(compression, name, **keys)
    job = spec_of(DIGITS, workers=2, strategy=block, batch_size=64, steps=steps, seed=seed, optimizer=optimizer)
    return train(job).evaluated[-1].metrics["eval/loss"]


@pytest.fixture(scope="module")
def uncompressed() -> float:
    return digits_loss(None)


@pytest.mark.parametrize("name", ["all_reduce", "parameter_server"])
@pytest.mark.parametrize("compression", [{"name": "topk", "fraction": 0.01}, {"name": "powersgd", "rank": 1}])
def test_strong_compression_reaches_the_loss_with_feedback_and_misses_it_without(uncompressed, compression, name):
    assert digits_loss(compression, name) <= 1.1 * uncompressed
    assert digits_loss(compression | {"error_feedback": False}, name) >= 1.8 * uncompressed


@pytest.mark.parametrize("compression", [{"name": "bf16"}, {"name": "int8"}])
def test_weak_compression_changes_nothing_to_speak_of(uncompressed, compression):
    assert digits_loss(compression) == pytest.approx(uncompressed, rel=0.005)


@pytest.mark.slow
@pytest.mark.parametrize("compression", [
    METHODS["bf16"], METHODS["int8"], {"name": "powersgd", "rank": 1}, {"name": "powersgd", "rank": 2},
])  # fmt: skip
def test_ten_paired_seeds_end_within_two_percent_of_the_uncompressed_loss(compression):
    pairs = [(digits_loss(compression, steps=400, seed=seed), digits_loss(None, steps=400, seed=seed))
             for seed in range(10)]  # fmt: skip
    compressed, plain = np.mean(pairs, axis=0)
    assert compressed <= 1.02 * plain


# --------------------------------------------------------------------------------------------------- bytes on the wire
def padded(num_bytes: int) -> int:
    return -(-num_bytes // 8) * 8


def payload_bytes(name: str) -> int:
    """Of Small's 1,155 float32 elements: [128, 5], 128, [3, 128], 3; four blocks of 256 and one of 131."""
    if name == "bf16":
        return padded(2 * 1155)
    if name == "int8":
        return padded(4 * 5) + padded(1155)  # rows are no longer than blocks
    kept = 4 * round(0.05 * 256) + round(0.05 * 131)
    return padded(4 * kept) + padded(2 * kept)


@pytest.mark.parametrize("name", ["bf16", "int8", "topk"])
@pytest.mark.parametrize("workers", [1, 2])
def test_bytes_per_step_are_what_the_payloads_add_up_to(tmp_path, monkeypatch, name, workers):
    monkeypatch.chdir(OWN)
    tail, pull = 4 * TAIL, 4 * 1155

    def bytes_per_step(block: dict) -> float:
        spec = spec_of(FLOAT32, workers=workers, steps=20, strategy=block)
        out = tmp_path / block["name"]
        return distml.run(spec, out=out, runtime="inline").metrics["comm/bytes_per_step"]

    reduced = bytes_per_step(strategy(METHODS[name]))
    assert reduced == workers * (workers - 1) * (payload_bytes(name) + tail)
    served = bytes_per_step(strategy(METHODS[name], "parameter_server"))
    assert served == workers * (payload_bytes(name) + pull)


# ------------------------------------------------------------------------------------------------ one update, many ways
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(("optimizer", "workers"), [(MOMENTUM, 2), (ADAM, 3)])
def test_any_number_of_servers_gives_the_same_bits(name, optimizer, workers):
    job = spec_of(FLOAT32, workers=workers, optimizer=optimizer, steps=25)
    one, *others = [train(job | {"strategy": strategy(METHODS[name], "parameter_server", servers=servers)})
                    for servers in (1, 2, 3)]  # fmt: skip
    assert all(torch.equal(other.weights, one.weights) for other in others)
    if workers == 2 and name != "powersgd":  # there servers sum what all_reduce gathers
        assert torch.equal(train(job | {"strategy": strategy(METHODS[name])}).weights, one.weights)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("workers", [2, 3, 4])
def test_workers_hold_equal_replicas(name, workers):
    trained = train(spec_of(FLOAT32, workers=workers, optimizer=ADAM, strategy=strategy(METHODS[name])))
    first, *others = [s.flat.weights for s in trained.strategies]
    assert all(torch.equal(first, other) for other in others)
    assert all(float(s.compressor.residual.abs().max()) > 0 for s in trained.strategies)


@pytest.mark.parametrize("task", ["gan_1d:GAN", "uneven:Uneven"])
@pytest.mark.parametrize("name", METHODS)
def test_phases_and_unequal_counts_train(task, name):
    for block in (strategy(METHODS[name]), strategy(METHODS[name], "parameter_server", servers=2),
                  strategy(METHODS[name], "parameter_server", mode="async", servers=2)):  # fmt: skip
        trained = train(spec_of(task, workers=3, strategy=block, optimizer=MOMENTUM, steps=20))
        assert math.isfinite(trained.evaluated[-1].metrics["eval/loss"])


def test_async_with_one_worker_is_all_reduce_with_one():
    for name in METHODS:
        job = spec_of(optimizer=MOMENTUM)
        alone = train(job | {"strategy": strategy(METHODS[name])})
        served = train(job | {"strategy": strategy(METHODS[name], "parameter_server", mode="async", servers=2)})
        assert float((alone.weights - served.weights).abs().max()) <= (1e-9 if name == "powersgd" else 0.0)


def naive(spec: dict, steps: int, send) -> torch.Tensor:
    """Two workers with plain torch: `send(c, u)` returns what leaves; mean, clip, SGD without momentum."""
    job = job_of(spec)
    task = build_task(job)
    seed_everything(job.seed)
    model = task.build_model().train()
    parameters = list(model.parameters())
    dataset = task.data("train")
    order = DataOrder(len(dataset[0]), job.seed)
    size, half = job.batch_size, job.batch_size // 2
    state = [torch.zeros(2, sum(p.numel() for p in parameters), dtype=torch.float64) for _ in range(2)]
    for version in range(steps):
        entries = order.entries(version * size, (version + 1) * size)
        total = torch.zeros(state[0].shape[1], dtype=torch.float64)
        for rank in range(2):
            loss = task.loss(model, take(dataset, entries[rank * half : (rank + 1) * half]), None)
            gradient = torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss.total, parameters)])
            total += send(gradient, state[0][rank], state[1][rank])
        mean = total / size
        norm = float(mean.norm())
        assert norm > job.optimizer.clip_norm
        mean *= job.optimizer.clip_norm / (norm + 1e-6)
        with torch.no_grad():
            for parameter, piece in zip(parameters, mean.split([p.numel() for p in parameters]), strict=True):
                parameter -= job.optimizer.lr * piece.view(parameter.shape)
    return torch.cat([p.detach().reshape(-1) for p in parameters])


def send_bf16(gradient, residual, velocity):
    residual += gradient
    sent = residual.bfloat16().double()
    residual -= sent
    return sent


def send_topk(gradient, residual, velocity):
    velocity.mul_(0.9).add_(gradient)
    residual += velocity
    sent = torch.zeros_like(residual)
    for start in range(0, len(residual), 256):
        block = residual[start : start + 256]
        places = block.abs().argsort(descending=True)[: round(0.05 * len(block))] + start
        sent[places] = residual[places]
        residual[places] = velocity[places] = 0.0
    return sent


@pytest.mark.parametrize(("name", "momentum", "send"), [("bf16", 0.0, send_bf16), ("topk", 0.9, send_topk)])
def test_an_update_equals_a_naive_one(name, momentum, send):
    """Residuals, momentum correction, and clipping by the norm of the mean gradient as it is applied."""
    spec = spec_of(workers=2, strategy=strategy(METHODS[name]), batch_size=12, steps=30,
                   optimizer={"name": "sgd", "lr": 0.1, "momentum": momentum, "clip_norm": 0.1})  # fmt: skip
    trained, found = train(spec), naive(spec, 30, send)
    assert float((trained.weights - found).abs().max()) <= 1e-12
    served = train(spec | {"strategy": strategy(METHODS[name], "parameter_server", servers=2)})
    assert float((served.weights - found).abs().max()) <= 1e-12
    norms = [report.values["grad_norm"] for report in trained.reports]
    assert min(norms) > 0.1  # before clipping


# ------------------------------------------------------------------------------------------------------------- momentum
@pytest.mark.parametrize("optimizer", [MOMENTUM, NESTEROV])
def test_topk_takes_momentum_out_of_the_optimiser(optimizer):
    def spec(compression: dict | None):
        return job_of(spec_of(workers=2, strategy=strategy(compression), optimizer=optimizer))

    taken = applied_optimizer(spec({"name": "topk"}))
    assert (taken.momentum, taken.nesterov) == (0.0, False)
    for compression in (None, {"name": "bf16"}, {"name": "topk", "error_feedback": False}):
        assert applied_optimizer(spec(compression)) == spec(compression).optimizer
    adam = job_of(spec_of(workers=2, strategy=strategy({"name": "topk"}), optimizer=ADAM))
    assert applied_optimizer(adam) == adam.optimizer


def test_weight_decay_is_that_of_the_velocity():
    """Without gradients the weights shrink as under SGD with momentum, whose velocity sums up the decay."""
    groups = [{"match": "b", "weight_decay": 0.002}]
    optimizer = {"name": "sgd", "lr": 0.1, "momentum": 0.9, "weight_decay": 0.001, "groups": groups}
    job = job_of(spec_of(workers=2, strategy=strategy({"name": "topk"}), optimizer=optimizer))
    layout = Layout.build([("a", (4,), 0, 0), ("b", (4,), 0, 1)])
    found = {}
    for name, spec in (("taken", applied_optimizer(job)), ("velocity", job.optimizer)):
        weights = torch.ones(8)
        flat = FlatOptimizer(spec, layout, (0, 8), weights, None)
        for version in range(1000):
            flat.update(weights, torch.zeros(8), 0, version)
            flat.step_done()
        found[name] = -weights.log()
    assert found["taken"][0] == pytest.approx(1.0, rel=0.02)
    assert found["taken"][4] == pytest.approx(2.0, rel=0.02)
    assert found["velocity"].tolist() == pytest.approx(found["taken"].tolist(), rel=0.02)


# --------------------------------------------------------------------------------------------------------------- resume
@pytest.fixture
def _in_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(OWN)


KINDS = {
    "all_reduce": (2, {"name": "all_reduce"}),
    "all_reduce-3": (3, {"name": "all_reduce"}),
    "server": (2, {"name": "parameter_server", "servers": 2}),
    "async-1": (1, {"name": "parameter_server", "mode": "async", "servers": 2}),
}


def resumable(kind: str, name: str, optimizer=MOMENTUM, task="gan_1d:GAN", **changes) -> dict:
    workers, block = KINDS[kind]
    values = {"steps": 18, "log": {"every": 4, "to": []}, "evaluate": {"every": 12}, "checkpoint": {"every": 6}}
    return spec_of(task, workers=workers, strategy=block | {"compression": METHODS[name]}, optimizer=optimizer,
                   **{**values, **changes})  # fmt: skip


def run(out: Path, spec: dict, **keys) -> distml.Result:
    return distml.run(spec, out=out, runtime="inline", **keys)


def break_off(out: Path, spec: dict) -> None:
    """End a run in the middle of step 15, after the checkpoint of step 12."""
    with pytest.raises(RunError, match="step 15"):
        run(out, spec, inject=("nan:rank=0,step=15",))


@pytest.mark.parametrize(("kind", "name"), [
    *((kind, name) for kind in ("all_reduce", "server") for name in METHODS),
    ("all_reduce-3", "bf16"), ("all_reduce-3", "powersgd"), ("async-1", "topk"),
])  # fmt: skip
@pytest.mark.usefixtures("_in_own")
def test_interrupted_and_resumed_is_uninterrupted(tmp_path, kind, name):
    spec = resumable(kind, name)
    run(tmp_path / "whole", spec)
    break_off(tmp_path / "parts", spec)
    run(tmp_path / "parts", spec)
    one, other = saved(tmp_path / "whole"), saved(tmp_path / "parts")
    assert all(same(one[part], other[part]) for part in ("model", "optimizer"))
    residuals = [key for key in one["own"] if key.startswith("0/strategy/sums/residual/")]
    assert len(residuals) == 8  # of each parameter one
    assert same({key: one["own"][key] for key in residuals}, {key: other["own"][key] for key in residuals})


@pytest.mark.parametrize("kind", ["all_reduce", "server"])
@pytest.mark.usefixtures("_in_own")
def test_a_resume_without_the_residuals_would_differ(tmp_path, monkeypatch, kind):
    """Control."""
    spec = resumable(kind, "topk")
    run(tmp_path / "whole", spec)
    break_off(tmp_path / "parts", spec)
    monkeypatch.setattr(Compressor, "load_state", lambda self, state: None)
    run(tmp_path / "parts", spec)
    assert not same(saved(tmp_path / "whole")["model"], saved(tmp_path / "parts")["model"])


def residual_sums(own: dict[int, dict]) -> dict[str, np.ndarray]:
    """Every residual vector, summed over the workers."""
    found: dict[str, np.ndarray] = {}
    for half in own.values():
        for vector, named in half["strategy"]["sums"].items():
            for name, array in named.items():
                found[f"{vector}/{name}"] = found.get(f"{vector}/{name}", 0.0) + array
    return found


@pytest.mark.parametrize(("name", "workers", "after"), [
    *((name, 2, "parameter_server") for name in METHODS), ("topk", 1, "all_reduce"), ("powersgd", 5, "all_reduce"),
])  # fmt: skip
@pytest.mark.usefixtures("_in_own")
def test_another_number_of_workers_keeps_the_sum_of_what_was_not_sent(tmp_path, name, workers, after):
    spec = resumable("all_reduce-3", name)
    break_off(tmp_path / "run", spec)
    checkpoint = CheckpointStore(tmp_path / "run" / "checkpoints", keep=1).load(12)
    cut = from_checkpoint(checkpoint, Layout.from_json(checkpoint.state["layout"]))
    folded = reshard(cut, workers)
    assert sorted(folded.own) == list(range(workers))
    before, kept = residual_sums(cut.own), residual_sums(folded.own)
    assert before.keys() == kept.keys()
    assert any(array.any() for array in before.values())
    assert all(np.allclose(before[key], kept[key], rtol=0, atol=1e-12) for key in before)
    commons = [json.dumps(half["strategy"]["common"], default=np.ndarray.tolist)
               for half in (cut.own[0], *folded.own.values())]  # fmt: skip
    assert set(commons) == {commons[0]}  # else ranks would factor by different bases
    result = run(tmp_path / "run", spec | {"resources": {"workers": workers},
                                           "strategy": strategy(METHODS[name], after)})  # fmt: skip
    assert (result.status, result.step) == ("done", 18)


@pytest.mark.usefixtures("_in_own")
def test_loaded_residuals_are_the_checkpoints(tmp_path, monkeypatch):
    """Up to the workers' own vectors: three become two, and nothing is lost or counted twice."""
    spec = resumable("all_reduce-3", "topk")
    break_off(tmp_path / "run", spec)
    checkpoint = CheckpointStore(tmp_path / "run" / "checkpoints", keep=1).load(12)
    cut = from_checkpoint(checkpoint, Layout.from_json(checkpoint.state["layout"]))
    loaded, real = [], Compressor.load_state

    def load_state(self: Compressor, state) -> None:
        real(self, state)
        loaded.append({key: vector.clone() for key, vector in self.residuals.items()})

    monkeypatch.setattr(Compressor, "load_state", load_state)
    run(tmp_path / "run", spec | {"resources": {"workers": 2}})
    assert len(loaded) == 2
    layout, before = Layout.from_json(checkpoint.state["layout"]), residual_sums(cut.own)
    for vector in ("residual", "velocity"):
        expected = layout.flatten({e.name: before[f"{vector}/{e.name}"] for e in layout.entries})
        assert np.allclose(sum(row[vector] for row in loaded).numpy(), expected, rtol=0, atol=1e-12)
        assert float(loaded[1][vector].abs().max()) > 0


@pytest.mark.parametrize(("before", "after"), [("topk", None), (None, "topk"), ("powersgd", "int8"), ("bf16", "topk")])
@pytest.mark.usefixtures("_in_own")
def test_compression_may_change_on_resume(tmp_path, before, after):
    def spec(name: str | None) -> dict:
        compression = METHODS[name] if name else None
        return resumable("all_reduce", "bf16") | {"strategy": strategy(compression)}

    break_off(tmp_path / "run", spec(before))
    result = run(tmp_path / "run", spec(after))
    assert (result.status, result.step) == ("done", 18)


def test_a_recovery_goes_back_to_a_checkpoint():
    """Snapshots in between would carry the residuals, uncompressed, over the wire."""
    from distml.strategies.build import build_strategy

    for block, every in ((strategy(METHODS["bf16"]), None), (strategy(None), 10)):
        job = job_of(spec_of(workers=2, strategy=block))
        assert build_strategy(job, 0, 2, torch.device("cpu"), 10).snapshot_every == every


def test_frozen_parameters_and_a_single_vector_compress():
    """No matrix is left for powersgd: everything goes uncompressed."""
    job = spec_of(workers=2, strategy=strategy(METHODS["powersgd"])) | {"init": {"freeze": ["*.weight"]}}
    trained = train(job)
    assert trained.strategies[0].compressor.factors == {}
    plain = train(job | {"strategy": strategy(None)})
    assert float((trained.weights - plain.weights).abs().max()) <= 1e-12
    assert isinstance(trained.strategies[0].model, nn.Module)
