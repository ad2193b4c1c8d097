"""An architecture search over small real children: its files, its order, its failures, and that a resume is exact."""

from __future__ import annotations

import json
import math
import os
import signal
from pathlib import Path

import pytest
from own.searches import TriedHost, gone, journal, run_search, search, with_metrics

import distml
from distml.errors import RunError, UsageError
from distml.launch.evaluate import evaluate_split, load_model
from distml.population import search as module
from distml.population.controller import make_controller
from distml.population.host import Advanced, Ready
from distml.population.reward import exponent
from distml.runs.directory import Result, RunDirectory
from distml.runtime.members import InlineHost
from distml.spec.decisions import decision_space
from distml.spec.loader import load_spec


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[Path, Result, list[str]]:
    """A search that nothing happened to."""
    out = tmp_path_factory.mktemp("search") / "out"
    _, result, notes = run_search(search(), out)
    return out, result, notes


def test_every_child_has_its_events_folder_and_reward(whole):
    out, result, _ = whole
    rows = journal(out)
    assert [(row["trial"], row["event"]) for row in rows] == [
        (f"{index:04d}", event) for index in range(10) for event in ("proposed", "finished")
    ]
    space = decision_space(load_spec(search()).job)
    for proposed, finished in zip(rows[::2], rows[1::2], strict=True):
        assert space.choices(proposed["values"]) == proposed["decisions"] == finished["decisions"]
        hidden = proposed["values"]["task.model.hidden.0"]
        assert finished["cost"] == 64 * hidden + hidden + hidden * 10 + 10
        expected = finished["metrics"]["eval/accuracy"] * (finished["cost"] / 300.0) ** exponent(0.05)
        assert finished["reward"] == pytest.approx(expected)
        assert (proposed["reward"], proposed["error"], finished["step"]) == (None, None, 6)
        assert math.log(1 / space.size) * 3 < proposed["logprob"] < 0
        folder = out / "trials" / proposed["trial"]
        own = load_spec(folder / "spec.yaml").job
        assert own.task.model.hidden == [hidden]
        assert own.optimizer.lr == proposed["values"]["optimizer.lr"]
        ended = json.loads((folder / "result.json").read_text())
        assert (ended["status"], ended["step"]) == ("done", 6)
        assert ended["metrics"]["eval/accuracy"] == finished["metrics"]["eval/accuracy"]
        assert json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 6
    rewards = [row["reward"] for row in rows[1:4:2]]
    assert [row["baseline"] for row in rows[:3:2]] == [None, None]
    assert min(rewards) <= rows[4]["baseline"] <= max(rewards)
    assert (result.status, result.step) == ("done", 10)


def test_the_best_child_is_a_runnable_spec_and_its_own_weights_are_tested_once(whole, tmp_path):
    out, result, notes = whole
    finished = [row for row in journal(out) if row["event"] == "finished"]
    best = max(finished, key=lambda row: row["reward"])
    assert result.best["trial"] == best["trial"]
    assert (result.best["metric"], result.best["value"]) == ("eval/accuracy", best["metrics"]["eval/accuracy"])
    assert (result.best["reward"], result.best["cost"], result.best["step"]) == (best["reward"], best["cost"], 6)
    scores = evaluate_split(load_model(out / "trials" / best["trial"]), "test")
    assert scores.items() <= result.metrics.items()
    assert result.metrics["eval/loss"] == best["metrics"]["eval/loss"]
    again = distml.run(out / "best.yaml", out=tmp_path / "again")
    assert again.metrics["eval/accuracy"] == best["metrics"]["eval/accuracy"]
    assert again.metrics["test/accuracy"] == scores["test/accuracy"]
    assert any("its own final weights are tested" in line for line in notes)


def test_the_front_is_in_the_result_and_in_the_closing_lines(whole):
    out, result, notes = whole
    finished = {row["trial"]: row for row in journal(out) if row["event"] == "finished"}
    front = [finished[name] for name in result.best["pareto"]]
    assert [row["cost"] for row in front] == sorted({row["cost"] for row in front})
    for row in finished.values():
        assert any(one["cost"] <= row["cost"] and one["metrics"]["eval/accuracy"] >= row["metrics"]["eval/accuracy"]
                   for one in front)  # fmt: skip
    assert f"Pareto front, eval/accuracy against parameters: {len(front)} of 10 children" in notes
    rows = RunDirectory(out).metrics.read()
    assert [row["step"] for row in rows] == list(range(1, 11))
    assert [row["nas/best_reward"] for row in rows] == sorted(row["nas/best_reward"] for row in rows)


# -------------------------------------------------------------------------------------------------------------- resumes
@pytest.mark.parametrize("answers", [0, 2, 5, 12])
def test_interrupted_and_resumed_is_uninterrupted(answers, whole, tmp_path, monkeypatch):
    if answers > 5:
        monkeypatch.setattr(module, "STATE_EVERY", 3)  # the controller's kept state, and the rest of the journal
    with pytest.raises(KeyboardInterrupt):
        run_search(search(), tmp_path / "out", TriedHost(stop_after=answers))
    assert json.loads((tmp_path / "out/result.json").read_text())["status"] == "interrupted"
    _, result, notes = run_search(search(), tmp_path / "out", TriedHost(), resume=True)
    assert journal(tmp_path / "out") == journal(whole[0])
    assert (result.best, result.step) == (whole[1].best, 10)
    assert result.metrics["test/loss"] == whole[1].metrics["test/loss"]
    assert any("resuming" in line for line in notes)
    assert not any("proposes otherwise" in line for line in notes)


def test_a_resume_without_the_controllers_past_proposes_otherwise(whole, tmp_path, monkeypatch):
    """The control: without learning what was learned, the search is another one, and says so."""
    with pytest.raises(KeyboardInterrupt):
        run_search(search(), tmp_path / "out", TriedHost(stop_after=12))
    monkeypatch.setattr(module.SearchRun, "_load_state", lambda self, rows: rows)
    run_search(search(), tmp_path / "out", TriedHost(), resume=True)
    assert journal(tmp_path / "out") != journal(whole[0])


def fails_once(answer, tries):
    return (
        gone(answer.member) if answer.member in ("0001", "0004") and type(answer) is Advanced and not tries else answer
    )


def test_two_at_a_time_with_failures_resume_exactly_too(tmp_path):
    run_search(search(), tmp_path / "one", TriedHost(2, fails_once))
    for answers in (9, 14):
        out = tmp_path / f"out-{answers}"
        host = TriedHost(2, fails_once, stop_after=answers)
        with pytest.raises(KeyboardInterrupt):
            run_search(search(), out, host)
        other = TriedHost(2, fails_once)
        other.seen = {key: tries for key, tries in host.seen.items() if key[1] is Advanced}
        run_search(search(), out, other, resume=True)
        assert journal(out) == journal(tmp_path / "one")


def test_more_trials_go_on_where_it_ended(whole, tmp_path):
    distml.run(search(trials=6), out=tmp_path / "out", runtime="inline")
    result = distml.run(search(trials=10), out=tmp_path / "out", runtime="inline")
    assert journal(tmp_path / "out") == journal(whole[0])
    assert result.best == whole[1].best


def test_a_signal_ends_it_where_it_is_and_the_next_run_goes_on(whole, tmp_path, monkeypatch):
    wait, calls = InlineHost.wait, []

    def signalled(self, timeout_s):
        calls.append(1)
        if len(calls) == 6:
            os.kill(os.getpid(), signal.SIGINT)
        return wait(self, timeout_s)

    monkeypatch.setattr(InlineHost, "wait", signalled)
    first = distml.run(search(), out=tmp_path / "out", runtime="inline")
    assert (first.status, first.exit_code) == ("interrupted", 130)
    result = distml.run(search(), out=tmp_path / "out", runtime="inline")
    assert (result.status, result.exit_code) == ("done", 0)
    assert journal(tmp_path / "out") == journal(whole[0])


# ---------------------------------------------------------------------------------------------------------------- order
def test_rewards_are_learned_in_the_order_in_which_they_come(tmp_path):
    host = TriedHost(3, late=True)
    run, result, _ = run_search(search(), tmp_path / "one", host)
    assert host.finished != sorted(host.finished)
    assert [row["trial"] for row in journal(tmp_path / "one") if row["event"] == "finished"] == host.finished
    assert (result.status, result.step) == ("done", 10)
    other = make_controller(run.job.controller, run.space.options, run.job.seed)
    for row in journal(tmp_path / "one"):
        if row["event"] == "proposed":
            assert list(other.propose()) == row["decisions"]
        else:
            other.learn(row["decisions"], row["reward"])


# ------------------------------------------------------------------------------------------------------------- failures
def test_a_failure_is_retried_then_listed_with_no_reward(tmp_path):
    def change(answer, tries):
        if answer.member == "0002" and type(answer) is Advanced and tries == 0:
            return gone("0002", "died")  # works the second time
        return gone("0005") if answer.member == "0005" and type(answer) is Ready else answer

    _, result, notes = run_search(search(), tmp_path / "out", TriedHost(2, change))
    events = {name: [row["event"] for row in journal(tmp_path / "out") if row["trial"] == name]
              for name in ("0002", "0005")}  # fmt: skip
    assert events == {"0002": ["proposed", "retried", "finished"], "0005": ["proposed", "retried", "failed"]}
    (failed,) = [row for row in journal(tmp_path / "out") if row["event"] == "failed"]
    assert (failed["reward"], failed["error"], failed["metrics"]) == (0.0, "loss, step 3: on purpose", {})
    assert result.status == "done"
    assert any(line.startswith("1 children failed: 0005 (the last one: loss, step 3: on purpose") for line in notes)
    lost = json.loads((tmp_path / "out/trials/0005/result.json").read_text())
    assert (lost["status"], lost["error"]["message"]) == ("failed", "on purpose")


def test_not_finite_is_the_worst_and_not_tried_again(tmp_path):
    def change(answer, tries):
        if answer.member == "0001" and type(answer) is Advanced:
            return gone("0001", "not_finite")
        return with_metrics(answer, **{"eval/accuracy": math.nan}) if answer.member == "0003" else answer

    _, result, _ = run_search(search(), tmp_path / "out", TriedHost(1, change))
    ends = {row["trial"]: row for row in journal(tmp_path / "out") if row["event"] in ("finished", "failed")}
    assert not any(row["event"] == "retried" for row in journal(tmp_path / "out"))
    assert (ends["0001"]["event"], ends["0001"]["reward"]) == ("failed", 0.0)
    assert (ends["0003"]["event"], ends["0003"]["reward"]) == ("finished", 0.0)
    assert ends["0003"]["metrics"] == {"eval/accuracy": None}
    assert not {"0001", "0003"} & {result.best["trial"], *result.best["pareto"]}


@pytest.mark.parametrize("state_every", [100, 1])
def test_failures_before_the_first_reward_are_less_than_it_where_rewards_are_negative(
    tmp_path, monkeypatch, state_every
):
    """0 would be the best of all there; and a resume comes to the same, also with what the controller kept."""
    monkeypatch.setattr(module, "STATE_EVERY", state_every)
    first = ("0000", "0001")

    def change(answer, tries):
        if answer.member in (*first, "0006") and type(answer) is Advanced:
            return gone(answer.member, "not_finite")
        return with_metrics(answer, **{"eval/accuracy": -100.0 - int(answer.member)})

    spec = search(reward={"metric": "eval/accuracy"}, trials=8)
    run, _, _ = run_search(spec, tmp_path / "whole", TriedHost(1, change))
    assert [run.trials[name].reward for name in first] == pytest.approx([-102.0 * 1.1] * 2)
    assert run.trials["0006"].reward == pytest.approx(-105.3)  # of -102 to -105 a tenth of 3 below
    rows = journal(tmp_path / "whole")
    assert [row["reward"] for row in rows if row["event"] == "failed"] == [None, None, run.trials["0006"].reward]
    assert run.best is run.trials["0002"]
    for answers in (4, 9):  # before and after the first reward
        with pytest.raises(KeyboardInterrupt):
            run_search(spec, tmp_path / f"{answers}", TriedHost(1, change, stop_after=answers))
        again, _, _ = run_search(spec, tmp_path / f"{answers}", TriedHost(1, change), resume=True)
        assert journal(tmp_path / f"{answers}") == rows
        assert [one.reward for one in again.trials.values()] == [one.reward for one in run.trials.values()]


def test_weights_that_are_lost_with_their_process_are_trained_again(tmp_path):
    host = TriedHost(1, lost=("0000",))
    _, result, _ = run_search(search(trials=3), tmp_path / "out", host)
    events = [row["event"] for row in journal(tmp_path / "out") if row["trial"] == "0000"]
    assert events == ["proposed", "retried", "finished"]
    assert "test/accuracy" in result.metrics


def test_when_all_fail_the_search_fails_and_soon(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "HOPELESS", 3)
    host = TriedHost(1, lambda answer, tries: gone(answer.member))
    with pytest.raises(RunError, match=r"the first 3 children failed, the last one: loss, step 3: on purpose"):
        run_search(search(), tmp_path / "out", host)
    with pytest.raises(RunError, match="no child finished; the last one: loss"):
        run_search(search(trials=2), tmp_path / "few", TriedHost(1, lambda answer, tries: gone(answer.member)))
    result = json.loads((tmp_path / "few/result.json").read_text())
    assert (result["status"], result["best"]) == ("failed", None)


def test_a_metric_that_is_never_reported_is_said_at_the_first_child(tmp_path):
    spec = search(reward={"metric": "eval/acuracy"})
    with pytest.raises(UsageError, match=r"does not report eval/acuracy; did you mean eval/accuracy\?"):
        run_search(spec, tmp_path / "out")
    assert len([row for row in journal(tmp_path / "out") if row["event"] == "proposed"]) == 1


def test_values_that_do_not_go_together_are_a_childs_failure(tmp_path):
    space = {"optimizer.schedule.warmup": {"choice": [0, 5]}, "stop.steps": {"choice": [3, 6]}}
    _, result, _ = run_search(search(space=space, controller="random", trials=8), tmp_path / "out")
    ends = [row for row in journal(tmp_path / "out") if row["event"] != "proposed"]
    wrong = [row for row in ends if list(row["values"].values()) == [5, 3]]
    assert wrong
    assert all(row["event"] == "failed" and "warmup 5 is longer" in row["error"] for row in wrong)
    assert all(row["event"] == "finished" for row in ends if row not in wrong)
    assert result.status == "done"


def test_missing_images_are_said_before_the_first_child(tmp_path):
    base = {
        **search()["base"],
        "task": {"name": "classification", "data": "cifar10", "path": str(tmp_path), "model": "mlp"},
    }
    with pytest.raises(UsageError, match=r"data_batch_1.bin is missing; download"):
        run_search(search(base=base), tmp_path / "out")
    assert not (tmp_path / "out/trials.jsonl").exists()


@pytest.mark.parametrize("controller", [{"name": "reinforce", "batch": 2},
                                        {"name": "evolution", "population": 2, "sample": 1},
                                        {"name": "random"}], ids=lambda one: one["name"])  # fmt: skip
def test_every_controller_searches_structured_spaces(controller, tmp_path):
    model = {"name": "nasnet", "repeats": 1, "filters": 2}
    base = {**search()["base"], "task": {"name": "classification", "model": model}, "stop": {"steps": 1}}
    space = {"name": "nasnet", "blocks": 1, "operations": ["identity", "max_3x3", "conv_1x1"]}
    spec = search(base=base, space=space, controller=controller, trials=3, reward={})
    _, result, _ = run_search(spec, tmp_path / "out")
    best = load_spec(tmp_path / "out/best.yaml").job.task.model
    assert [len(cell) for cell in (best.normal, best.reduction)] == [1, 1]
    (row,) = [r for r in journal(tmp_path / "out") if r["trial"] == result.best["trial"] and r["event"] == "finished"]
    assert row["values"]["task.model.normal"] == [block.model_dump() for block in best.normal]
    assert len(row["decisions"]) == 10
