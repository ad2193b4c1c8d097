"""Small tasks of every kind, each against a calculation beside it: the strategies know nothing of any of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from own.oracle import distance, job_of, oracle, spec_of, train
from torch import nn

from distml.strategies.base import seed_everything
from distml.tasks.build import build_task
from distml.tasks.data import DataOrder, num_rows, take

SYNC = {
    "single": (1, {"name": "single"}), "all_reduce": (3, {"name": "all_reduce"}),
    "server": (2, {"name": "parameter_server", "servers": 2}),
}  # fmt: skip


def sync_spec(task: str, strategy: str, **changes) -> dict:
    workers, block = SYNC[strategy]
    return spec_of(task, workers=workers, strategy=block, **changes)


def parts_of(task, job, version: int) -> list[tuple]:
    """Every rank's batch of a version."""
    dataset, size, workers = task.data("train"), job.batch_size, job.resources.workers
    entries = DataOrder(len(dataset[0]), job.seed).entries(version * size, (version + 1) * size)
    cuts = [size * rank // workers for rank in range(workers + 1)]
    return [take(dataset, entries[cuts[rank] : cuts[rank + 1]]) for rank in range(workers)]


def built(spec: dict):
    job = job_of(spec)
    task = build_task(job)
    seed_everything(job.seed)
    return job, task, task.build_model()


# ------------------------------------------------------------------------------------------------------ carried tensors
@pytest.mark.parametrize("strategy", ["all_reduce", "server"])
@pytest.mark.parametrize("key", ["evaluate", "checkpoint"])
def test_running_statistics_are_averaged_by_count_when_they_are_looked_at(strategy, key):
    spec = sync_spec("bn:BN", strategy, batch_size=11, steps=4, **{key: {"every": 2}})
    trained = train(spec)
    job, task, _ = built(spec)
    running = np.zeros((job.resources.workers, 5))
    for version in range(4):
        parts = [inputs.numpy() for inputs, _ in parts_of(task, job, version)]
        running = 0.9 * running + 0.1 * np.stack([part.mean(0) for part in parts])
        if version % 2 == 1:  # averaged after 2 and 4 updates, by the examples of two rounds each
            running[:] = np.average(running, axis=0, weights=[len(part) for part in parts])
    for trainer in trained.runtime.trainers:
        np.testing.assert_allclose(trainer.model.norm.running_mean, running[0], rtol=0, atol=1e-14)
        assert int(trainer.model.norm.num_batches_tracked) == 4
        own = 11 // job.resources.workers  # rank 0's share: integers are not averaged
        assert int(trainer.model.seen) == 4 * own
    rare = train(spec | {key: {"every": 1000}}).runtime.trainers[0].model.norm.running_mean
    assert np.abs(rare.numpy() - running[0]).max() < 1e-14  # linear: when they are averaged does not matter here


def test_running_statistics_of_one_worker_are_not_those_of_all():
    """Control for the above: without averaging they differ."""
    spec = sync_spec("bn:BN", "all_reduce", batch_size=11, steps=2)
    job, task, _ = built(spec)
    means = [part[0].numpy().mean(0) for part in parts_of(task, job, 0)]
    assert np.abs(means[0] - np.average(means, axis=0, weights=[3, 4, 4])).max() > 0.01


# --------------------------------------------------------------------------------------------------------------- phases
@pytest.mark.parametrize("strategy", SYNC)
@pytest.mark.parametrize("rule", ["sgd", "adam"])
def test_a_gan_is_two_phases_of_one_step(strategy, rule):
    spec = sync_spec("gan_1d:GAN", strategy, steps=30, optimizer={"name": rule, "lr": 0.05})
    trained = train(spec)
    job, task, model = built(spec)
    make = (lambda p: torch.optim.SGD(p, 0.05)) if rule == "sgd" else (lambda p: torch.optim.Adam(p, 0.05))
    optimizers = {"d": make(model.d.parameters()), "g": make(model.g.parameters())}
    softplus = nn.functional.softplus
    for version in range(30):
        pieces = parts_of(task, job, version)
        real, noise = (torch.cat([piece[k] for piece in pieces]) for k in (0, 1))
        optimizers["d"].zero_grad()
        (softplus(-model.d(real)) + softplus(model.d(model.g(noise).detach()))).mean().backward()
        optimizers["d"].step()
        optimizers["g"].zero_grad()
        softplus(-model.d(model.g(noise))).mean().backward()
        optimizers["g"].step()
    hand = {name: p.detach().numpy() for name, p in model.named_parameters()}
    assert distance(trained.named, hand) <= 1e-12
    swapped = oracle_of_simultaneous_steps(job, task, 30)
    assert distance(trained.named, swapped) > 1e-4 or rule == "adam"
    assert {name for report in trained.reports for name in report.means} == {"d_loss", "g_loss"}


def oracle_of_simultaneous_steps(job, task, steps: int) -> dict[str, np.ndarray]:
    """Control: both gradients at the same weights, which is not what phases mean."""
    seed_everything(job.seed)
    model = task.build_model()
    softplus = nn.functional.softplus
    for version in range(steps):
        pieces = parts_of(task, job, version)
        real, noise = (torch.cat([piece[k] for piece in pieces]) for k in (0, 1))
        d_loss = (softplus(-model.d(real)) + softplus(model.d(model.g(noise).detach()))).mean()
        g_loss = softplus(-model.d(model.g(noise))).mean()
        d, g = list(model.d.parameters()), list(model.g.parameters())
        gradients = [*torch.autograd.grad(d_loss, d), *torch.autograd.grad(g_loss, g)]
        with torch.no_grad():
            for parameter, gradient in zip([*d, *g], gradients, strict=True):
                parameter -= 0.05 * gradient
    return {name: p.detach().numpy() for name, p in model.named_parameters()}


# -------------------------------------------------------------------------------------------------- counts, collectives
@pytest.mark.parametrize("strategy", SYNC)
@pytest.mark.parametrize("micro", [None, 2])
def test_tokens_are_summed_and_divided_by_their_number_over_all_workers(strategy, micro):
    spec = sync_spec("uneven:Uneven", strategy, batch_size=10, micro_batch_size=micro)
    trained = train(spec)
    assert distance(trained.named, oracle(spec, 30)) <= 1e-12
    report = trained.reports[-1]
    assert report.means["error"] == pytest.approx(report.means["loss"])


@pytest.mark.parametrize("strategy", [*SYNC, "async"])
@pytest.mark.parametrize("micro", [None, 2])
def test_epochs_count_rows_where_the_loss_counts_tokens(strategy, micro):
    changes = {"batch_size": 10, "micro_batch_size": micro, "stop": {"epochs": 2}, "log": {"every": 1, "to": []}}
    if strategy == "async":
        trained = train(spec_of("uneven:Uneven", workers=2, strategy={"name": "parameter_server", "mode": "async"},
                                **changes))  # fmt: skip
    else:
        trained = train(sync_spec("uneven:Uneven", strategy, **changes))
    assert {event.reason for event in trained.finished} == {"epochs"}
    updates = 20 if strategy == "async" else 10  # 50 rows, twice, 10 of them in a round of 1 or 2 updates
    for one in trained.strategies:
        assert (one.progress.version, one.progress.examples, one.progress.fraction) == (updates, 100, 1.0)
    last = max(trained.reports, key=lambda report: report.version)
    assert last.examples == 100
    assert all(report.values["examples"] / report.values["steps"] < 11 for report in trained.reports)
    assert sum(count for report in trained.reports for _, count in [report.means["loss"]]) > 300  # tokens


def test_rows_of_two_phases_are_counted_once_and_batches_without_a_length_by_their_count():
    gan = train(sync_spec("gan_1d:GAN", "all_reduce", steps=5))
    assert gan.strategies[0].progress.examples == 5 * 12
    assert num_rows(object(), 7.0) == 7.0
    assert num_rows({"x": torch.zeros(3, 9)}, 27.0) == 3.0


def test_a_mean_of_means_is_something_else():
    spec = sync_spec("uneven:Uneven", "all_reduce", batch_size=10, steps=1)
    job, task, model = built(spec)
    losses = [task.loss(model, part, None) for part in parts_of(task, job, 0)]
    means = sum(loss.total / loss.count for loss in losses) / len(losses)
    gradients = torch.autograd.grad(means, list(model.parameters()))
    wrong = {name: (p - 0.1 * g).detach().numpy()
             for (name, p), g in zip(model.named_parameters(), gradients, strict=True)}  # fmt: skip
    trained = train(spec).named
    assert distance(trained, oracle(spec, 1)) <= 1e-14
    assert distance(trained, wrong) > 1e-4


@pytest.mark.parametrize("strategy", SYNC)
def test_the_group_mean_is_over_all_workers(strategy):
    spec = sync_spec("centred:Centred", strategy)  # 12 examples: equal shares
    trained = train(spec)
    whole = oracle(spec, 30)
    assert distance(trained.named, whole) <= 1e-12
    if strategy != "single":  # the control: each worker's own mean
        for trainer in trained.runtime.trainers:
            assert trainer.task.group_mean.__self__ is trainer.strategy
        alone = train(spec | {"task": {"name": "alone:Alone"}})
        assert distance(alone.named, whole) > 1e-4


# --------------------------------------------------------------------------------------------- own halves, after_update
@pytest.mark.parametrize("strategy", SYNC)
def test_a_target_follows_every_update(strategy):
    spec = sync_spec("target:Target", strategy, steps=20, evaluate={"every": 7})
    trained = train(spec)
    job, task, model = built(spec)
    weight, slow = model.weight.detach().clone(), model.slow.clone()
    for version in range(20):
        inputs, targets = (torch.cat(pieces) for pieces in zip(*parts_of(task, job, version), strict=True))
        gradient = 2 * inputs.T @ (inputs @ weight - targets) / len(inputs) + 2 * (weight - slow)
        weight = weight - 0.1 * gradient
        slow = 0.75 * slow + 0.25 * weight
    for trainer in trained.runtime.trainers:
        np.testing.assert_allclose(trainer.model.weight.detach(), weight, rtol=0, atol=1e-12)
        np.testing.assert_allclose(trainer.model.slow, slow, rtol=0, atol=1e-12)


def test_every_rank_draws_its_own_random_numbers():
    spec = sync_spec("dropout:Dropout", "all_reduce", steps=5)
    trained, again = train(spec), train(spec)
    assert torch.equal(trained.weights, again.weights)
    states = [state["torch"].tobytes() for state in trained.runtime.states]
    assert len(set(states)) == 3
    assert not torch.equal(train(spec | {"seed": 1}).weights, trained.weights)


def test_a_stream_of_its_own_sees_the_progress():
    trained = train(spec_of("grow:Grow", workers=2, strategy="all_reduce", steps=8))
    for trainer in trained.runtime.trainers:
        assert trainer.stream.versions == list(range(8))
        assert len(trainer.stream.points) == 1 + 2 * 8
    first, second = (trainer.stream.points for trainer in trained.runtime.trainers)
    assert not torch.equal(first, second)


def test_data_drawn_from_the_global_generators_is_the_same_on_every_rank_and_disturbs_nothing():
    spec = spec_of("drawn:Drawn", evaluate={"every": 4}, steps=12)
    alone, three = train(spec), train(spec | {"strategy": "all_reduce", "resources": {"workers": 3}})
    assert distance(alone.named, three.named) <= 1e-12
    rarely = train(spec | {"evaluate": {"every": 1000}})
    assert torch.equal(alone.weights, rarely.weights)
    other = train(spec | {"seed": 1})
    assert distance(alone.named, other.named) > 1e-4
