"""Runs whose storage is a bucket: what a later run finds in it, and what the bucket does to a run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from own.bucket import BucketServer, committed
from own.on_ray import Notes, assert_same, weights

import distml
from distml.errors import RunError, UsageError
from distml.launch import run as commands
from distml.launch.run import run
from distml.runs import mirror, stored
from distml.runs.storage import explained

LIMIT_S = 60.0
SPEC: dict[str, Any] = {
    "distml": "v1",
    "name": "small",
    "task": {"name": "classification", "model": {"name": "mlp", "hidden": [16], "dropout": 0.1}},
    "strategy": "single",
    "optimizer": {"name": "adamw", "lr": 0.003},
    "stop": {"steps": 40},
    "evaluate": {"every": 1_000_000},
    "checkpoint": {"every": 20},
    "log": {"every": 20, "to": []},
}


def start(url: str, out: Path, **changes: Any) -> subprocess.Popen[str]:
    """The command, as a process; only its id is ever signalled."""
    spec = out.parent / f"{out.name}.yaml"
    spec.write_text(json.dumps({**SPEC, "storage": url, "stop": {"steps": 10_000_000}, **changes}))
    command = [sys.executable, "-m", "distml", "run", str(spec), "--out", str(out)]
    return subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def wait_for_commit(buckets: BucketServer, bucket: str, process: subprocess.Popen[str], count: int = 1) -> None:
    deadline = time.monotonic() + LIMIT_S
    while time.monotonic() < deadline and process.poll() is None:
        if len(buckets.manifests(bucket)) >= count:
            return
        time.sleep(0.02)
    process.kill()
    pytest.fail(f"no checkpoint came to the bucket: {process.communicate()[0]}")


def test_killed_and_resumed_from_the_bucket_alone(buckets, tmp_path):
    bucket = buckets.new_bucket()
    process = start(buckets.url(bucket), tmp_path / "first")
    wait_for_commit(buckets, bucket, process, count=2)
    process.kill()
    process.communicate(timeout=LIMIT_S)
    last = max(int(step[5:]) for step in committed(buckets.objects(bucket)))

    notes, stop = Notes(), {"steps": last + 40}
    elsewhere = {**SPEC, "stop": stop, "storage": buckets.url(bucket)}
    result = run(elsewhere, out=tmp_path / "second", display=notes)
    assert result.step == last + 40
    assert any(line.startswith(f"fetched the run from s3://{bucket}/runs/small into") for line in notes.lines)
    assert any(f"(process {process.pid} on" in line and "without finishing" in line for line in notes.lines)
    assert f"resuming from step {last}" in notes.lines
    distml.run({**SPEC, "stop": stop}, out=tmp_path / "whole")
    assert_same(weights(tmp_path / "second", last + 40), weights(tmp_path / "whole", last + 40))
    there = buckets.objects(bucket)
    assert committed(there)[-1] == f"step-{last + 40:08d}"
    assert json.loads(there["runs/small/result.json"])["status"] == "done"
    assert not [name for name in there if "holder" in name or "probe" in name]

    again = Notes()  # a third place: nothing is left to do
    assert run(elsewhere, out=tmp_path / "third", display=again).step == last + 40
    assert "already finished" in again.lines[-1]


@pytest.mark.slow
def test_terminated_keeps_the_last_checkpoint(buckets, tmp_path):
    bucket = buckets.new_bucket()
    process = start(buckets.url(bucket), tmp_path / "run", checkpoint={"every": 10_000_000})
    deadline = time.monotonic() + LIMIT_S
    while "runs/small/metrics.jsonl" not in buckets.objects(bucket) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 130, said
    result = json.loads(buckets.objects(bucket)["runs/small/result.json"])
    assert result["status"] == "interrupted"
    assert committed(buckets.objects(bucket)) == [f"step-{result['step']:08d}"]


class Opening(Notes):
    """Opens a gate when training has come to a step."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self.step, self.gate, self.reached = step, threading.Event(), False

    def report(self, step, fraction, metrics) -> None:
        if step >= self.step:
            self.reached = True
            self.gate.set()


def test_uploads_that_hang_stop_no_step(buckets, tmp_path, monkeypatch):
    monkeypatch.setattr(mirror, "PASS_S", 0.1)
    bucket = buckets.new_bucket()
    display, waited = Opening(60), []

    def hang(method: str, path: str) -> int | None:
        if method in ("PUT", "POST") and "/checkpoints/" in path and not display.reached:
            waited.append(display.gate.wait(LIMIT_S))
        return None

    buckets.answer = hang
    # Slowly enough for an upload to begin before the end.
    run({**SPEC, "stop": {"steps": 60}, "storage": buckets.url(bucket)}, out=tmp_path / "run", display=display,
        inject=["slow:rank=0,step=20"])  # fmt: skip
    assert waited
    assert all(waited)  # training came to its end while they hung: were a step to wait for them, none would have
    assert committed(buckets.objects(bucket))[-1] == "step-00000060"


def test_a_bucket_that_fails_at_the_end_is_exit_3_and_the_next_run_copies(buckets, tmp_path, monkeypatch):
    monkeypatch.setattr(stored, "FINISH_S", 0.5)
    bucket = buckets.new_bucket()
    buckets.answer = lambda method, path: (
        403 if method != "GET" and "/small/" in path and "holder" not in path else None
    )
    spec = {**SPEC, "storage": buckets.url(bucket)}
    with pytest.raises(UsageError, match="no permission"):  # not even the mark could be written
        run(spec, out=tmp_path / "run")
    buckets.answer = lambda method, path: 403 if "/checkpoints/" in path and method != "GET" else None
    with pytest.raises(RunError, match="storage") as caught:
        run(spec, out=tmp_path / "run")
    assert caught.value.phase == "storage"
    assert caught.value.exit_code == 3
    assert "lacks what came last: no permission" in str(caught.value)
    assert f"all of it is in {tmp_path / 'run'}, and the same command again copies it" in str(caught.value)
    assert json.loads((tmp_path / "run" / "result.json").read_text())["status"] == "done"
    buckets.answer = lambda method, path: None
    monkeypatch.setattr(stored, "FINISH_S", LIMIT_S)
    notes = Notes()
    run(spec, out=tmp_path / "run", display=notes)
    assert "already finished" in notes.lines[-1]
    assert committed(buckets.objects(bucket))[-1] == "step-00000040"


@pytest.mark.parametrize(
    ("status", "said"), [(403, "no permission, or no credentials"), (404, "there is no such bucket")]
)
def test_what_a_bucket_refuses_is_said_before_anything_is_begun(buckets, tmp_path, status, said):
    bucket = buckets.new_bucket()
    buckets.answer = lambda method, path: status
    with pytest.raises(UsageError, match=f"storage s3://{bucket}/runs: {said}"):
        run({**SPEC, "storage": buckets.url(bucket)}, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_bucket_in_another_region(buckets, tmp_path):
    bucket = buckets.new_bucket()
    buckets.answer = lambda method, path: 301
    with pytest.raises(UsageError, match=r"the bucket is in another region; write it after the URL, as in \?region="):
        run({**SPEC, "storage": buckets.url(bucket)}, out=tmp_path / "run")
    told = OSError("AWS Error UNKNOWN (HTTP status 301) during HeadObject operation: No response body. Looks like the "
                   "configured region is 'us-east-1' while the bucket is located in 'ap-south-1'.")  # fmt: skip
    assert "?region=ap-south-1" in explained(told)


def test_a_run_that_the_nodes_refuse_is_not_copied(buckets, tmp_path, monkeypatch):
    monkeypatch.setattr(mirror, "PASS_S", 0.02)

    def refuse(*args: object) -> None:
        time.sleep(0.5)
        raise UsageError("not seen")

    monkeypatch.setattr(commands, "probe_nodes", refuse)
    bucket = buckets.new_bucket()
    spec = {**SPEC, "stop": {"steps": 2}, "storage": buckets.url(bucket)}
    with pytest.raises(UsageError, match="not seen"):
        run(spec, out=tmp_path / "run", runtime="ray")
    assert buckets.objects(bucket).keys() == {"runs/small/mirror.json"}
    assert run(spec, out=tmp_path / "run").status == "done"


@pytest.mark.slow
def test_terminated_in_the_last_copy(buckets, tmp_path):
    """The place is given back at once, and the next run copies what came last."""
    bucket = buckets.new_bucket()
    buckets.answer = lambda method, path: 403 if "/checkpoints/" in path and method != "GET" else None
    process = start(buckets.url(bucket), tmp_path / "run", stop={"steps": 2})
    said: list[str] = []
    assert process.stdout is not None
    for line in process.stdout:
        said.append(line)
        if line.startswith("copying what came last"):
            process.send_signal(signal.SIGTERM)
    assert process.wait(LIMIT_S) == 130, said
    assert f"copying what came last to s3://{bucket}/runs/small, up to 600 s\n" in said
    assert any("no permission" in line for line in said)
    assert f"all of it is in {tmp_path / 'run'}\n" in said[-1]
    assert "runs/small/holder.json" not in buckets.objects(bucket)
    buckets.answer = lambda method, path: None
    run({**SPEC, "stop": {"steps": 2}, "storage": buckets.url(bucket)}, out=tmp_path / "run")
    assert committed(buckets.objects(bucket)) == ["step-00000002"]


@pytest.mark.slow
def test_terminated_while_it_watches_the_holder(buckets, tmp_path):
    bucket = buckets.new_bucket()
    held = b'{"host": "far", "machine": "far", "pid": 7, "token": "t", "beat": 3}'
    buckets.put(bucket, "runs/small/holder.json", held)
    process = start(buckets.url(bucket), tmp_path / "run")
    assert process.stdout is not None
    assert "was held by process 7 on host far; looking" in process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    assert process.wait(LIMIT_S) == 130
    assert buckets.objects(bucket) == {"runs/small/holder.json": held}


def test_an_endpoint_where_nobody_listens(buckets, tmp_path):
    url = "s3://bucket/runs?endpoint_override=127.0.0.1:1&scheme=http"
    with pytest.raises(UsageError, match="no answer from the store; check the network"):
        run({**SPEC, "storage": url}, out=tmp_path / "run")


def test_the_endpoint_of_the_environment(buckets, tmp_path, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{buckets.port}")
    bucket = buckets.new_bucket()
    run({**SPEC, "stop": {"steps": 2}, "storage": f"s3://{bucket}"}, out=tmp_path / "run")
    assert committed(buckets.objects(bucket)) == ["step-00000002"]
    assert "small/spec.yaml" in buckets.objects(bucket)


def test_a_folder_holds_the_run_itself_or_its_copy(tmp_path):
    spec = {**SPEC, "stop": {"steps": 2}, "storage": str(tmp_path / "shared")}
    result = run(spec)
    assert result.directory == tmp_path / "shared" / "small"
    assert {path.name for path in (tmp_path / "shared").iterdir()} == {"small"}
    assert not (result.directory / "mirror.json").exists()
    run({**spec, "name": "other"}, out=tmp_path / "here")
    assert committed({str(path): b"" for path in (tmp_path / "shared" / "other").rglob("*")}) == ["step-00000002"]


@pytest.mark.slow
def test_a_population_goes_on_from_the_bucket_alone(buckets, tmp_path):
    bucket = buckets.new_bucket()
    base = {key: value for key, value in SPEC.items() if key not in ("name", "evaluate", "checkpoint")}
    spec = {
        "distml": "v1", "kind": "population", "name": "small", "base": base, "members": 2, "every": 20, "seed": 3,
        "space": {"optimizer.lr": {"loguniform": [1e-4, 1e-1]}}, "objective": {"metric": "eval/loss", "mode": "min"},
        "stop": {"steps": 120},
    }  # fmt: skip
    stop = {"base": {**base, "stop": {"steps": 60}}, "stop": {"steps": 60}}
    del stop["base"]
    run({**spec, **stop, "storage": buckets.url(bucket)}, out=tmp_path / "first", runtime="inline")
    notes = Notes()
    second = run({**spec, "storage": buckets.url(bucket)}, out=tmp_path / "second", runtime="inline", display=notes)
    whole = run(spec, out=tmp_path / "whole", runtime="inline")
    assert second.step == whole.step
    assert any("fetched the run" in line for line in notes.lines)
    names = buckets.objects(bucket)
    assert "runs/small/population.json" in names
    assert "runs/small/best.yaml" in names


def test_a_submitted_job_has_the_name_of_its_run(tmp_path, monkeypatch, capfd):
    from distml.launch.submit import remote

    monkeypatch.setenv(remote.IN_JOB, "{}")
    monkeypatch.setenv(remote.RUN, "")
    monkeypatch.chdir(tmp_path)
    spec = tmp_path / "small.yaml"
    spec.write_text(json.dumps({**SPEC, "stop": {"steps": 2}}))
    shared = f"storage={tmp_path / 'shared'}"
    assert remote.main(["mine", str(spec), "--set", shared]) == 0
    assert (tmp_path / "shared" / "mine" / "result.json").exists()
    assert remote.main(["mine", str(spec), "--set", "storage=shared"]) == 2
    assert "storage shared is relative to a folder that Ray removes after the job" in capfd.readouterr().out
    assert os.environ[remote.RUN] == "mine"
