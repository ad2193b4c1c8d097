"""Jobs on a cluster of namespaces, watched from outside through the run directories, which all hosts share."""

from __future__ import annotations

import contextlib
import json
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from distml.bench.hosts import Cluster
from distml.errors import RunError

LOOK_S = 0.02
LIMIT_S = 180.0
SPEC = """\
distml: v1
name: {name}
task: {{name: classification, data: digits, model: {{name: mlp, hidden: [128]}}}}
strategy: all_reduce
batch_size: 64
stop: {{seconds: {seconds}}}
log: {{every: {every}, to: []}}
resources: {{workers: 2, placement: {placement}}}
"""


class Watched:
    """A run's metrics.jsonl, and when each of its rows was first seen."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.seen: list[tuple[float, int]] = []  # time.monotonic() and step
        self._read = 0

    def look(self) -> None:
        """Note what is new; a file that became shorter was cut back, and is read anew from its end."""
        with contextlib.suppress(FileNotFoundError):
            data = (self.directory / "metrics.jsonl").read_bytes()
            if len(data) < self._read:
                self._read = len(data)
            end = data.rfind(b"\n") + 1
            for line in data[self._read : end].splitlines():
                self.seen.append((time.monotonic(), int(json.loads(line)["step"])))
            self._read = max(self._read, end)

    def wait_until(self, is_there: Callable[[], bool], awaited: str, process: subprocess.Popen[Any]) -> float:
        """Look until something is there; when that was.

        Raises:
            RunError: not within `LIMIT_S`, or the process ended before.
        """
        deadline = time.monotonic() + LIMIT_S
        while True:
            self.look()
            if is_there():
                return time.monotonic()
            if process.poll() not in (None, 0) or time.monotonic() > deadline:
                why = f"{LIMIT_S:g} s were over" if process.poll() is None else f"exit code {process.returncode}"
                raise RunError(f"no {awaited} in {self.directory.name}: {why}", phase="bench")
            time.sleep(LOOK_S)

    def first(self, process: subprocess.Popen[Any]) -> float:
        """When its first report came."""
        return self.wait_until(lambda: bool(self.seen), "report", process)

    def watch(self, seconds: float) -> None:
        """Look for so long."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            self.look()
            time.sleep(LOOK_S)

    def longest_gap(self, since: float) -> float:
        """Seconds between two reports that follow each other, the later of which came after `since`."""
        pairs = zip(self.seen, self.seen[1:], strict=False)
        return max((later[0] - earlier[0] for earlier, later in pairs if later[0] > since), default=float("inf"))

    def metric(self, name: str) -> float:
        """What result.json has last; 0 where it has none."""
        metrics = json.loads((self.directory / "result.json").read_bytes())["metrics"]
        return float(metrics.get(name, 0.0))


@contextlib.contextmanager
def submitted(
    made: Cluster, folder: Path, name: str, *, seconds: float, every: int = 1, placement: str = "pack"
) -> Iterator[tuple[Watched, subprocess.Popen[bytes]]]:
    """A job that a client follows; it is stopped and waited for at the end of the block."""
    (folder / f"{name}.yaml").write_text(SPEC.format(name=name, seconds=seconds, every=every, placement=placement))
    command = ["submit", f"{name}.yaml", "--address", made.url, "--follow", "--out", name]
    with (folder / f"{name}.log").open("wb") as log:
        process = made.client(command, cwd=folder, stdout=log, stderr=subprocess.STDOUT)
    try:
        yield Watched(made.runs / name), process
    finally:
        stop = made.client(["stop", name], cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            stop.wait(LIMIT_S)
            process.wait(LIMIT_S)
        for one in (stop, process):
            one.kill()
            one.wait()
