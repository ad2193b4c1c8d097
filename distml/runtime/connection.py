"""The Ray that a run uses: a cluster's, or a private one that ends with it; and where what Ray says goes."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO, cast

import ray

from distml.errors import UsageError
from distml.runtime.authentication import STUCK_THREAD, cluster_address

# A private Ray's. Workers at Ray's niceness of 15 would let everything else on the machine go first. A new raylet may
# ask for its own object store before that listens, and would try again 1 s later; 10 s in all is Ray's patience too.
PRIVATE_SETTINGS = {
    "RAY_worker_niceness": "0",
    "RAY_raylet_client_connect_timeout_milliseconds": "50",
    "RAY_raylet_client_num_connect_attempts": "200",
}
TRY_ADDRESS = "; check --address or RAY_ADDRESS ('ray status' on a node shows the cluster's)"
REACH_S = 5.0


def connect(address: str | None, cpus: int, start_s: float) -> bool:
    """Connect to a cluster, or start a private Ray; whether it is ours to end.

    A private Ray has as many logical CPUs as the job asks for, a token of its own, no dashboard and no usage reports.

    Args:
        cpus: what the job asks for.
        start_s: until an existing cluster must have answered.
    """
    if ray.is_initialized():
        return False
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    for name, value in PRIVATE_SETTINGS.items():
        os.environ.setdefault(name, value)
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR, "configure_logging": False}
    target = cluster_address(address)
    if target is not None:
        check_reachable(target)
        failed: list[Exception] = []
        started = threading.Thread(target=_init, args=(target, quiet, failed), name=STUCK_THREAD, daemon=True)
        started.start()
        started.join(start_s)
        if started.is_alive():
            raise UsageError(f"the Ray cluster at {target!r} gave no answer for {start_s:g} s{TRY_ADDRESS}")
        if failed:
            text = " ".join(str(failed[0]).split())
            raise UsageError(f"no Ray cluster at {target!r}: {text[:300]}{TRY_ADDRESS}") from failed[0]
        return False
    cores = len(os.sched_getaffinity(0))
    if cpus > cores:
        print(
            f"warning: the job asks for {cpus} CPUs, this machine has {cores}; workers will share them",
            file=sys.stderr,
        )
    # "local": else Ray would take whatever cluster was started last on this machine.
    store = object_store_bytes()
    ray.init(address="local", num_cpus=cpus, include_dashboard=False, object_store_memory=store, **quiet)
    return True


def _init(target: str, options: dict[str, Any], failed: list[Exception]) -> None:
    """`ray.init`, on a thread: it has no limit of its own and can wait for a dead cluster for good."""
    try:
        ray.init(address=target, **options)
    except Exception as error:
        failed.append(error)


def check_reachable(target: str) -> None:
    """Refuse an address where nobody listens.

    Raises:
        UsageError: with what was tried.
    """
    if target.startswith("ray://"):
        raise UsageError(
            f"{target!r} is Ray Client's; run on a node of the cluster with its host:port, or --address auto"
        )
    host, _, port = target.rpartition(":")
    if not port.isdigit():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=REACH_S).close()
    except (OSError, OverflowError) as error:
        raise UsageError(f"no Ray cluster at {target!r}: {error}{TRY_ADDRESS}") from error


def object_store_bytes() -> int:
    """A private Ray's object store: a quarter of the shared memory that is free, at most 2 GiB."""
    free = os.statvfs("/dev/shm")
    return max(80 * 2**20, min(2 * 2**30, free.f_bavail * free.f_frsize // 4))


class _ByThread:
    """A text stream that sends what Ray's own threads print, and ours for its start and end, to a log; all else on."""

    def __init__(self, stream: TextIO, log: TextIO) -> None:
        self._stream, self._log = stream, log

    def write(self, text: str) -> int:
        name = threading.current_thread().name
        target = self._log if name.startswith("ray_") or name == STUCK_THREAD else self._stream
        return target.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def diverted_output(path: Path) -> Iterator[None]:
    """What Ray says in this process goes to `path`, not to the terminal."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8") as log:
        before = sys.stdout, sys.stderr
        sys.stdout, sys.stderr = cast(TextIO, _ByThread(before[0], log)), cast(TextIO, _ByThread(before[1], log))
        handler = logging.StreamHandler(log)
        logger = logging.getLogger("ray")
        logger.addHandler(handler)
        propagated, logger.propagate = logger.propagate, False
        try:
            yield
        finally:
            sys.stdout, sys.stderr = before
            logger.removeHandler(handler)
            logger.propagate = propagated
