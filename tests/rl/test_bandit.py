"""The bandit testbed: against Sutton and Barto's pseudo-code, its known shares, and whoever plays which runs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from own.oracle import Trained, saved, spec_of, train

import distml
from distml.errors import UsageError
from distml.rl.bandit import Bandit, BanditStream
from distml.runs.display import SilentDisplay
from distml.spec.loader import load_spec
from distml.spec.tabular import BanditSpec
from distml.tasks.base import Mean, Part, Progress

LAYOUTS = [
    ("single", 1), ("all_reduce", 2), ("all_reduce", 3), ({"name": "parameter_server", "servers": 2}, 3),
]  # fmt: skip


def bandit_spec(steps: int = 40, workers: int = 1, seed: int = 0, strategy="all_reduce", **keys) -> dict:
    task = {"name": "bandit", "runs": 7, "arms": 4, "epsilons": [0.0, 0.1, 0.5]} | keys
    spec = spec_of(task, steps=steps, workers=workers, seed=seed, strategy=strategy,
                   optimizer={"name": "sgd", "lr": 1.0}, log={"every": steps, "to": []})  # fmt: skip
    del spec["batch_size"]
    return spec


def estimates(trained: Trained) -> dict[str, np.ndarray]:
    return {name: array.reshape(-1, 3, 4) for name, array in trained.named.items()}


def textbook(seed: int, run: int, epsilon: float, arms: int, steps: int) -> tuple[np.ndarray, np.ndarray, float]:
    """Sutton & Barto 2018, 2.4, one run in plain Python: (Q, N, share of optimal plays)."""
    values = np.random.default_rng([seed, run, 0]).normal(size=arms)
    q, n, optimal = np.zeros(arms), np.zeros(arms), 0
    for step in range(steps):
        if step % 128 == 0:
            luck = np.random.default_rng([seed, run, 1 + step // 128])
            explores, noise, anything = luck.random(128), luck.normal(size=128), luck.integers(arms, size=128)
        arm = int(anything[step % 128]) if explores[step % 128] < epsilon else int(np.argmax(q))
        reward = values[arm] + noise[step % 128]
        n[arm] += 1
        q[arm] += (reward - q[arm]) / n[arm]
        optimal += arm == int(np.argmax(values))
    return q, n, optimal / steps


def test_it_is_the_textbook_s_algorithm():
    trained = train(bandit_spec(steps=150))  # over the border of a block of luck
    found = estimates(trained)
    shares = dict.fromkeys((0.0, 0.1, 0.5), 0.0)
    for run in range(7):
        for learner, epsilon in enumerate(shares):
            q, n, share = textbook(0, run, epsilon, 4, 150)
            np.testing.assert_array_equal(found["pulls"][run, learner], n)
            np.testing.assert_allclose(found["values"][run, learner], q, atol=1e-5)
            shares[epsilon] += share / 7
    for epsilon, share in shares.items():
        mean = Mean(*trained.reports[-1].means[f"rl/optimal_share_{epsilon:g}"])
        assert mean.value == pytest.approx(share, abs=1e-12)
    other, *_ = textbook(1, 0, 0.1, 4, 150)  # control: another seed is another bandit
    assert np.abs(found["values"][0, 1] - other).max() > 0.1


def test_estimates_are_the_averages_of_the_rewards(monkeypatch):
    played = []
    original = BanditStream.next
    monkeypatch.setattr(BanditStream, "next", lambda *args: played.append(original(*args)) or played[-1])
    found = estimates(train(bandit_spec(steps=60)))
    sums, counts = np.zeros((7, 3, 4)), np.zeros((7, 3, 4))
    for pulls in played:
        for run, arms, rewards in zip(pulls.runs.tolist(), pulls.arms.tolist(), pulls.rewards.tolist(), strict=True):
            for learner, (arm, reward) in enumerate(zip(arms, rewards, strict=True)):
                sums[run, learner, arm] += reward
                counts[run, learner, arm] += 1
    np.testing.assert_array_equal(found["pulls"], counts)
    np.testing.assert_allclose(found["values"], sums / np.maximum(counts, 1), atol=1e-5)
    assert (counts.sum(2) == 60).all()


@pytest.mark.parametrize(("strategy", "workers"), LAYOUTS[1:])
@pytest.mark.parametrize("micro", [None, 2])
def test_who_plays_which_runs_changes_nothing(strategy, workers, micro):
    alone = train(bandit_spec())
    spec = bandit_spec(workers=workers, strategy=strategy) | {"micro_batch_size": micro}
    shared = train(spec)
    for name, array in alone.named.items():
        assert shared.named[name].tobytes() == array.tobytes()
    for name, (total, _) in alone.reports[-1].means.items():
        sums = [report.means[name][0] for report in shared.reports]
        assert sum(sums) == pytest.approx(total, rel=1e-6), name
    assert shared.evaluated[-1].metrics == pytest.approx(alone.evaluated[-1].metrics, abs=1e-12)
    other = train(bandit_spec(seed=1))  # control
    assert any(other.named[name].tobytes() != array.tobytes() for name, array in alone.named.items())


def test_a_run_does_not_depend_on_how_many_there_are():
    few, many = train(bandit_spec(runs=4)), train(bandit_spec(runs=8))  # powers of two: scaling by them is exact
    for name, array in estimates(few).items():
        np.testing.assert_array_equal(estimates(many)[name][:4], array)


@pytest.mark.parametrize(("before", "after"), [(LAYOUTS[0], LAYOUTS[0]), (LAYOUTS[1], LAYOUTS[2]),
                                               (LAYOUTS[3], LAYOUTS[1])])  # fmt: skip
def test_interrupted_and_resumed_is_uninterrupted(tmp_path, before, after):
    def run(out: Path, steps: int, layout) -> dict:
        spec = bandit_spec(steps=steps, strategy=layout[0], workers=layout[1])
        distml.run(spec, out=out, runtime="inline", display=SilentDisplay())
        return saved(out)["model"]

    whole = run(tmp_path / "whole", 33, LAYOUTS[0])
    half = run(tmp_path / "parts", 14, before)
    assert any(half[name].tobytes() != whole[name].tobytes() for name in whole)
    parts = run(tmp_path / "parts", 33, after)
    assert all(parts[name].tobytes() == whole[name].tobytes() for name in whole)


def test_shares_after_a_thousand_plays_are_the_book_s():
    """Figure 2.2: about 0.36, 0.6 and 0.8; 400 runs have standard errors of 0.024 (0.024, 0.02)."""
    spec = bandit_spec(steps=1000, runs=400, arms=10, epsilons=[0.0, 0.01, 0.1])
    metrics = train(spec | {"evaluate": {"every": 1000}}).evaluated[-1].metrics
    for epsilon, share in ((0.0, 0.36), (0.01, 0.6), (0.1, 0.8)):
        assert metrics[f"eval/optimal_share_{epsilon:g}"] == pytest.approx(share, abs=0.08)
    assert metrics["eval/reward_0.1"] > metrics["eval/reward_0.01"] > metrics["eval/reward_0"]
    assert metrics["eval/reward_0.1"] < 1.54  # of ten values of N(0, 1) the largest is 1.54 on average


def test_the_long_run_share_where_all_values_are_known():
    """1 - epsilon + epsilon / arms; and with nothing known, every arm alike."""
    task = Bandit(BanditSpec(name="bandit"), seed=3)
    model = task.build_model()
    part = Part(0, 1, 0, "validation")
    ignorant = task.evaluate(model, part, Progress())
    assert ignorant["optimal_share_0.1"].value == pytest.approx(0.1, abs=0.04)
    with torch.no_grad():
        model.values.copy_(torch.from_numpy(task.values(0, 1000))[:, None, :].expand(-1, 3, -1))
    known = {name: mean.value for name, mean in task.evaluate(model, part, Progress()).items()}
    assert known["optimal_share_0"] == 1.0
    assert known["optimal_share_0.01"] == pytest.approx(0.991)
    assert known["optimal_share_0.1"] == pytest.approx(0.91)
    largest, mean = task.values(0, 1000).max(1).mean(), task.values(0, 1000).mean()
    assert known["reward_0"] == pytest.approx(largest)
    assert known["reward_0.1"] == pytest.approx(0.9 * largest + 0.1 * mean)


def test_parts_of_an_evaluation_add_up():
    task = Bandit(BanditSpec(name="bandit", runs=10), seed=3)
    model = task.build_model()
    whole = task.evaluate(model, Part(0, 1, 0, "validation"), Progress())
    parts = [task.evaluate(model, Part(index, 12, 0, "validation"), Progress()) for index in range(12)]
    for name, mean in whole.items():
        summed = sum((part[name] for part in parts if part), Mean(0.0, 0.0))
        assert (summed.total, summed.count) == (pytest.approx(mean.total), mean.count)


@pytest.mark.slow
def test_the_long_run_share_is_played(monkeypatch):
    """Arms that differ by 3, so that 10,000 plays tell them apart: then 0.91 for 0.1 and 0.991 for 0.01.

    60 runs of the last 10,000 plays: a standard error is 0.0004 (0.0001), and 0.003 is left to runs that still err.
    """
    monkeypatch.setattr(Bandit, "values", lambda task, first, stop: 3.0 * np.eye(10)[np.arange(first, stop) % 10])
    spec = bandit_spec(steps=20_000, runs=60, arms=10, epsilons=[0.01, 0.1, 1.0])
    trained = train(spec | {"log": {"every": 10_000, "to": []}})
    shares = {name: Mean(*mean).value for name, mean in trained.reports[-1].means.items()}
    assert shares["rl/optimal_share_0.01"] == pytest.approx(0.991, abs=0.003)
    assert shares["rl/optimal_share_0.1"] == pytest.approx(0.91, abs=0.003)
    assert shares["rl/optimal_share_1"] == pytest.approx(0.1, abs=0.003)  # control: nothing but exploring


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer": {"name": "sgd", "lr": 0.5}}, "set optimizer: {name: sgd, lr: 1.0}"),
        ({"optimizer": {"name": "adam", "lr": 1.0}}, "set optimizer: {name: sgd, lr: 1.0}"),
        ({"strategy": {"name": "all_reduce", "compression": "bf16"}}, "remove strategy.compression"),
        ({"batch_size": 5}, "batch_size 5 is not task.runs 7"),
        ({"precision": "bf16"}, "precision bf16 would round"),
        ({"stop": {"epochs": 1}}, "set stop.steps"),
        ({"task": {"name": "bandit", "runs": 7, "epsilons": [0.1, 0, 0.10]}}, "task.epsilons has 0.1 twice"),
        ({"stop": {"frames": 1}}, "stop.frames counts environment steps, and task bandit takes none"),
        ({"strategy": "local_sgd"}, "needs one_version, which local_sgd does not offer"),
        ({"resources": {"workers": 8}}, "batch_size 7 is shared out over 8 workers"),
    ],
)
def test_what_would_not_be_the_average_is_refused(changes, message):
    with pytest.raises(UsageError) as caught:
        load_spec(bandit_spec() | changes)
    assert message in str(caught.value)


def test_a_run_s_rows_have_every_learner(tmp_path):
    spec = bandit_spec(steps=20) | {"log": {"every": 5, "to": []}}
    distml.run(spec, out=tmp_path / "run", runtime="inline", display=SilentDisplay())
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    reports = [row for row in rows if "train/loss" in row]
    assert [row["step"] for row in reports] == [5, 10, 15, 20]
    for row in reports:
        assert all(0 <= row[f"rl/optimal_share_{epsilon}"] <= 1 for epsilon in ("0", "0.1", "0.5"))
