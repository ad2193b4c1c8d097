"""Both hosts of members: the same numbers; and on Ray deaths, silence and blocked donors, where nothing may hang."""

from __future__ import annotations

import gc
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from own.members import changed, same_state, same_tree, small_job
from own.oracle import OWN

from distml.errors import UsageError
from distml.population.host import Advanced, Copied, Gone, Ready
from distml.runtime.members import InlineHost
from distml.runtime.ray_members import RayHost
from distml.spec.schema import JobSpec
from distml.tasks.sources import SourceTree

LIMITS = {"heartbeat_s": 0.3, "lost_after_s": 2.0, "start_s": 120.0}
PATIENCE_S = 120.0
FAILING = "failing:Failing"
ASYNC = {"name": "parameter_server", "mode": "async"}


def job_of(task: Any = None, **changes) -> JobSpec:
    return small_job(task or {"name": FAILING, "args": {"dropout": 0.5, "how": ""}}, limits=LIMITS, **changes)


@pytest.fixture(scope="module")
def on_ray(shared_ray: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayHost]:
    """Two slots."""
    job = job_of()
    folder = tmp_path_factory.mktemp("run") / "members"
    host = RayHost(job, SourceTree.collect(job.task, OWN), folder, 2)
    yield host
    host.close()


@pytest.fixture
def host(on_ray: RayHost) -> Iterator[RayHost]:
    """Empty before and after."""
    yield on_ray
    for slot in on_ray.all_slots:
        if slot.member is not None:
            on_ray.release(slot.member)


def inline(tmp_path: Path, job: JobSpec, slots: int = 2, **options) -> InlineHost:
    return InlineHost(job, SourceTree.collect(job.task, OWN), tmp_path / "members", slots, **options)


def in_order(host: Any, count: int) -> list[Any]:
    """The next answers; several may come at once."""
    found: list[Any] = []
    deadline = time.monotonic() + PATIENCE_S
    while len(found) < count:
        assert time.monotonic() < deadline, f"only {found}"
        found += host.wait(1.0)
    assert len(found) == count, found
    return found


def answers(host: Any, count: int) -> dict[str, Any]:
    """The last of the next ones, by member."""
    return {answer.member: answer for answer in in_order(host, count)}


def kinds(found: dict[str, Any]) -> dict[str, type]:
    return {member: type(answer) for member, answer in found.items()}


def exploited(host: Any, job: JobSpec) -> tuple[list[Any], Callable[[Any], Any]]:
    """Two members, of which b takes a's state with another rate and dropout; what they came to."""
    watch = ["optimizer.lr", "task.args.dropout"]
    new = changed(job, optimizer__lr=0.05, task__args__dropout=0.25)
    for name, one in {"a": job, "b": changed(job, seed=3)}.items():
        host.start(name, one, None, watch)
    ready = answers(host, 2)
    for name in "ab":
        host.advance(name, 10, True)
    first = answers(host, 2)
    host.copy("b", first["a"].state, changed(new, seed=3), keep=True)
    copied = answers(host, 1)["b"]
    for name in "ab":
        host.advance(name, 20, True)
    last = answers(host, 2)
    assert kinds(ready) == {"a": Ready, "b": Ready}
    assert ready["b"].live == {"optimizer.lr": 0.01, "task.args.dropout": 0.5}
    assert isinstance(copied, Copied)
    assert copied.applied == {"optimizer.lr": 0.05, "task.args.dropout": 0.25}
    states = [first["a"].state, first["b"].state, copied.state, last["a"].state, last["b"].state]
    return [host.fetch(state) for state in states], lambda name: last[name]


@pytest.mark.slow  # a whole population does, too: test_population_on_ray.py
def test_both_hosts_come_to_the_same(host, tmp_path):
    job = job_of()
    here, end = exploited(inline(tmp_path, job), job)
    there, other_end = exploited(host, job)
    assert all(same_state(one, other) for one, other in zip(here, there, strict=True))
    assert not same_state(here[3], here[4])
    for name in "ab":
        assert end(name).step == other_end(name).step == 20
        assert end(name).metrics["eval/loss"] == other_end(name).metrics["eval/loss"]


def test_a_parked_member_goes_on_in_another_process(host, tmp_path):
    """Its state outlives the process that it was left in, once the member is released."""
    job = job_of()
    host.start("a", job)
    host.advance("a", 10, True)
    kept = answers(host, 2)["a"].state
    slot = next(slot for slot in host.all_slots if slot.member == "a")
    host.release("a")
    host.fetch(kept)
    die(host, slot)
    host.start("a", job, kept)
    host.advance("a", 20, True)
    found = answers(host, 2)["a"]
    alone = inline(tmp_path, job)
    alone.start("a", job)
    alone.advance("a", 10, True)
    alone.advance("a", 20, True)
    assert [type(answer) for answer in (*alone.wait(1), *alone.wait(1))] == [Ready, Advanced]
    assert same_tree(host.fetch(found.state).shared["weights"], alone.wait(1)[0].state.shared["weights"])


def test_a_state_goes_when_nobody_refers_to_it(host):
    import ray

    def kept_there() -> int:
        """States in the slot's process, once it has dropped what it was told to."""
        ray.get(slot.actor.drop.remote([]), timeout=PATIENCE_S)
        return ray.get(slot.actor.num_kept.remote(), timeout=PATIENCE_S)

    host.start("a", job_of())
    host.advance("a", 1, False)
    answers(host, 2)
    slot = next(slot for slot in host.all_slots if slot.member == "a")
    gc.collect()  # what earlier members left
    host.advance("a", 2, False)
    answers(host, 1)
    before = kept_there()
    host.advance("a", 3, True)
    kept = answers(host, 1)["a"].state
    assert kept_there() == before + 1
    del kept
    gc.collect()
    host.advance("a", 4, False)
    answers(host, 1)
    assert kept_there() == before


def test_an_old_ping_does_not_overwrite_what_is_known(host):
    import ray

    host.start("a", job_of())
    answers(host, 1)
    slot = next(slot for slot in host.all_slots if slot.member == "a")
    slot.step, slot.ping = 10, ray.put(("train", 0.0, 3))
    host._hear_ping(slot)
    assert slot.step == 10
    slot.ping = ray.put(("train", 1e9, 10))  # of a member that blocks, and is released before that is heard
    host.release("a")
    host.start("b", job_of())
    assert slot.member == "b"
    assert kinds(answers(host, 1)) == {"b": Ready}


def test_slots_are_counted(host, tmp_path):
    small = inline(tmp_path, job_of(), slots=1)
    for one in (small, host):
        for index in range(one.slots):
            one.start(str(index), job_of())
        with pytest.raises(RuntimeError, match="no free slot for member more"):
            one.start("more", job_of())
        one.release("0")
        one.start("more", job_of())
        with pytest.raises(KeyError):
            one.advance("nobody", 1, False)
        assert kinds(answers(one, one.slots))["more"] is Ready
        for name in [str(index) for index in range(1, one.slots)] + ["more"]:
            one.release(name)


def test_inline_has_no_gpus(tmp_path):
    with pytest.raises(UsageError, match="gpus_per_worker needs --runtime ray"):
        inline(tmp_path, job_of(resources={"workers": 1, "gpus_per_worker": 1}))


# ------------------------------------------------------------------------------------------------------------ failures
def die(host: RayHost, slot: Any) -> None:
    """Kill a slot's process, and let the host notice."""
    host.wait(0.0)
    while slot.process is None:
        host.wait(0.1)
    os.kill(slot.process[1], signal.SIGKILL)
    while slot.actor is not None and slot.member is None:
        host.wait(0.1)


@pytest.mark.parametrize(("how", "kind"), [("nan", "not_finite"), ("raise", "failed")])
@pytest.mark.parametrize("where", ["inline", "ray"])
def test_a_failure_leaves_the_slot_to_the_next(host, tmp_path, how, kind, where):
    job = job_of({"name": FAILING, "args": {"how": how, "version": 3}})
    one = host if where == "ray" else inline(tmp_path, job)
    one.start("a", job)
    one.advance("a", 10, True)
    ready, gone = in_order(one, 2)
    assert isinstance(ready, Ready)
    assert isinstance(gone, Gone)
    assert (gone.kind, gone.phase, gone.step) == (kind, "loss", 3)
    assert "\n" not in gone.cause
    one.advance("a", 20, True)  # nobody listens any more
    one.start("a", job_of())
    one.advance("a", 5, False)
    assert [type(answer) for answer in in_order(one, 2)] == [Ready, Advanced]
    one.release("a")


def test_what_cannot_be_built_is_said(host, tmp_path):
    job = job_of({"name": FAILING, "args": {"dtype": "no_such_type"}})
    for one in (host, inline(tmp_path, job)):
        one.start("a", job)
        gone = answers(one, 1)["a"]
        assert (gone.kind, gone.phase, gone.step) == ("failed", "start", None)
        assert "no_such_type" in gone.cause


def test_injected_failures_happen_once(tmp_path):
    one = inline(tmp_path, job_of(), injections={"b": ("nan:rank=0,step=4",)})
    for name in "ab":
        one.start(name, job_of())
        one.advance(name, 8, False)
    found = [answer for _ in range(4) for answer in one.wait(1)]
    assert [type(answer) for answer in found] == [Ready, Advanced, Ready, Gone]
    assert (found[-1].kind, found[-1].step) == ("not_finite", 4)
    one.start("b", job_of())
    one.advance("b", 8, False)
    assert [type(answer) for _ in range(2) for answer in one.wait(1)] == [Ready, Advanced]


def waiting(file: Path) -> JobSpec:
    return job_of({"name": FAILING, "args": {"how": "wait", "version": 10, "file": str(file)}})


def prepared(host: RayHost, tmp_path: Path) -> tuple[dict[str, Any], Any]:
    """A donor a that waits in its interval after step 10, and a target b; their answers, and the donor's slot."""
    job = waiting(tmp_path / "go on")
    host.start("a", job)
    host.start("b", job)
    for name in "ab":
        host.advance(name, 10, True)
    found = answers(host, 4)
    host.advance("a", 20, True)
    return found, next(slot for slot in host.all_slots if slot.member == "a")


def test_a_copy_does_not_wait_for_the_donors_interval(host, tmp_path):
    found, _ = prepared(host, tmp_path)
    host.copy("b", found["a"].state, waiting(tmp_path / "go on"))
    assert kinds(answers(host, 1)) == {"b": Copied}  # a has yet to answer
    (tmp_path / "go on").touch()
    assert answers(host, 1)["a"].step == 20


def test_a_death_ends_the_member_and_not_the_host(host, tmp_path):
    found, slot = prepared(host, tmp_path)
    while slot.process is None:
        found |= {answer.member: answer for answer in host.wait(0.1)}
    os.kill(slot.process[1], signal.SIGKILL)
    gone = answers(host, 1)["a"]
    assert (gone.kind, gone.step) == ("died", 10)
    assert "SIGKILL" in gone.cause
    with pytest.raises(LookupError, match="lost with its process"):
        host.fetch(found["a"].state)
    host.start("a", job_of(), found["b"].state)  # a clone of the other one
    assert kinds(answers(host, 1)) == {"a": Ready}


@pytest.mark.parametrize("kills", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["killed", "silent"])
def test_a_donor_that_is_lost_in_the_midst_of_a_copy_hangs_nobody(host, tmp_path, kills):
    """It is stopped, so that its state does not come; then killed, or left to the heartbeat."""
    found, slot = prepared(host, tmp_path)
    while slot.process is None:
        host.wait(0.1)
    pid = slot.process[1]
    os.kill(pid, signal.SIGSTOP)
    host.copy("b", found["a"].state, waiting(tmp_path / "go on"))
    assert host.wait(0.3) == []
    if kills:
        os.kill(pid, signal.SIGKILL)
    gone = answers(host, 2)
    assert {member: (answer.kind, answer.phase) for member, answer in gone.items() if member == "b"} == {
        "b": ("failed", "copy")}  # fmt: skip
    assert gone["a"].kind == "died"
    assert "lost with its process" in gone["b"].cause
    assert ("SIGKILL" if kills else "gave no answer for 2 s") in gone["a"].cause
    host.start("b", job_of())
    assert kinds(answers(host, 1)) == {"b": Ready}
