"""What a cluster says of a job."""

from __future__ import annotations

import time
from dataclasses import dataclass

from distml.errors import DistmlError, ExitCode

RAYS_STOP_WAIT_S = 3  # where a job does not say
OVER = ("SUCCEEDED", "FAILED", "STOPPED")


class ClusterError(DistmlError):
    """A cluster that has answered before fails, or is gone."""

    exit_code = ExitCode.FAILED


@dataclass(frozen=True)
class JobState:
    """What the cluster says of a job.

    Attributes:
        run: the run's name; None: it was not submitted by distml.
        status: PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED.
        exit_code: the driver's own; None while it runs, and where it did not come to one.
        message: of Ray about it.
        started: seconds since the epoch.
        ended: the same; None while it runs.
        stop_wait_s: how long its driver has for its last checkpoint when it is stopped.
    """

    submission_id: str
    run: str | None
    status: str
    exit_code: int | None = None
    message: str = ""
    started: float | None = None
    ended: float | None = None
    stop_wait_s: int = RAYS_STOP_WAIT_S

    @property
    def is_over(self) -> bool:
        """Whether it will not change any more."""
        return self.status in OVER

    @property
    def code(self) -> int:
        """What a command that waited for the job exits with."""
        if self.status == "STOPPED":
            return int(ExitCode.INTERRUPTED)
        if self.status == "SUCCEEDED":
            return int(ExitCode.DONE)
        return self.exit_code if self.exit_code is not None and self.exit_code > 0 else int(ExitCode.FAILED)

    @property
    def seconds(self) -> float | None:
        """How long it runs, or ran."""
        return None if self.started is None else max(0.0, (self.ended or time.time()) - self.started)
