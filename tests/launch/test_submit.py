"""Jobs on a real cluster of one node, with a token: submitted, followed, found again, stopped, resumed."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from own.head import Head, ray_head

import distml
from distml.cli import main
from distml.errors import RunError, UsageError
from distml.launch.submit.handle import Handle
from distml.launch.submit.request import STOP_WAIT
from distml.runs.checkpoints import CheckpointStore
from distml.spec.jobs import jobs_directory

TOKEN = "a-token-of-these-tests"
WAIT_S = 90.0
SMALL = """
distml: v1
name: small
task: "small_task:Small"
strategy: single
batch_size: 4
stop: {steps: 20}
checkpoint: {every: 10}
log: {to: []}
"""
SMALL_TASK = """
import os
import torch
import distml
from lib.shapes import WIDTH

class Small(distml.Task):
    def build_model(self):
        print("MINE is", os.environ.get("MINE"))
        return torch.nn.Linear(WIDTH, 1)

    def data(self, split):
        return torch.ones(64, WIDTH), torch.ones(64, 1)

    def loss(self, model, batch, progress):
        return torch.nn.functional.mse_loss(model(batch[0]), batch[1])
"""
LONG = """
distml: v1
name: long
task: classification
strategy: all_reduce
stop: {steps: 2000000}
evaluate: {every: 1000000}
checkpoint: {every: 1000000}
log: {every: 10, to: []}
resources: {workers: %d}
"""


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    with ray_head(TOKEN) as one:
        yield one


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, head: Head) -> Path:
    """A working directory; the cluster's token is known, and other clusters are in the environment."""
    files = {"small.yaml": SMALL, "small_task.py": SMALL_TASK, "lib/__init__.py": "", "lib/shapes.py": "WIDTH = 3\n",
             "long.yaml": LONG % 2, "data.bin": "x" * 1000, ".gitignore": "data.bin\n"}  # fmt: skip
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:1")  # the argument goes before it
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_job_with_its_own_task_is_followed_to_its_end(work: Path, head: Head, capsys) -> None:
    assert main(["submit", "small.yaml", "--address", head.url, "--env", "MINE=yes", "--follow"]) == 0
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert lines[0].startswith("sending 6 files")
    assert "staying behind (ignored): data.bin" in lines
    assert f"distml {distml.__version__} (sent with the job)" in out
    assert re.search(r"^done at step 20", out, re.MULTILINE)
    assert "::distml-result" not in out
    assert CheckpointStore(head.runs / "small" / "checkpoints", 1).steps() == [10, 20]

    handle = Handle.read(work / "runs" / "small")
    assert (handle.address, handle.run) == (head.url, "small")
    assert TOKEN not in (work / "runs" / "small" / "job.json").read_text() + out
    assert main(["status", "runs/small"]) == 0
    out = capsys.readouterr().out
    assert f"{handle.submission_id}: succeeded" in out
    assert f"done at step 20, checkpoint checkpoints/step-00000020 in {head.runs / 'small'}" in out
    assert main(["stop", "runs/small"]) == 0
    assert "there is nothing to stop" in capsys.readouterr().out
    assert main(["logs", "--address", head.url, handle.submission_id]) == 0
    assert "done at step 20" in capsys.readouterr().out
    assert main(["jobs", "--address", head.url]) == 0
    assert re.search(rf"small +{handle.submission_id} +SUCCEEDED", capsys.readouterr().out)


def test_what_a_job_fails_with_is_the_commands_exit_code(work: Path, head: Head, tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    changes = {"stop": {"steps": 3, "goal": {"metric": "eval/loss", "at_most": -1}}, "storage": str(shared)}
    missed = distml.submit(work / "small.yaml", changes, address=head.url, out=work / "runs" / "missed")
    assert main(["logs", "-f", "runs/missed"]) == 4
    found = missed.result()
    assert (found.status, found.step, found.exit_code) == ("goal_missed", 3, 4)
    assert found.directory == str(shared / "missed")
    assert (shared / "missed" / "result.json").is_file()
    assert not (head.runs / "missed").exists()


@pytest.mark.slow
def test_what_a_cluster_does_not_have_is_one_line(work: Path, head: Head, capsys) -> None:
    wrong = distml.submit(work / "small.yaml", {"resources.gpus_per_worker": 3}, address=head.url, out="runs/wrong")
    assert main(["logs", "-f", "runs/wrong"]) == 2
    errors = [line for line in capsys.readouterr().out.splitlines() if not line.startswith(("20", "Running", "distml"))]
    assert [line[:7] for line in errors] == ["error: "]  # one line, and nothing of Ray's
    with pytest.raises(UsageError, match=r"asks for 3 GPUs .* this cluster has none"):
        wrong.result()


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_client_finds_its_job_which_saves_its_last_step_and_goes_on_later(
    work: Path, head: Head, capsys, workers: int
) -> None:
    (work / "long.yaml").write_text(LONG.replace("name: long", f"name: long-{workers}") % workers)
    run = f"runs/long-{workers}"
    command = [sys.executable, "-m", "distml", "submit", "long.yaml", "--address", head.url, "--follow",
               "--env", f"{STOP_WAIT}=45"]  # fmt: skip
    client = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    watchdog = threading.Timer(WAIT_S, client.kill)
    watchdog.start()
    assert client.stdout is not None
    assert any(line.startswith("step ") for line in client.stdout)  # it trains
    client.kill()
    client.wait(10)
    watchdog.cancel()

    assert main(["status", run]) == 0
    assert ": running" in capsys.readouterr().out
    held = Handle.read(work / run).submission_id
    assert main(["submit", "long.yaml", "--address", head.url]) == 2
    error = capsys.readouterr().err
    assert f"distml logs -f --address {head.url} {held}" in error
    assert Handle.read(work / run).submission_id == held

    assert main(["stop", run]) == 0
    out = capsys.readouterr().out
    assert "its driver has 45 s" in out
    saved = re.search(r"interrupted at step (\d+), checkpoint (checkpoints/step-\d+) in", out)
    assert saved is not None
    assert (head.runs / f"long-{workers}" / saved[2]).is_dir()
    assert main(["logs", "-f", run]) == 130
    steps = int(saved[1]) + 5
    assert main(["submit", "long.yaml", "--address", head.url, "--set", f"stop.steps={steps}", "-f"]) == 0
    out = capsys.readouterr().out
    assert f"resuming from step {saved[1]}" in out
    assert f"done at step {steps}" in out


def test_a_wrong_token_and_an_unknown_job(work: Path, head: Head, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["logs", "-f", "--address", head.url, "no-such-job"]) == 2
    assert "knows no such job" in capsys.readouterr().err
    monkeypatch.setenv("RAY_AUTH_TOKEN", "another")
    assert main(["jobs", "--address", head.url]) == 2
    assert "refuses the token of RAY_AUTH_TOKEN" in capsys.readouterr().err
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    monkeypatch.setenv("HOME", str(work))
    assert main(["submit", "small.yaml", "--address", head.url]) == 2
    assert "wants a token, and none was found" in capsys.readouterr().err
    assert not (work / "runs").exists()


# ----------------------------------------------------------------------------------------------------------------- slow
@pytest.mark.slow
def test_the_distml_that_was_checked_is_the_one_that_runs_on_every_process(work: Path, head: Head) -> None:
    """The cluster has one too; the one that was sent goes first, in the driver and in the workers."""
    shutil.copytree(
        Path(distml.__file__).parent, work / "other" / "distml", ignore=shutil.ignore_patterns("__pycache__")
    )
    shutil.copytree(jobs_directory(), work / "other" / "distml" / "shipped_jobs")
    package = work / "other" / "distml" / "__init__.py"
    package.write_text(package.read_text().replace(f'"{distml.__version__}"', '"77.1"'))
    task = work / "small_task.py"
    task.write_text(task.read_text().replace("        print(", "        assert distml.__version__ == '77.1'; print("))
    (work / ".rayignore").write_text("other\n")
    command = [sys.executable, "-m", "distml", "submit", "small.yaml", "--address", head.url, "-f", "--out",
               "runs/versions", "--set", "strategy=all_reduce", "--set", "resources.workers=2"]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(work / "other")}
    found = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=WAIT_S)
    assert found.returncode == 0, found.stdout + found.stderr
    assert "distml 77.1 (sent with the job)" in found.stdout
    client = [sys.executable, "-m", "distml", "submit", "small.yaml", "--address", head.url, "-f", "--out", "runs/ours"]
    found = subprocess.run(client, capture_output=True, text=True, check=False, timeout=WAIT_S)
    assert found.returncode == 2  # the control: this one's workers are refused by the same task
    assert f"distml {distml.__version__} (sent with the job)" in found.stdout


@pytest.mark.slow
@pytest.mark.parametrize("token", [None, TOKEN])
def test_rays_own_command_runs_the_same_job(work: Path, token: str | None) -> None:
    """As the README says it, with authentication and without."""
    with ray_head(token) as other:
        command = [str(Path(sys.executable).with_name("ray")), "job", "submit", "--working-dir", ".", "--", "python",
                   "-m", "distml", "run", "long.yaml", "--set", "stop.steps=5"]  # fmt: skip
        environment = {
            **os.environ,
            "RAY_API_SERVER_ADDRESS": other.url,
            "RAY_AUTH_MODE": "token" if token else "disabled",
        }
        for ended in ("done at step 5", "already finished: done at step 5"):  # the same again finds its run
            found = subprocess.run(
                command, capture_output=True, text=True, check=False, env=environment, timeout=WAIT_S
            )
            assert found.returncode == 0, found.stdout + found.stderr
            assert ended in found.stdout
        result = json.loads((other.runs / "long" / "result.json").read_text())
        assert result["status"] == "done"


@pytest.mark.slow
def test_a_cluster_that_dies_is_not_waited_for(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distml.launch.submit.handle.OUT_OF_REACH_S", 2.0)
    with ray_head(TOKEN) as other:
        job = distml.submit(work / "long.yaml", address=other.url)
        began = time.monotonic()
        while job.status().status == "PENDING" and time.monotonic() - began < WAIT_S:
            time.sleep(0.5)
    with pytest.raises((RunError, distml.errors.DistmlError), match="nothing was heard of the cluster"):
        job.result()
