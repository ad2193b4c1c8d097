"""`distml doctor [--address URL]`: what a run needs, each `ok` or what to do.

this machine ── Python, torch, CUDA, NCCL, DeepSpeed's ops, shared memory, disk, Ray, token, who listens ─┬─▶ lines
a cluster ───── reached? token? nodes alike? links (doctor_cluster.py) ───────────────────────────────────┘   or JSON

What imports much runs in a process of its own, and every probe has a limit: an answer that does not come is a finding.
"""

from __future__ import annotations

import importlib.metadata
import ipaddress
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import psutil
from packaging.specifiers import SpecifierSet

from distml.errors import ExitCode, UsageError
from distml.launch.check.ray_up import readable_by_others
from distml.launch.check.versions import TESTED_PYTHON, allowed
from distml.launch.submit.contact import find_token, within
from distml.memory import binary_size
from distml.spec.yaml import one_line

IMPORT_S, PROBE_S = 120.0, 20.0
SHARED_MEMORY_BYTES, FREE_SHARED_BYTES = 2**30, 2**28
NUM_SHOWN = 4
DISK_BYTES, FULL = 5 * 2**30, 0.95  # from there on Ray spills no more

TORCH = """
import json, torch
cuda = torch.cuda.is_available()
cards = [[p.name, p.total_memory] for p in map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))]
nccl = ".".join(map(str, torch.cuda.nccl.version())) if cuda and torch.distributed.is_nccl_available() else None
found = {"version": torch.__version__, "built": torch.version.cuda, "cards": cards if cuda else [], "nccl": nccl}
print(json.dumps(found))
"""
DEEPSPEED = """
import json, deepspeed
from deepspeed.ops.op_builder.all_ops import ALL_OPS
ops = {name: bool(ALL_OPS[name].is_compatible(verbose=False)) for name in ("cpu_adam", "fused_adam") if name in ALL_OPS}
print(json.dumps({"version": deepspeed.__version__, "ops": ops}))
"""


@dataclass(frozen=True)
class Finding:
    """One line.

    Attributes:
        name: what was looked at.
        said: what was found.
        do: what to do about it; "": it is all right.
    """

    name: str
    said: str
    do: str = ""

    @property
    def ok(self) -> bool:
        """Whether nothing needs to be done."""
        return not self.do

    def __str__(self) -> str:
        text = f"{'ok' if self.ok else '!!'}  {self.name:<14}  {self.said}"
        return one_line(f"{text}; {self.do}" if self.do else text)


def doctor_command(*, address: str | None, out: Path | None, as_json: bool) -> int:
    """The verb `doctor`; its exit code."""
    address = address or next((os.environ[name] for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
                               if os.environ.get(name)), None)  # fmt: skip
    if out is not None and address is None:
        raise UsageError("--out is for what is measured between nodes; add --address of a cluster")
    findings: list[Finding] = []
    for finding in chain(local_findings(address), _of_cluster(address, out)):
        findings.append(finding)
        if not as_json:
            print(finding, flush=True)
    if as_json:
        print(json.dumps({"ok": all(one.ok for one in findings),
                          "findings": [{"ok": one.ok, **asdict(one)} for one in findings]}, indent=2))  # fmt: skip
    return int(ExitCode.DONE if all(one.ok for one in findings) else ExitCode.USAGE)


def _of_cluster(address: str | None, out: Path | None) -> Iterator[Finding]:
    if address is None:
        yield Finding("cluster", "none asked for (--address, RAY_ADDRESS)")
        return
    from distml.launch.doctor_cluster import cluster_findings

    yield from cluster_findings(address, out)


def local_findings(address: str | None) -> Iterator[Finding]:
    """What this machine has; `address` is of the cluster that will be asked."""
    yield python()
    for name, probe in (
        ("torch", torch), ("deepspeed", deepspeed), ("shared memory", shared_memory), ("disk", disk), ("ray", ray),
        ("token", lambda: token(address, os.environ)), ("listening", listening),
    ):  # fmt: skip
        yield from _within(name, probe)


def _within(name: str, probe: Callable[[], Iterator[Finding]]) -> list[Finding]:
    """What a probe finds; that it found nothing in time, or failed, is a finding."""
    limit = IMPORT_S if name in ("torch", "deepspeed") else PROBE_S
    try:
        return within(limit + 5, name, lambda: list(probe()))
    except UsageError as error:
        return [Finding(name, f"no answer: {error}", "look at what this machine is busy with")]
    except Exception as error:
        return [Finding(name, f"{type(error).__name__}: {error}", "report it: this probe should not fail")]


# -------------------------------------------------------------------------------------------------------- this machine
def python() -> Finding:
    """The interpreter's version."""
    version = platform.python_version()
    wanted = SpecifierSet(importlib.metadata.metadata("distml")["Requires-Python"])
    if not wanted.contains(version, prereleases=True):
        return Finding("python", version, f"distml needs {wanted}: make a new environment")
    tested = "" if version.startswith(f"{TESTED_PYTHON}.") else f", tested with {TESTED_PYTHON}"
    return Finding("python", f"{version}{tested} on {platform.system()} {platform.machine()}")


def asked(script: str) -> dict[str, Any] | str:
    """What a script prints as JSON, run by this interpreter; else its last words."""
    try:
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=IMPORT_S,
                              stdin=subprocess.DEVNULL)  # fmt: skip
    except subprocess.TimeoutExpired:
        return f"no answer in {IMPORT_S:g} s"
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        return (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    found: dict[str, Any] = json.loads(lines[-1])
    return found


def torch() -> Iterator[Finding]:
    """PyTorch, the GPUs that it sees, NCCL."""
    found, devices = asked(TORCH), len(list(Path("/dev").glob("nvidia[0-9]*")))
    if isinstance(found, str):
        yield Finding("torch", found, "reinstall it: pip install -c constraints.txt torch")
        return
    yield _fits("torch", found["version"])
    cards = found["cards"]
    if cards:
        yield Finding("cuda", f"{len(cards)} x {cards[0][0]}, {binary_size(cards[0][1])}, CUDA {found['built']}")
        yield Finding("nccl", str(found["nccl"])) if found["nccl"] else Finding(
            "nccl", "torch was built without it", "install the torch of PyPI, which has it")  # fmt: skip
    elif devices:
        built = f"torch is built for CUDA {found['built']}" if found["built"] else "torch is built for CPUs"
        advice = "update the driver, or see what nvidia-smi says" if found["built"] else "install torch from PyPI"
        yield Finding("cuda", f"{devices} GPUs are here and torch sees none: {built}", advice)
    else:
        yield Finding("cuda", "no GPU here; gpus_per_worker: 0 trains on CPUs")
        yield Finding("nccl", "not needed without GPUs; gloo takes its place")


def deepspeed() -> Iterator[Finding]:
    """DeepSpeed, and whether what it compiles at first use can be compiled."""
    if platform.system() != "Linux":
        yield Finding("deepspeed", "is for Linux; strategy zero runs there")
        return
    found = asked(DEEPSPEED)
    if isinstance(found, str):
        yield Finding("deepspeed", found, "reinstall it: pip install -c constraints.txt deepspeed")
        return
    yield _fits("deepspeed", found["version"])
    missing = [tool for tool in ("g++", "ninja") if shutil.which(tool) is None]
    unfit = [name for name, fits in found["ops"].items() if not fits]
    if missing or unfit:
        what = " and ".join([*(f"no {tool}" for tool in missing), *(f"{name} does not fit" for name in unfit)])
        yield Finding("deepspeed ops", what, "strategy zero compiles at first use: install g++, ninja-build and, for "
                      "GPUs, the CUDA toolkit of torch's version")  # fmt: skip
    else:
        yield Finding("deepspeed ops", f"{', '.join(found['ops'])} can be compiled")


def _fits(name: str, version: str) -> Finding:
    wanted = allowed()[name]
    if wanted.contains(version.partition("+")[0], prereleases=True):
        return Finding(name, version)
    return Finding(name, version, f"distml is tested with {wanted}: pip install -c constraints.txt {name}")


def shared_memory() -> Iterator[Finding]:
    """Where workers on one host exchange, and Ray keeps objects."""
    if not Path("/dev/shm").is_dir():
        yield Finding("shared memory", "there is no /dev/shm here; gradients go through files")
        return
    usage = shutil.disk_usage("/dev/shm")
    said = f"{binary_size(usage.free)} free of {binary_size(usage.total)} in /dev/shm"
    if usage.total < SHARED_MEMORY_BYTES:
        yield Finding("shared memory", said, "give the container more: docker run --shm-size=8g")
    elif usage.free < FREE_SHARED_BYTES:
        yield Finding("shared memory", said, "remove what ended programs left there: ls -la /dev/shm")
    else:
        yield Finding("shared memory", said)


def disk() -> Iterator[Finding]:
    """Where runs are written, and where Ray spills objects and logs."""
    seen: dict[int, Path] = {}
    for place in (Path.cwd(), Path(os.environ.get("RAY_TMPDIR", "/tmp"))):
        seen.setdefault(place.stat().st_dev, place)
    for place in seen.values():
        usage = shutil.disk_usage(place)
        said = f"{binary_size(usage.free)} free of {binary_size(usage.total)} at {place}"
        full = usage.used > FULL * usage.total or usage.free < DISK_BYTES
        yield Finding("disk", said, "make room: checkpoints and Ray's spilled objects need it" if full else "")


def ray() -> Iterator[Finding]:
    """Ray's version."""
    yield _fits("ray", importlib.metadata.version("ray"))


# ----------------------------------------------------------------------------------------------------------- who may in
def token(address: str | None, environment: Mapping[str, str]) -> Iterator[Finding]:
    """Whether a token is wanted, found, and read by its owner only."""
    mode = environment.get("RAY_AUTH_MODE")
    try:
        found = find_token(environment)
    except UsageError as error:
        yield Finding("token", str(error), "write one with ray get-auth-token --generate, or unset the variable")
        return
    path = Path(environment.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token").expanduser()
    if mode == "disabled":
        yield Finding("token", "RAY_AUTH_MODE=disabled: whoever reaches a Ray started here runs code on it",
                      "unset it, or RAY_AUTH_MODE=token")  # fmt: skip
    elif found is not None and path.exists() and readable_by_others(path):
        yield Finding("token", f"{path} can be read by other users (mode {path.stat().st_mode & 0o777:o})",
                      f"chmod 600 {path}")  # fmt: skip
    elif found is not None:
        yield Finding("token", f"found: {found.source}")
    elif mode == "token" and address is None:
        yield Finding("token", "RAY_AUTH_MODE=token, and there is none", "ray get-auth-token --generate > /dev/null")
    else:
        yield Finding("token", "none is kept here; a Ray that distml starts itself has one of its own")


def listening() -> Iterator[Finding]:
    """Ray's processes on this machine that can be reached from elsewhere without a token."""
    open_at: list[str] = []
    guarded = 0
    for process in psutil.process_iter(["name", "cmdline"]):
        name = ray_process(process.info["name"] or "", process.info["cmdline"] or [])
        if name is None:
            continue
        try:
            heard = [one.laddr for one in process.net_connections("inet") if one.status == psutil.CONN_LISTEN]
            mode = token_mode(process)
        except (psutil.AccessDenied, psutil.NoSuchProcess):
            continue
        outside = [f"{one.ip}:{one.port}" for one in heard if not is_loopback(one.ip)]
        guarded += bool(outside and mode == "token")
        open_at += [f"{name} {place}" for place in outside if mode != "token"]
    if open_at:
        more = len(open_at) - NUM_SHOWN
        few = ", ".join(sorted(open_at)[:NUM_SHOWN]) + (f" and {more} more" if more > 0 else "")
        yield Finding("listening", f"without a token: {few}", "whoever reaches it runs code here: ray stop, then start "
                      "it with RAY_AUTH_MODE=token and --dashboard-host=127.0.0.1")  # fmt: skip
    elif guarded:
        yield Finding("listening", f"{guarded} of Ray's processes, all with a token")
    else:
        yield Finding("listening", "no Ray here can be reached from elsewhere")


def token_mode(process: psutil.Process) -> str | None:
    """A process's RAY_AUTH_MODE; Ray's agents write their titles over their environment, which is their raylet's."""
    environment, parent = process.environ(), process.parent()
    if "PATH" not in environment and parent is not None:
        environment = parent.environ()
    return environment.get("RAY_AUTH_MODE")


def is_loopback(address: str) -> bool:
    """Whether only this machine reaches it; `::ffff:127.0.0.1` too is this machine."""
    found = ipaddress.ip_address(address.partition("%")[0])
    inner = found.ipv4_mapped if isinstance(found, ipaddress.IPv6Address) else None
    return (inner or found).is_loopback


def ray_process(name: str, command: list[str]) -> str | None:
    """Which of Ray's processes one is; None: none that listens."""
    words = " ".join(command[:6])
    if name in ("gcs_server", "raylet"):
        return name
    for part, called in (("ray/dashboard/dashboard.py", "dashboard"), ("ray-dashboard", "dashboard"),
                         ("ray/dashboard/agent.py", "agent"), ("ray::DashboardAgent", "agent"),
                         ("ray/util/client/server", "client server")):  # fmt: skip
        if part in words:
            return called
    return None
