"""When a run ends and what is due when, against hand values; schedules against torch's own."""

from __future__ import annotations

import math

import pytest
import torch
from own.oracle import job_of, spec_of
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, StepLR

from distml.spec.schema import ScheduleSpec
from distml.strategies.agenda import Agenda, Spent, crossed
from distml.strategies.optimizer import schedule_factor


def agenda(stop: dict, *, updates: int = 1, size: int | None = None, snapshot: int | None = None, **keys) -> Agenda:
    return Agenda(job_of(spec_of(stop=stop, **keys)), updates_per_round=updates, dataset_size=size,
                  snapshot_every=snapshot)  # fmt: skip


def test_crossed():
    assert [crossed(before, version, 10) for before, version in ((9, 10), (10, 11), (8, 12), (0, 9), (5, 31))] == [
        True, False, True, False, True]  # fmt: skip


def test_the_first_budget_that_is_used_up_ends_the_run():
    both = agenda({"steps": 10, "examples": 100})
    used = ((9, 99), (10, 99), (9, 100), (10, 100))
    assert [both.spent(Spent(*pair)) for pair in used] == [None, "steps", "examples", "steps"]
    timed = agenda({"seconds": 5.0})
    assert (timed.spent(Spent(10**6, 10**9, 10**9, 4.9)), timed.spent(Spent(seconds=5.0))) == (None, "seconds")
    epochs = agenda({"epochs": 2.5}, size=41)
    assert [epochs.spent(Spent(1, e)) for e in (102, 103)] == [None, "epochs"]


def test_the_budget_in_steps_is_what_schedules_end_at():
    assert agenda({"steps": 10, "examples": 100}).budget_steps == 9  # 100 / 12, rounded up
    assert agenda({"examples": 100}, updates=3).budget_steps == 25
    assert agenda({"epochs": 2.0}, size=40).budget_steps == 7
    assert agenda({"seconds": 1.0}).budget_steps is None


def test_the_fraction_is_of_the_budget_nearest_to_its_end():
    both = agenda({"steps": 10, "examples": 100, "seconds": 4.0})
    assert both.fraction(Spent(5, 20, 0, 0.4)) == 0.5
    assert both.fraction(Spent(5, 80, 0, 0.4)) == 0.8
    assert both.fraction(Spent(5, 80, 0, 3.8)) == 0.95
    assert both.fraction(Spent(12, 80, 0, 1.0)) == 1.0


def test_duties():
    due = agenda({"steps": 100}, evaluate={"every": 6}, checkpoint={"every": 4}, snapshot=3)
    assert {version: due.duties(version, None) for version in range(1, 13) if due.duties(version, None)} == {
        3: ("snapshot",), 4: ("checkpoint", "snapshot"), 6: ("evaluate", "snapshot"), 8: ("checkpoint", "snapshot"),
        9: ("snapshot",), 12: ("evaluate", "checkpoint", "snapshot")}  # fmt: skip
    assert due.duties(5, "steps") == ("evaluate", "checkpoint", "snapshot")
    assert due.duties(5, "requested") == ("checkpoint", "snapshot")
    assert due.duties(12, "requested") == due.duties(12, None)  # or a resumed run would lack it


@pytest.mark.parametrize(("goal", "value", "verdict"), [
    ({"at_least": 0.9}, 0.9, "goal"), ({"at_least": 0.9}, 0.89, None), ({"at_most": 0.1}, 0.1, "goal"),
    ({"at_most": 0.1}, 0.2, None), ({"at_least": 0.9}, math.nan, None), ({"at_most": 0.1}, math.nan, None),
])  # fmt: skip
def test_goals(goal, value, verdict):
    judged = agenda({"steps": 10, "goal": {"metric": "eval/score", **goal}})
    assert judged.judge(1, {"eval/score": value, "eval/loss": 0.0}) == verdict


def test_patience_counts_evaluations_without_a_better_one():
    def verdicts(values, **keys):
        judged = agenda({"steps": 99, "patience": 2, **keys.pop("stop", {})}, **keys)
        name = judged.watched[0]
        return [judged.judge(i, {name: value}) for i, value in enumerate(values)]

    assert verdicts([3.0, 2.0, 2.5, 2.0]) == [None, None, None, "patience"]  # equal is not better
    assert verdicts([3.0, 2.0, 2.5, 1.9, 2.0, 2.0]) == [None] * 5 + ["patience"]
    assert verdicts([3.0, math.nan, math.nan]) == [None, None, "patience"]
    best = {"checkpoint": {"best": {"metric": "eval/score", "mode": "max"}}}
    assert verdicts([3.0, 2.0, 2.5], **best) == [None, None, "patience"]
    goal = {"stop": {"goal": {"metric": "eval/score", "at_least": 9.0}}}
    assert verdicts([3.0, 4.0, 2.5, 9.0], **goal) == [None, None, None, "goal"]


def test_a_metric_that_is_watched_and_not_reported_is_an_error():
    judged = agenda({"steps": 10, "goal": {"metric": "eval/score", "at_least": 1.0}})
    with pytest.raises(ValueError, match=r"'eval/score'.*reports \['eval/loss'\]"):
        judged.judge(1, {"eval/loss": 1.0})
    assert agenda({"steps": 10}).judge(1, {"eval/other": 1.0}) is None


def test_the_evaluations_so_far_survive_a_resume():
    first, second = agenda({"steps": 99, "patience": 2}), agenda({"steps": 99, "patience": 2})
    for version, loss in ((1, 1.0), (2, 2.0)):
        first.judge(version, {"eval/loss": loss})
    second.load_state(first.state())
    assert second.judge(3, {"eval/loss": 3.0}) == "patience"


# ------------------------------------------------------------------------------------------------------------ schedules
def factors(schedule: dict, count: int, budget: int | None = None) -> list[float]:
    spec = ScheduleSpec.model_validate(schedule)
    return [schedule_factor(spec, version, budget) for version in range(count)]


def test_schedules_by_hand():
    assert factors({"name": "constant"}, 3) == [1.0, 1.0, 1.0]
    assert factors({"name": "constant", "warmup": 4}, 6) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert factors({"name": "linear", "steps": 4}, 6) == [1.0, 0.75, 0.5, 0.25, 0.0, 0.0]
    assert factors({"name": "linear", "final": 0.5}, 5, budget=4) == [1.0, 0.875, 0.75, 0.625, 0.5]
    assert factors({"name": "linear", "warmup": 2, "steps": 4}, 5) == [0.5, 1.0, 1.0, 0.5, 0.0]
    assert factors({"name": "step", "every": 2, "factor": 0.5}, 5) == [1.0, 1.0, 0.5, 0.5, 0.25]
    assert factors({"name": "cosine", "steps": 2, "final": 0.2}, 4) == pytest.approx([1.0, 0.6, 0.2, 0.2])


def live(scheduler_of, count: int) -> list[float]:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler, found = scheduler_of(optimizer), []
    for _ in range(count):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def test_schedules_are_torchs():
    cosine = live(lambda o: CosineAnnealingLR(o, T_max=20, eta_min=0.1), 21)
    assert factors({"name": "cosine", "steps": 20, "final": 0.1}, 21) == pytest.approx(cosine, abs=1e-12)
    stepped = live(lambda o: StepLR(o, 3, 0.1), 12)
    assert factors({"name": "step", "every": 3}, 12) == pytest.approx(stepped, abs=1e-12)

    def warm(version: int) -> float:
        return (version + 1) / 5 if version < 5 else 0.5 * (1 + math.cos(math.pi * (version - 5) / 15))

    warmed = live(lambda o: LambdaLR(o, warm), 20)
    assert factors({"name": "cosine", "warmup": 5}, 20, budget=20) == pytest.approx(warmed, abs=1e-12)
