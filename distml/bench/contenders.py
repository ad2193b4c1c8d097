"""The contenders of `distml bench exchange`: each a set of processes as a user would start it, on one host or two."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import yaml

from distml.bench.timing import Plan
from distml.errors import RunError

BATCH = 16
NEVER = 10**9
LIMIT_S = 900.0
INNER_STEPS = 8
# One thread each, and the same priority for all: Ray's workers would run at nice 15, the other peers at 0.
EVERYWHERE = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "RAY_worker_niceness": "0"}
COMPRESSIONS = ("bf16", "int8", "topk", "powersgd")
SERVER: dict[str, Any] = {"name": "parameter_server"}
STRATEGIES: dict[str, dict[str, Any]] = {
    "all_reduce": {"name": "all_reduce"},
    "ps_sync": SERVER,
    "ps_async": {**SERVER, "mode": "async"},
    "ps_ssp": {**SERVER, "mode": "ssp", "max_staleness": 4},
    "local_sgd": {"name": "local_sgd", "inner_steps": INNER_STEPS},
    **{f"all_reduce_{name}": {"name": "all_reduce", "compression": {"name": name}} for name in COMPRESSIONS},
}
LABELS = {
    "compute": "compute only",
    "ddp": "torch DDP, gloo",
    "ray_train": "Ray Train TorchTrainer",
    "pattern_sync": "Ray docs' server, sync",
    "pattern_async": "Ray docs' server, async",
    "all_reduce": "distml all_reduce",
    "ps_sync": "distml parameter_server sync",
    "ps_async": "distml parameter_server async",
    "ps_ssp": "distml parameter_server ssp 4",
    "local_sgd": f"distml local_sgd, {INNER_STEPS} inner steps",
    **{f"all_reduce_{name}": f"distml all_reduce, {name}" for name in COMPRESSIONS},
}
ONE_HOST = ("compute", "ddp", "ray_train", "pattern_sync", "pattern_async",
            "all_reduce", "ps_sync", "ps_async", "ps_ssp", "local_sgd")  # fmt: skip
TWO_HOSTS = ("compute", "ddp", "all_reduce", *(f"all_reduce_{name}" for name in COMPRESSIONS), "ps_sync")
INDEPENDENT = frozenset({"compute", "pattern_async", "ps_async", "ps_ssp"})  # workers that do not wait for all others
SLOW = frozenset({"ddp", "ray_train", "pattern_sync", "pattern_async"})


class Host(Protocol):
    """Where processes can be started."""

    @property
    def address(self) -> str:
        """Under which the others reach it."""
        ...

    def command(self, arguments: Sequence[str]) -> list[str]:
        """The command that runs these arguments there."""
        ...


@dataclass(frozen=True)
class ThisHost:
    """The machine itself."""

    address: str = "127.0.0.1"

    def command(self, arguments: Sequence[str]) -> list[str]:
        """As they are."""
        return list(arguments)


@dataclass(frozen=True)
class Site:
    """The hosts, and the Ray that runs on them.

    Attributes:
        ray: address of the Ray.
        hosts: one or two.
        environment: what processes need to be let in.
    """

    ray: str
    hosts: Sequence[Host] = (ThisHost(),)
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Cell:
    """What is trained: one point of the grid.

    Attributes:
        size: a name of the model's size.
        width: of the model.
        workers: how many.
        optimizer: `sgd` or `adam`.
        transport: for distml's strategies, as the spec has it.
    """

    size: str
    width: int
    workers: int
    optimizer: str
    transport: str = "auto"


def start(name: str, cell: Cell, plan: Plan, site: Site, folder: Path) -> dict[str, Any]:
    """Run a contender to its end; its workers' times are in `folder` then.

    Returns:
        What it says of itself: `transport` and `bytes_per_step` of a strategy of ours.

    Raises:
        RunError: one of its processes failed, or it took longer than `LIMIT_S`.
    """
    config = {"width": cell.width, "workers": cell.workers, "optimizer": cell.optimizer, "batch": BATCH,
              "steps": plan.steps, "folder": str(folder), "address": site.ray}  # fmt: skip
    if name in STRATEGIES:
        spec = write_spec(name, cell, plan, len(site.hosts), folder)
        out = folder / "run"
        ours = ["-m", "distml", "run", str(spec), "--out", str(out), "--runtime", "ray", "--address", site.ray]
        run_all([(site.hosts[0], ours)], site.environment, folder)
        return of_run(out)
    run_all(peer_commands(name, config, site), site.environment, folder)
    return {}


def peer_commands(name: str, config: dict[str, Any], site: Site) -> list[tuple[Host, list[str]]]:
    """(host, Python's arguments) of a peer's processes."""
    hosts, workers = site.hosts, config["workers"]
    if name == "compute":
        return [
            (hosts[rank % len(hosts)], ["-m", "distml.bench.peers.compute", json.dumps({**config, "rank": rank})])
            for rank in range(workers)
        ]
    if name == "ddp":
        script = ["-m", "distml.bench.peers.ddp", json.dumps(config)]
        torchrun, per_node = ["-m", "torch.distributed.run"], ["--nproc-per-node", str(workers // len(hosts))]
        if len(hosts) == 1:
            return [(hosts[0], [*torchrun, "--standalone", *per_node, *script])]
        nodes = ["--nnodes", str(len(hosts)), "--master-addr", hosts[0].address, "--master-port", "29400"]
        return [
            (host, [*torchrun, *nodes, "--node-rank", str(rank), *per_node, *script]) for rank, host in enumerate(hosts)
        ]
    if name == "ray_train":
        return [(hosts[0], ["-m", "distml.bench.peers.ray_train", json.dumps(config)])]
    mode = name.removeprefix("pattern_")
    return [(hosts[0], ["-m", "distml.bench.peers.server_pattern", json.dumps({**config, "mode": mode})])]


def write_spec(name: str, cell: Cell, plan: Plan, hosts: int, folder: Path) -> Path:
    """The spec of a strategy of ours, with its task beside it."""
    from distml.bench.peers.blocks import LEARNING_RATE

    source = importlib.util.find_spec("distml.bench.blocks_task")
    assert source is not None
    assert source.origin is not None
    (folder / "blocks_task.py").write_text(Path(source.origin).read_text(encoding="utf-8"), encoding="utf-8")
    gradients_per_step = cell.workers if name in INDEPENDENT else 1
    spec = {
        "distml": "v1",
        "name": "bench-exchange",
        "task": {"name": "blocks_task:Blocks", "args": {"width": cell.width, "folder": str(folder)}},
        "strategy": STRATEGIES[name],
        "optimizer": {"name": cell.optimizer, "lr": LEARNING_RATE[cell.optimizer]},
        "batch_size": BATCH * cell.workers,
        "stop": {"steps": plan.steps * gradients_per_step},
        "evaluate": {"every": NEVER},
        "checkpoint": {"every": NEVER},
        "log": {"every": 10},
        "resources": {"workers": cell.workers, "placement": "spread" if hosts > 1 else "pack"},
        "transport": cell.transport,
    }
    path = folder / "spec.yaml"
    path.write_text(yaml.safe_dump(spec), encoding="utf-8")
    return path


def of_run(out: Path) -> dict[str, Any]:
    """The transport that a run chose, and its bytes per step as it counts them."""
    environment = json.loads((out / "environment.json").read_text(encoding="utf-8"))
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    counted = [row["comm/bytes_per_step"] for row in rows if "comm/bytes_per_step" in row]
    return {"transport": environment.get("transport"), "bytes_per_step": statistics.median(counted)}


def run_all(
    commands: Sequence[tuple[Host, list[str]]], environment: Mapping[str, str], folder: Path, limit_s: float = LIMIT_S
) -> None:
    """Run Python on these hosts with these arguments, to the end of all.

    Raises:
        RunError: one failed, whose last line is given, or `limit_s` went by; the others are ended.
    """
    what = " ".join(commands[0][1][:3])
    processes: list[subprocess.Popen[bytes]] = []
    logs = [folder / f"output-{index}.log" for index in range(len(commands))]
    failed: int | None = None
    try:
        for (host, arguments), log in zip(commands, logs, strict=True):
            processes.append(spawn(host.command([sys.executable, *arguments]), {**EVERYWHERE, **environment}, log))
        failed = wait_for(processes, what, limit_s)
    finally:
        for process in processes:
            end_group(process)
    if failed is not None:
        text = logs[failed].read_text(encoding="utf-8", errors="replace").strip() or "it said nothing"
        code = processes[failed].returncode
        raise RunError(f"{what} ended with {code}: {text.splitlines()[-1]}", phase="bench")


def spawn(command: Sequence[str], variables: Mapping[str, str], log: Path) -> subprocess.Popen[bytes]:
    """A process in a group of its own, which is what `end_group` ends."""
    with open(log, "wb") as file:
        return subprocess.Popen(command, env={**os.environ, **variables}, stdin=subprocess.DEVNULL, stdout=file,
                                stderr=file, start_new_session=True)  # fmt: skip


def wait_for(processes: Sequence[subprocess.Popen[bytes]], what: str, limit_s: float) -> int | None:
    """Until all have ended; which one failed first, or None.

    None of them is reaped here: until that is done, nobody else can have its process id or that of its group.

    Raises:
        RunError: `limit_s` went by.
    """
    deadline = time.monotonic() + limit_s
    running = set(range(len(processes)))
    while running:
        if time.monotonic() > deadline:
            raise RunError(f"{what} had not ended after {limit_s:g} s", phase="bench")
        for index in sorted(running):
            ended = os.waitid(os.P_PID, processes[index].pid, os.WEXITED | os.WNOWAIT | os.WNOHANG)
            if ended is not None and ended.si_status:
                return index
            if ended is not None:
                running.remove(index)
        time.sleep(0.05)
    return None


def end_group(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL for what is left of a process and its children; it must not have been waited for."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(10.0)


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM ends the block like an interrupt from the keyboard, so that it is cleaned up after."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
