"""What people read: `show`, report.html, `compare`, the display, TensorBoard."""

import io
import json
import re
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from distml.errors import UsageError
from distml.runs.display import LiveDisplay, PlainDisplay, make_display
from distml.runs.history import Goal, History
from distml.runs.plots import Curve, Panel, draw
from distml.runs.report import _panels, compare, show
from distml.runs.tensorboard import TensorBoardWriter
from distml.runs.units import byte_size, duration, number

HOSTILE = "<script>alert(1)</script> [bold]not bold[/bold]"


def picture_size(data: bytes) -> tuple[int, int]:
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    return struct.unpack(">II", data[16:24])


# ----------------------------------------------------------------------------------------------------------------- show
def test_show_prints_what_the_run_came_to(tmp_path, capsys, make_run):
    show(make_run(tmp_path / "run", strategy="{name: parameter_server, mode: ssp}", staleness=1.0))
    printed = capsys.readouterr().out
    for words in (
        r"digits", r"status +goal met", r"strategy +parameter_server/ssp", r"steps +400", r"examples +25,600",
        r"sent +16 MB", r"restarts +1", r"checkpoint +checkpoints/step-00000400", r"goal +eval/accuracy at least 0.9",
        r"eval/loss +0\.\d+ +0\.\d+", r"test/accuracy +0\.951", r"report: .*report\.html",
    ):  # fmt: skip
        assert re.search(words, printed), words
    assert "error" not in printed


def test_show_of_a_failure_is_literal_text(tmp_path, capsys, make_run):
    error = {"rank": 1, "phase": "exchange", "step": 7, "message": HOSTILE}
    show(make_run(tmp_path / "run", status="failed", error=error))
    assert f"rank 1, exchange, step 7: {HOSTILE}" in capsys.readouterr().out
    page = (tmp_path / "run" / "report.html").read_text()
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt; [bold]not bold[/bold]" in page


def test_the_page_is_self_contained_and_complete(tmp_path, make_run):
    run = make_run(tmp_path / "run", staleness=1.0)
    show(run)
    page = (run / "report.html").read_text()
    assert not re.search(r"https?:|<script|<link|@import|url\(", page)
    sources = re.findall(r'src="([^"]{22})', page)
    assert set(sources) == {"data:image/png;base64,"}
    titles = re.findall(r'<img alt="([^"]+)"', page)
    assert {"Loss", "eval/accuracy", "Throughput", "Time of a step", "Staleness when consumed"} <= set(titles)
    assert "strategy: {name: all_reduce}" in page
    assert "process_group" in page


def test_metrics_that_differ_in_a_number_are_one_chart(tmp_path, make_run):
    run = make_run(tmp_path / "run")
    shares = {f"{kind}/optimal_share_{epsilon}": 0.5 for kind in ("rl", "eval") for epsilon in ("0", "0.01", "1e-05")}
    rows = [{"step": step, "train/loss": 1.0, "rl/frames": step, "eval/top_5": 0.9, **shares} for step in (1, 2)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [(panel.title, [curve.label for curve in panel.curves]) for panel in _panels(History.load(run))] == [
        ("Loss", ["train/loss"]),
        ("eval/optimal_share", ["eval/optimal_share_0", "eval/optimal_share_0.01", "eval/optimal_share_1e-05"]),
        ("eval/top_5", ["eval/top_5"]),
        ("rl/optimal_share", ["rl/optimal_share_0", "rl/optimal_share_0.01", "rl/optimal_share_1e-05"]),
    ]


def test_plots_are_of_what_was_reported(tmp_path, make_run):
    """The control of the test above: no staleness reported, none drawn."""
    show(make_run(tmp_path / "run"))
    assert "Staleness" not in (tmp_path / "run" / "report.html").read_text()


def test_a_run_that_has_only_begun(tmp_path, capsys):
    (tmp_path / "spec.yaml").write_text("distml: v1\nname: early\n")
    show(tmp_path)
    assert "early" in capsys.readouterr().out
    assert (tmp_path / "report.html").exists()


def test_a_dead_driver_is_called_dead_and_a_live_one_named(tmp_path, capsys, make_run):
    from distml.runs.directory import RunDirectory

    run = make_run(tmp_path / "run", status="running")
    show(run)
    assert "died" in capsys.readouterr().out
    with RunDirectory.open(run):
        show(run)
        assert re.search(r"status +running \(process \d+ on host", capsys.readouterr().out)


@pytest.mark.parametrize("name", ["nowhere", "spec"])
def test_what_is_no_run(tmp_path, name):
    if name == "spec":
        (tmp_path / "spec").mkdir()
        (tmp_path / "spec" / "spec.yaml").write_text("a: [")
    with pytest.raises(UsageError):
        show(tmp_path / name)


# -------------------------------------------------------------------------------------------------------------- history
def test_series_against_other_axes(tmp_path, make_run):
    run = History.load(make_run(tmp_path / "run", seconds_per_step=0.02, bytes_per_step=1000))
    steps, loss = run.series("eval/loss")
    np.testing.assert_array_equal(steps, np.arange(0, 401, 50))
    seconds, same = run.series("eval/loss", "wall_s")
    np.testing.assert_allclose(seconds, steps * 0.02)
    np.testing.assert_array_equal(same, loss)
    # Evaluations do not report examples; the test's row at the end, under an earlier step, must not bend the axis.
    np.testing.assert_allclose(run.series("eval/loss", "train/examples")[0], steps * 64)
    np.testing.assert_allclose(run.series("eval/loss", "comm/bytes")[0], steps * 1000)
    assert len(run.series("eval/loss", "no/such")[0]) == 0


def test_best_knows_which_way_is_better(tmp_path, make_run):
    run = make_run(tmp_path / "run")
    rows = [
        {"step": step, "eval/accuracy": a, "eval/loss": b} for step, a, b in [(1, 0.5, 2), (2, 0.9, 1), (3, 0.7, 3)]
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    history = History.load(run)
    assert (history.best("eval/accuracy"), history.last("eval/accuracy")) == (0.9, 0.7)
    assert (history.best("eval/loss"), history.last("eval/loss")) == (1, 3)
    (run / "spec.yaml").write_text("distml: v1\nstop: {goal: {metric: eval/accuracy, at_most: 0.1}}\n")
    assert History.load(run).best("eval/accuracy") == 0.5, "the spec says that less is better"


def test_goals(tmp_path, make_run):
    run = History.load(make_run(tmp_path / "run", seconds_per_step=0.02))
    seconds, examples = run.reached(run.goal)
    steps, accuracy = run.series("eval/accuracy")
    first = steps[np.argmax(accuracy >= 0.9)]
    assert (seconds, examples) == pytest.approx((first * 0.02, first * 64))
    assert run.reached(Goal("eval/accuracy", 2.0, None)) is None


# -------------------------------------------------------------------------------------------------------------- compare
def test_compare(tmp_path, make_run):
    runs = [
        make_run(tmp_path / "fast", seconds_per_step=0.01),
        make_run(tmp_path / "frugal", strategy="{name: parameter_server, mode: async}", bytes_per_step=10, speed=0.3),
        make_run(tmp_path / "alone", strategy="{name: single}", bytes_per_step=0),
    ]
    table = compare(runs, tmp_path / "out")
    lines = table.splitlines()
    assert [line.split()[:2] for line in lines[-3:]] == [
        ["fast", "all_reduce"], ["frugal", "parameter_server/async"], ["alone", "single"],
    ]  # fmt: skip
    assert all(line == line.rstrip() for line in lines)
    assert picture_size((tmp_path / "out" / "compare.png").read_bytes()) == (1800, 528)
    facts = json.loads((tmp_path / "out" / "compare.json").read_text())["runs"]
    fast, frugal, _ = facts
    assert (fast["name"], fast["steps"], fast["examples"], fast["seconds"], fast["bytes"]) == (
        "fast", 400, 25600, 4.0, 16_000_000,
    )  # fmt: skip
    assert fast["goal"] == {
        "goal": "eval/accuracy at least 0.9", "is_met": True, "seconds": pytest.approx(2.0), "examples": 12800.0,
    }  # fmt: skip
    assert frugal["goal"]["is_met"] is False
    assert fast["final"]["eval/loss"] == fast["best"]["eval/loss"] < frugal["best"]["eval/loss"]


def test_compare_tells_runs_of_one_name_apart(tmp_path, make_run):
    one, two = make_run(tmp_path / "a" / "run"), make_run(tmp_path / "b" / "run")
    table = compare([one, two], tmp_path)
    assert str(one) in table
    assert str(two) in table


def test_compare_of_a_run_without_evaluations(tmp_path, make_run):
    run = make_run(tmp_path / "run")
    rows = [json.dumps({"step": step, "wall_s": step, "train/loss": 1 / step}) for step in (1, 2)]
    (run / "metrics.jsonl").write_text("\n".join(rows) + "\n")
    compare([run, make_run(tmp_path / "other", name="other")], tmp_path / "out")
    assert (tmp_path / "out" / "compare.png").stat().st_size > 0


def test_compare_refuses(tmp_path, make_run):
    run = make_run(tmp_path / "run")
    (tmp_path / "file").write_text("")
    for runs, out in (([], tmp_path), ([tmp_path / "nowhere"], tmp_path), ([run], tmp_path / "file" / "out")):
        with pytest.raises(UsageError):
            compare(runs, out)


def test_drawing_survives_odd_values():
    x = np.arange(5.0)
    curves = [Curve("nan", x, np.full(5, np.nan)), Curve("zero", x, np.zeros(5)), Curve("wide", x, 10.0 ** (x * 3))]
    curves += [Curve("one point", x[:1], x[:1]), Curve("none", x[:0], x[:0])]
    for wanted in (curves, *[[curve] for curve in curves], []):
        assert picture_size(draw([Panel("title", "x", "y", wanted)], shared_legend=True)) > (100, 100)


# -------------------------------------------------------------------------------------------------------------- display
class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_plain_lines_are_at_most_one_a_second_but_evaluations_always(capsys):
    clock = Clock()
    display = PlainDisplay("digits", "400 steps", clock)
    display.start("2 workers")
    for step in range(0, 50):
        clock.now = step * 0.1
        display.report(
            step, step / 100, {"train/loss": 0.5, "throughput/examples_per_s": 1234.0, "staleness/mean": 1.5}
        )
        display.evaluated(step, {"eval/loss": None})
    display.note("rank 1 was lost")
    display.finish(["goal met"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "digits: 2 workers (400 steps)"
    assert lines[-2:] == ["rank 1 was lost", "goal met"]
    assert len([line for line in lines if "eval/loss nan" in line]) == 50
    reports = [line for line in lines if "train/loss" in line]
    assert len(reports) == 5
    assert reports[1] == "step 10   10%  train/loss 0.5  1,234 examples/s  9.0 s left"


def test_time_left_is_by_the_pace_of_this_process(capsys):
    """A run resumed at 90 %: what is left takes as long as this process's own pace says."""
    clock = Clock()
    display = PlainDisplay("digits", "400 steps", clock)
    display.report(360, 0.9, {})
    clock.now = 10.0
    display.report(380, 0.95, {})
    first, second = capsys.readouterr().out.splitlines()
    assert "left" not in first
    assert second.endswith("10 s left")


def test_a_reader_that_leaves_does_not_stop_the_run(monkeypatch):
    class Gone(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    display, gone = PlainDisplay("digits", "400 steps"), Gone()
    monkeypatch.setattr(sys, "stdout", gone)
    display.note("one")
    display.note("two")
    assert gone.getvalue() == ""


def live() -> tuple[LiveDisplay, io.StringIO]:
    file = io.StringIO()
    return LiveDisplay("digits", "400 steps", Console(file=file, force_terminal=True, width=100, highlight=False)), file


def test_the_panel_shows_where_the_run_is():
    display, file = live()
    with display:
        display.start("2 workers")
        display.report(200, 0.5, {"train/loss": 0.25, "staleness/mean": 1.25, "staleness/max": 4.0})
        display.evaluated(200, {"eval/accuracy": 0.9})
        display.note(HOSTILE)
        display._live.refresh()
        display.finish(["goal met"])
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", file.getvalue())
    for words in (
        "digits",
        "50% of 400 steps",
        "step 200  train/loss 0.25  staleness 1.2 (max 4)",
        "eval/accuracy 0.9",
    ):
        assert words in shown
    assert HOSTILE in shown
    assert shown.rstrip().endswith("goal met")


@pytest.mark.parametrize("is_stopped", [True, False])
def test_the_terminal_is_given_back_on_an_exception(is_stopped):
    display, file = live()
    display.start("2 workers")
    assert "\x1b[?25l" in file.getvalue(), "the cursor is hidden while it is live"
    if is_stopped:
        with pytest.raises(ZeroDivisionError), display:
            1 / 0  # noqa: B018
    assert ("\x1b[?25h" in file.getvalue()) is is_stopped
    display.close()
    display.close()


def test_the_display_fits_the_terminal():
    assert isinstance(make_display(True, "digits", "400 steps"), LiveDisplay)
    assert isinstance(make_display(False, "digits", "400 steps"), PlainDisplay)


def test_units():
    assert [number(value) for value in (0.12345, 1e-7, 12345.0, 3, None)] == ["0.1235", "1e-07", "12,345", "3", "nan"]
    assert [duration(s) for s in (0.82, 42, 200, 11_000)] == ["0.8 s", "42 s", "3 min 20 s", "3 h 03 min"]
    assert [byte_size(b) for b in (512, 1500, 23_400_000, 999e12)] == ["512 B", "1.5 kB", "23.4 MB", "999 TB"]


# ---------------------------------------------------------------------------------------------------------- TensorBoard
def read_scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder)).Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


@pytest.mark.parametrize("resumed_at", [10, None])
def test_tensorboard_reads_it_and_forgets_what_a_resume_cut_off(tmp_path, resumed_at):
    with TensorBoardWriter(tmp_path / "tb") as writer:
        for step in (10, 20, 30):
            writer.scalars(step, {"train/loss": step / 10, "eval/loss": None}, wall_time=1000.0 + step)
    assert read_scalars(tmp_path / "tb") == {"train/loss": [(10, 1.0), (20, 2.0), (30, 3.0)]}
    first = next((tmp_path / "tb").iterdir())
    first.rename(first.with_name("events.out.tfevents.0000000001.h"))  # both were made within one second
    with TensorBoardWriter(tmp_path / "tb", resumed_at=resumed_at) as writer:
        writer.scalars(20, {"train/loss": 5.0}, wall_time=2000.0)
    again = read_scalars(tmp_path / "tb")["train/loss"]
    if resumed_at is None:
        assert again[:3] == [(10, 1.0), (20, 2.0), (30, 3.0)], "the control: the abandoned steps still show"
    else:
        assert again == [(10, 1.0), (20, 5.0)]
