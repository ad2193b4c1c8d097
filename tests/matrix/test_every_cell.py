"""Every pair of task and strategy trains, or is refused with the reason that the matrix prints."""

from __future__ import annotations

import math

import pytest
from own.oracle import job_of, spec_of, train

from distml.errors import UsageError
from distml.spec.matrix import Cell, built_in_tasks, matrix

FREE = ("small:Small", "bn:BN", "dropout:Dropout", "target:Target", "grow:Grow", "anew:Anew", "uneven:Uneven",
        "gan_1d:GAN")  # fmt: skip
OWN = dict.fromkeys(FREE, ()) | {"centred:Centred": ("group_mean",), "fresh:Fresh": ("one_version",)}
CELLS = matrix((name, frozenset(needs)) for name, needs in OWN.items())
STEPS = 4
PHASES = "gan_1d:GAN"
REFUSED_WHEN_BUILT = {PHASES: ("zero/1", "zero/2", "zero/3"), "target:Target": ("zero/3",)}
FLOAT32 = {"args": {"dtype": "float32"}}  # of own tasks: zero's weights are
TOGETHER = ("single", "zero/1", "zero/2", "zero/3")  # one worker: several are as many processes, not inline


ACTING = {name: {"environment": "CartPole-v1", "envs_per_worker": 2, "evaluation": {"episodes": 3, "max_frames": 20}}
          for name in ("actor_critic", "reinforce", "ppo", "trpo")}  # fmt: skip
ACTING |= {name: {**ACTING["ppo"], "environment": "FrozenLake-v1"} for name in ("q_learning", "sarsa")}
ACTS = (*ACTING, "bandit")
SETTINGS = {**ACTING, "ppo": {**ACTING["ppo"], "n_steps": 8}, "trpo": {**ACTING["trpo"], "n_steps": 8},
            "bandit": {"runs": 6}}  # fmt: skip
TEXT = {"data": {"path": "rhymes.txt", "validation": 0.2, "test": 0.2}, "block": 8}
MODEL = {"layers": 1, "heads": 2, "width": 8}
SUPERVISED = {"language_model": {**TEXT, "model": {"name": "gpt", **MODEL}},
              "masked_language_model": {**TEXT, "tokenizer": "bytes", "model": {"name": "bert", **MODEL}}}  # fmt: skip


def spec(cell: Cell) -> dict:
    """A small job of a cell; what acts says itself how large its batches are, and two find their steps themselves."""
    settings = SETTINGS.get(cell.task) or SUPERVISED.get(cell.task, {})
    if cell.task in OWN and cell.strategy.name == "zero" and cell.task != PHASES:
        settings = FLOAT32
    found = spec_of({"name": cell.task, **settings}, strategy=cell.strategy.model_dump(),
                    steps=STEPS, log={"every": 1, "to": []}, workers=1 if cell.strategy.label in TOGETHER else 3,
                    optimizer={"name": "sgd", "lr": 1.0 if cell.task in ("trpo", "bandit") else 0.1})  # fmt: skip
    if cell.task in SETTINGS:
        del found["batch_size"], found["checkpoint"]
    return found


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: f"{cell.task}-{cell.strategy.label}")
def test_a_cell_trains_or_says_why_not(cell):
    if not cell.trains:
        with pytest.raises(UsageError) as caught:
            job_of(spec(cell))
        assert cell.reason in str(caught.value)
        return
    if cell.strategy.label in REFUSED_WHEN_BUILT.get(cell.task, ()):
        with pytest.raises(UsageError, match=r"in 2 phases, and zero/. knows one|no worker has them all"):
            train(spec(cell))
        return
    trained = train(spec(cell))
    totals = [total / count for report in trained.reports for total, count in report.means.values()]
    assert totals
    assert all(math.isfinite(total) for total in totals)
    assert max(strategy.progress.version for strategy in trained.strategies) == STEPS
    assert {event.reason for event in trained.finished} == {"steps"}
    assert len(trained.finished) == len(trained.strategies)
    assert [event.version for event in trained.evaluated] == [STEPS]
    metrics = trained.evaluated[0].metrics
    assert metrics
    assert all(math.isfinite(value) for value in metrics.values())


def test_the_matrix_has_both_kinds_of_cells():
    assert {(cell.task, cell.strategy.label) for cell in CELLS if not cell.trains} == {
        (task, label)
        for task in ("centred:Centred", "fresh:Fresh", "trpo", "bandit")
        for label in ("parameter_server/async", "parameter_server/ssp", "local_sgd")
    } | {("trpo", label) for label in ("zero/1", "zero/2")} | {(task, "zero/3") for task in ACTS}
    assert len(CELLS) == (len(OWN) + len(built_in_tasks())) * 9
