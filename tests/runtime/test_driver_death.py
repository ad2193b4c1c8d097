"""The driver as a process of its own, with a private Ray: signals, SIGKILL, and what the next run does."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

LIMIT_S = 90.0
LONG = ["--set", "stop={steps: 1000000}", "--set", "checkpoint.every=50", "--set", "evaluate.every=100000"]


def start(out: Path, *arguments: str) -> subprocess.Popen[str]:
    """`distml run` with a private Ray; only this process's id is ever signalled."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    command = [sys.executable, "-m", "distml", "run", "digits-all-reduce", "--out", str(out), *arguments]
    return subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def wait_for_steps(out: Path, steps: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + LIMIT_S
    while time.monotonic() < deadline and process.poll() is None:
        lines = (out / "metrics.jsonl").read_text().splitlines() if (out / "metrics.jsonl").exists() else []
        if lines and json.loads(lines[-1])["step"] >= steps:
            return
        time.sleep(0.05)
    pytest.fail(f"the run did not reach step {steps}: {process.stdout.read() if process.poll() is not None else ''}")


def listening_addresses(process: subprocess.Popen[str]) -> set[str]:
    """Where the run and all that it has started listen."""
    own = psutil.Process(process.pid)
    found = [c for p in (own, *own.children(recursive=True)) for c in p.net_connections() if c.status == "LISTEN"]
    return {connection.laddr.ip.removeprefix("::ffff:") for connection in found}


def test_killed_then_interrupted_then_done(tmp_path):
    out = tmp_path / "run"
    first = start(out, *LONG)
    wait_for_steps(out, 120, first)
    assert listening_addresses(first) == {"127.0.0.1"}
    first.kill()
    first.wait(LIMIT_S)
    assert json.loads((out / "result.json").read_text())["status"] == "running"

    second = start(out, *LONG)
    before = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    wait_for_steps(out, before + 100, second)
    second.send_signal(signal.SIGTERM)
    said, _ = second.communicate(timeout=LIMIT_S)
    assert second.returncode == 130
    assert f"process {first.pid} on" in said
    assert "ended without finishing" in said
    assert "resuming from step" in said
    result = json.loads((out / "result.json").read_text())
    assert result["status"] == "interrupted"
    assert result["checkpoint"] == f"checkpoints/step-{result['step']:08d}"
    assert (out / result["checkpoint"] / "manifest.json").exists()

    third = start(out, "--set", f"stop={{steps: {result['step'] + 10}}}")
    said, _ = third.communicate(timeout=LIMIT_S)
    assert third.returncode == 0
    assert f"resuming from step {result['step']}" in said
    assert json.loads((out / "result.json").read_text())["status"] == "done"
