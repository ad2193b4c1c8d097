"""From `distml submit` to a job's first update, against `distml run` on the same cluster; and coming back to a job.

Both ask for two workers of the same job and take turns. The clock starts with the process: `run` on the head's host,
`submit` on the client's. It ends with the first report, which is that of the first update. Coming back is a new
process, `distml status` and `distml logs -f` of a job that runs: until the one has ended, and the other shows a line.
"""

from __future__ import annotations

import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from distml.bench.exchange import tell
from distml.bench.hosts import Cluster, cluster
from distml.bench.parts import Table, target
from distml.bench.submit_watch import LIMIT_S, SPEC, Watched, submitted
from distml.bench.table import cells, summary
from distml.errors import RunError

OPTIONS = ("repeats",)
LABELS = {"run": "distml run, first update", "submit": "distml submit, first update",
          "status": "distml status of a job that runs", "logs": "distml logs -f, first line"}  # fmt: skip


def measure(repeats: int = 3) -> dict[str, Any]:
    """Let them take turns, after one of each that does not count.

    Raises:
        UsageError: there can be no hosts here. RunError: one failed.
    """
    found: dict[str, list[float]] = {name: [] for name in LABELS}
    with cluster(nodes=3, cpus=1) as made, tempfile.TemporaryDirectory(prefix="distml-bench-") as folder:
        for repeat in range(repeats + 1):
            seconds = {"run": run_once(made, Path(folder), repeat), **submit_once(made, Path(folder), repeat)}
            tell("submit, start: " + ", ".join(f"{name} {value:.2f} s" for name, value in seconds.items()))
            for name, value in seconds.items() if repeat else ():
                found[name].append(value)
    made_of = {name: summary(values) for name, values in found.items()}
    return {"seconds": made_of, "repeats": repeats, "targets": targets(made_of)}


def run_once(made: Cluster, folder: Path, repeat: int) -> float:
    """`distml run` on the head: seconds to its first report."""
    name = f"run-{repeat}"
    (folder / f"{name}.yaml").write_text(SPEC.format(name=name, seconds=1, every=1, placement="pack"))
    began = time.monotonic()
    process = made.on(0, ["run", f"{name}.yaml", "--address", made.ray, "--out", name], cwd=folder,
                      stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
    first = Watched(folder / name).first(process)
    process.wait(LIMIT_S)
    return first - began


def submit_once(made: Cluster, folder: Path, repeat: int) -> dict[str, float]:
    """`distml submit`: seconds to the first report; and of two that come back to the job."""
    name = f"submit-{repeat}"
    began = time.monotonic()
    with submitted(made, folder, name, seconds=120) as (watched, process):
        first = watched.first(process)
        return {
            "submit": first - began,
            "status": status_once(made, folder, name),
            "logs": logs_once(made, folder, name),
        }


def status_once(made: Cluster, folder: Path, name: str) -> float:
    """`distml status`: seconds until it has answered."""
    began = time.monotonic()
    process = made.client(["status", name], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    said, _ = process.communicate(timeout=LIMIT_S)
    if process.returncode:
        raise RunError(f"distml status: {said.strip()[-200:]}", phase="bench")
    return time.monotonic() - began


def logs_once(made: Cluster, folder: Path, name: str) -> float:
    """`distml logs -f`: seconds until it shows something; it is ended then, the job goes on."""
    began = time.monotonic()
    process = made.client(["logs", "-f", name], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        assert process.stdout is not None
        if not process.stdout.read(1):
            raise RunError(f"distml logs -f {name} said nothing", phase="bench")
        return time.monotonic() - began
    finally:
        process.kill()
        process.communicate()


def targets(seconds: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """What it should have come to."""
    run, submit = seconds["run"]["median"], seconds["submit"]["median"]
    back = max(seconds[name]["median"] for name in ("status", "logs"))
    return [target(f"seconds of submit over 1.5 x run's {run:.2f} s", submit - 1.5 * run, "at most", 8.0),
            target("seconds to come back", back, "at most", 2.0)]  # fmt: skip


def table(found: dict[str, Any]) -> Table:
    """Title, header, body and closing lines."""
    body = [[LABELS[name], *cells(values, 2)] for name, values in found["seconds"].items()]
    closing = [f"{found['repeats']} repeats in turns, after one that does not count; three hosts, 1 Gbit/s links"]
    return "On a cluster of three hosts, two workers", ["seconds", "median", "min", "max"], body, closing
