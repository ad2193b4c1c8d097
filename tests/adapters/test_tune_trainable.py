"""A job as a class of Tune's, driven by hand in this process: values count, in whatever order they come."""

from __future__ import annotations

import math

import pytest
from own.sweeps import BASE, OWN

import distml
import distml.adapters.tune_trainable as module
from distml.errors import UsageError
from distml.population.member import Member
from distml.spec.loader import load_spec, load_train
from distml.spec.schema import BestSpec
from distml.tasks.sources import SourceTree

LOSS = BestSpec(metric="eval/loss", mode="min")
SPEC = {"distml": "v1", "name": "tuned", **BASE}


@pytest.fixture
def make(tmp_path, monkeypatch):
    """The class for a job in this folder."""
    monkeypatch.setattr("ray.tune.trainable.trainable.DEFAULT_STORAGE_PATH", str(tmp_path / "tune"))
    monkeypatch.chdir(OWN)

    def made(every=3, **changes):
        return module.trainable({**SPEC, **changes}, every=every)

    return made


def loss_after(steps, lr, start=0.0):
    """(w - 1)² after gradient descent, whose gradient is 2 (w - 1)."""
    return ((start - 1.0) * (1.0 - 2.0 * lr) ** steps) ** 2


def test_a_trial_reports_its_metrics_every_so_often_until_its_own_end(make):
    trial = make()({"optimizer.lr": 0.05})
    results = [trial.train() for _ in range(3)]
    trial.stop()
    assert [result["step"] for result in results] == [3, 6, 9]
    assert [result["done"] for result in results] == [False, False, True]
    assert [result["eval/loss"] for result in results] == pytest.approx(
        [loss_after(n, 0.05) for n in (3, 6, 9)], rel=1e-5
    )


def test_a_state_that_is_loaded_does_not_bring_back_the_values_it_was_saved_with(make, tmp_path):
    donor = make()({"optimizer.lr": 0.05})
    donor.train()
    donor.save(str(tmp_path / "state"))
    other = make()({"optimizer.lr": 0.2})
    other.train()
    other.reset({"optimizer.lr": 0.3})
    other.restore(str(tmp_path / "state"))
    result = other.train()
    assert result["step"] == 6
    went = 1.0 - math.sqrt(loss_after(3, 0.05))
    assert result["eval/loss"] == pytest.approx(loss_after(3, 0.3, start=went), rel=1e-5)
    assert result["eval/loss"] != pytest.approx(loss_after(6, 0.05), rel=1e-2)  # the donor's rate, had it come back
    for trial in (donor, other):
        trial.stop()


def test_a_pause_changes_nothing(make, tmp_path):
    adam = {"optimizer": {"name": "adam", "lr": 0.1}}
    whole = make(**adam)({"optimizer.lr": 0.03})
    expected = [whole.train()["eval/loss"] for _ in range(3)]
    first = make(**adam)({"optimizer.lr": 0.03})
    found = [first.train()["eval/loss"]]
    first.save(str(tmp_path / "state"))
    assert not [file for file in (tmp_path / "state").rglob("*") if file.suffix == ".pkl"]
    second = make(**adam)({"optimizer.lr": 0.5})
    second.reset({"optimizer.lr": 0.03})
    second.restore(str(tmp_path / "state"))
    second.save(str(tmp_path / "again"))  # before it has taken a step
    second.restore(str(tmp_path / "again"))
    found += [second.train()["eval/loss"] for _ in range(2)]
    assert found == expected
    for trial in (whole, first, second):
        trial.stop()


def test_values_that_are_not_in_use_are_a_defect(make, monkeypatch):
    base = load_spec(SPEC, directory=OWN)
    trial = make()({"optimizer.lr": 0.05})
    monkeypatch.setattr(module, "Member", lambda job, *more, **known: Member(base.job, *more, **known))  # forgets them
    with pytest.raises(module.AppliedDiffers, match=r"0\.05 was asked for, 0\.1 is in use"):
        trial.train()
    trial.stop()


def test_a_choice_in_short_form_is_trained_as_what_it_resolves_to(make):
    trial = make()({"optimizer.schedule": "linear", "optimizer.lr": 0.05})
    constant = make()({"optimizer.lr": 0.05})
    assert trial.train()["eval/loss"] > constant.train()["eval/loss"]
    for one in (trial, constant):
        one.stop()


def test_nan_ends_a_trial_and_is_the_worst_there_is(make, tmp_path):
    unknown = make(task={"name": "tuned:Tuned", "args": {"mode": "nan"}})({"optimizer.lr": 0.05})
    with pytest.raises(module.MemberError, match="loss is nan"):  # whose metrics nobody knows: it alone fails
        unknown.train()
    trial = make(task={"name": "tuned:Tuned", "args": {"mode": "nan-later"}})({"optimizer.lr": 0.05})
    assert not trial.train()["done"]
    result = trial.train()
    assert result["done"]
    assert math.isnan(result["eval/loss"])  # without it, Tune ends all trials for want of the metric
    trial.save(str(tmp_path / "state"))  # Tune asks for it at the end
    for one in (unknown, trial):
        one.stop()
    assert module.ordered({"eval/loss": math.nan}, LOSS) > module.ordered({"eval/loss": 1e9}, LOSS)
    most = BestSpec(metric="eval/loss", mode="max")
    assert module.ordered({}, most) < module.ordered({"eval/loss": -1e9}, most)


def test_a_failure_and_a_path_that_is_not_there_are_said(make):
    broken = make(task={"name": "tuned:Tuned", "args": {"mode": "broken"}})({"optimizer.lr": 0.05})
    with pytest.raises(Exception, match="broken by its argument"):
        broken.train()
    unknown = make()({"optimizer.rate": 0.05})
    with pytest.raises(UsageError, match=r"optimizer\.rate"):
        unknown.train()
    with pytest.raises(UsageError, match=r"strategy zero.*on disk"):
        make(strategy="zero")


def test_it_is_at_distml_tune():
    import distml.tune

    assert distml.tune.trainable is module.trainable


def test_a_trial_begins_with_the_weights_that_init_names(make, tmp_path):
    first = distml.run(SPEC, out=tmp_path / "first")
    trial = make(init={"from": str(tmp_path / "first")})({"optimizer.lr": 0.05})
    went = 1.0 - math.sqrt(first.metrics["eval/loss"])
    assert trial.train()["eval/loss"] == pytest.approx(loss_after(3, 0.05, start=went), rel=1e-4)
    trial.stop()


@pytest.mark.parametrize("clear_of", [(), ("one", "two")])
@pytest.mark.parametrize("workers", [1, 2])
def test_a_trials_bundles_keep_clear_of_nodes_for_others(monkeypatch, workers, clear_of):
    """As a training job's do, and on nodes with its labels."""
    monkeypatch.chdir(OWN)
    resources = {"workers": workers, "labels": {"zone": "a"}}
    base = load_train({**SPEC, "resources": resources}, ())
    sources = SourceTree.collect(base.job.task, OWN)
    asked = module.make_trainable(base, sources, 3, clear_of=clear_of).default_resource_request({})
    others = {"ray.io/node-id": "!in(one,two)"} if clear_of else {}
    assert asked._kwargs["bundle_label_selector"] == [{"zone": "a", **others}] * workers
    assert len(asked.bundles) == workers
