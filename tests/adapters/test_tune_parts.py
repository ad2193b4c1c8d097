"""Sweeps without Ray: who proposes, what is kept, which trial is the best; what a resume knows."""

from __future__ import annotations

import json
import math
import random
from types import SimpleNamespace

import pytest
from own.on_ray import Notes
from own.sweeps import loaded, sweep_file

from distml.adapters.tune_book import TrialBook, TrialRecord
from distml.adapters.tune_hooks import SweepState
from distml.adapters.tune_samplers import RandomSampler, build_sampler
from distml.adapters.tune_trainable import Detail
from distml.errors import UsageError
from distml.runs.directory import RunDirectory
from distml.spec.loader import load_spec
from distml.spec.search_rules import space_of
from distml.tasks.sources import SourceTree

GRID = {"optimizer.lr": {"choice": [0.1, 0.2]}, "batch_size": {"choice": [2, 4, 8]}}
MIXED = {"optimizer.lr": {"loguniform": [1e-3, 1.0]}, "batch_size": {"randint": [1, 8]},
         "optimizer.name": {"choice": ["sgd", "adam"]}}  # fmt: skip
LOSS, COST = {"metric": "eval/loss", "mode": "min"}, {"metric": "eval/cost", "mode": "max"}


def sampler_of(folder, **changes):
    job = loaded(folder, **changes).job
    return build_sampler(job, space_of(job))


def book_of(folder, **changes):
    spec = loaded(folder, **changes)
    out = folder / "run"
    out.mkdir(exist_ok=True)
    return TrialBook(spec, RunDirectory(out), SourceTree.collect(spec.job.base.task, spec.directory))


def test_a_grid_is_every_combination_once_the_last_path_fastest(tmp_path):
    sampler = sampler_of(tmp_path, sampler="grid", space=GRID, trials=None)
    found = [tuple(sampler.propose(index).values()) for index in range(sampler.num_trials)]
    assert found == [(0.1, 2), (0.1, 4), (0.1, 8), (0.2, 2), (0.2, 4), (0.2, 8)]
    assert sampler_of(tmp_path, sampler="grid", space=GRID, trials=4).num_trials == 4


def test_random_trials_depend_on_seed_and_number_alone(tmp_path):
    def drawn(order, **changes):
        sampler = sampler_of(tmp_path, space=MIXED, **changes)
        found = {index: sampler.propose(index) for index in order}
        return [found[index] for index in sorted(found)]

    assert drawn(range(6)) == drawn([3, 1, 5, 0, 2, 4])
    assert drawn(range(6)) != drawn(range(6), seed=1)
    assert isinstance(sampler_of(tmp_path), RandomSampler)


def test_optuna_proposes_the_same_for_the_same_seed_and_learns(tmp_path):
    pytest.importorskip("optuna")

    def run(seed, score):
        sampler, found = sampler_of(tmp_path, sampler="optuna", space=MIXED, seed=seed, trials=40), []
        for index in range(40):
            found.append(sampler.propose(index))
            sampler.tell(index, [score(found[-1])])
        return found

    def near(values):
        return abs(math.log(values["optimizer.lr"] / 0.1))

    one = run(3, near)
    assert one == run(3, near)
    assert one[:10] != run(4, near)[:10]
    # The control: told the opposite, it looks elsewhere.
    assert sum(map(near, one[-10:])) < sum(map(near, run(3, lambda values: -near(values))[-10:]))


def test_optuna_that_is_asked_and_told_again_goes_on_as_it_would_have(tmp_path):
    pytest.importorskip("optuna")

    def scores(values):
        return [math.nan if values["batch_size"] == 1 else values["optimizer.lr"]]

    whole, found = sampler_of(tmp_path, sampler="optuna", space=MIXED, trials=30), []
    for index in range(30):
        found.append(whole.propose(index))
        whole.tell(index, None if index == 4 else scores(found[-1]))
    again = sampler_of(tmp_path, sampler="optuna", space=MIXED, trials=30)
    for index in range(15):
        again.recall(index, found[index])
        again.tell(index, None if index == 4 else scores(found[index]))
    assert [again.propose(15)] == found[15:16]
    # Values that another version of Optuna proposed are what counts.
    other = sampler_of(tmp_path, sampler="optuna", space=MIXED, trials=30)
    other.recall(0, {"optimizer.lr": 0.5, "batch_size": 7, "optimizer.name": "adam"})
    assert other.asked[0].params == {"optimizer.lr": 0.5, "batch_size": 7, "optimizer.name": 1}


def run_of(folder, seed, lag=3, slots=3):
    """What is proposed where `slots` trials are under way, which end in an order of chance."""
    book, sampler, live = (
        book_of(folder, sampler="optuna", trials=20),
        sampler_of(folder, sampler="optuna", trials=20),
        [],
    )
    sampler.lag = lag
    state, chance = SweepState(book, sampler, Notes(), 0, lambda: None), random.Random(seed)
    while True:
        trial = state.next() if len(live) < slots else "later"
        if isinstance(trial, TrialRecord):
            live.append(trial)
        elif live:
            ended = live.pop(chance.randrange(len(live)))
            state.report(
                ended, Detail(9, 1.0, {"eval/loss": ended.values["optimizer.lr"]}, [], ended.values, fresh=True)
            )
            state.end(ended, "finished")
        else:
            book.close()
            return [trial.values for trial in book.trials.values()]


def test_what_optuna_proposes_does_not_depend_on_who_ends_first(tmp_path):
    pytest.importorskip("optuna")
    found = []
    for seed, lag in ((1, 3), (2, 3), (2, 1)):
        folder = tmp_path / f"{seed}-{lag}"
        folder.mkdir()
        found.append(run_of(folder, seed, lag))
    assert [len(one) for one in found] == [20, 20, 20]
    assert found[0] == found[1]
    assert found[1] != found[2]  # which knows all but itself


def test_optuna_that_is_missing_is_said_with_the_extra(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install 'distml\[optuna\]'"):
        sampler_of(tmp_path, sampler="optuna")


def finish(book, index, event="finished", **metrics):
    trial = book.propose(index, {"optimizer.lr": 0.1 + index / 100})
    book.prepare(trial)
    book.report(trial, 9, 1.5, {f"eval/{name}": value for name, value in metrics.items()}, [{"step": 9, "wall_s": 1.5}])
    folder = book.folder(index) / "checkpoints" / "step-00000009"
    folder.mkdir(parents=True)
    book.end(trial, event)
    return trial


def test_nan_is_the_worst_and_a_trial_that_was_stopped_is_not_compared_with_whole_ones(tmp_path):
    book = book_of(tmp_path)
    finish(book, 0, loss=math.nan)
    assert book.best() is None
    finish(book, 4, event="stopped", loss=0.9)
    assert book.best().index == 4  # a trial that has diverged hides no finite one
    finish(book, 1, loss=0.5)
    finish(book, 2, loss=0.7)
    finish(book, 3, event="stopped", loss=0.1)
    assert book.best().index == 1
    assert [trial.index for trial in book.trials.values() if (book.folder(trial.index) / "checkpoints").exists()] == [1]
    assert json.loads((book.folder(2) / "result.json").read_text())["checkpoint"] is None


def test_a_trial_that_has_diverged_is_not_done_and_says_why(tmp_path):
    book = book_of(tmp_path)
    trial = book.propose(0, {"optimizer.lr": 0.1})
    book.prepare(trial)
    book.report(trial, 3, 1.0, {"eval/loss": math.nan}, [])
    book.end(trial, "diverged", "the loss is nan")
    assert finish(book, 1, loss=0.5).end == "finished"
    record = json.loads((book.folder(0) / "result.json").read_text())
    assert (record["status"], record["error"]["message"]) == ("failed", "the loss is nan")
    again = book_of(tmp_path)
    again.recall(sampler_of(tmp_path))
    assert again.trials[0].end == "diverged"


def test_the_pareto_set_is_what_nobody_dominates_and_tie_break_chooses_from_it(tmp_path):
    book = book_of(tmp_path, objective=[LOSS, COST], tie_break=COST)
    for index, (loss, cost) in enumerate([(0.1, 1.0), (0.2, 2.0), (0.3, 1.5), (0.4, 3.0), (math.nan, 2.0)]):
        finish(book, index, loss=loss, cost=cost)
    assert [trial.index for trial in book.front()] == [0, 1, 3]
    assert book.best().index == 3


def test_a_resume_knows_what_ended_what_did_not_and_what_comes_next(tmp_path):
    book, sampler = book_of(tmp_path), sampler_of(tmp_path)
    finish(book, 0, loss=0.5)
    book.prepare(book.propose(1, sampler.propose(1)))
    retried = book.propose(2, sampler.propose(2))
    book.retry(retried, "once")
    assert book.last_error == "once"
    finish(book, 3, loss=0.4)
    book.close()
    with (tmp_path / "run" / "trials.jsonl").open("a") as file:
        file.write('{"trial": "0001", "event": "fini')  # killed while it wrote
    again = book_of(tmp_path)
    again.recall(sampler)
    assert {trial.index: trial.end for trial in again.trials.values()} == {
        0: "finished",
        1: None,
        2: None,
        3: "finished",
    }
    assert [trial.index for trial in again.unfinished()] == [1, 2]
    assert again.trials[2].failures == 1
    assert again.last_error == "once"
    assert again.best().index == 3
    assert again.earlier_s > 0


def test_asha_knows_the_rungs_of_an_earlier_process(tmp_path):
    from distml.adapters.tune_schedulers import OBJECTIVE, REPORTS, build_scheduler, replay

    book = book_of(tmp_path, scheduler={"name": "asha", "reduction_factor": 3})
    for index in range(4):
        trial = book.propose(index, {"optimizer.lr": 0.1})
        book.prepare(trial)
        rows = [{"step": step, "wall_s": 0.0, "eval/loss": 0.1 * (index + 1)} for step in range(1, 10)]
        book.report(trial, 9, 1.0, {"eval/loss": 0.1 * (index + 1)}, rows)
        book.end(trial, "finished")

    def first_report(scheduler):
        trial = SimpleNamespace(trial_id="new")
        scheduler.on_trial_add(None, trial)
        return scheduler.on_trial_result(None, trial, {REPORTS: 1, OBJECTIVE: 0.9})

    told, ignorant = (build_scheduler(book.job, space_of(book.job)) for _ in range(2))
    replay(told, book, book.job)
    assert (first_report(told), first_report(ignorant)) == ("STOP", "CONTINUE")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scheduler": "asha", "base": {"stop": {"seconds": 5}}}, "asha needs to know how many steps"),
        ({"scheduler": "pbt", "sampler": "grid", "space": GRID, "trials": None}, "use sampler: random"),
        ({"scheduler": "pb2", "space": {"batch_size": {"randint": [2, 8]}}}, "pb2 models numbers without steps"),
        ({"scheduler": "pbt", "trials": 1}, "copies trials, and trials is 1"),
        ({"base": {"strategy": "zero"}}, "a trial of a sweep has its state in one place"),
        ({"space": {"resources.cpus_per_worker": {"choice": [1, 2]}}}, "may not be searched"),
    ],
)
def test_what_tune_cannot_do_is_refused_with_its_place(tmp_path, changes, message):
    from own.sweeps import BASE

    changes = {**changes, "base": {**BASE, **changes.get("base", {})}}
    with pytest.raises(UsageError, match=r"sweep\.json\.yaml:1:\d+: ") as caught:
        load_spec(sweep_file(tmp_path, **changes))
    assert message in str(caught.value)
