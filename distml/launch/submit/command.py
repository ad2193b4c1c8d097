"""The verbs submit, status, logs, stop and jobs."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from distml.errors import ExitCode, UsageError
from distml.launch.submit.contact import contact, dashboard_variable, shown
from distml.launch.submit.handle import JOB_FILE, Handle, Job, JobResult, last_error, result_of, submit
from distml.launch.submit.jobs import RayJobs
from distml.launch.submit.request import STOP_WAIT_S, parse_env
from distml.launch.submit.state import JobState
from distml.runs.units import duration, number

NUM_LAST = 3  # lines of the log that `status` shows of a job that runs


def submit_command(
    *, spec: str, overrides: list[str], address: str | None, follow: bool, env: list[str], working_dir: Path | None,
    out: Path | None, fresh: bool,
) -> int:  # fmt: skip
    """The verb `submit`; with `follow` the job's own exit code."""
    job = submit(
        spec, overrides, address=address, env=parse_env(env), working_dir=working_dir, out=out, fresh=fresh, say=say
    )
    directory = out if out is not None else Path("runs") / job.submission_id.rpartition("-")[0]
    say(f"submitted {job.submission_id}; follow it with 'distml logs -f {directory}', end it with 'distml stop "
        f"{directory}'")  # fmt: skip
    return followed(job, str(directory)) if follow else int(ExitCode.DONE)


def status_command(*, target: str, address: str | None) -> int:
    """The verb `status`."""
    job, there = found(target, address)
    state = job.status()
    say(headline(state, there))
    lines = list(job_lines(job))
    result = result_of(lines, state.code) if state.is_over else None
    if result is not None:
        say(result_line(result))
    elif state.is_over:
        say(f"  {last_error(lines) or last_words(state) or 'it has said nothing of how it ended'}")
    for line in () if state.is_over else [line for line in lines if line.strip()][-NUM_LAST:]:
        say(f"  {line}")
    return int(ExitCode.DONE)


def logs_command(*, target: str, address: str | None, follow: bool) -> int:
    """The verb `logs`; with `follow` the job's own exit code."""
    job, _ = found(target, address)
    if follow:
        return followed(job, target if address is None else f"--address {address} {target}")
    for line in job.logs():
        say(line)
    return int(ExitCode.DONE)


def stop_command(*, target: str, address: str | None) -> int:
    """The verb `stop`: 0 once the job is over, also where it was before."""
    job, there = found(target, address)
    state = job.status()
    if state.is_over:
        say(f"{headline(state, there)}; there is nothing to stop")
        return int(ExitCode.DONE)
    say(f"stopping {job.submission_id}: its driver has {state.stop_wait_s} s to write a last checkpoint")
    began = time.monotonic()
    result = job.stop()
    say(f"{job.submission_id} ended after {duration(time.monotonic() - began)}")
    if result is None:
        say("  it could not say what it had saved; submitted again, it goes on from its newest checkpoint")
    else:
        say(result_line(result))
    return int(ExitCode.DONE)


def jobs_command(*, address: str | None) -> list[tuple[str, ...]]:
    """The verb `jobs`: a table's rows, its header first."""
    rows: list[tuple[str, ...]] = [("run", "job", "status", "started", "for")]
    for state in RayJobs(contact(address, note)).jobs():
        began = time.strftime("%Y-%m-%d %H:%M", time.localtime(state.started)) if state.started else "-"
        rows.append((state.run or "-", state.submission_id, state.status, began, how_long(state)))
    return rows


# -------------------------------------------------------------------------------------------------------------- finding
def found(target: str, address: str | None) -> tuple[Job, str]:
    """The job that a run directory or an id names, and its cluster's address.

    Raises:
        UsageError: it is neither.
    """
    directory = Path(target)
    if (directory / JOB_FILE).is_file():
        handle = Handle.read(directory)
        submission_id, address = handle.submission_id, address or handle.address
    elif directory.is_dir() and address is None:
        raise UsageError(
            f"{target} has no {JOB_FILE}: nothing was submitted from it; or give --address URL and a job's id"
        )
    elif address is None and dashboard_variable(os.environ) is None:
        raise UsageError(
            f"{target}: no such run directory; give one with a {JOB_FILE}, or --address URL and a job's id"
        )
    else:
        submission_id = target
    there = contact(address, note)
    return Job(RayJobs(there), submission_id), there.url


def followed(job: Job, how: str) -> int:
    """Print the log to its end; the job's own exit code. Ctrl-C leaves the job running."""
    try:
        for line in job.logs(follow=True):
            say(line)
    except KeyboardInterrupt:
        note(f"\nthe job goes on; follow it again with 'distml logs -f {how}', end it with 'distml stop {how}'")
        return int(ExitCode.INTERRUPTED)
    state = job.wait(timeout_s=STOP_WAIT_S)
    if state.status != "SUCCEEDED" and not state.exit_code:
        note(f"job {job.submission_id}: {state.status}{': ' if state.message else ''}{last_words(state)}")
    return state.code


def job_lines(job: Job) -> Iterator[str]:
    """The log so far, our own lines included; nothing where there is none yet."""
    with contextlib.suppress(UsageError):
        yield from job.all_lines()


# -------------------------------------------------------------------------------------------------------------- showing
def headline(state: JobState, there: str) -> str:
    """A job in one line."""
    code = f" (exit {state.exit_code})" if state.exit_code else ""
    return f"{state.submission_id}: {state.status.lower()}{code}, {how_long(state)}, at {shown(there)}"


def how_long(state: JobState) -> str:
    """Seconds as people read them."""
    return "not started" if state.seconds is None else duration(state.seconds)


def last_words(state: JobState) -> str:
    """Ray's message about a job that has ended, in one line."""
    return " ".join(state.message.split())[-300:]


def result_line(result: JobResult) -> str:
    """What the run came to, and where it lies."""
    scores = "  ".join(f"{name} {number(value)}" for name, value in sorted(result.metrics.items())
                       if name.startswith(("eval/", "test/")))  # fmt: skip
    saved = f", checkpoint {result.checkpoint}" if result.checkpoint else ", no checkpoint"
    word = result.status.replace("_", " ")
    return f"  {word} at step {result.step}{saved} in {result.directory} on {result.host}  {scores}".rstrip()


def say(line: str) -> None:
    """To the terminal, at once."""
    print(line, flush=True)


def note(line: str) -> None:
    """What does not belong to a verb's output."""
    print(line, file=sys.stderr, flush=True)
