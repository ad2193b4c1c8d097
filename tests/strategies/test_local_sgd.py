"""local_sgd against a naive twin: one plain torch module and optimiser per worker, averaged parameter by parameter."""

from __future__ import annotations

import copy
import fnmatch
import signal

import numpy as np
import pytest
import torch
from own.oracle import OWN, clip_and_step, distance, job_of, make_optimizer, oracle, same, saved, spec_of, train
from torch import nn

import distml
from distml.exchange.flat import to_numpy
from distml.runs.display import SilentDisplay
from distml.strategies.base import seed_everything
from distml.strategies.local_sgd import LocalSGD
from distml.tasks.build import build_task
from distml.tasks.data import DataOrder, take
from distml.tasks.sources import SourceTree

SGD = {"name": "sgd", "lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, "groups": [{"match": "*.bias", "lr": 0.05}]}
ADAMW = {"name": "adamw", "lr": 0.01, "weight_decay": 0.1, "clip_norm": 0.2, "schedule": {"name": "cosine"}}
AVERAGE = {"name": "average"}
NESTEROV = {"name": "nesterov", "lr": 0.7, "momentum": 0.8}
STEPS = 10  # with H = 4 the last round is cut short


def local(inner_steps: int = 4, outer: dict = AVERAGE, **changes) -> dict:
    strategy = {"name": "local_sgd", "inner_steps": inner_steps, "outer": outer}
    return spec_of(**{"task": "small:Small", "strategy": strategy, "steps": STEPS, "workers": 2, "batch_size": 14}
                   | changes)  # fmt: skip


# ---------------------------------------------------------------------------------------------------------- naive twin
def inner_step(task, model: nn.Module, optimizer: torch.optim.Optimizer, base: list[float], batch, job, version):
    """One step of one worker alone; what each phase's gradient is a sum over."""
    counts = []
    for method, pattern in task.phases:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(fnmatch.fnmatchcase(name, pattern))
            parameter.grad = None
        loss = getattr(task, method)(model, batch, None)
        (loss.total / loss.count).backward()
        clip_and_step(job, model, optimizer, base, version)
        counts.append(float(loss.count))
    return counts


class Outer:
    """The outer update, parameter by parameter, by torch.optim.SGD or a plain mean."""

    def __init__(self, job, task, model: nn.Module) -> None:
        self.outer, self.phases, self.start = job.strategy.outer, task.phases, copy.deepcopy(model)
        for parameter in self.start.parameters():
            parameter.requires_grad_(True)
        if self.outer.name == "nesterov":
            self.sgd = torch.optim.SGD(
                self.start.parameters(), lr=self.outer.lr, momentum=self.outer.momentum, nesterov=True
            )

    def update(self, models: list[nn.Module], counts: list[list[float]]) -> None:
        """`counts`: of each worker and phase in this round."""
        for name, parameter in self.start.named_parameters():
            phase = next(k for k, (_, pattern) in enumerate(self.phases) if fnmatch.fnmatchcase(name, pattern))
            shares = [row[phase] / sum(other[phase] for other in counts) for row in counts]
            ours = [model.get_parameter(name).data for model in models]
            mean = sum(share * weight for share, weight in zip(shares, ours, strict=True))
            parameter.grad = parameter.data - mean
            if self.outer.name == "average":
                parameter.data = mean
        if self.outer.name == "nesterov":
            self.sgd.step()
        for model in models:
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    parameter.copy_(self.start.get_parameter(name))


def twin(spec: dict, weighted: bool = True) -> dict[str, np.ndarray]:
    """The weights after the whole run, under their names; `weighted`: workers count by what their losses count."""
    job = job_of(spec)
    SourceTree.collect(job.task, OWN).install()
    task, workers = build_task(job), job.resources.workers
    seed_everything(job.seed)
    first = task.build_model().train()
    outer, models = Outer(job, task, first), [copy.deepcopy(first) for _ in range(workers)]
    optimizers = [make_optimizer(job, model) for model in models]
    base = [group["lr"] for group in optimizers[0].param_groups]
    dataset = task.data("train")
    order = DataOrder(len(dataset[0]), job.seed)
    counts = [[0.0] * len(task.phases) for _ in models]
    for version in range(job.stop.steps):
        begin = version * job.batch_size
        cuts = [begin + job.batch_size * rank // workers for rank in range(workers + 1)]
        for rank, model in enumerate(models):
            batch = take(dataset, order.entries(cuts[rank], cuts[rank + 1]))
            found = inner_step(task, model, optimizers[rank], base, batch, job, version)
            counts[rank] = [before + new for before, new in zip(counts[rank], found, strict=True)]
        if (version + 1) % job.strategy.inner_steps == 0 or version + 1 == job.stop.steps:
            outer.update(models, counts if weighted else [[1.0] * len(task.phases) for _ in models])
            counts = [[0.0] * len(task.phases) for _ in models]
    return {name: to_numpy(parameter) for name, parameter in models[0].named_parameters()}


@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize("inner_steps", [1, 4])
@pytest.mark.parametrize("optimizer", [SGD, ADAMW], ids=["sgd", "adamw"])
@pytest.mark.parametrize("outer", [AVERAGE, NESTEROV], ids=["average", "nesterov"])
def test_equals_the_naive_twin_in_float64(workers, inner_steps, optimizer, outer):
    spec = local(inner_steps, outer, workers=workers, optimizer=optimizer)
    trained = train(spec)
    assert distance(trained.named, twin(spec)) <= 1e-12
    assert all(s.progress.version == STEPS and s.progress.examples == STEPS * 14 for s in trained.strategies)
    assert all(torch.equal(s.flat.weights, trained.weights) for s in trained.strategies)


@pytest.mark.parametrize("task", ["uneven:Uneven", "gan_1d:GAN"])
def test_uneven_counts_and_several_phases_equal_the_naive_twin(task):
    spec = local(task=task, workers=3, outer=NESTEROV, optimizer=ADAMW)
    assert distance(train(spec).named, twin(spec)) <= 1e-12


def test_the_twin_tells_mechanisms_apart():
    """Control: another round length, outer update, number of workers or weighting of their means is seen."""
    uneven = {"task": "uneven:Uneven", "workers": 3}
    trained = train(local(4, NESTEROV, **uneven)).named
    slower = NESTEROV | {"momentum": 0.7}
    others = (local(5, NESTEROV, **uneven), local(4, AVERAGE, **uneven), local(4, slower, **uneven),
              local(4, NESTEROV, **uneven | {"workers": 2}))  # fmt: skip
    assert all(distance(trained, twin(other)) > 1e-6 for other in others)
    assert distance(trained, twin(local(4, NESTEROV, **uneven), weighted=False)) > 1e-6


@pytest.mark.parametrize("workers", [2, 3])
@pytest.mark.parametrize("task", ["small:Small", "uneven:Uneven"])
def test_one_inner_step_of_sgd_and_averaging_is_all_reduce(workers, task):
    optimizer = {"name": "sgd", "lr": 0.1, "weight_decay": 0.01}
    spec = local(1, workers=workers, task=task, optimizer=optimizer)
    reduced = train(spec | {"strategy": "all_reduce"}).named
    assert distance(train(spec).named, reduced) <= 1e-12
    assert distance(train(spec).named, oracle(spec, STEPS)) <= 1e-12
    assert distance(train(local(2, workers=workers, task=task, optimizer=optimizer)).named, reduced) > 1e-6


# -------------------------------------------------------------------------------------------------------------- rounds
def weights_by_version(spec: dict, monkeypatch: pytest.MonkeyPatch) -> dict[int, list[torch.Tensor]]:
    """Every replica's weights at each version, in rank order."""
    found: dict[int, dict[int, torch.Tensor]] = {}
    real = LocalSGD._advance

    def advance(self, spent, *rest):
        found.setdefault(spent.version, {})[self.rank] = self.flat.weights.clone()
        real(self, spent, *rest)

    monkeypatch.setattr(LocalSGD, "_advance", advance)
    train(spec)
    return {version: [row[rank] for rank in sorted(row)] for version, row in found.items()}


def test_replicas_differ_within_a_round_and_are_one_at_its_end(monkeypatch):
    by_version = weights_by_version(local(workers=3), monkeypatch)
    equal = {v: all(torch.equal(row[0], other) for other in row[1:]) for v, row in by_version.items()}
    assert {version for version, same_weights in equal.items() if same_weights} == {4, 8, 10}
    assert set(equal) == set(range(1, STEPS + 1))


def test_without_the_exchange_the_replicas_stay_apart(monkeypatch):
    monkeypatch.setattr("distml.runtime.inline.InlineGroup.all_reduce", lambda self, vector: None)
    first, second = train(local()).strategies
    assert not torch.equal(first.flat.weights, second.flat.weights)


@pytest.mark.parametrize("inner_steps", [2, 5])
@pytest.mark.parametrize("task", ["small:Small", "gan_1d:GAN"])
def test_bytes_per_example_are_an_hth_of_all_reduces(inner_steps, task):
    sent = {}
    for strategy in (local(inner_steps)["strategy"], {"name": "all_reduce"}):
        trained = train(local(task=task, strategy=strategy, workers=3, batch_size=12))
        total = sum(report.values["bytes"] for report in trained.reports)
        sent[strategy["name"]] = total / trained.strategies[0].progress.examples
    slack = 3 * len(trained.strategies[0].phases) * STEPS / (STEPS * 12)  # a phase's bytes are rounded up on each rank
    assert sent["local_sgd"] == pytest.approx(sent["all_reduce"] / inner_steps, abs=slack if "gan" in task else 0)
    assert sent["all_reduce"] > 0


def test_what_is_due_within_a_round_is_done_at_its_end():
    trained = train(local(steps=18, evaluate={"every": 5}, checkpoint={"every": 6}))
    assert [event.version for event in trained.evaluated] == [8, 12, 16, 18]
    written = [event.version for event in trained.snapshots if event.checkpoint and event.rank == 0]
    assert written == [8, 12, 18]
    assert [report.version for report in trained.reports if report.rank == 0] == [10, 18]
    assert [event.reason for event in trained.finished] == ["steps", "steps"]


def test_snapshots_for_recovery_are_taken_at_round_ends():
    job = job_of(local(16, steps=64))
    strategy = LocalSGD(job, 0, 2, torch.device("cpu"), snapshot_every=10)
    SourceTree.collect(job.task, OWN).install()
    strategy.prepare(build_task(job), None, 40)
    due = [strategy.agenda.duties(end, None, since=end - 16) for end in range(16, 64, 16)]
    assert due == [("snapshot",)] * 3


@pytest.mark.parametrize(("stop", "reason", "step"), [
    ({"examples": 60}, "examples", 8),  # five steps' worth
    ({"examples": 48}, "examples", 4),
    ({"epochs": 1}, "epochs", 4),  # 40 examples
    ({"steps": 7, "examples": 1000}, "steps", 7),
    ({"seconds": 1e-9}, "seconds", 4),
])  # fmt: skip
def test_budgets_are_looked_at_where_rounds_end_and_steps_are_kept_exactly(stop, reason, step):
    trained = train(local(stop=stop, batch_size=12, workers=3))
    assert [(event.reason, event.version) for event in trained.finished] == [(reason, step)] * 3
    assert {s.progress.examples for s in trained.strategies} == {12 * step}
    assert all(torch.equal(s.flat.weights, trained.weights) for s in trained.strategies)


def test_progress_within_a_round_counts_everyones_examples(monkeypatch):
    seen = []
    real = LocalSGD._advance

    def advance(self, spent, *rest):
        seen.append((self.rank, spent.version, spent.examples))
        real(self, spent, *rest)

    monkeypatch.setattr(LocalSGD, "_advance", advance)
    train(local(workers=3))  # shares of 4, 5 and 5
    assert sorted(seen) == [(rank, version, 14 * version) for rank in range(3) for version in range(1, STEPS + 1)]


# -------------------------------------------------------------------------------------------------------------- resume
class StopAt(SilentDisplay):
    """Asks the run to stop at a step, as Ctrl-C does."""

    def __init__(self, step: int | None) -> None:
        self.step = step

    def report(self, step: int, fraction: float, metrics) -> None:
        if self.step is not None and step >= self.step:
            self.step = None
            signal.raise_signal(signal.SIGINT)


def run(out, spec: dict, stop_at: int | None = None, **changes) -> distml.Result:
    return distml.run(spec | changes, out=out, runtime="inline", display=StopAt(stop_at))


@pytest.fixture
def _in_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(OWN)


@pytest.mark.usefixtures("_in_own")
@pytest.mark.parametrize("task", ["dropout:Dropout", "bn:BN", "grow:Grow"])
@pytest.mark.parametrize(("outer", "optimizer"), [(NESTEROV, ADAMW), (AVERAGE, SGD)], ids=["nesterov", "average"])
def test_interrupted_and_resumed_is_uninterrupted(tmp_path, task, outer, optimizer):
    optimizer = {key: value for key, value in optimizer.items() if key != "groups"}
    spec = local(outer=outer, optimizer=optimizer, task=task, steps=30, workers=3, log={"every": 3, "to": []},
                 evaluate={"every": 10}, checkpoint={"every": 16})  # fmt: skip
    run(tmp_path / "whole", spec)
    first = run(tmp_path / "parts", spec, stop_at=13)
    assert (first.status, first.step) == ("interrupted", 16)
    assert run(tmp_path / "parts", spec).step == 30
    whole, parts = saved(tmp_path / "whole"), saved(tmp_path / "parts")
    assert all(same(whole[kind], parts[kind]) for kind in ("model", "optimizer", "own"))
    assert any(name.startswith("outer_momentum/") for name in whole["optimizer"]) == (outer is NESTEROV)


@pytest.mark.usefixtures("_in_own")
def test_other_strategies_and_new_workers_go_on_from_its_checkpoints_and_it_from_theirs(tmp_path):
    spec = local(outer=NESTEROV, optimizer=ADAMW | {"schedule": {"name": "constant"}})
    plain, served = {"name": "all_reduce"}, {"name": "parameter_server"}
    for steps, strategy in ((10, plain), (20, spec["strategy"]), (30, served), (40, spec["strategy"]), (50, plain)):
        workers = {"workers": 3 if steps == 40 else 2}
        result = run(tmp_path / "run", spec, stop={"steps": steps}, strategy=strategy, resources=workers)
        assert (result.status, result.step) == ("done", steps)
        assert np.isfinite(result.metrics["eval/loss"])


def test_a_new_worker_starts_with_rank_0s_moments_and_an_old_one_with_its_own():
    trained = train(local(optimizer=ADAMW, workers=3))
    shared, (_, second, third) = trained.strategies[0].shared_state(), trained.strategies
    assert not torch.equal(trained.strategies[0].optimizer.moments["exp_avg"], second.optimizer.moments["exp_avg"])
    own, before = second.own_state(), second.optimizer.moments["exp_avg"].clone()
    assert trained.strategies[0].own_state() == {}
    for strategy in (second, third):
        strategy.load_shared(shared)
    second.load_own(own)
    third.load_own({})
    assert torch.equal(second.optimizer.moments["exp_avg"], before)
    assert torch.equal(third.optimizer.moments["exp_avg"], trained.strategies[0].optimizer.moments["exp_avg"])
