"""Following a log whose connections break, hang and end, without a cluster."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

import pytest

from distml.errors import UsageError
from distml.launch.submit.contact import NotReached
from distml.launch.submit.follow import followed
from distml.launch.submit.state import ClusterError, JobState

LOG = [f"line {number}\n" for number in range(10)] + ["the last, without an end"]
Step = str | Exception | None


class Cluster:
    """Each connection follows one script: pieces of the log, an error, or None for silence. The job is over with the
    last script, or after a number of questions."""

    def __init__(self, *scripts: list[Step], over_after: int | None = None) -> None:
        self.scripts, self.over_after = list(scripts), over_after
        self.connections, self.questions = 0, 0

    async def tail(self) -> AsyncIterator[str]:
        self.connections += 1
        for step in self.scripts.pop(0):
            if step is None:
                await asyncio.sleep(3600)
            elif isinstance(step, Exception):
                raise step
            else:
                yield step

    def status(self) -> JobState:
        self.questions += 1
        over = not self.scripts if self.over_after is None else self.questions > self.over_after
        return JobState("id", "run", "SUCCEEDED" if over else "RUNNING")

    def lines(self, status: Callable[[], JobState] | None = None, out_of_reach_s: float = 5.0) -> list[str]:
        found = followed(self.tail, status or self.status, retry_s=0.0, silence_s=0.05, out_of_reach_s=out_of_reach_s)
        return list(found)


WHOLE = "".join(LOG).split("\n")


def test_all_lines_once() -> None:
    assert Cluster([*LOG]).lines() == WHOLE
    assert Cluster(list("".join(LOG))).lines() == WHOLE  # in any pieces
    assert Cluster(["".join(LOG)]).lines() == WHOLE


def test_after_a_cut_nothing_is_lost_and_nothing_comes_twice() -> None:
    text = "".join(LOG)
    for where in range(0, len(text), 7):
        cluster = Cluster(
            [text[:where], ConnectionResetError("cut")], [text[: where + 3], RuntimeError("1006")], [text]
        )
        assert cluster.lines() == WHOLE
        assert cluster.connections == 3


def test_a_connection_that_ends_before_the_job_is_made_again() -> None:
    text = "".join(LOG)
    assert Cluster([text[:25]], [text]).lines() == WHOLE


def test_silence_of_a_job_that_runs_is_waited_for_and_of_one_that_is_over_not() -> None:
    cluster = Cluster(["".join(LOG) + "\n", None], over_after=6)
    assert cluster.lines() == WHOLE
    assert cluster.questions >= 7


def test_a_cluster_out_of_reach_is_given_up_and_the_job_goes_on() -> None:
    cluster = Cluster(*[[ConnectionRefusedError("gone")] for _ in range(10_000)])
    asked = iter([cluster.status])

    def unreachable() -> JobState:
        return next(asked, _gone)()

    with pytest.raises(ClusterError, match=r"nothing was heard .* the job may go on: .*distml logs -f") as found:
        cluster.lines(unreachable, out_of_reach_s=0.2)
    assert found.value.exit_code == 3
    assert cluster.connections > 1


def _gone() -> JobState:
    raise NotReached("gone")


def test_no_such_job() -> None:
    def unknown() -> JobState:
        raise UsageError("knows no such job")

    with pytest.raises(UsageError, match="no such job"):
        Cluster([]).lines(unknown)


def test_leaving_early_leaves_no_thread() -> None:
    import threading

    stream = followed(Cluster([LOG[0], None], [None]).tail, Cluster([]).status, 0.0, 5.0)
    assert next(stream) == "line 0"
    stream.close()
    for thread in threading.enumerate():
        if thread.name == "distml-follow":
            thread.join(10.0)
            assert not thread.is_alive()


@pytest.mark.parametrize(
    ("status", "exit_code", "code"),
    [("SUCCEEDED", 0, 0), ("FAILED", 4, 4), ("FAILED", 2, 2), ("FAILED", None, 3), ("FAILED", -9, 3),
     ("STOPPED", None, 130)],
)  # fmt: skip
def test_exit_codes(status: str, exit_code: int | None, code: int) -> None:
    assert JobState("id", None, status, exit_code).code == code
