"""What a cluster is asked, as text; and what runs there, without a cluster."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

import distml
from distml.errors import UsageError
from distml.launch.run import runs_root
from distml.launch.submit import handle as module
from distml.launch.submit.contact import NotReached
from distml.launch.submit.handle import (
    Handle,
    Job,
    last_error,
    override_texts,
    prepare,
    result_of,
    written_unless_refused,
)
from distml.launch.submit.jobs import as_state
from distml.launch.submit.remote import NEEDED, OFTEN_NEEDED, RESULT_MARK, directory_of
from distml.launch.submit.request import STOP_WAIT, STOP_WAIT_S, JobRequest, checked_env, checked_run_name, parse_env
from distml.launch.submit.state import ClusterError, JobState
from distml.spec.loader import load_spec

REPOSITORY = Path(distml.__file__).resolve().parents[1]
NASTY = ["a b", "x'; rm -rf / #", '$(touch gone)', "`id`", "ü\n", "--set=k={a: 'b'}", "*", ""]  # fmt: skip


def arguments_of(entrypoint: str, folder: Path) -> list[str]:
    """What a shell hands to `python`."""
    (folder / "python").write_text(f"#!{sys.executable}\nimport sys, json; print(json.dumps(sys.argv[1:]))\n")
    (folder / "python").chmod(0o755)
    environment = {"PATH": f"{folder}:{os.environ['PATH']}"}
    found = subprocess.run(["sh", "-c", entrypoint], env=environment, capture_output=True, text=True, check=True)
    return list(json.loads(found.stdout))


def test_nothing_in_a_job_is_read_by_the_shell(tmp_path: Path) -> None:
    request = JobRequest("run", "a spec.yaml", "digest", tuple(NASTY))
    assert arguments_of(request.entrypoint, tmp_path)[2:] == ["run", "a spec.yaml", *NASTY]
    control = request.entrypoint.replace(shlex.join(NASTY), " ".join(NASTY[:1]))
    assert arguments_of(control, tmp_path)[2:] == ["run", "a spec.yaml", "a", "b"]


def test_ids_are_the_runs_name_and_something_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    made = [prepare("digits-single", {"stop.steps": 3}, {}, None, None, True, print)[0] for _ in range(2)]
    assert all(re.fullmatch(r"digits-single-[0-9a-f]{8}", request.submission_id) for request in made)
    assert made[0].submission_id != made[1].submission_id
    assert made[0].options == ("--set=stop.steps=3", "--fresh")
    assert made[0].digest == made[1].digest != prepare("digits-single", [], {}, None, None, False, print)[0].digest


def test_the_local_directory_names_the_run(tmp_path: Path) -> None:
    request, _, directory = prepare("digits-single", [], {}, None, tmp_path / "second", False, print)
    assert (request.run, directory) == ("second", tmp_path / "second")
    assert checked_run_name("a.b-c_1") == "a.b-c_1"
    for name in ("", "a b", "../x", "-x", "ü"):
        with pytest.raises(UsageError, match="cannot name the run"):
            checked_run_name(name)


def test_a_spec_given_as_a_dict_travels_as_a_file() -> None:
    spec = {"distml": "v1", "name": "d", "task": "classification", "strategy": "single", "stop": {"steps": 3}}
    request, upload, _ = prepare(spec, {}, {}, None, None, False, print)
    assert list(upload.texts) == [request.spec]
    assert load_spec(spec).dump() == load_spec(_written(upload.texts[request.spec])).dump()


def _written(text: str) -> dict:
    import yaml

    return dict(yaml.safe_load(text))


def test_overrides_keep_their_types() -> None:
    texts = override_texts({"a.b": "x: y", "c": [1, None], "d": "12"})
    assert texts == ['a.b="x: y"', "c=[1, null]", 'd="12"']


# ---------------------------------------------------------------------------------------------------------- environment
def test_variables_by_value_and_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINE", "here")
    monkeypatch.delenv("NOT_SET", raising=False)
    assert parse_env(["A=b=c", "MINE", "EMPTY="]) == {"A": "b=c", "MINE": "here", "EMPTY": ""}
    for text, what in (("NOT_SET", "not set here"), ("=x", "not a variable"), ("a b=x", "not a variable")):
        with pytest.raises(UsageError, match=what):
            parse_env([text])


@pytest.mark.parametrize("name", ["RAY_AUTH_TOKEN", "RAY_AUTH_MODE", "RAY_ADDRESS", "RAY_JOB_CONFIG_JSON_ENV_VAR"])
def test_rays_own_variables_are_refused_without_their_values(name: str) -> None:
    with pytest.raises(UsageError, match=f"{name}: leave it out") as found:
        checked_env({name: "secret-value"})
    assert "secret" not in str(found.value)


def test_a_stopped_driver_has_more_time_than_ray_gives() -> None:
    assert int(JobRequest("r", "s", "d").env_vars[STOP_WAIT]) > 3
    assert JobRequest("r", "s", "d", env={STOP_WAIT: "7"}).env_vars[STOP_WAIT] == "7"
    with pytest.raises(UsageError, match="whole number of seconds"):
        checked_env({STOP_WAIT: "soon"})


# ------------------------------------------------------------------------------------------------------------ a cluster
class Answers:
    """A cluster that answers so, one after the other; the last again and again."""

    def __init__(self, *answers: JobState | Exception) -> None:
        self.answers, self.stopped = list(answers), 0

    def status(self, submission_id: str) -> JobState:
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer

    def stop(self, submission_id: str) -> bool:
        self.stopped += 1
        return True

    def submit(self, request: JobRequest, upload: object) -> str:
        raise AssertionError

    def logs(self, submission_id: str, follow: bool = False) -> Iterator[str]:
        return iter(())


RUNNING, DONE = JobState("id", "run", "RUNNING", stop_wait_s=300), JobState("id", "run", "SUCCEEDED")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that only sleeping moves."""
    now = [0.0]
    monkeypatch.setattr(module, "time", SimpleNamespace(
        monotonic=lambda: now[0], sleep=lambda seconds: now.__setitem__(0, now[0] + seconds)
    ))  # fmt: skip
    return now


def test_waiting_outlives_answers_that_are_none(clock: list[float]) -> None:
    gone, proxy = NotReached("gone"), ClusterError("answers 502: Bad Gateway")
    assert Job(Answers(RUNNING, proxy, gone, proxy, DONE), "id").wait() is DONE
    with pytest.raises(ClusterError, match=r"nothing was heard of the cluster for 60 s: answers 502"):
        Job(Answers(RUNNING, proxy), "id").wait()
    with pytest.raises(UsageError, match="no such job"):
        Job(Answers(RUNNING, UsageError("no such job"), DONE), "id").wait()


def test_stopping_waits_as_long_as_the_job_gives_its_driver(clock: list[float]) -> None:
    cluster = Answers(*[RUNNING] * 400, DONE)  # two states a second: longer than 90 s
    Job(cluster, "id").stop()
    assert cluster.stopped == 1
    with pytest.raises(ClusterError, match="not over after 330 s"):
        Job(Answers(RUNNING), "id").stop()
    with pytest.raises(ClusterError, match="not over after 5 s"):
        Job(Answers(RUNNING), "id").stop(timeout_s=5.0)


def test_the_time_of_a_stopped_driver_is_the_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    def state(environment: dict | None) -> JobState:
        names = ("driver_exit_code", "message", "start_time", "end_time")
        details = SimpleNamespace(metadata={}, status="RUNNING", runtime_env=environment, **dict.fromkeys(names))
        return as_state(details, "id")  # type: ignore[arg-type]

    assert state({"env_vars": JobRequest("r", "s", "d").env_vars}).stop_wait_s == STOP_WAIT_S
    assert state({"env_vars": {STOP_WAIT: "300"}}).stop_wait_s == 300
    assert state(None).stop_wait_s == state({}).stop_wait_s == state({"env_vars": {STOP_WAIT: "x"}}).stop_wait_s == 3


# ------------------------------------------------------------------------------------------------------------- job.json
HANDLE = Handle("http://127.0.0.1:8265", "run-1", "run", "x.yaml", "0" * 64, "0.1.0")


def test_the_handle_comes_back(tmp_path: Path) -> None:
    HANDLE.write(tmp_path / "new" / "run")
    assert Handle.read(tmp_path / "new" / "run") == HANDLE


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"address": 3}', "\x00"])
def test_a_damaged_handle_is_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "job.json").write_text(text)
    with pytest.raises(UsageError, match=r"job\.json is not a job of distml"):
        Handle.read(tmp_path)


def test_a_refused_job_leaves_the_earlier_handle(tmp_path: Path) -> None:
    newer = Handle("http://x", "run-2", *list(HANDLE.__dict__.values())[2:])
    with contextlib.suppress(UsageError), written_unless_refused(HANDLE, tmp_path):
        assert Handle.read(tmp_path) == HANDLE  # a client that is killed here finds its job
        raise UsageError("refused")
    assert not (tmp_path / "job.json").exists()
    HANDLE.write(tmp_path)
    with pytest.raises(UsageError), written_unless_refused(newer, tmp_path):
        raise UsageError("refused")
    assert Handle.read(tmp_path) == HANDLE
    for cut in (KeyboardInterrupt, NotReached):  # it may have been taken all the same
        HANDLE.write(tmp_path)
        with pytest.raises(cut), written_unless_refused(newer, tmp_path):
            raise cut
        assert Handle.read(tmp_path) == newer


# ------------------------------------------------------------------------------------------------------- on the cluster
def test_runs_of_a_job_are_outside_the_directory_that_goes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR", raising=False)
    assert runs_root() == Path("runs")
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert runs_root() == tmp_path / "distml-runs"
    monkeypatch.setenv("DISTML_RUNS", str(tmp_path / "shared"))
    assert runs_root() == tmp_path / "shared"


@pytest.mark.parametrize(
    "overrides", [{"storage": "{there}"}, ["storage={there}"], ["stop.steps=3", "storage={there}"]]
)
def test_a_run_lies_in_the_storage_that_it_was_submitted_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overrides: dict[str, str] | list[str]
) -> None:
    there = tmp_path / "shared"
    monkeypatch.setenv("DISTML_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    given = placed_at(overrides, there)
    request, _, _ = prepare("digits-single", given, {}, None, None, True, print)
    assert directory_of(request.run, request.spec, list(request.options)) == there / "digits-single"
    apart = [part for option in request.options for part in option.split("=", 1)]  # as a shell may have it
    assert directory_of(request.run, request.spec, apart) == there / "digits-single"
    request, _, _ = prepare("digits-single", [], {}, None, None, True, print)
    assert directory_of(request.run, request.spec, list(request.options)) == tmp_path / "runs" / "digits-single"


def placed_at(overrides: dict[str, str] | list[str], there: Path) -> dict[str, str] | list[str]:
    """The overrides with the folder in them."""
    if isinstance(overrides, dict):
        return {key: text.format(there=there) for key, text in overrides.items()}
    return [text.format(there=there) for text in overrides]


def test_a_storage_in_the_jobs_own_directory_is_refused_here_and_there() -> None:
    with pytest.raises(UsageError, match="storage shared is relative to a folder that Ray removes"):
        prepare("digits-single", ["storage=shared"], {}, None, None, False, print)
    with pytest.raises(UsageError, match="storage shared is relative to a folder that Ray removes"):
        directory_of("run", "digits-single", ["--set=storage=shared"])


def remotely(folder: Path, has: tuple[str, ...]) -> subprocess.CompletedProcess:
    """`remote` under a Python that has these distributions only."""
    for name in has:
        info = folder / f"{name.replace('-', '_')}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    command = [sys.executable, "-S", "-m", "distml.launch.submit.remote", "run", "digits-single"]
    environment = {"PYTHONPATH": f"{folder}:{REPOSITORY}", "PATH": os.environ["PATH"]}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=folder)


@pytest.mark.parametrize(
    ("lacks", "what"), [("torch", "has no torch; nothing is installed"), ("ray", "it is not the one that runs the cl")]
)
def test_what_a_cluster_lacks_is_one_line(tmp_path: Path, lacks: str, what: str) -> None:
    found = remotely(tmp_path, tuple(name for name in NEEDED if name != lacks))
    assert found.returncode == 2
    assert len(found.stdout.splitlines()) == 1
    assert found.stdout.startswith("error: ")
    assert what in found.stdout
    assert "Traceback" not in found.stderr


def test_a_cluster_that_lacks_nothing_gets_further(tmp_path: Path) -> None:
    found = remotely(tmp_path, NEEDED)
    assert found.stdout.startswith("distml 0.")  # and then there is no typer in truth
    assert f"not installed there: {', '.join(OFTEN_NEEDED)}" in found.stdout


def test_what_is_looked_for_is_what_the_project_needs() -> None:
    if sys.version_info < (3, 11):
        pytest.skip("tomllib")
    import tomllib

    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    declared = {re.match(r"[\w-]+", text)[0].lower() for text in project["dependencies"]}  # type: ignore[index]
    of_the_client, only_zero = {"pathspec", "jsonschema", "packaging"}, {"deepspeed"}
    looked_for = {name.lower() for name in (*NEEDED, *OFTEN_NEEDED)}
    assert looked_for == declared - of_the_client - only_zero


def test_the_last_word_of_a_run() -> None:
    values = {"status": "interrupted", "step": 7, "wall_s": 1.0, "metrics": {}, "best": None, "checkpoint": "c",
              "error": None, "pid": 1, "host": "h", "directory": "/d"}  # fmt: skip
    lines = ["x", RESULT_MARK + "{}", RESULT_MARK + json.dumps(values)]
    found = result_of(lines, 130)
    assert found is not None
    assert (found.status, found.step, found.exit_code) == ("interrupted", 7, 130)
    assert result_of(["x"], 0) is result_of([RESULT_MARK + "not json"], 0) is result_of([RESULT_MARK + "[]"], 0) is None
    assert last_error(["error: one", "error: two", "more"]) == "two"
    assert last_error(["more"]) is None
