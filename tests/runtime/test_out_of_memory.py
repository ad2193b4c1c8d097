"""Deaths for lack of memory: a run goes on from one, and from no second; what is said then."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
from own.oracle import OWN, job_of, spec_of

from distml.errors import RunError
from distml.events import Event
from distml.runs.directory import RunDirectory
from distml.runs.display import SilentDisplay
from distml.runtime.driver import Driver
from distml.runtime.group import Lost
from distml.runtime.inline import InlineRuntime
from distml.tasks.sources import SourceTree

KILLED = "out of memory: killed by the kernel, this host has 23.5 GiB"


class Dying(InlineRuntime):
    """A worker that is reported dead so many times before it trains."""

    def __init__(self, deaths: list[str]) -> None:
        job = job_of(spec_of(steps=2))
        super().__init__(job, SourceTree.collect(job.task, OWN))
        self.deaths = deaths

    def events(self) -> Iterator[Event | Lost]:
        for cause in self.deaths:
            yield Lost("rank 0", cause, "backward")
        yield from super().events()


def trained(path, deaths) -> str:
    group = Dying(deaths)
    with RunDirectory.open(path, fresh=False) as directory:
        driver = Driver(group.job, directory, group, SilentDisplay(), time.perf_counter(), lambda: "plan says 9.00 GiB")
        try:
            driver.build(lambda: None, resume=False)
            return driver.train()
        finally:
            driver.close()


def test_one_death_for_lack_of_memory_is_recovered_from(tmp_path):
    assert trained(tmp_path / "run", [KILLED]) == "done"


def test_a_second_one_ends_the_run_with_what_a_plan_says(tmp_path):
    with pytest.raises(RunError) as caught:
        trained(tmp_path / "run", [KILLED, KILLED])
    assert str(caught.value) == (
        f"rank 0, backward, step 0: {KILLED}; plan says 9.00 GiB; not restarted again: it was the second time"
    )


def test_other_deaths_are_recovered_from_as_often_as_the_limits_say(tmp_path):
    """The control."""
    assert trained(tmp_path / "run", ["the node has left"] * 3) == "done"
    with pytest.raises(RunError, match=r"limits.max_restarts: 3"):
        trained(tmp_path / "again", ["the node has left"] * 4)
