"""A real `ray start --head` on the loopback interface: its own folder, its own token, ended by its process id."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

START_S = 60.0
END_S = 20.0


@dataclass(frozen=True)
class Head:
    """A cluster of one node.

    Attributes:
        url: of its dashboard.
        token: None: it wants none.
        runs: where its jobs' runs are.
    """

    url: str
    token: str | None
    runs: Path

    @property
    def environment(self) -> dict[str, str]:
        """Of a client that knows the token."""
        return {} if self.token is None else {"RAY_AUTH_TOKEN": self.token}


@contextlib.contextmanager
def ray_head(token: str | None, num_cpus: int = 4) -> Iterator[Head]:
    """Inside, it runs."""
    folder = Path(tempfile.mkdtemp(prefix="dml-"))  # short: sockets lie in it
    port = free_port()
    command = [
        str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", "--port=0", "--disable-usage-stats",
        "--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1", f"--dashboard-port={port}",
        f"--dashboard-agent-listen-port={free_port()}", f"--ray-client-server-port={free_port()}",
        f"--num-cpus={num_cpus}", "--object-store-memory=100000000", f"--temp-dir={folder / 'ray'}",
    ]  # fmt: skip
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",  # a job's `python` is this one
        "HOME": str(folder), "DISTML_RUNS": str(folder / "runs"), "OMP_NUM_THREADS": "1",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # listen on the loopback interface only
        "RAY_AUTH_MODE": "disabled" if token is None else "token",
        **({} if token is None else {"RAY_AUTH_TOKEN": token}),
    }  # fmt: skip
    with open(folder / "head.log", "wb") as log:
        process = subprocess.Popen(command, env=environment, cwd=folder, stdout=log, stderr=log)
    head = Head(f"http://127.0.0.1:{port}", token, folder / "runs")
    try:
        wait_for(head, process, folder / "head.log")
        yield head
    finally:
        end(process)
        shutil.rmtree(folder, ignore_errors=True)


def wait_for(head: Head, process: subprocess.Popen, log: Path) -> None:
    """Until its dashboard answers."""
    request = urllib.request.Request(head.url + "/api/jobs/", headers={"Authorization": f"Bearer {head.token}"})
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(OSError):
            urllib.request.urlopen(request, timeout=5.0).read()
            return
        time.sleep(0.2)
    raise RuntimeError(f"no Ray head after {START_S:g} s: {log.read_text()[-2000:]}")


def end(process: subprocess.Popen) -> None:
    """It and all that it started."""
    others = []
    with contextlib.suppress(psutil.NoSuchProcess):
        others = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(END_S)
    for one in others:
        with contextlib.suppress(psutil.NoSuchProcess):
            one.kill()
    process.kill()
    process.wait(END_S)


def free_port() -> int:
    """Of the loopback interface, free a moment ago."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])
