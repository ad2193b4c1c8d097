"""The run directory: one writer, whole files, and nobody else's folder."""

import json
import math
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from distml.errors import UsageError
from distml.runs.directory import MetricsFile, Result, ResultFile, RunDirectory
from distml.runs.files import finite, strict_json, write_atomically

HOLD = """
import sys
from distml.runs.directory import RunDirectory
with RunDirectory.open(sys.argv[1]) as run:
    run.result.update(status="running")
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """A process that holds tmp_path/run until its stdin closes."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "run")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ------------------------------------------------------------------------------------------------------------- the lock
def test_a_directory_in_use_is_refused_naming_the_holder_and_the_ways_out(tmp_path, holder):
    for fresh in (False, True):
        with pytest.raises(UsageError) as caught:
            RunDirectory.open(tmp_path / "run", fresh=fresh)
        message = str(caught.value)
        assert f"process {holder.pid} on host {os.uname().nodename}" in message
        assert f"kill {holder.pid}" in message
        assert "--out" in message
        assert "\n" not in message
    assert not (tmp_path / "run.1").exists()
    assert RunDirectory.view(tmp_path / "run").in_use().pid == holder.pid


def test_the_lock_ends_with_its_holder_however_that_ends(tmp_path, holder):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    left = json.loads((tmp_path / "run" / "lock").read_text())
    assert left == {"host": os.uname().nodename, "pid": holder.pid}, "the stale note is there, and must not matter"
    assert RunDirectory.view(tmp_path / "run").in_use() is None
    with RunDirectory.open(tmp_path / "run") as run:
        assert run.result.read().status == "running"
        assert json.loads((run.path / "lock").read_text())["pid"] == os.getpid()


def test_another_hosts_stale_note_does_not_block(tmp_path):
    (tmp_path / "lock").write_text('{"host": "elsewhere", "pid": 1}')
    with RunDirectory.open(tmp_path):
        assert json.loads((tmp_path / "lock").read_text())["pid"] == os.getpid()


def test_close_releases_and_open_excludes_within_one_process(tmp_path):
    with RunDirectory.open(tmp_path / "run"), pytest.raises(UsageError, match="in use"):
        RunDirectory.open(tmp_path / "run")
    RunDirectory.open(tmp_path / "run").close()


def test_of_processes_that_start_together_one_gets_it(tmp_path):
    command = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
    racers = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    # A loser ends by itself; the winner says so and stays until its stdin closes.
    said = [process.stdout.readline() for process in racers]
    errors = [process.communicate()[1] for process in racers]
    assert sorted(said) == ["", "", "held\n"]
    assert sum("in use" in error for error in errors) == 2


# ------------------------------------------------------------------------------------------- what is not ours stays so
@pytest.mark.parametrize("fresh", [False, True])
def test_a_foreign_folder_is_refused_and_untouched(tmp_path, fresh):
    folder = tmp_path / "thesis"
    folder.mkdir()
    (folder / "chapter.tex").write_text("years of work")
    (folder / "spec.yaml").write_text("openapi: 3.0.0\n")
    (folder / "result.json").write_text("[1, 2]")
    (folder / "lock").write_text("theirs")
    before = contents(folder)
    with pytest.raises(UsageError, match="not a run directory"):
        RunDirectory.open(folder, fresh=fresh)
    assert contents(folder) == before
    assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.parametrize(
    ("name", "text"),
    [("spec.yaml", "distml: v1\n"), ("result.json", '{"status": "done"}'), ("lock", '{"host": "h", "pid": 1}')],
)
def test_a_folder_of_ours_is_taken_over(tmp_path, name, text):
    """The control of the test above: each mark alone makes a folder a run's."""
    (tmp_path / name).write_text(text)
    (tmp_path / "notes.txt").write_text("kept")
    RunDirectory.open(tmp_path).close()
    assert (tmp_path / "notes.txt").read_text() == "kept"


def test_a_file_in_the_way(tmp_path):
    file = tmp_path / "run"
    file.write_text("a file")
    with pytest.raises(UsageError, match="is a file"):
        RunDirectory.open(file)
    with pytest.raises(UsageError, match="cannot write the run directory"):
        RunDirectory.open(file / "below")
    assert file.read_text() == "a file"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_an_unwritable_parent(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(UsageError, match="Permission denied"):
        RunDirectory.open(tmp_path / "run")
    tmp_path.chmod(0o700)


def test_view_needs_a_run(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UsageError, match="not a run directory"):
            RunDirectory.view(path)
    assert not (tmp_path / "nowhere").exists()


# ---------------------------------------------------------------------------------------------------------------- fresh
def test_fresh_moves_to_the_next_free_number(tmp_path):
    path = tmp_path / "run"
    (tmp_path / "run.2").mkdir()
    for round_, moved_to in enumerate([None, "run.1", "run.3", "run.4"]):
        with RunDirectory.open(path, fresh=True) as run:
            assert run.moved_to == (moved_to and tmp_path / moved_to)
            assert [entry.name for entry in path.iterdir()] == ["lock"]
            run.write_spec(f"distml: v1\nname: round-{round_}\n")
            with pytest.raises(UsageError, match="in use"):
                RunDirectory.open(path, fresh=True)
    assert RunDirectory.view(tmp_path / "run.3").read_spec_text() == "distml: v1\nname: round-1\n"


def test_without_fresh_everything_stays(tmp_path):
    with RunDirectory.open(tmp_path / "run") as run:
        run.write_spec("distml: v1\n")
    with RunDirectory.open(tmp_path / "run") as run:
        assert run.read_spec_text() == "distml: v1\n"
        assert run.moved_to is None


# ---------------------------------------------------------------------------------------------------------- small files
def test_result_keeps_what_is_not_changed(tmp_path):
    result = ResultFile(tmp_path / "result.json")
    assert result.read() is None
    result.update(status="running", step=3, metrics={"train/loss": math.nan, "eval/loss": np.float32(0.5)})
    result.update(step=7, best={"metric": "eval/loss", "value": 0.5, "step": 3}, durable=False)
    read = ResultFile(tmp_path / "result.json").read()
    assert read == Result(
        status="running",
        step=7,
        metrics={"train/loss": None, "eval/loss": 0.5},
        best={"metric": "eval/loss", "value": 0.5, "step": 3},
        pid=os.getpid(),
        host=os.uname().nodename,
    )
    assert [entry.name for entry in tmp_path.iterdir()] == ["result.json"], "no temporary file stays"


def test_result_refuses_unknown_fields_and_states(tmp_path):
    result = ResultFile(tmp_path / "result.json")
    with pytest.raises(TypeError):
        result.update(steps=3)
    with pytest.raises(ValueError, match="finished"):
        result.update(status="finished")
    assert result.read() is None
    (tmp_path / "result.json").write_text("{")
    with pytest.raises(UsageError, match=r"result\.json is not a result"):
        result.read()


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomically(path, "old")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        write_atomically(path, "new")
    assert contents(tmp_path) == {"file": b"old"}


def test_modes_follow_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        write_atomically(tmp_path / "file", "text")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o640


def test_environment(tmp_path):
    with RunDirectory.open(tmp_path / "run") as run:
        assert run.read_environment() == {}
        run.write_environment({"python": "3.11", "hosts": ["a"]})
        assert run.read_environment() == {"python": "3.11", "hosts": ["a"]}


def test_leftover_temporary_files_go(tmp_path):
    RunDirectory.open(tmp_path).close()
    (tmp_path / ".result.json.123.tmp").write_text("half")
    RunDirectory.open(tmp_path).close()
    assert [entry.name for entry in tmp_path.iterdir()] == ["lock"]


@pytest.mark.parametrize(
    "value", [{"a": math.nan}, {"a": [1, {"b": math.inf}]}, {1: 2}, {"a": {3}}, {"a": np.int64(1)}]
)
def test_strict_json_refuses_what_would_not_read_back(value):
    with pytest.raises(ValueError, match="state"):
        strict_json(value, "state")
    if not any(isinstance(item, set) for item in value.values()):
        json.dumps(finite(value), allow_nan=False)  # what is meant for people is made readable instead


# -------------------------------------------------------------------------------------------------------------- metrics
def test_metrics_are_readable_at_once_and_nan_is_null(tmp_path):
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    assert metrics.read() == []
    metrics.append({"step": 1, "train/loss": 0.5, "bad": math.inf})
    assert MetricsFile(metrics.path).read() == [{"step": 1, "train/loss": 0.5, "bad": None}]
    metrics.close()


def test_a_torn_last_line_is_passed_over_and_not_glued_to(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3, "train/lo')
    metrics = MetricsFile(path)
    assert [row["step"] for row in metrics.read()] == [1, 2]
    metrics.append({"step": 3})
    metrics.close()
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n{"step": 3}\n'


def test_a_damaged_line_elsewhere_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"ste\n{"step": 3}\n')
    with pytest.raises(UsageError, match=r"metrics\.jsonl:2"):
        MetricsFile(path).read()


@pytest.mark.parametrize(("step", "kept"), [(200, [100, 200]), (300, [100, 200, 300]), (-1, []), (250, [100, 200])])
def test_cut_back(tmp_path, step, kept):
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    for number in (100, 200, 300):
        metrics.append({"step": number})
    with open(metrics.path, "a") as file:
        file.write('{"step": 4')
    assert metrics.cut_back(step) == 3 - len(kept)
    assert [row["step"] for row in metrics.read()] == kept
    metrics.append({"step": 999})
    metrics.close()
    assert metrics.path.read_text().splitlines() == [json.dumps({"step": number}) for number in [*kept, 999]]


def test_cut_back_of_nothing(tmp_path):
    assert MetricsFile(tmp_path / "metrics.jsonl").cut_back(5) == 0
    assert not list(tmp_path.iterdir())


def test_importing_is_cheap():
    """Neither torch nor ray nor what only reports need."""
    code = (
        "import sys, distml.runs.directory, distml.runs.checkpoints, distml.runs.tensorboard, distml.runs.display,"
        " distml.runs.report; print([name for name in"
        " ('torch', 'ray', 'matplotlib', 'tensorboard', 'rich', 'pydantic', 'google') if name in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
