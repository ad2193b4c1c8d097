"""Submit, status, logs, stop: four verbs behind a Protocol, and the one implementation, over Ray's Jobs API.

Every call has a limit. A client that is killed leaves its job running, and one that comes later finds it by its id. Ray
is imported here and nowhere else in this package, when it is first needed.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar

from distml.errors import DistmlError, UsageError
from distml.launch.submit.archive import Upload
from distml.launch.submit.contact import ADDRESS_VARIABLES, Contact, NotReached, within
from distml.launch.submit.follow import followed
from distml.launch.submit.request import META_RUN, STOP_WAIT, JobRequest
from distml.launch.submit.state import RAYS_STOP_WAIT_S, ClusterError, JobState
from distml.spec.yaml import one_line

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

T = TypeVar("T")
CALL_S = 30.0
UPLOAD_S, UPLOAD_BYTES_PER_S = 60.0, 2**18  # the least that a link must carry
CHATTY = ("ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk")  # tell of uploads and connections
STATUS_CODE = re.compile(r"status code (\d+): ?(.*)", re.DOTALL)


class Submitter(Protocol):
    """Where jobs run."""

    def submit(self, request: JobRequest, upload: Upload) -> str:
        """Start a job; its id."""

    def status(self, submission_id: str) -> JobState:
        """What has become of it."""

    def logs(self, submission_id: str, follow: bool = False) -> Iterator[str]:
        """Its output in whole lines; with `follow` until it is over."""

    def stop(self, submission_id: str) -> bool:
        """Ask it to end; False: it is over already."""


class RayJobs:
    """A `Submitter` for a Ray cluster.

    Args:
        there: the cluster, which has answered.
    """

    def __init__(self, there: Contact) -> None:
        self.there = there
        self._client = self._call("its Jobs API", lambda: connected(there), CALL_S)

    # ------------------------------------------------------------------------------------------------------- the verbs
    def submit(self, request: JobRequest, upload: Upload) -> str:
        """Upload what is needed and start the job.

        Raises:
            UsageError: a job of this run is not over yet, or the cluster refuses.
        """
        self.check_free(request.run)
        with tempfile.TemporaryDirectory(prefix="distml-submit-") as folder:
            archive = Path(folder) / "working_dir.zip"
            upload.write(archive)
            environment = {"working_dir": str(archive), "env_vars": request.env_vars}

            def start() -> str:
                started = self._client.submit_job(
                    entrypoint=request.entrypoint, submission_id=request.submission_id, runtime_env=environment,
                    metadata=request.metadata,
                )  # fmt: skip
                return str(started)

            limit = UPLOAD_S + archive.stat().st_size / UPLOAD_BYTES_PER_S
            return self._call("the job to be taken", start, limit)

    def status(self, submission_id: str) -> JobState:
        """What the cluster says of it.

        Raises:
            UsageError: it knows no such job.
        """
        return as_state(self._call("the job's state", lambda: self._client.get_job_info(submission_id)), submission_id)

    def logs(self, submission_id: str, follow: bool = False) -> Iterator[str]:
        """Whole lines without their ends.

        Raises:
            UsageError: there is no such job.
            RunError: with `follow`: the cluster has been out of reach for too long; the job may go on.
        """
        if follow:
            return followed(lambda: self._tail(submission_id), lambda: self.status(submission_id))
        text: str = self._call("the job's log", lambda: self._client.get_job_logs(submission_id))
        return iter(text.splitlines())

    def stop(self, submission_id: str) -> bool:
        """SIGTERM to the driver, which writes its last checkpoint; SIGKILL after the time that the request gave it."""
        return bool(self._call("the job to be stopped", lambda: self._client.stop_job(submission_id)))

    # ---------------------------------------------------------------------------------------------------------- others
    def jobs(self) -> list[JobState]:
        """All that were submitted, the newest last."""
        found: list[JobDetails] = self._call("the list of jobs", self._client.list_jobs)
        states = [as_state(one, one.submission_id) for one in found if one.submission_id]
        return sorted(states, key=lambda state: (state.started or 0.0, state.submission_id))

    def check_free(self, run: str) -> None:
        """Refuse a run that is running.

        Raises:
            UsageError: with how to follow or stop it.
        """
        for state in self.jobs():
            if state.run == run and not state.is_over:
                there = f"--address {self.there.url} {state.submission_id}"
                raise UsageError(
                    f"run {run} is {state.status.lower()} on this cluster already; follow it with 'distml logs -f "
                    f"{there}', end it with 'distml stop {there}', or give another --out"
                )

    def _call(self, awaited: str, call: Callable[[], T], seconds: float = CALL_S) -> T:
        with translated(self.there):
            return within(seconds, f"{awaited} at {self.there.url}", call)

    async def _tail(self, submission_id: str) -> AsyncIterator[str]:
        async for chunk in self._client.tail_job_logs(submission_id):
            yield chunk


def connected(there: Contact) -> JobSubmissionClient:
    """Ray's client for a cluster; what the environment says of others does not count."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    from ray.job_submission import JobSubmissionClient

    for name in CHATTY:
        logging.getLogger(name).setLevel(logging.WARNING)
    with without_variables(ADDRESS_VARIABLES):
        return JobSubmissionClient(there.url, headers=there.headers)


@contextlib.contextmanager
def without_variables(names: tuple[str, ...]) -> Iterator[None]:
    """Inside, these are not set: Ray's client lets them win over its argument."""
    before = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(before)


@contextlib.contextmanager
def translated(there: Contact) -> Iterator[None]:
    """Turn what Ray's client raises into one line."""
    try:
        yield
    except DistmlError:
        raise
    except OSError as error:  # all that `requests` raises
        raise NotReached(f"{there.url} has gone: {one_line(str(error))[:200]}") from None
    except RuntimeError as error:  # with the status, and of Ray's authentication without
        found = STATUS_CODE.search(str(error))
        status, text = (int(found[1]), found[2]) if found else (0, str(error))
        raise refusal(there, status, one_line(" ".join(text.split()))) from None


def refusal(there: Contact, status: int, text: str) -> DistmlError:
    """What a cluster's refusal means."""
    if status == 404:
        return UsageError(f"{there.url} knows no such job: 'distml jobs --address {there.url}' lists those it knows")
    if status == 413:
        return UsageError(f"{there.url} refuses an upload of this size; a proxy before it may take less than Ray")
    if "uthenti" in text:
        return UsageError(f"{there.url} no longer takes the token: was the cluster started anew? set RAY_AUTH_TOKEN")
    return ClusterError(f"{there.url} answers {status or 'with an error'}: {text[-300:]}")


def as_state(details: JobDetails, submission_id: str) -> JobState:
    """Ray's description of a job as ours."""

    def seconds(milliseconds: int | None) -> float | None:
        return None if not milliseconds else milliseconds / 1000

    wait = str(((details.runtime_env or {}).get("env_vars") or {}).get(STOP_WAIT, ""))
    return JobState(
        submission_id=submission_id,
        run=(details.metadata or {}).get(META_RUN),
        status=str(getattr(details.status, "value", details.status)),
        exit_code=details.driver_exit_code,
        message=details.message or "",
        started=seconds(details.start_time),
        ended=seconds(details.end_time),
        stop_wait_s=int(wait) if wait.isdecimal() else RAYS_STOP_WAIT_S,
    )
