"""job.json in a local run directory, and what it leads to: a job on a cluster, followed, asked and ended from Python.

job.json is written before the job is submitted, with an id that was chosen here: a client that is killed at any moment
finds its job again. It holds no secrets.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from hashlib import sha256
from pathlib import Path
from typing import Any

from distml import __version__
from distml.errors import RunError, UsageError
from distml.launch.submit.archive import Upload
from distml.launch.submit.checks import check_base, check_data, check_modules, check_recording, sent_as
from distml.launch.submit.contact import NotReached, contact
from distml.launch.submit.files import Selection, select
from distml.launch.submit.follow import OUT_OF_REACH_S
from distml.launch.submit.jobs import RayJobs, Submitter
from distml.launch.submit.remote import RESULT_MARK, whole_folder
from distml.launch.submit.request import JobRequest, checked_env, checked_run_name, new_submission_id
from distml.launch.submit.state import ClusterError, JobState
from distml.launch.submit.written import as_written
from distml.runs.files import strict_json, write_atomically
from distml.spec.jobs import find_job
from distml.spec.loader import LoadedSpec, load_spec
from distml.spec.yaml import dump

JOB_FILE = "job.json"
SPEC_FILE = "distml-spec.yaml"  # of a spec that was given as a dict
POLL_S = 0.5
STOP_SLACK_S = 30.0  # for what comes after a driver's last checkpoint
Say = Callable[[str], object]


@dataclass(frozen=True)
class Handle:
    """What job.json holds.

    Attributes:
        address: of the cluster's dashboard.
        run: the run's name there.
        spec: as it was named.
        digest: SHA-256 of the resolved spec.
        version: of the distml that submitted it.
    """

    address: str
    submission_id: str
    run: str
    spec: str
    digest: str
    version: str

    def write(self, directory: Path) -> None:
        """Into a run directory, made if it is not there.

        Raises:
            UsageError: it cannot be written.
        """
        try:
            directory.mkdir(parents=True, exist_ok=True)
            write_atomically(directory / JOB_FILE, strict_json(asdict(self), "job"))
        except OSError as error:
            raise UsageError(
                f"{directory / JOB_FILE} cannot be written: {error.strerror}; choose another --out"
            ) from None

    @classmethod
    def read(cls, directory: Path) -> Handle:
        """From a run directory.

        Raises:
            UsageError: there is none, or it is not one.
        """
        path = directory / JOB_FILE
        try:
            values = json.loads(path.read_bytes())
            texts = {item.name: values[item.name] for item in fields(cls)}
        except FileNotFoundError:
            raise UsageError(f"{directory} has no {JOB_FILE}: nothing was submitted from it") from None
        except OSError as error:
            raise UsageError(f"{path} cannot be read: {error.strerror}") from None
        except (ValueError, KeyError, TypeError):
            texts = {"": None}
        if not all(isinstance(text, str) for text in texts.values()):
            raise UsageError(f"{path} is not a job of distml; 'distml jobs --address URL' lists a cluster's jobs")
        return cls(**texts)


@dataclass(frozen=True)
class JobResult:
    """How a job's run has ended.

    Attributes:
        status: `done`, `goal_met`, `goal_missed` or `interrupted`.
        step: version of the weights.
        metrics: the last value of each metric.
        checkpoint: the newest committed one, in `directory`.
        directory: the run directory, on the cluster.
        host: where that is.
        exit_code: what `distml run` exited with there.
    """

    status: str
    step: int
    wall_s: float
    metrics: dict[str, Any]
    best: dict[str, Any] | None
    checkpoint: str | None
    directory: str
    host: str
    exit_code: int


class Job:
    """A job on a cluster.

    Args:
        jobs: the cluster.
        submission_id: the job's.
    """

    def __init__(self, jobs: Submitter, submission_id: str) -> None:
        self._jobs, self.submission_id = jobs, submission_id

    def status(self) -> JobState:
        """What the cluster says of it."""
        return self._jobs.status(self.submission_id)

    def logs(self, follow: bool = False) -> Iterator[str]:
        """The driver's output, line by line; with `follow` until the job is over."""
        return (line for line in self.all_lines(follow) if not line.startswith(RESULT_MARK))

    def all_lines(self, follow: bool = False) -> Iterator[str]:
        """Also the one for `result_of`."""
        return self._jobs.logs(self.submission_id, follow)

    def result(self, timeout_s: float | None = None) -> JobResult:
        """Wait for the end of it.

        Raises:
            ClusterError: it is not over after `timeout_s`, or nothing was heard of the cluster for a minute.
            UsageError: what its spec or the cluster's resources explain.
            RunError: the run failed.
        """
        state = self.wait(timeout_s)
        lines = list(self.all_lines())
        found = result_of(lines, state.code)
        if found is not None and found.status != "failed":
            return found
        error = last_error(lines) or " ".join(state.message.split())[-300:] or f"it ended as {state.status}"
        raise UsageError(error) if state.code == 2 else RunError(error, role=f"job {self.submission_id}")

    def wait(self, timeout_s: float | None = None) -> JobState:
        """Until it is over.

        Raises:
            ClusterError: see `result`.
        """
        began = heard = time.monotonic()
        while True:
            try:
                state = self.status()
                heard = time.monotonic()
                if state.is_over:
                    return state
            except (NotReached, ClusterError) as error:  # also a proxy that answers for it
                if time.monotonic() - heard > OUT_OF_REACH_S:
                    raise ClusterError(f"nothing was heard of the cluster for {OUT_OF_REACH_S:g} s: {error}") from None
            if timeout_s is not None and time.monotonic() - began > timeout_s:
                raise ClusterError(f"job {self.submission_id} is not over after {timeout_s:g} s; it goes on")
            time.sleep(POLL_S)

    def stop(self, timeout_s: float | None = None) -> JobResult | None:
        """Ask the driver to write its last checkpoint and end, and wait for it; None where the run has left no word.

        Args:
            timeout_s: None: the time that the job gives its driver, and `STOP_SLACK_S`.

        Raises:
            ClusterError: it is not over after `timeout_s`.
        """
        state = self.status()
        if not state.is_over:
            self._jobs.stop(self.submission_id)
        state = self.wait(state.stop_wait_s + STOP_SLACK_S if timeout_s is None else timeout_s)
        return result_of(self.all_lines(), state.code)


def submit(
    spec: str | os.PathLike[str] | Mapping[str, Any],
    overrides: Mapping[str, object] | Sequence[str] = (),
    *,
    address: str | None = None,
    env: Mapping[str, str] = {},
    working_dir: str | os.PathLike[str] | None = None,
    out: str | os.PathLike[str] | None = None,
    fresh: bool = False,
    say: Say = lambda line: None,
) -> Job:
    """Start a job on a cluster; it goes on without this process.

    Args:
        spec: a file in the working directory, a shipped job's name, or the spec as a dict.
        overrides: dotted keys and values.
        address: of the cluster's dashboard, `http://HOST:8265`; None: RAY_API_SERVER_ADDRESS.
        env: variables of the job's processes; everyone who may use the cluster can read them.
        working_dir: whose files are sent; by default the current directory, for a shipped job or a dict nothing.
        out: the local run directory, for job.json; its name is the run's name on the cluster. `runs/NAME` by default.
        fresh: on the cluster, move what is in the run's directory aside first.
        say: where it is said what is sent.

    Raises:
        UsageError: before anything is sent: what the spec, the files, the address or the token explain.
        ClusterError: the cluster answered with an error.
    """
    request, upload, directory = prepare(spec, overrides, env, working_dir, out, fresh, say)
    there = contact(address, say)
    jobs = RayJobs(there)
    jobs.check_free(request.run)
    handle = Handle(there.url, request.submission_id, request.run, request.spec, request.digest, __version__)
    with written_unless_refused(handle, directory):
        jobs.submit(request, upload)
    return Job(jobs, request.submission_id)


def prepare(
    spec: str | os.PathLike[str] | Mapping[str, Any], overrides: Mapping[str, object] | Sequence[str],
    env: Mapping[str, str], working_dir: str | os.PathLike[str] | None, out: str | os.PathLike[str] | None,
    fresh: bool, say: Say,
) -> tuple[JobRequest, Upload, Path]:  # fmt: skip
    """What will be sent, checked; nothing is sent, and no cluster is asked."""
    loaded = load_spec(spec, overrides, directory=Path(working_dir or ".") if isinstance(spec, Mapping) else None)
    name, selection, texts = placed(spec, working_dir)
    directory = Path(out) if out is not None else Path("runs") / loaded.job.name
    texts_set = override_texts(overrides)
    options = [f"--set={text}" for text in texts_set] + (["--fresh"] if fresh else [])
    run = checked_run_name(directory.absolute().name)
    request = JobRequest(run, name, digest_of(loaded), tuple(options), checked_env(env), new_submission_id(run))
    upload = Upload(selection, texts)
    written = as_written(spec, texts_set, loaded, Path(working_dir or "."))
    whole_folder(loaded.job.storage)
    check_base(written, selection)
    check_recording(loaded, written)
    for line in (*upload.lines(), *check_modules(loaded, selection), *check_data(loaded, written, selection)):
        say(line)
    upload.check_size()
    return request, upload, directory


def placed(
    spec: str | os.PathLike[str] | Mapping[str, Any], working_dir: str | os.PathLike[str] | None
) -> tuple[str, Selection | None, dict[str, str]]:
    """The spec's name on the cluster, what of the working directory is sent, and what besides.

    Raises:
        UsageError: the spec lies outside the working directory, or stays behind.
    """
    chosen = select(Path(working_dir)) if working_dir is not None else None
    if isinstance(spec, Mapping):
        return SPEC_FILE, chosen, {SPEC_FILE: dump(dict(spec))}
    path = find_job(spec)
    if path != Path(spec):  # shipped, and travels with distml
        return os.fspath(spec), chosen, {}
    root = Path(working_dir or ".")
    if chosen is None and not path.resolve().is_relative_to(root.resolve()):
        sent_as(path, root.resolve(), Selection(root.resolve()))  # refused without looking through the directory
    chosen = chosen or select(root)
    return sent_as(path, chosen.root, chosen), chosen, {}


def override_texts(overrides: Mapping[str, object] | Sequence[str]) -> list[str]:
    """As `--set` takes them; JSON is YAML."""
    if isinstance(overrides, Mapping):
        return [f"{key}={json.dumps(value)}" for key, value in overrides.items()]
    return list(overrides)


def digest_of(loaded: LoadedSpec[Any]) -> str:
    """Of the resolved spec."""
    return sha256(loaded.dump().encode()).hexdigest()


@contextlib.contextmanager
def written_unless_refused(handle: Handle, directory: Path) -> Iterator[None]:
    """Write job.json; if what follows is refused, put back what was there before."""
    path = directory / JOB_FILE
    before = path.read_bytes() if path.is_file() else None
    handle.write(directory)
    try:
        yield
    except NotReached:  # it may have been taken all the same
        raise
    except UsageError:
        if before is None:
            path.unlink(missing_ok=True)
        else:
            write_atomically(path, before)
        raise


# ----------------------------------------------------------------------------------------------------- reading the logs
def result_of(lines: Sequence[str] | Iterator[str], code: int) -> JobResult | None:
    """What the run said last of itself; None: it was ended before it could, or said nothing of ours."""
    marked = [line for line in lines if line.startswith(RESULT_MARK)]
    try:
        values = json.loads(marked[-1].removeprefix(RESULT_MARK))
        known = {item.name: values[item.name] for item in fields(JobResult) if item.name != "exit_code"}
        return JobResult(**known, exit_code=code)
    except (IndexError, ValueError, KeyError, TypeError):
        return None


def last_error(lines: Sequence[str]) -> str | None:
    """The run's own line about its failure."""
    return next((line.removeprefix("error: ") for line in reversed(lines) if line.startswith("error: ")), None)
