"""What people read of jobs over jobs: who copied whom, trials, Pareto fronts, pictures, the report."""

from __future__ import annotations

import json
import math
import re
import struct

import pytest
from own.over_runs import write_lines, write_nas, write_population, write_result, write_sweep

from distml.errors import UsageError
from distml.launch.evaluate import load_model
from distml.runs import over_plots
from distml.runs.history import History
from distml.runs.over import (
    Axis,
    Lineage,
    Objective,
    Piece,
    Trial,
    axes_of,
    best_run,
    front,
    objectives_of,
    read_trials,
)
from distml.runs.over_plots import _Vertical, draw_best_so_far, draw_front, draw_parallel, draw_schedules
from distml.runs.report import compare, show

LOSS, ACCURACY = Objective("eval/loss", "min"), Objective("eval/accuracy", "max")


def size(data: bytes) -> tuple[int, int]:
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    return struct.unpack(">II", data[16:24])


def event(member, step, score, kind="decide", **more):
    return {"event": kind, "wall_s": 0.0, "member": member, "step": step, "score": score, "values": {"x": step}, **more}


def copied(member, step, donor, donor_step, kind="copy", **more):
    return event(member, step, 9.0, kind, **{"from": donor, "from_step": donor_step, "from_score": 1.0, **more})


# ----------------------------------------------------------------------------------------------------------- population
def test_an_ancestry_follows_the_copies_back(tmp_path):
    write_lines(tmp_path / "lineage.jsonl", [
        event("a", 0, None, "start"), event("b", 0, None, "start"), event("c", 0, None, "start"),
        event("a", 10, 1.0), copied("b", 10, "a", 10), event("c", 10, 3.0),
        event("b", 20, 0.5), copied("c", 15, "b", 20), copied("a", 20, "c", 15),
        event("b", 30, 0.4, "finish"), event("c", 30, 0.3, "finish"), event("a", 30, 0.9, "finish"),
    ])  # fmt: skip
    lineage = Lineage.read(tmp_path)
    assert lineage.ancestry("c") == [Piece("a", 0, 10), Piece("b", 10, 20), Piece("c", 15, 30)]
    assert lineage.ancestry("b") == [Piece("a", 0, 10), Piece("b", 10, 30)]
    assert lineage.ancestry("a") == [Piece("a", 0, 10), Piece("b", 10, 20), Piece("c", 15, 15), Piece("a", 20, 30)]
    assert lineage.ancestry("b", 10) == [Piece("b", 0, 10)]  # as it was before it copied there
    assert lineage.ancestry("b", 20) == [Piece("a", 0, 10), Piece("b", 10, 20)]
    assert [point.score for point in lineage.within(Piece("b", 0, 10))] == [None, 9.0]
    assert lineage.ranked(LOSS) == ["c", "b", "a"]
    assert lineage.finished == {"a", "b", "c"}


def test_a_copy_after_the_donor_was_taken_is_no_ancestor(tmp_path):
    """`b` took `a` at 10; that `a` was overwritten at 10 afterwards is another story."""
    write_lines(tmp_path / "lineage.jsonl", [
        event("a", 0, None, "start"), event("b", 0, None, "start"), event("c", 0, None, "start"),
        event("a", 10, 1.0), copied("b", 10, "a", 10), copied("a", 10, "c", 10), event("b", 20, 0.1, "finish"),
    ])  # fmt: skip
    assert Lineage.read(tmp_path).ancestry("b") == [Piece("a", 0, 10), Piece("b", 10, 20)]


def test_a_piece_begins_with_what_came_after_the_copy(tmp_path):
    write_lines(
        tmp_path / "lineage.jsonl",
        [
            event("a", 0, None, "start"),
            event("b", 0, None, "start"),
            event("a", 10, 5.0),
            copied("a", 10, "b", 10),
            event("a", 20, 2.0),
        ],
    )
    lineage = Lineage.read(tmp_path)
    assert [(point.step, point.score) for point in lineage.within(Piece("a", 10, 20))] == [(10, 1.0), (20, 2.0)]


def test_one_that_goes_on_by_itself_has_copied_nobody(tmp_path):
    write_lines(
        tmp_path / "lineage.jsonl",
        [event("a", 0, None, "start"), event("a", 10, None, "replace", **{"from": None, "cause": "died"})],
    )
    lineage = Lineage.read(tmp_path)
    assert not lineage.copies
    assert lineage.last_score("a") is None


@pytest.mark.parametrize("members", [2, 100])
def test_show_of_a_population(tmp_path, capsys, members):
    run = write_population(tmp_path / "run", members=members)
    show(run)
    printed = capsys.readouterr().out
    for words in (
        r"status +done",
        r"base +classification, single",
        rf"members +{members}, {members} of them to their",
        r"objective +eval/loss \(min\)",
        r"best +member \d+: eval/loss 0\.\d+ at step 400",
        r"of it, once +test/loss",
        r"train/loss is NaN",
        r"pictures: .*lineage.png, .*schedules.png",
    ):
        assert re.search(words, printed), words
    assert printed.count("adamw") + printed.count("sgd") + printed.count("rmsprop") == min(members, 20)
    assert ("more, in report.html" in printed) == (members > 20)
    page = (run / "report.html").read_text()
    assert not re.search(r"https?:|<script|<link|@import|url\(", page)
    assert set(re.findall(r'src="([^"]{22})', page)) == {"data:image/png;base64,"}
    assert re.findall(r'<img class="wide" alt="([^"]+)"', page) == ["who copied whom", "schedules that were discovered"]
    for name in ("lineage.png", "schedules.png"):
        width, height = size((run / name).read_bytes())
        assert 600 <= width <= 2000
        assert 200 <= height <= 2000


def test_a_population_without_a_decision_has_a_table(tmp_path, capsys):
    """The control of the pictures: nothing happened yet, nothing is drawn."""
    run = write_population(tmp_path / "run")
    write_lines(run / "lineage.jsonl", [event(name, 0, None, "start") for name in "abcd"])
    write_result(run, status="running", step=0)
    show(run)
    printed = capsys.readouterr().out
    assert "pictures" not in printed
    assert "died: it was running" in printed
    assert not (run / "lineage.png").exists()


def test_a_line_that_is_no_event_is_named(tmp_path):
    run = write_population(tmp_path / "run")
    with (run / "lineage.jsonl").open("a") as file:
        file.write('{"event": "copy"}\n')
    with pytest.raises(UsageError, match=r"lineage.jsonl:\d+: not an event of a population"):
        show(run)


# --------------------------------------------------------------------------------------------------------------- trials
def test_a_trial_is_its_newest_event(tmp_path):
    rows = [
        {"trial": "0000", "event": "proposed", "values": {"x": 1}, "decisions": [3]},
        {"trial": "0001", "event": "proposed", "values": {"x": 2}},
        {"trial": "0001", "event": "finished", "metrics": {"eval/loss": None}, "step": 5},
        {"trial": "0000", "event": "retried", "error": "died"},
        {"trial": "0000", "event": "finished", "metrics": {"eval/loss": 0.5}, "step": 9, "reward": 0.1},
    ]
    write_lines(tmp_path / "trials.jsonl", rows)
    first, second = read_trials(tmp_path)
    assert (first.name, first.event, first.value("eval/loss"), first.values) == ("0001", "finished", None, {"x": 2})
    assert (second.name, second.step, second.values, second.decisions) == ("0000", 9, {"x": 1}, (3,))
    write_lines(tmp_path / "trials.jsonl", rows[:-1])
    assert [trial.name for trial in read_trials(tmp_path)] == ["0001", "0000"]  # what goes on comes last
    write_lines(tmp_path / "trials.jsonl", [{"event": "finished"}])
    with pytest.raises(UsageError, match=r"trials.jsonl:1: not an event of a trial"):
        read_trials(tmp_path)


@pytest.mark.parametrize("event", ["diverged", "finished"], ids=["of its own", "of an earlier version"])
def test_what_has_diverged_has_a_word_of_its_own(tmp_path, capsys, event):
    out = write_sweep(tmp_path / "run", trials=4)
    *_, last = (json.loads(line) for line in (out / "trials.jsonl").read_text().splitlines())
    row = {**last, "trial": "0004", "event": event, "metrics": {}, "error": "the loss is nan"}
    with (out / "trials.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    show(out)
    text = capsys.readouterr().out
    assert "1 diverged" in text
    assert re.search(r"0004 +diverged +the loss is nan", text)


def trial(name, cost, accuracy, event="finished"):
    return Trial(name, event, 0.0, {}, 1, {"eval/accuracy": accuracy}, 0.0, None, cost=cost)


def test_a_front_by_hand():
    trials = [trial("a", 1.0, 0.5), trial("b", 2.0, 0.4), trial("c", 3.0, 0.7), trial("d", 3.0, 0.6),
              trial("e", 4.0, 0.7), trial("f", 5.0, None), trial("g", None, 0.9), trial("h", 9.0, 0.8)]  # fmt: skip
    assert [one.name for one in front(trials, [ACCURACY], True)] == ["a", "c", "h"]
    both = [
        Trial(name, "finished", 0.0, {}, 1, {"eval/loss": loss, "eval/accuracy": accuracy}, 0.0, None)
        for name, loss, accuracy in (("a", 1.0, 0.9), ("b", 0.5, 0.8), ("c", 0.7, 0.7), ("d", 0.2, math.nan))
    ]
    assert [one.name for one in front(both, [LOSS, ACCURACY])] == ["b", "a"]
    assert front([], [LOSS, ACCURACY]) == []


def test_nobody_on_a_front_is_beaten():
    trials = [trial(str(i), (i * 37) % 19, ((i * 53) % 23) / 23) for i in range(60)]
    edge = front(trials, [ACCURACY], True)
    for one in trials:
        beaten = any(
            o.cost <= one.cost
            and o.value("eval/accuracy") >= one.value("eval/accuracy")
            and (o.cost, o.value("eval/accuracy")) != (one.cost, one.value("eval/accuracy"))
            for o in trials
        )
        assert not (beaten and one in edge)
        assert beaten or any((o.cost, o.metrics) == (one.cost, one.metrics) for o in edge)


@pytest.mark.parametrize("trials", [2, 100])
def test_show_of_a_sweep(tmp_path, capsys, trials):
    run = write_sweep(tmp_path / "run", trials=trials)
    show(run)
    printed = capsys.readouterr().out
    for words in (rf"trials +{trials} of {trials}: \d+ finished, .*1 failed", r"best +trial 00\d\d: eval/loss 0\.\d+",
                  r"rank 0: out of memory", r"parallel.png, .*best-so-far.png"):  # fmt: skip
        assert re.search(words, printed), words
    assert "pareto.png" not in printed
    for name in ("parallel.png", "best-so-far.png"):
        assert size((run / name).read_bytes())[0] >= 600


def test_several_objectives_have_a_front(tmp_path, capsys):
    both = "[{metric: eval/loss, mode: min}, {metric: eval/accuracy, mode: max}]"
    run = write_sweep(tmp_path / "run", objective=both)
    show(run)
    assert re.search(r"Pareto front +1 trials", capsys.readouterr().out)  # accuracy is a function of the loss here
    assert size((run / "pareto.png").read_bytes())


def shown(draw, monkeypatch):
    """The figure that a picture is made of."""
    seen = []
    monkeypatch.setattr(over_plots, "_png", lambda figure: seen.append(figure) or b"")
    draw()
    return seen[0]


def scored(name, event="finished", **metrics):
    metrics = {f"eval/{metric}": value for metric, value in metrics.items()}
    return Trial(name, event, 0.0, {"x": 0.5}, 1, metrics, 0.0, None)


def test_three_objectives_are_drawn_in_pairs_with_one_front(monkeypatch):
    """Of the wide ones the axis is logarithmic, and what is not finite is said to be left out."""
    third = Objective("eval/size", "min")
    trials = [scored("a", loss=0.1, accuracy=0.5, size=9.0), scored("b", loss=1e9, accuracy=0.9, size=8.0),
              scored("c", loss=2e9, accuracy=0.8, size=1.0), scored("d", loss=3e9, accuracy=0.8, size=1.0),
              scored("e", loss=math.inf, accuracy=0.99, size=0.0)]  # fmt: skip
    assert [one.name for one in front(trials, [LOSS, ACCURACY, third])] == ["a", "b", "c"]
    figure = shown(lambda: draw_front(trials, [LOSS, ACCURACY, third], "a"), monkeypatch)
    assert [(axes.get_xlabel(), axes.get_ylabel()) for axes in figure.axes] == [
        ("eval/loss (min)", "eval/accuracy (max)"), ("eval/loss (min)", "eval/size (min)")]  # fmt: skip
    assert [(axes.get_xscale(), axes.get_yscale()) for axes in figure.axes] == [("log", "linear")] * 2
    assert "left out: 1 of 5 trials" in figure.get_suptitle()
    finite = shown(lambda: draw_front(trials[1:4], [ACCURACY, LOSS], "b"), monkeypatch)
    assert "left out" not in finite.get_suptitle()
    assert finite.axes[0].get_yscale() == "linear"


def test_trials_that_failed_and_a_single_one_have_marks(monkeypatch):
    trials = [scored("a", loss=0.5), scored("b", "failed")]
    figure = shown(lambda: draw_parallel(trials, [Axis("x", "uniform")], [LOSS], "a"), monkeypatch)
    assert [line.get_xydata().tolist() for line in figure.axes[0].lines if line.get_marker() == "x"] == [[[0.0, 0.5]]]
    figure = shown(lambda: draw_best_so_far(trials[:1], [LOSS]), monkeypatch)
    (best,) = [line for line in figure.axes[0].lines if line.get_label() == "best so far"]
    assert (best.get_marker(), best.get_xydata()[0].tolist()) == ("o", [1.0, 0.5])
    figure.canvas.draw()
    assert figure.axes[0].get_legend().get_window_extent().y1 < figure.axes[0].bbox.y0  # below the data


def test_show_of_a_search(tmp_path, capsys):
    run = write_nas(tmp_path / "run")
    show(run)
    printed = capsys.readouterr().out
    for words in (r"controller +reinforce", r"objective +eval/accuracy \(max\), for its flops",
                  r"Pareto front +\d+ trials", r"trial +ended +step +eval/accuracy +flops +reward +seconds",
                  r"pareto.png, .*best-so-far.png"):  # fmt: skip
        assert re.search(words, printed), words
    assert not (run / "parallel.png").exists()  # a structured space has no paths


def test_what_a_run_wrote_is_text_on_the_page(tmp_path, capsys):
    run = write_sweep(tmp_path / "run")
    rows = [json.loads(line) for line in (run / "trials.jsonl").read_text().splitlines()]
    for row in rows:
        if row["event"] == "failed":
            row["error"] = "<script>alert(1)</script> [bold]x[/bold]"
    write_lines(run / "trials.jsonl", rows)
    show(run)
    assert "[bold]x[/bold]" in capsys.readouterr().out
    assert "<script" not in (run / "report.html").read_text()


def test_a_sweep_in_which_all_failed(tmp_path, capsys):
    run = write_sweep(tmp_path / "run", trials=3, failures=3)
    write_result(
        run, status="failed", error={"rank": "driver", "phase": "sweep", "step": None, "message": "all failed"}
    )
    show(run)
    assert re.search(r"3 of 3: 3 failed", capsys.readouterr().out)
    assert not list(run.glob("*.png"))


# ------------------------------------------------------------------------------------------------------------- pictures
def test_vertical_axes():
    log = _Vertical("x", (), 1e-4, 1.0, True)
    assert [log.height(value, 0.0) for value in (1e-4, 1e-2, 1.0)] == pytest.approx([0.0, 0.5, 1.0])
    assert [text for _, text in log.ticks()] == ["0.0001", "0.001", "0.01", "0.1", "1"]
    choices = _Vertical("x", ("a", "b"), 0.0, 1.0, False)
    assert [choices.height(at, 0.0) for at in (0, 1)] == [0.25, 0.75]
    flat = _Vertical("x", (), 3.0, 3.0, False)  # all trials came to the same
    assert flat.height(3.0, 0.0) == 0.0


def test_the_axes_are_the_specs():
    spec = {"space": {"a": {"loguniform": [1, 2]}, "b": {"choice": [True, None]}, "c": {"randint": [1, 4]}}}
    axes = axes_of(spec)
    assert axes == [Axis("a", "loguniform", 1.0, 2.0), Axis("b", "choice", choices=(True, None)),
                    Axis("c", "randint", 1.0, 4.0)]  # fmt: skip
    assert [axis.is_log for axis in axes] == [True, False, False]
    assert axes_of({"space": {"name": "nasnet"}}) == []
    assert objectives_of({"kind": "nas", "reward": {"metric": "eval/loss"}}) == [Objective("eval/loss", "max")]


def test_pictures_bear_odd_values(tmp_path):
    run = write_sweep(tmp_path / "run", trials=6)
    trials, history = read_trials(run), History.load(run)
    axes = [*axes_of(history.spec), Axis("gone", "choice", choices=({"name": "sgd"}, None, 2.5))]
    assert size(draw_parallel(trials, axes, [LOSS], "none of them"))
    population = write_population(tmp_path / "population", members=3, decisions=2)
    many = [*axes_of(History.load(population).spec), *(Axis(f"a{i}", "uniform") for i in range(20))]
    assert size(draw_schedules(Lineage.read(population), many, LOSS, "00"))


# --------------------------------------------------------------------------------------------------------- the best one
def test_the_best_stands_for_the_whole(tmp_path, make_run):
    run = write_population(tmp_path / "run")
    best = History.load(run).result.best["member"]
    assert best_run(run) == run / "members" / best
    plain = make_run(tmp_path / "plain")
    assert best_run(plain) == plain
    with pytest.raises(
        UsageError, match=rf"kept no weights of its best, {best}; train it again: distml run .*best.yaml"
    ):
        load_model(run)
    write_result(run, status="running")
    with pytest.raises(UsageError, match="has no best member yet"):
        best_run(run)
    write_result(run, best={"metric": "eval/loss", "value": 1.0, "step": 1, "member": "77"})
    with pytest.raises(UsageError, match=r"its best is member 77, and .* is not there"):
        best_run(run)


def test_compare_takes_the_best_member(tmp_path, make_run):
    run = write_population(tmp_path / "run")
    best = best_run(run)
    for file in best.iterdir():
        file.unlink()
    best.rmdir()
    make_run(best, name="toy-03")
    table = compare([run, make_run(tmp_path / "plain")], tmp_path / "out")
    assert "toy-03" in table
    assert (tmp_path / "out" / "compare.png").exists()
