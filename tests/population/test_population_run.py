"""A population's decisions, slots, losses and ends, on a host in plain Python."""

from __future__ import annotations

import json
import math
import random
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from own.plain_host import PlainHost
from own.populations import Kept, lineage, per_member, run_with, toy

from distml.errors import RunError, UsageError
from distml.launch.run import EXIT_CODES
from distml.population.host import Advanced, Answer
from distml.population.saving import Saver
from distml.runs.checkpoints import CheckpointStore
from distml.spec.loader import load_spec


def weights(out: Path) -> dict[str, np.ndarray]:
    """What every member ended with."""
    return {folder.name: CheckpointStore(folder / "checkpoints", 1).newest_good(print).model()["theta"]
            for folder in sorted((out / "members").iterdir())}  # fmt: skip


def same_end(one: Path, other: Path) -> None:
    """Bitwise: weights, events per member, reports, and what the result says."""
    assert per_member(lineage(one)) == per_member(lineage(other))
    for name, theta in weights(one).items():
        np.testing.assert_array_equal(theta, weights(other)[name])
        rows = [(out / "members" / name / "metrics.jsonl").read_text() for out in (one, other)]
        assert rows[0] == rows[1]
    results = [json.loads((out / "result.json").read_text()) for out in (one, other)]
    for result in results:
        result["metrics"] = {name: value for name, value in result["metrics"].items() if "timing/" not in name}
    for key in ("status", "step", "metrics", "best", "checkpoint"):
        assert results[0][key] == results[1][key]


class Watching(PlainHost):
    """Also keeps the steps of all members after each answer."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.steps: list[dict[str, int]] = [{}]
        self.most = 0

    def wait(self, timeout_s: float) -> list[Answer]:
        self.most = max(self.most, len(self.members))
        answers = super().wait(timeout_s)
        for answer in answers:
            if isinstance(answer, Advanced):
                self.steps.append({**self.steps[-1], answer.member: answer.step})
        return answers


class Rating(PlainHost):
    """Scores that make members copy, whatever their values; one member is lost."""

    def wait(self, timeout_s: float) -> list[Answer]:
        return [replace(a, metrics={**a.metrics, "eval/quality": float(a.member)}) if isinstance(a, Advanced) else a
                for a in super().wait(timeout_s)]  # fmt: skip


END = 24
SIX = {"members": 6, "base__stop__steps": END, "exploit": {"name": "truncation", "fraction": 0.34},
       "checkpoint": {"every": 100}}  # fmt: skip
KEPT = {**SIX, "checkpoint": {"every": 1}}


# ------------------------------------------------------------------------------------------------------------ decisions
@pytest.mark.parametrize("slots", [6, 2])
@pytest.mark.parametrize("exploit", ["truncation", "tournament"])
def test_synchronous_does_not_depend_on_who_answers_first(slots: int, exploit: str, tmp_path: Path) -> None:
    spec = toy(**SIX | {"exploit": exploit})
    run_with(spec, tmp_path / "in order")
    run_with(spec, tmp_path / "mixed", PlainHost(slots, random.Random(slots)))
    same_end(tmp_path / "in order", tmp_path / "mixed")
    assert any(event["event"] == "copy" for event in lineage(tmp_path / "mixed"))


def test_asynchronous_does_depend_on_it(tmp_path: Path) -> None:
    ends = []
    for seed in range(3):
        run_with(toy(**SIX, synchronous=False), tmp_path / f"{seed}", PlainHost(6, random.Random(seed)))
        ends.append(per_member(lineage(tmp_path / f"{seed}")))
    assert ends[0] != ends[1] or ends[0] != ends[2]


@pytest.mark.parametrize("synchronous", [True, False])
def test_nobody_waits_unless_all_do(synchronous: bool, tmp_path: Path) -> None:
    host = Watching(6, random.Random(1))
    run_with(toy(**SIX, synchronous=synchronous), tmp_path / "run", host)
    spread = max(max(steps.values()) - min(steps.values()) for steps in host.steps if len(steps) == 6)
    assert (spread <= 4) is synchronous


def test_decisions_come_at_multiples_of_every(tmp_path: Path) -> None:
    run_with(toy(**SIX | {"base__stop__steps": 26}), tmp_path / "run")
    for events in per_member(lineage(tmp_path / "run")).values():
        assert [event["step"] for event in events] == [0, *range(4, 25, 4), 26]
        assert events[-1]["event"] == "finish"
        assert events[-1]["reason"] == "steps"


def test_a_copy_takes_weights_and_values_of_a_better_one(tmp_path: Path) -> None:
    run_with(toy(**SIX, explore="none"), tmp_path / "run")
    events = lineage(tmp_path / "run")
    copies = [event for event in events if event["event"] == "copy"]
    assert copies
    at = {(event["member"], event["step"]): event for event in events if event["event"] in ("decide", "copy")}
    for event in copies:
        donor = at[event["from"], event["from_step"]]
        assert donor["score"] == event["from_score"] > event["score"]
        assert event["from_step"] == event["step"]
        assert event["requested"] == event["applied"] == event["values"] == donor.get("before", donor["values"])


# ---------------------------------------------------------------------------------------------------------------- slots
@pytest.mark.parametrize("slots", [1, 2])
def test_more_members_than_slots_take_turns(slots: int, tmp_path: Path) -> None:
    host = Watching(slots, random.Random(3))
    run_with(toy(**SIX | {"synchronous": False, "exploit": "none", "explore": "none"}), tmp_path / "few", host)
    assert host.most == slots
    first_all = next(index for index, steps in enumerate(host.steps) if len(steps) == 6)
    for steps in host.steps[first_all:]:
        behind = sorted(steps.values())
        assert behind[-1] - behind[0] <= 8
    run_with(toy(**SIX | {"synchronous": False, "exploit": "none", "explore": "none"}), tmp_path / "all")
    same_end(tmp_path / "few", tmp_path / "all")  # nobody lost anything


# --------------------------------------------------------------------------------------------------------------- losses
def on_disk(out: Path, member: str, step: int) -> None:
    """Wait until what a resume goes on from has come to `step`."""
    ends = time.monotonic() + 20.0
    while json.loads((out / "population.json").read_text())["members"][member]["step"] < step:
        assert time.monotonic() < ends
        time.sleep(0.002)


def once(member: str, step: int, kind: str, out: Path | None = None) -> Any:
    """Loses a member once, in the interval that begins at `step`; where `out` is given, when that is on the disk."""
    left = [1]

    def gone(name: str, at: int, job: Any) -> str | None:
        if name == member and at == step and left:
            left.pop()
            if out is not None:
                on_disk(out, member, step)
            return kind
        return None

    return gone


@pytest.mark.parametrize("synchronous", [True, False])
@pytest.mark.parametrize(("kind", "loses"), [
    ("died", True), pytest.param("died", False, marks=pytest.mark.slow),
    pytest.param("failed", False, marks=pytest.mark.slow), ("not_finite", False),
])  # fmt: skip
def test_a_lost_member_is_replaced_by_a_clone(kind: str, synchronous: bool, loses: bool, tmp_path: Path) -> None:
    host = PlainHost(6, gone=once("03", 16, kind, tmp_path / "run"), loses=loses)
    run, result = run_with(toy(**KEPT, synchronous=synchronous), tmp_path / "run", host)
    assert result.status == "done"
    events = per_member(lineage(tmp_path / "run"))
    (event,) = [event for event in events["03"] if event["event"] == "replace"]
    assert event["cause"] == f"{kind} on purpose"
    assert event["step"] == 16
    assert event["equal"]
    assert event["from"] != "03"
    donor = next(e for e in events[event["from"]] if e["step"] == event["from_step"])
    assert donor["score"] == event["from_score"]
    assert events["03"][-1]["step"] == END  # its own budget
    assert run.members["03"].losses == 1
    steps = [event["step"] for event in events["03"]]
    assert steps == sorted(steps)


def test_a_lost_member_before_anybody_is_good_goes_on_with_other_values(tmp_path: Path) -> None:
    host = PlainHost(6, gone=once("00", 0, "not_finite"))
    run_with(toy(**SIX, synchronous=False), tmp_path / "run", host)
    first, second = per_member(lineage(tmp_path / "run"))["00"][:2]
    assert (first["event"], second["event"]) == ("start", "replace")
    assert second["from"] is None
    assert second["before"] == first["values"] != second["values"]


@pytest.mark.parametrize(
    ("member", "kind", "clone"), [("05", "died", False), ("05", "not_finite", True), ("00", "died", True)]
)
def test_the_best_whose_process_died_is_not_replaced_by_a_worse_one(
    member: str, kind: str, clone: bool, tmp_path: Path
) -> None:
    host = Rating(6, gone=once(member, 16, kind))
    run_with(toy(**KEPT), tmp_path / "run", host)
    (event,) = [event for event in per_member(lineage(tmp_path / "run"))[member] if event["event"] == "replace"]
    assert (event["from"] is not None) is clone
    assert (event["before"] != event["values"]) is clone


def test_without_exploit_a_lost_member_goes_on_by_itself(tmp_path: Path) -> None:
    host = PlainHost(6, gone=once("00", 16, "died", tmp_path / "lost"), loses=True)
    spec = toy(**KEPT | {"exploit": "none", "explore": "none"})
    run_with(spec, tmp_path / "lost", host)
    run_with(spec, tmp_path / "not lost")
    events = per_member(lineage(tmp_path / "lost"))["00"]
    (event,) = [event for event in events if event["event"] == "replace"]
    assert event["from"] is None
    assert event["before"] == event["values"]
    np.testing.assert_array_equal(weights(tmp_path / "lost")["00"], weights(tmp_path / "not lost")["00"])


@pytest.mark.parametrize("synchronous", [True, False])
def test_one_that_fails_again_and_again_is_given_up(synchronous: bool, tmp_path: Path) -> None:
    host = PlainHost(6, gone=lambda name, step, job: "failed" if name == "02" and step >= 16 else None)
    display = Kept()
    spec = toy(**SIX, synchronous=synchronous, limits__max_restarts=2)
    run, result = run_with(spec, tmp_path / "run", host, display=display)
    assert result.status == "done"
    assert run.members["02"].losses == 3
    assert [event["event"] for event in per_member(lineage(tmp_path / "run"))["02"]][-3:] == [
        "replace",
        "replace",
        "finish",
    ]
    member = json.loads((tmp_path / "run/members/02/result.json").read_text())
    assert member["status"] == "failed"
    assert member["error"]["message"] == "failed on purpose"
    assert any("member 02 was given up: failed on purpose" in line for line in display.lines)


def test_losses_with_progress_between_them_do_not_add_up(tmp_path: Path) -> None:
    times: Counter[int] = Counter()

    def gone(name: str, step: int, job: Any) -> str | None:
        times[step] += name == "02"
        return "failed" if name == "02" and step and times[step] == 1 else None

    run, _ = run_with(toy(**SIX, limits__max_restarts=1), tmp_path / "run", PlainHost(6, gone=gone))
    assert run.members["02"].losses > 2
    assert run.members["02"].record.error is None


def test_when_all_fail_the_run_fails_with_the_last_cause(tmp_path: Path) -> None:
    host = PlainHost(2, gone=lambda name, step, job: "died" if step >= 8 else None)
    with pytest.raises(RunError, match=r"all members failed; the last one: member 0\d, train: died on purpose"):
        run_with(toy(), tmp_path / "run", host)
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert result["status"] == "failed"
    assert "died on purpose" in result["error"]["message"]


@pytest.mark.parametrize("error", [UsageError, RunError])
def test_a_run_that_fails_later_keeps_what_it_came_to(error: type[Exception], tmp_path: Path) -> None:
    class Failing(PlainHost):
        left = 30

        def wait(self, timeout_s: float) -> list[Answer]:
            self.left -= 1
            if not self.left:
                raise error("on purpose")
            return super().wait(timeout_s)

    with pytest.raises(RunError, match="on purpose"):
        run_with(toy(**KEPT), tmp_path / "run", Failing(6))
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert result["status"] == "failed"
    assert result["wall_s"] > 0
    assert result["step"] > 0
    assert result["best"]["value"] == result["metrics"]["eval/quality"]
    assert (tmp_path / "run" / result["checkpoint"] / "model.safetensors").is_file()


def test_a_test_split_that_fails_costs_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import distml.population.run as module

    def broken(folder: Path) -> dict[str, float]:
        raise UsageError("there is no test data")

    monkeypatch.setattr(module, "test_scores", broken)
    display = Kept()
    _, result = run_with(toy(**SIX), tmp_path / "run", display=display)
    assert result.status == "done"
    assert result.best is not None
    assert set(result.metrics) == {"eval/quality", "train/loss", "timing/start_s"}
    assert any("was not measured on the test split: there is no test data" in line for line in display.lines)
    assert (tmp_path / "run/best.yaml").is_file()


def test_what_fails_before_anybody_has_begun_is_the_users_matter(tmp_path: Path) -> None:
    host = PlainHost(2, gone=lambda name, step, job: "failed")
    with pytest.raises(UsageError, match="member 00, train: failed on purpose"):
        run_with(toy(), tmp_path / "run", host)


@pytest.mark.parametrize("synchronous", [True, False])
@pytest.mark.parametrize("who", ["target", "donor"])
@pytest.mark.parametrize("slots", [pytest.param(6, marks=pytest.mark.slow), 3])
def test_deaths_in_the_midst_of_copies(who: str, synchronous: bool, slots: int, tmp_path: Path) -> None:
    class Mortal(PlainHost):
        """The target dies when it is to copy, or the donor does, with all that it kept."""

        deaths = 0

        def copy(self, member: str, state: Any, job: Any, keep: bool = False) -> None:
            super().copy(member, state, job, keep)
            if self.deaths == 3 or state not in self.states:
                return
            victim = member if who == "target" else self.states[state][0]
            if not victim:
                return
            self.deaths += 1
            self.states = {key: kept for key, kept in self.states.items() if kept[0] != victim}
            if victim in self.members:
                self.commands = [(name, work) for name, work in self.commands if name != victim]
                self.commands.append((victim, lambda: self._dies(victim, "died", "copy", 0)))

    host = Mortal(slots, random.Random(5), loses=True)
    _, result = run_with(toy(**KEPT, synchronous=synchronous), tmp_path / "run", host)
    assert host.deaths == 3
    assert result.status == "done"
    events = per_member(lineage(tmp_path / "run"))
    assert all(history[-1]["event"] == "finish" and history[-1]["step"] == END for history in events.values())
    assert any(event["event"] == "replace" for history in events.values() for event in history)
    for name in events:
        rows = [json.loads(line)["step"] for line in (tmp_path / f"run/members/{name}/metrics.jsonl").open()]
        assert rows == list(range(1, END + 1))  # no report lost or doubled


# --------------------------------------------------------------------------------------------------------------- scores
def scoring(values: dict[str, float]) -> type[PlainHost]:
    """A host whose members report these scores."""

    class Scoring(PlainHost):
        def wait(self, timeout_s: float) -> list[Answer]:
            return [
                Advanced(a.member, a.step, {**a.metrics, "eval/quality": values.get(a.member, 0.0)}, a.rows, a.finished,
                         a.state, a.seconds) if isinstance(a, Advanced) else a
                for a in super().wait(timeout_s)
            ]  # fmt: skip

    return Scoring


@pytest.mark.parametrize("exploit", ["truncation", "tournament"])
@pytest.mark.parametrize("mode", ["max", "min"])
def test_nan_is_the_worst(exploit: str, mode: str, tmp_path: Path) -> None:
    host = scoring({"01": math.nan, "02": 1.0, "03": -1.0})(4)
    spec = toy(**SIX | {"members": 4, "exploit": exploit, "objective__mode": mode})
    _, result = run_with(spec, tmp_path / "run", host)
    copies = [event for event in lineage(tmp_path / "run") if event["event"] == "copy"]
    assert "01" in {event["member"] for event in copies}
    assert "01" not in {event["from"] for event in copies}
    assert result.best is not None
    assert result.best["member"] == ("02" if mode == "max" else "03")


def test_equals_do_not_copy_each_other(tmp_path: Path) -> None:
    run_with(toy(**SIX), tmp_path / "run", scoring({})(6))
    assert not [event for event in lineage(tmp_path / "run") if event["event"] == "copy"]


def test_if_nothing_is_ever_finite_there_is_no_best(tmp_path: Path) -> None:
    host = scoring({"00": math.nan, "01": math.nan})(2)
    _, result = run_with(toy(base__stop__steps=8), tmp_path / "run", host)
    assert (result.status, result.best, set(result.metrics)) == ("done", None, {"timing/start_s"})


TOGETHER = {"base__batch_size": 64, "explore": "resample", "space": {
    "batch_size": {"choice": [16, 32, 64, 128]}, "micro_batch_size": {"choice": [8, 16, 32]}}}  # fmt: skip


@pytest.mark.parametrize("changes", [{}, {"exploit": "none", "synchronous": False}], ids=["copies", "explores"])
def test_values_that_the_base_does_not_take_together_are_drawn_again(changes: dict[str, Any], tmp_path: Path) -> None:
    host = Rating(6, gone=once("02", 0, "not_finite"))
    _, result = run_with(toy(**SIX | TOGETHER | changes), tmp_path / "run", host)
    assert result.status == "done"
    events = lineage(tmp_path / "run")
    tried = [event["values"] for event in events if event["event"] in ("start", "copy", "replace", "decide")]
    assert len(tried) > 30
    assert all(values["micro_batch_size"] <= values["batch_size"] for values in tried)
    assert {"replace"} < {event["event"] for event in events}


def test_a_space_of_which_the_base_takes_nothing_is_refused(tmp_path: Path) -> None:
    space = {"batch_size": {"choice": [8, 16]}, "micro_batch_size": {"choice": [32, 64]}}
    with pytest.raises(UsageError, match=r"of 100 combinations of batch_size, micro_batch_size the base takes none"):
        run_with(toy(**TOGETHER | {"space": space}), tmp_path / "run")


def test_an_objective_that_is_not_reported(tmp_path: Path) -> None:
    says = "the base does not report 'eval/qualitty'; it reports eval/quality; did you mean 'eval/quality'"
    with pytest.raises(UsageError, match=f"objective.metric: {says}"):
        run_with(toy(objective__metric="eval/qualitty"), tmp_path / "run")
    with pytest.raises(UsageError, match=f"stop.goal.metric: {says}"):
        run_with(toy(stop__goal={"metric": "eval/qualitty", "at_least": 1.0}), tmp_path / "goal")


def test_values_that_do_not_arrive_are_a_defect(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="which it was given"):
        run_with(toy(**SIX), tmp_path / "run", PlainHost(6, ignores=True))
    assert [event["equal"] for event in lineage(tmp_path / "run") if event["event"] == "copy"] == [False]


# ----------------------------------------------------------------------------------------------------------------- ends
@pytest.mark.parametrize("synchronous", [True, False])
def test_stop_steps_are_of_all_together(synchronous: bool, tmp_path: Path) -> None:
    _, result = run_with(toy(**SIX, synchronous=synchronous, stop__steps=100), tmp_path / "run")
    assert result.status == "done"
    assert result.step == (120 if synchronous else 100)  # whole rounds of 24


def test_one_checkpoint_stays_and_the_best(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Saver, "put", lambda self, snapshot, important=False: self.write(snapshot))  # leave none out
    run, _ = run_with(toy(**KEPT | {"checkpoint": {"keep": 1}}), tmp_path / "run")
    for folder in run.folders.values():
        best = folder.store.best("eval/quality")
        assert set(folder.store.steps()) == {END} | ({best[0]} if best is not None else set())


def test_stop_seconds(tmp_path: Path) -> None:
    _, result = run_with(toy(stop__seconds=1e-9), tmp_path / "run")
    assert (result.status, result.step) == ("done", 0)


@pytest.mark.parametrize("synchronous", [True, False])
def test_goals(synchronous: bool, tmp_path: Path) -> None:
    goal = {"metric": "eval/quality", "at_least": -0.1}
    spec = toy(**SIX, synchronous=synchronous, stop__goal=goal)
    _, result = run_with(spec, tmp_path / "met")
    assert (result.status, EXIT_CODES[result.status]) == ("goal_met", 0)
    assert result.metrics["eval/quality"] >= -0.1
    _, result = run_with({**spec, "stop": {"goal": {**goal, "at_least": 1.3}}}, tmp_path / "missed")
    assert (result.status, EXIT_CODES[result.status]) == ("goal_missed", 4)


def test_what_a_run_leaves(tmp_path: Path) -> None:
    out = tmp_path / "run"
    display = Kept()
    _, result = run_with(toy(**SIX), out, display=display)
    assert result.best is not None
    best = result.best
    scores = {name: max(event["score"] for event in events[1:]) for name, events in per_member(lineage(out)).items()}
    assert best["value"] == max(scores.values()) == result.metrics["eval/quality"] == result.metrics["test/quality"]
    assert best["member"] == max(scores, key=lambda name: scores[name])
    assert (out / result.checkpoint / "model.safetensors").is_file()
    job = load_spec(out / "best.yaml").job
    assert (job.kind, job.name) == ("train", "toy-best")
    events = per_member(lineage(out))
    assert job.task.args == {"h0": events[best["member"]][-1]["values"]["task.args.h0"],
                             "h1": events[best["member"]][-1]["values"]["task.args.h1"]}  # fmt: skip
    for name in scores:
        member = json.loads((out / f"members/{name}/result.json").read_text())
        assert (member["status"], member["step"]) == ("done", END)
        spec = load_spec(out / f"members/{name}/spec.yaml").job
        assert spec.task.args["h0"] == events[name][-1]["values"]["task.args.h0"]
        assert (spec.evaluate.every, spec.checkpoint.every) == (4, 4)
        assert len([line for line in display.lines if line.split()[:1] == [name]]) == 1
    assert load_spec(out / "spec.yaml").job.kind == "population"
