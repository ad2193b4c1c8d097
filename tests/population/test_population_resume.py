"""Whatever moment a population's driver dies at, the next run goes on from it: nothing lost, nothing doubled."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from own.plain_host import LAYOUT, Climber, PlainHost
from own.populations import OWN, Kept, lineage, per_member, run_with, toy
from test_population_run import END, KEPT, SIX, same_end, weights

from distml.errors import UsageError
from distml.launch.run import check_resume
from distml.population.context import forget, has_begun
from distml.population.host import Answer
from distml.population.individual import Held, Record
from distml.population.saving import Saver, Snapshot
from distml.runs.directory import RunDirectory
from distml.spec.loader import load_spec

TESTS = OWN.parent


class Imaging(PlainHost):
    """Keeps an image of the run directory before some answers: what a SIGKILL at that moment would leave."""

    def __init__(self, slots: int, out: Path, moments: set[int], **named: Any) -> None:
        super().__init__(slots, random.Random(7), **named)
        self.out, self.moments, self.count = out, moments, 0

    def wait(self, timeout_s: float) -> list[Answer]:
        self.count += 1
        if self.count in self.moments:
            shutil.copytree(self.out, self.out.with_name(f"{self.out.name}-{self.count}"))
        return super().wait(timeout_s)


@pytest.fixture
def _written_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is handed over is on the disk when the decider goes on."""

    def put(self: Saver, snapshot: Snapshot, *, important: bool = False) -> None:
        self.write(snapshot)

    monkeypatch.setattr(Saver, "put", put)


def images(out: Path) -> list[Path]:
    return sorted(out.parent.glob(f"{out.name}-*"))


@pytest.mark.usefixtures("_written_at_once")
@pytest.mark.parametrize(
    ("slots", "every", "moments"),
    [(2, 2, {9, 50, 75}), pytest.param(6, 1, set(range(2, 80, 7)), marks=pytest.mark.slow)],
)
def test_synchronous_ends_bitwise_as_if_nothing_had_happened(
    slots: int, every: int, moments: set[int], tmp_path: Path
) -> None:  # fmt: skip
    out = tmp_path / "run"
    spec = toy(**SIX | {"checkpoint": {"every": every}})
    run_with(spec, out, Imaging(slots, out, moments))
    assert len(images(out)) > 2
    for image in images(out):
        run_with(spec, image, PlainHost(slots, random.Random(8)), resume=True)
        same_end(out, image)


@pytest.mark.usefixtures("_written_at_once")
def test_synchronous_with_a_member_that_diverges(tmp_path: Path) -> None:
    def gone(name: str, step: int, job: Any) -> str | None:
        return "not_finite" if name == "04" and step == 16 and job.task.args["h0"] < 0.9 else None

    out = tmp_path / "run"
    spec = toy(**KEPT)
    run_with(spec, out, Imaging(6, out, {48, 55}, gone=gone))
    assert any(event["event"] == "replace" for event in lineage(out))
    for image in images(out):
        run_with(spec, image, PlainHost(6, random.Random(8), gone=gone), resume=True)
        same_end(out, image)


@pytest.mark.usefixtures("_written_at_once")
def test_asynchronous_loses_and_doubles_nothing(tmp_path: Path) -> None:
    out = tmp_path / "run"
    spec = toy(**KEPT, synchronous=False)
    run_with(spec, out, Imaging(3, out, {17, 50}))
    for image in images(out):
        known = json.loads((image / "population.json").read_text())["members"]
        before = per_member(lineage(image))
        run_with(spec, image, PlainHost(3, random.Random(8)), resume=True)
        for name, events in per_member(lineage(image)).items():
            assert events[: known[name]["events"]] == before.get(name, [])[: known[name]["events"]]
            steps = [event["step"] for event in events]
            assert steps == list(range(0, END + 1, 4))
            rows = [json.loads(line)["step"] for line in (image / f"members/{name}/metrics.jsonl").open()]
            assert rows == list(range(1, END + 1))


def test_what_is_lost_is_not_named_by_the_file_whoever_hears_of_it_meanwhile(tmp_path: Path) -> None:
    run, _ = run_with(toy(stop={"steps": 8}), tmp_path / "run")

    def fetch(handle: Any) -> Any:
        saver.lost.clear()  # as the decider does, who looks after them
        if handle == "lost":
            raise LookupError("it was lost")
        return state

    state = Climber(load_spec(toy(), directory=OWN).job.base, None).state()
    saver = Saver(tmp_path / "other", run.folders, fetch, "eval/quality")
    (tmp_path / "other").mkdir()
    saver.layout = LAYOUT
    values = run.members["00"].own.values
    records = {name: Record(Held(40, values, handle, 1.0), 1.0, 2) for name, handle in (("00", "lost"), ("01", "here"))}
    saver.write(Snapshot(0.0, records))
    assert not saver.path.exists()
    assert saver.lost == {"00"}
    saver.write(Snapshot(0.0, {"01": records["01"]}))
    assert saver.path.exists()


class Interrupting(PlainHost):
    """The terminal's Ctrl-C at the n-th answer."""

    number = 20

    def wait(self, timeout_s: float) -> list[Answer]:
        self.number -= 1
        if self.number == 0:
            os.kill(os.getpid(), signal.SIGINT)
        return super().wait(timeout_s)


@pytest.mark.parametrize("synchronous", [True, False])
def test_interrupted_and_resumed(synchronous: bool, tmp_path: Path) -> None:
    spec, host = toy(**SIX, synchronous=synchronous), Interrupting(6)
    import distml.population.run as module

    original = module.PopulationRun.train

    def train(self: Any) -> None:
        with self.signals.handled():
            original(self)

    module.PopulationRun.train = train  # type: ignore[method-assign]
    try:
        _, result = run_with(spec, tmp_path / "run", host)
    finally:
        module.PopulationRun.train = original  # type: ignore[method-assign]
    assert result.status == "interrupted"
    assert "test/quality" not in result.metrics
    members = [json.loads(path.read_text()) for path in (tmp_path / "run/members").glob("*/result.json")]
    assert {member["status"] for member in members} == {"interrupted"}
    assert all(member["checkpoint"] for member in members)
    display = Kept()
    _, result = run_with(spec, tmp_path / "run", resume=True, display=display)
    assert result.status == "done"
    assert any("resuming at" in line for line in display.lines)
    if synchronous:
        run_with(spec, tmp_path / "whole")
        same_end(tmp_path / "run", tmp_path / "whole")


@pytest.mark.usefixtures("_written_at_once")
@pytest.mark.parametrize("left", [1, 0])
def test_damaged_checkpoints(left: int, tmp_path: Path) -> None:
    out = tmp_path / "run"
    spec = toy(**KEPT, synchronous=False, stop={"steps": 72})
    run_with(spec, out)
    for folder in sorted((out / "members/02/checkpoints").glob("step-*"))[left:]:
        (folder / "model.safetensors").write_bytes(b"")
    display = Kept()
    _, result = run_with({**spec, "stop": {"steps": 144}}, out, resume=True, display=display)
    assert result.status == "done"
    what = "goes on from an older one" if left else "begins anew"
    assert any("member 02" in line and what in line for line in display.lines)
    steps = [event["step"] for event in per_member(lineage(out))["02"]]
    assert steps == sorted(set(steps))


def test_a_changed_stop_lets_a_finished_population_go_on(tmp_path: Path) -> None:
    out = tmp_path / "run"
    spec = toy(**SIX, stop={"steps": 48})
    run_with(spec, out)
    run, result = run_with({**spec, "stop": {"steps": 96}}, out, resume=True)
    assert result.step == 96
    copies = [[event["event"] for event in events].count("copy") for events in per_member(lineage(out)).values()]
    assert [one.copies for one in run.members.values()] == copies
    assert any(copies)
    run_with({**spec, "stop": {"steps": 96}}, tmp_path / "whole")
    same_end(out, tmp_path / "whole")


DRIVER = """
import os, random, signal, sys
from pathlib import Path
sys.path[:0] = [{tests!r}, {own!r}]
from own.plain_host import PlainHost
from own.populations import run_with, toy

class Deadly(PlainHost):
    left = {left}
    def wait(self, timeout_s):
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().wait(timeout_s)

run_with(toy(**{changes!r}), Path({out!r}), Deadly(6, random.Random(1)))
"""


@pytest.mark.parametrize("left", [25, pytest.param(95, marks=pytest.mark.slow)])
def test_a_killed_driver(left: int, tmp_path: Path) -> None:
    changes = {**KEPT, "base__stop__steps": 80}
    text = DRIVER.format(tests=str(TESTS), own=str(OWN), left=left, changes=changes, out=str(tmp_path / "run"))
    found = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, timeout=120, check=False)
    assert found.returncode == -signal.SIGKILL, found.stderr
    assert json.loads((tmp_path / "run/result.json").read_text())["status"] == "running"
    run_with(toy(**changes), tmp_path / "run", resume=True)
    run_with(toy(**changes), tmp_path / "whole")
    same_end(tmp_path / "run", tmp_path / "whole")


def test_what_a_resume_reads_is_what_was_written(tmp_path: Path) -> None:
    """A control of `same_end`: another seed's population ends otherwise."""
    run_with(toy(**SIX), tmp_path / "one")
    run_with(toy(**SIX, seed=1), tmp_path / "other")
    with pytest.raises(AssertionError):
        same_end(tmp_path / "one", tmp_path / "other")
    assert set(weights(tmp_path / "one")) == {f"0{index}" for index in range(6)}


@pytest.mark.parametrize(
    ("name", "nothing", "something"),
    [
        ("population.json", {"members": {"00": {"checkpoint": False}}}, {"members": {"00": {"checkpoint": True}}}),
        ("trials.jsonl", {"trial": "0000", "event": "failed"}, {"trial": "0000", "event": "finished"}),
    ],
)
def test_a_mistake_may_be_mended_before_anything_was_trained(
    name: str, nothing: Any, something: Any, tmp_path: Path
) -> None:
    before, after = (load_spec(toy(base__batch_size=size, limits__start_s=size * 9), directory=OWN) for size in (1, 2))
    with RunDirectory.open(tmp_path) as directory:
        shutil.copy(OWN / "surrogate.py", tmp_path)
        directory.write_spec(before.dump())
        directory.result.update(status="failed", step=1)
        (tmp_path / name).write_text(json.dumps(nothing) + "\n")
        display = Kept()
        assert check_resume(directory, after, directory.result.read(), display) is False
        assert display.lines == ["nothing was trained here before; it begins anew with base.batch_size: 1 -> 2"]
        (tmp_path / name).write_text(json.dumps(something) + "\n")
        with pytest.raises(UsageError, match="of another spec"):
            check_resume(directory, after, directory.result.read(), display)
        same = load_spec(toy(limits__start_s=18), directory=OWN)  # which the base has, too
        assert check_resume(directory, same, directory.result.read(), display) is True
        (tmp_path / "members/07").mkdir(parents=True)
        forget(directory)
        assert not has_begun(directory)
        assert not (tmp_path / "members").exists()


@pytest.mark.parametrize("steps", [16, 32])
def test_members_that_are_given_more_go_on(steps: int, tmp_path: Path) -> None:
    """With the same budget nobody does."""
    run_with(toy(base__stop__steps=16), tmp_path)
    host = PlainHost(2)
    _, result = run_with(toy(base__stop__steps=steps), tmp_path, host, resume=True)
    finished = [event for event in lineage(tmp_path) if event["event"] == "finish"]
    assert (result.step, result.status) == (2 * steps, "done")
    assert [event["step"] for event in finished] == sorted([16, 16, *([32, 32] if steps == 32 else [])])
    assert all(rows[-1]["step"] == steps for rows in per_member(lineage(tmp_path)).values())


def test_a_resume_may_give_members_more(tmp_path: Path) -> None:
    with RunDirectory.open(tmp_path) as directory:
        shutil.copy(OWN / "surrogate.py", tmp_path)
        directory.write_spec(load_spec(toy(), directory=OWN).dump())
        directory.result.update(status="done", step=480)
        (tmp_path / "population.json").write_text('{"members": {"00": {"checkpoint": true}}}')
        known, display = directory.result.read(), Kept()
        assert check_resume(directory, load_spec(toy(), directory=OWN), known, display) is None
        more = load_spec(toy(base__stop__steps=300), directory=OWN)
        assert check_resume(directory, more, known, display) is True
        assert display.lines == ["changed: base.stop.steps: 240 -> 300"]


def test_a_file_of_an_earlier_version_is_one_line(tmp_path: Path) -> None:
    run_with(toy(base__stop__steps=16), tmp_path)
    path = tmp_path / "population.json"
    found = json.loads(path.read_text())
    del found["members"]["01"]["copies"]
    path.write_text(json.dumps(found))
    with pytest.raises(UsageError, match=r"is not what a population leaves \('copies'\); --fresh begins anew"):
        run_with(toy(base__stop__steps=16), tmp_path, resume=True)
