"""What tests of jobs on a cluster of several hosts share: submit, wait with a limit, and what a run has come to."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml

import distml
from distml.bench.hosts import Cluster
from distml.launch.evaluate import load_model

LIMIT_S = 120.0
DIGITS: dict[str, Any] = {
    "distml": "v1",
    "name": "digits",
    "task": {"name": "classification", "data": "digits", "model": {"name": "mlp", "hidden": [32]}},
    "strategy": "all_reduce",
    "optimizer": {"name": "sgd", "lr": 0.05, "momentum": 0.9},
    "batch_size": 64,
    "stop": {"steps": 200},
    "evaluate": {"every": 1000000},
    "checkpoint": {"every": 100},
    "log": {"every": 10, "to": []},
    "resources": {"workers": 2, "placement": "spread"},
}


def submit(cluster: Cluster, folder: Path, spec: dict[str, Any] | str, *options: str) -> subprocess.Popen[str]:
    """`distml submit --follow` from the clients' host.

    Args:
        folder: the client's working directory.
        spec: written there; or a shipped job's name.
    """
    name = spec
    if not isinstance(spec, str):
        name = f"{spec['name']}.yaml"
        (folder / name).write_text(yaml.safe_dump(spec))
    return client(cluster, folder, "submit", name, "--address", cluster.url, "--follow", *options)


def client(cluster: Cluster, folder: Path, *arguments: str) -> subprocess.Popen[str]:
    """`distml ARGUMENTS` on the clients' host."""
    return cluster.client(arguments, cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def ended(process: subprocess.Popen[str], limit_s: float = LIMIT_S) -> tuple[int, str]:
    """Exit code and output, once it has ended; fails where it does not in time."""
    try:
        output, _ = process.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        process.kill()
        output, _ = process.communicate(timeout=10.0)
        raise AssertionError(f"it has not ended after {limit_s:g} s:\n{output}") from None
    return process.returncode, output


def wait_until(what: str, true: Callable[[], bool], limit_s: float = LIMIT_S) -> None:
    """Look until it is so."""
    deadline = time.monotonic() + limit_s
    while not true():
        assert time.monotonic() < deadline, f"not within {limit_s:g} s: {what}"
        time.sleep(0.05)


def step_of(run: Path) -> int:
    """The last that a run has reported; -1 before the first."""
    try:
        lines = (run / "metrics.jsonl").read_text().splitlines()
        return int(json.loads(lines[-1])["step"])
    except (OSError, IndexError, ValueError):
        return -1


def wait_for_step(run: Path, step: int, process: subprocess.Popen[str]) -> None:
    """Until a run has reported it."""
    wait_until(f"step {step} of {run}", lambda: step_of(run) >= step or process.poll() is not None)
    assert process.poll() is None, ended(process)


def result(run: Path) -> dict[str, Any]:
    """result.json."""
    found: dict[str, Any] = json.loads((run / "result.json").read_text())
    return found


def weights(run: Path) -> torch.Tensor:
    """The last checkpoint's, as one vector."""
    return torch.cat([tensor.flatten() for tensor in load_model(run).model.state_dict().values()])


def undisturbed(folder: Path, spec: dict[str, Any]) -> torch.Tensor:
    """The weights of the same run in this process."""
    distml.run(spec, out=folder / "undisturbed", runtime="inline")
    return weights(folder / "undisturbed")


def workers_on(cluster: Cluster, node: int) -> list[int]:
    """The runs' workers on a node: Ray names its processes after their actors."""
    return [pid for pid in cluster.pids(node) if b"WorkerActor" in command_line(pid)]


def drivers(cluster: Cluster, run: str) -> list[int]:
    """The processes of a submitted run's driver, on the head."""
    wanted = b"distml.launch.submit.remote\0" + run.encode() + b"\0"
    return [pid for pid in cluster.pids(0) if wanted in command_line(pid)]


def command_line(pid: int) -> bytes:
    """Empty where it has gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""
