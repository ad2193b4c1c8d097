"""Runs over two real hosts: a network namespace and a node of Ray each, with a shaped link between them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
import yaml

import distml
from distml.bench import hosts, network
from distml.bench.hosts import two_hosts
from distml.bench.network import call, missing
from distml.errors import UsageError
from distml.launch.evaluate import load_model
from distml.runtime.placement import in_rank_order

REASON = missing()
needs_hosts = pytest.mark.skipif(REASON is not None, reason=str(REASON))
STEPS = 60
SPEC = {
    "distml": "v1",
    "name": "two-hosts",
    "task": {"name": "classification", "data": "digits", "model": {"name": "mlp", "hidden": [128]}},
    "optimizer": {"name": "sgd", "lr": 0.1, "momentum": 0.9},
    "batch_size": 64,
    "stop": {"steps": STEPS},
    "evaluate": {"every": 30},
    "checkpoint": {"every": 30},
    "resources": {"workers": 2, "placement": "strict_spread"},
    "limits": {"heartbeat_s": 1.0, "lost_after_s": 5.0},
}
MODEL_BYTES = 4 * (64 * 128 + 128 + 128 * 10 + 10)


@pytest.fixture(scope="module")
def pair():
    with two_hosts("1gbit") as made:
        yield made


def start(pair, folder: Path, strategy, **changes) -> subprocess.Popen[str]:
    """`distml run` on the first host."""
    spec = folder / "spec.yaml"
    spec.write_text(yaml.safe_dump({**SPEC, "strategy": strategy, **changes}))
    command = [sys.executable, "-m", "distml", "run", str(spec), "--out", str(folder / "run"), "--address", pair.ray]
    environment = {**os.environ, **pair.environment}
    return subprocess.Popen(pair.hosts[0].command(command), env=environment, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True)  # fmt: skip


def finish(process: subprocess.Popen[str], timeout_s: float = 60.0) -> tuple[int, str]:
    """Exit code and output."""
    try:
        output, _ = process.communicate(timeout=timeout_s)
    finally:
        process.kill()
    return process.returncode, output


def weights(directory: Path) -> torch.Tensor:
    """The last checkpoint's, as one vector."""
    return torch.cat([tensor.flatten() for tensor in load_model(directory).model.state_dict().values()])


def inline(folder: Path, strategy, **changes) -> torch.Tensor:
    """The same run in this process."""
    distml.run({**SPEC, "strategy": strategy, **changes}, out=folder / "inline", runtime="inline")
    return weights(folder / "inline")


def workers_on(host) -> dict[int, str]:
    """The run's workers on a host, process id -> name of the log: Ray names its processes after their actors."""
    found = {}
    for pid in host.pids():
        with contextlib.suppress(OSError):
            if b"WorkerActor" in Path(f"/proc/{pid}/cmdline").read_bytes():
                found[pid] = Path(f"/proc/{pid}/fd/1").readlink().name
    return found


@needs_hosts
@pytest.mark.parametrize(
    "strategy",
    ["all_reduce", pytest.param({"name": "parameter_server", "servers": 2}, marks=pytest.mark.slow)],
)
def test_two_hosts_learn_what_one_process_learns(pair, tmp_path, strategy):
    before = pair.bytes_sent()["link_bytes"]
    process = start(pair, tmp_path, strategy)
    seen = set()
    while process.poll() is None:
        seen |= {(log, index) for index, host in enumerate(pair.hosts) for log in workers_on(host).values()}
        time.sleep(0.1)
    code, output = finish(process)
    assert code == 0, output
    # One on each; rank 0, which keeps the shared state for a recovery, beside the driver.
    assert {(log, index) for log, index in seen if log.startswith("worker-") and log.count("-") == 1} == {
        ("worker-0.log", 0), ("worker-1.log", 1)
    }  # fmt: skip
    assert torch.allclose(weights(tmp_path / "run"), inline(tmp_path, strategy), rtol=0, atol=1e-4)
    crossed = pair.bytes_sent()["link_bytes"] - before
    assert crossed > 2 * STEPS * MODEL_BYTES  # the control: there and back, it went over the link
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert min(row["comm/bytes_per_step"] for row in rows if "comm/bytes_per_step" in row) >= 2 * MODEL_BYTES


@needs_hosts
@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["all_reduce", "parameter_server"])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_lost_worker_on_the_other_host_is_noticed_and_replaced(pair, tmp_path, strategy, number):
    longer = {"stop": {"steps": 1200}, "evaluate": {"every": 1200}, "checkpoint": {"every": 1200}}
    process = start(pair, tmp_path, strategy, **longer)
    metrics, deadline = tmp_path / "run" / "metrics.jsonl", time.monotonic() + 60
    while not metrics.exists() or metrics.read_text().count("\n") < 3:
        assert time.monotonic() < deadline
        assert process.poll() is None, finish(process)
        time.sleep(0.02)
    [victim] = workers_on(pair.hosts[1])
    os.kill(victim, number)
    code, output = finish(process, timeout_s=120.0)
    assert code == 0, output
    assert "rank" in output
    assert victim not in workers_on(pair.hosts[1])
    assert torch.allclose(weights(tmp_path / "run"), inline(tmp_path, strategy, **longer), rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("nodes", "here", "order"),
    [
        ({0: "b", 1: "a"}, "a", [1, 0]),
        ({0: "b", 1: "a", 2: "b", 3: "a"}, "b", [0, 2, 1, 3]),
        ({0: "b", 1: "a"}, "head", [1, 0]),
        ({0: "a", 1: "a"}, "a", [0, 1]),
    ],
)
def test_ranks_begin_on_the_drivers_node(nodes, here, order):
    assert in_rank_order(nodes, here) == order


@needs_hosts
def test_the_link_is_as_fast_as_it_was_told_and_no_faster():
    """A megabyte at 20 Mbit/s takes 0.4 s, less what fits into the bucket; unshaped it takes milliseconds."""
    receive = (
        "import socket, sys; s = socket.create_server((sys.argv[1], 5000)); print(flush=True); c, _ = s.accept()\n"
        "n = 0\nwhile n < 2**20: n += len(c.recv(65536))\nc.sendall(b'x')"
    )
    send = (
        "import socket, sys, time; s = socket.create_connection((sys.argv[1], 5000), 10); t = time.monotonic()\n"
        "s.sendall(bytes(2**20)); s.recv(1); print(time.monotonic() - t)"
    )
    with network.network("20mbit") as (net, _):
        a, b = net.add(), net.add()
        with subprocess.Popen(
            b.command([sys.executable, "-c", receive, b.address]), stdout=subprocess.PIPE
        ) as receiver:
            receiver.stdout.readline()
            seconds = float(call(*a.command([sys.executable, "-c", send, b.address])))
        assert a.bytes_sent() > 2**20 > b.bytes_sent()
        assert seconds > 0.25
    assert a.name not in call("ip", "netns", "list")


@needs_hosts
def test_all_that_ran_is_gone_after_a_failure(monkeypatch):
    made = []

    def no_ray(host, environment, *rest):
        made.extend([host, Path(environment["RAY_AUTH_TOKEN_PATH"]), subprocess.Popen(host.command(["sleep", "600"]))])
        while not host.pids():
            time.sleep(0.01)
        assert oct(made[1].stat().st_mode)[-3:] == "600"
        raise RuntimeError("Ray does not start")

    monkeypatch.setattr(hosts, "spawn_node", no_ray)
    with pytest.raises(RuntimeError, match="does not start"), two_hosts("1gbit"):
        pass
    host, token, sleeper = made
    assert sleeper.wait(5.0) == -signal.SIGKILL
    assert host.name not in call("ip", "netns", "list")
    assert not token.exists()


@needs_hosts
def test_leftovers_of_killed_invocations_are_removed():
    child = subprocess.Popen(["true"])
    child.wait()
    stale, mine = f"distml-{child.pid}-0-a", f"distml-{os.getpid()}-99-a"
    folders = [Path(tempfile.mkdtemp(prefix=network.FOLDER.format(pid=pid))) for pid in (child.pid, os.getpid())]
    for name in (stale, mine):
        call("ip", "netns", "add", name)
    try:
        network.sweep()
        names = call("ip", "netns", "list")
        assert stale not in names
        assert mine in names
        assert [folder.exists() for folder in folders] == [False, True]
    finally:
        call("ip", "netns", "del", mine)
        folders[1].rmdir()


def test_without_the_rights_or_tools_it_is_one_line(monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(UsageError, match="need root"), two_hosts("1gbit"):
        pass
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(network.shutil, "which", lambda tool: None if tool == "tc" else tool)
    with pytest.raises(UsageError, match="need 'tc', which is not installed"), two_hosts("1gbit"):
        pass


def test_a_cluster_for_tests_misses_a_node_as_those_of_users_do():
    folder = Path(__file__).parents[2] / "clusters"
    files = [folder / f"{name}.yaml" for name in ("local", "aws-gpu", "gcp-gpu")]
    others = [folder / "kuberay" / f"{name}.yaml" for name in ("raycluster-gpu", "rayjob-gpu")]
    for settings, count in ((hosts.HEAD_SETTINGS, 1), (hosts.NODE_SETTINGS, 2)):
        [(name, value)] = settings.items()
        assert [file.read_text().count(f" {name}={value}") for file in files] == [count] * 3
        assert [file.read_text().count(f'{{name: {name}, value: "{value}"}}') for file in others] == [count] * 2
