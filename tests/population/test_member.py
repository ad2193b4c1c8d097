"""A member: pauses that change nothing, states that go on, copies that keep what is the target's own."""

from __future__ import annotations

import math
import threading
import time

import numpy as np
import pytest
import torch
from own.members import ADAM, changed, member_of, same_state, same_tree, small_job, timeless
from own.oracle import train
from own.rl_jobs import acting_spec

from distml.errors import UsageError
from distml.loop import Trainer, random_states
from distml.population.alone import Alone
from distml.population.member import Member, MemberError
from distml.population.transfer import copied
from distml.runtime.cut import Cut, from_checkpoint, to_checkpoint
from distml.spec.schema import JobSpec
from distml.strategies.optimizer import FlatOptimizer
from distml.tasks.build import build_task

LOCAL = {"name": "local_sgd", "inner_steps": 5}
ASYNC, SYNC = ({"name": "parameter_server", "mode": mode} for mode in ("async", "sync"))
TWO = {"workers": 2}
ALONE = [{"strategy": "single"}, {"strategy": LOCAL}, {"strategy": {"name": "all_reduce", "compression": "topk"}}]
EXACT = [*ALONE, {"strategy": "all_reduce", **TWO}, {"strategy": SYNC, **TWO}, {"strategy": LOCAL, **TWO},
         {"strategy": ASYNC}]  # fmt: skip


def acting_job(**changes) -> JobSpec:
    from own.oracle import job_of

    task = {"name": "actor_critic", "environment": "CartPole-v1", "envs_per_worker": 2, "n_steps": 6,
            "policy": {"name": "mlp", "hidden": [8]}, "evaluation": {"episodes": 2, "modes": ["greedy"]}}  # fmt: skip
    options = {"optimizer": ADAM, "steps": 20, "checkpoint": {"every": 5}, "evaluate": {"every": 5}}
    return job_of(acting_spec(task, **(options | changes)))


# -------------------------------------------------------------------------------------------------------------- pauses
@pytest.mark.parametrize("changes", EXACT, ids=str)
def test_pauses_change_nothing(changes):
    job = small_job(**changes)
    member = member_of(job)
    stands = [member.advance(until, keep=True) for until in (10, 20, None)]
    assert [stand.step for stand in stands] == [10, 20, 40]
    assert [stand.finished for stand in stands] == [None, None, "steps"]
    plain = train(job.model_dump(mode="python", by_alias=True))
    assert stands[-1].state.shared["weights"].tobytes() == plain.weights.numpy().tobytes()
    assert stands[-1].metrics["eval/loss"] == plain.evaluated[-1].metrics["eval/loss"]
    member.close()


def test_asynchronous_workers_all_go_on_where_they_were():
    """One of them makes the version of the pause; the half of the other, slow one is kept too."""
    job = small_job(strategy=ASYNC, inline={"speeds": [1, 0.25]}, **TWO)
    member = member_of(job)
    kept = member.advance(10, keep=True).state
    rounds = [kept.own[rank]["stream"]["round"] for rank in range(2)]
    assert rounds[0] >= 2 * rounds[1] > 0
    assert sum(rounds) >= 10
    other = member_of(job, kept)
    for one in (member, other):
        later = one.advance(20, keep=True).state.own
        assert sum(later[rank]["stream"]["round"] for rank in range(2)) >= sum(rounds) + 10
        assert later[1]["stream"]["round"] < later[0]["stream"]["round"] // 2 + 2
        one.close()


def test_a_block_is_seen_also_in_a_group_of_one(tmp_path):
    """A server's only worker runs in this process; whoever pings it must learn that it does not move."""
    file = tmp_path / "go on"
    task = {"name": "failing:Failing", "args": {"how": "wait", "version": 3, "file": str(file)}}
    member = member_of(small_job(task, strategy=ASYNC))
    training = threading.Thread(target=member.advance, args=(10,))
    training.start()
    try:
        while member.activity[0] != "loss" or member.activity[1] < 0.3:
            assert training.is_alive()
            time.sleep(0.01)
    finally:
        file.touch()
        training.join(60.0)
    assert member.activity == ("idle", 0.0)
    member.close()


def test_a_pause_is_a_checkpoints_boundary_for_what_acts():
    """Environments begin anew at a pause, as a run's do at its checkpoints; without them it is another run."""
    job = acting_job()
    member = member_of(job)
    for until in (5, 10, 15, None):
        stand = member.advance(until, keep=True)
    found = [train(job.model_dump(mode="python", by_alias=True) | {"checkpoint": {"every": every}}).weights.numpy()
             for every in (5, 20)]  # fmt: skip
    assert stand.state.shared["weights"].tobytes() == found[0].tobytes()
    assert stand.state.shared["weights"].tobytes() != found[1].tobytes()


@pytest.mark.parametrize("changes", [*EXACT, "acting"], ids=str)
def test_a_state_goes_on_where_it_was_taken_also_through_a_checkpoint(changes):
    job = acting_job() if changes == "acting" else small_job(**changes)
    member = member_of(job)
    kept = member.advance(10, keep=True).state
    layout, frozen = member.training.layout, member.training.frozen()
    stored = from_checkpoint(to_checkpoint(kept, layout, frozen, {}), layout)
    ends = [member.advance(20, keep=True).state]
    for state in (kept, stored):
        other = member_of(job, state)
        ends.append(other.advance(20, keep=True).state)
        other.close()
    assert same_state(ends[0], ends[1])
    assert same_state(ends[0], ends[2])
    member.close()


def test_it_is_evaluated_where_it_stands_and_says_what_is_new():
    member = member_of(small_job(log={"every": 4, "to": []}, evaluate={"every": 1000}))
    stand = member.advance(10)
    assert stand.state is None
    assert [row["step"] for row in stand.rows] == [4, 8, 10, 10]
    assert "eval/loss" in stand.rows[-1]
    assert stand.metrics["eval/loss"] == stand.rows[-1]["eval/loss"] == member.evaluate("validation")["eval/loss"]
    again = member.advance(10)  # it is there already
    assert again.metrics["eval/loss"] == stand.metrics["eval/loss"]
    assert {row["step"] for row in member.advance(16).rows} == {12, 16}
    assert set(member.evaluate("test")) == {"test/loss"}


@pytest.mark.parametrize(("stop", "reason", "step"), [
    ({"steps": 7}, "steps", 7), ({"steps": 40, "goal": {"metric": "eval/loss", "at_most": 100.0}}, "goal", 5),
    ({"steps": 40, "patience": 1}, "patience", None), ({"examples": 60}, "examples", 5),
])  # fmt: skip
def test_its_own_end_is_told(stop, reason, step):
    spec = {"stop": stop, "evaluate": {"every": 5}, "optimizer": {"name": "sgd", "lr": 3.0}}
    member = member_of(small_job(**spec))
    for until in range(5, 45, 5):
        stand = member.advance(until)
        if stand.finished:
            break
    assert stand.finished == reason
    assert step in (None, stand.step)
    assert member.advance(stand.step + 5).step == stand.step


def test_members_leave_each_others_random_states_alone():
    job, other = (small_job(evaluate={"every": 5}, seed=seed) for seed in (0, 7))
    alone = member_of(job).advance(20, keep=True).state
    first, second = member_of(job), member_of(other)
    before = random_states()
    for until in (5, 10, 15, 20):
        ends = first.advance(until, keep=True).state, second.advance(until, keep=True).state
    assert same_tree(before, random_states())
    assert same_state(ends[0], alone)
    assert not same_state(ends[0], ends[1])


# -------------------------------------------------------------------------------------------------------------- copies
def stands(job: JobSpec, **donor) -> tuple[Member, Cut]:
    """A target at version 10, and the state of a donor of another seed at version 20."""
    target, other = member_of(job), member_of(changed(job, seed=5, **donor))
    target.advance(10)
    kept = other.advance(20, keep=True).state
    other.close()
    return target, kept


@pytest.mark.parametrize("changes", EXACT, ids=str)
def test_a_copy_takes_the_shared_half_and_keeps_the_own(changes):
    job = small_job(**changes)
    target, theirs = stands(job)
    before = target.state()
    target.copy(theirs, job)
    after = target.state()
    assert same_tree(after.shared["weights"], theirs.shared["weights"])
    assert same_tree(after.shared["moments"], theirs.shared["moments"])
    clock = after.shared["clock"]
    assert (clock["version"], clock["examples"], clock["updates"]) == (10, 120, 20)
    assert clock["agenda"] == before.shared["clock"]["agenda"]
    assert after.own.keys() == before.own.keys()
    for rank, half in before.own.items():
        assert same_tree(after.own[rank]["stream"], half["stream"])
        assert same_tree(after.own[rank]["random"], half["random"])
    assert target.advance(None).step == 40  # its own budget
    target.close()


def test_what_follows_a_copy_is_what_follows_a_load_by_hand():
    job = small_job()
    target, theirs = stands(job)
    own = target.state()
    new = changed(job, optimizer__lr=0.05, optimizer__betas=[0.8, 0.9])
    assert target.copy(theirs, new, ["optimizer.lr", "optimizer.betas"]) == {
        "optimizer.lr": 0.05, "optimizer.betas": [0.8, 0.9]}  # fmt: skip
    end = target.advance(20, keep=True).state

    def by_hand(updates: int) -> np.ndarray:
        trainer = Trainer(new, build_task(new), 0, 1)
        trainer.build()
        trainer.connect(None, None)
        clock = {**own.shared["clock"], "updates": updates}
        trainer.load({**theirs.shared, "clock": clock}, own.own[0])
        for _ in trainer.advance(20):
            pass
        return trainer.strategy.flat.weights.numpy()

    assert end.shared["weights"].tobytes() == by_hand(20).tobytes()
    assert end.shared["weights"].tobytes() != by_hand(10).tobytes()  # Adam's bias correction is the moments'


def test_values_are_applied_after_the_state_and_read_back():
    """In the other order the donor's values are what trains, and what is read back shows it."""
    job = small_job()
    target, theirs = stands(job, optimizer__lr=0.5, optimizer__weight_decay=0.25)
    new = changed(job, optimizer__lr=0.07, optimizer__weight_decay=0.125)
    requested = {"optimizer.lr": 0.07, "optimizer.weight_decay": 0.125}
    assert target.copy(theirs, new, list(requested)) == requested

    target.apply(new)  # the control: reversed
    target.training.load(copied(*target.training.standing(), theirs))
    assert target.live(list(requested)) == {"optimizer.lr": 0.5, "optimizer.weight_decay": 0.25}


def test_what_is_read_back_is_what_computes(monkeypatch):
    job = small_job()
    target, theirs = stands(job)
    new = changed(job, optimizer__lr=0.07, batch_size=20)
    monkeypatch.setattr(Trainer, "retune", lambda self, job: None)
    assert target.copy(theirs, changed(job, optimizer__lr=0.07), ["optimizer.lr"]) == {"optimizer.lr": 0.01}
    monkeypatch.setattr(Alone, "become", lambda self, job: None)
    assert target.copy(theirs, new, ["batch_size"]) == {"batch_size": 12}


def test_a_donors_moments_come_along_where_the_optimisers_differ():
    job = small_job(optimizer={"name": "sgd", "lr": 0.1, "momentum": 0.5})
    target, theirs = stands(job, optimizer=ADAM)
    new = changed(job, optimizer=ADAM | {"lr": 0.2})
    assert target.copy(theirs, new, ["optimizer.name", "optimizer.lr"]) == {
        "optimizer.name": "adam",
        "optimizer.lr": 0.2,
    }
    state = target.state().shared
    assert same_tree(state["moments"], theirs.shared["moments"])
    assert state["clock"]["updates"] == 20
    target.copy(theirs, job)
    assert {name: float(np.abs(v).sum()) for name, v in target.state().shared["moments"].items()} == {"momentum": 0.0}


@pytest.mark.parametrize("workers", [1, 2])
def test_a_copy_between_members_that_act(workers):
    job = acting_job(workers=workers, strategy=ASYNC, evaluate={"every": 1000})
    target, donor = member_of(job), member_of(changed(job, seed=3))
    target.advance(5)
    theirs = donor.advance(10, keep=True).state
    watch = {"task.entropy": 0.5, "optimizer.lr": 0.03, "task.n_steps": 4, "batch_size": 8 * workers}
    new = changed(job, **{path.replace(".", "__"): value for path, value in watch.items() if path != "batch_size"},
                  batch_size=8 * workers)  # fmt: skip
    before = target.state().shared["clock"]
    assert target.copy(theirs, new, list(watch)) == watch
    after = target.state().shared
    assert after["clock"]["frames"] == before["frames"] > 0
    assert same_tree(after["weights"], theirs.shared["weights"])
    stand = target.advance(15)
    assert stand.step == 15
    assert math.isfinite(stand.metrics["eval/return_greedy_mean"])
    for member in (target, donor):
        member.close()


# ------------------------------------------------------------------------------------------------------ changed values
def test_the_optimisers_values_change_in_place():
    job = small_job(optimizer={"name": "sgd", "lr": 0.1})
    member = member_of(job)
    member.advance(10)
    trainer = member.training.trainer
    member.apply(changed(job, optimizer__momentum=0.9, optimizer__schedule={"name": "linear"}))
    assert member.training.trainer is trainer
    assert member.live(["optimizer.momentum", "optimizer.schedule.name", "optimizer.lr"]) == {
        "optimizer.momentum": 0.9, "optimizer.schedule.name": "linear", "optimizer.lr": 0.1}  # fmt: skip
    assert not member.state().shared["moments"]["momentum"].any()
    assert trainer.strategy.learning_rate() == pytest.approx(0.1 * 0.75)


def test_other_values_are_built_anew_and_the_state_stays():
    job = small_job(task={"name": "dropout:Dropout", "args": {"dropout": 0.5}})
    member = member_of(job)
    before = member.advance(10, keep=True).state
    new = changed(job, task__args__dropout=0.25, batch_size=6)
    member.apply(new)
    assert member.live(["task.args.dropout", "batch_size"]) == {"task.args.dropout": 0.25, "batch_size": 6}
    assert [module.p for module in member.training.trainer.model.modules() if isinstance(module, torch.nn.Dropout)] == [
        0.25
    ]
    after = member.state()
    assert after.own[0]["stream"] == {"round": 20}  # the same example
    before.own[0]["stream"] = after.own[0]["stream"]
    assert same_tree(timeless(after), timeless(before))
    assert member.advance(12).step == 12


def test_another_shape_is_refused_by_its_path():
    job = small_job(task={"name": "small:Small", "args": {"hidden": 8, "rows": 40}})
    member = member_of(job)
    with pytest.raises(UsageError, match=r"^task\.args\.hidden changes the model's shape; .*use kind: sweep"):
        member.apply(changed(job, task__args__hidden=16))
    other = member_of(changed(job, task__args__hidden=16)).advance(5, keep=True).state
    with pytest.raises(UsageError, match="does not fit a model"):
        member.copy(other, job)
    assert member.advance(5).step == 5  # as it was


def test_rules_change_with_moments_that_fit():
    from distml.exchange.layout import Layout
    from distml.spec.schema import AdamSpec, AdamWSpec, RMSpropSpec, SGDSpec

    layout = Layout.build([("a", (4,), 0, 0)])
    one = FlatOptimizer(AdamSpec(name="adam"), layout, (0, 4), torch.zeros(4), None)
    one.moments["exp_avg"].fill_(1.0)
    one.updates = 9
    one.change_rule(AdamWSpec(name="adamw"))
    assert (float(one.moments["exp_avg"].sum()), one.updates) == (4.0, 9)
    one.change_rule(SGDSpec(name="sgd", momentum=0.9))
    one.moments["momentum"].fill_(1.0)
    one.change_rule(RMSpropSpec(name="rmsprop", momentum=0.9))
    assert not any(float(moment.sum()) for moment in one.moments.values())
    one.change_rule(AdamSpec(name="adam"))
    assert one.updates == 0


# ------------------------------------------------------------------------------------------------------------ failures
@pytest.mark.parametrize(("how", "kind", "cause"), [
    ("nan", "not_finite", "BadLossError: loss is nan"), ("raise", "failed", "KeyError: 'no such word' (failing.py:"),
])  # fmt: skip
@pytest.mark.parametrize("changes", [{}, {"strategy": ASYNC, **TWO}], ids=["alone", "grouped"])
def test_a_failure_says_what_where_and_when(how, kind, cause, changes):
    member = member_of(small_job({"name": "failing:Failing", "args": {"how": how, "version": 13}}, **changes))
    member.advance(10)
    with pytest.raises(MemberError) as caught:
        member.advance(20)
    error = caught.value
    assert (error.kind, error.phase, error.step) == (kind, "loss", 13)
    assert error.cause.startswith(cause)
    member.close()


def test_weights_that_are_not_finite_are_noticed():
    small = {"name": "small:Small", "args": {"dtype": "float32"}}
    member = member_of(small_job(small, optimizer={"name": "sgd", "lr": 1e308}, stop={"steps": 1}))
    with pytest.raises(MemberError) as caught:
        member.advance(1)
    assert caught.value.kind == "not_finite"


def test_a_state_in_parts_is_refused():
    with pytest.raises(UsageError, match="zero/1 keeps each rank's part"):
        member_of(small_job(strategy={"name": "zero", "stage": 1}))
