"""Trials that do not answer any more: their processes say how they are, the driver ends those that hang.

    trial's process: Pulse, a thread ──▶ DIR/tune/beats/ID.json ──▶ Beats.look, from Tune's loop ──▶ SIGKILL

A process of Tune's cannot be asked while it trains, and what a trial reports may be long in coming; so a thread writes
a file every `limits.heartbeat_s`, and the patience is that for members (`runtime/ray_members.py`). Where the run
directory is not shared with the trial's machine the driver sees no file, and the thread itself ends what has not moved.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import ray

from distml.runs.files import write_atomically
from distml.runtime.actors import blocked_cause, patience_s
from distml.runtime.ray import kill
from distml.spec.schema import JobSpec

KILL_PATIENCE_S = 10.0
Doing = tuple[str, str, float]  # Tune's id of the trial, what its process does, seconds without a move in it


@dataclass(frozen=True)
class Beat:
    """What a trial's process says of itself.

    Attributes:
        count: how many of its process came before.
        activity: of the trainer; "start" until it is built, "idle" between two of Tune's calls.
        motionless_s: seconds for which it has not moved in that.
    """

    count: int
    node: str
    pid: int
    activity: str
    motionless_s: float


def folder_of(home: Path) -> Path:
    """Where the beats of a sweep are, below its run directory."""
    return home / "tune" / "beats"


def blocked(beat: Beat, base: JobSpec) -> str | None:
    """Why a process is to be ended by what it says itself, one line; None: it is well."""
    if beat.activity == "start":
        if beat.motionless_s <= base.limits.start_s:
            return None
        return f"it was not built within {base.limits.start_s:g} s and was ended; raise limits.start_s if it needs more"
    if beat.motionless_s <= patience_s(base):
        return None
    return blocked_cause(base, beat.activity, beat.motionless_s)


class Pulse:
    """The thread in a trial's process.

    Args:
        home: the sweep's run directory.
        doing: asked for every beat, from the thread.
    """

    def __init__(self, home: Path, base: JobSpec, doing: Callable[[], Doing]) -> None:
        self.folder, self.base, self.doing = folder_of(home), base, doing
        self.node = ray.get_runtime_context().get_node_id()
        self.over, self.lock, self.count = threading.Event(), threading.Lock(), 0
        self.thread = threading.Thread(target=self._run, name="pulse", daemon=True)
        self.thread.start()

    def beat(self) -> Beat:
        """Say how the process is: also before each of Tune's calls, so that it is known by then which one it is."""
        with self.lock:
            trial, activity, motionless_s = self.doing()
            self.count += 1
            beat = Beat(self.count, self.node, os.getpid(), activity, motionless_s)
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                write_atomically(self.folder / f"{trial}.json", json.dumps(asdict(beat)), durable=False)
            except OSError as error:  # a full disk: the driver is to say so, where it writes
                print(f"no sign of life could be written: {error}", flush=True)
        return beat

    def _run(self) -> None:
        limits = self.base.limits
        grace_s = limits.heartbeat_s + limits.lost_after_s  # the driver comes first, and says why
        while not self.over.wait(limits.heartbeat_s):
            beat = self.beat()
            if blocked(replace(beat, motionless_s=beat.motionless_s - grace_s), self.base):
                os._exit(1)

    def close(self) -> None:
        """No more of them."""
        self.over.set()
        self.thread.join(self.base.limits.heartbeat_s)


@dataclass
class Heard:
    """What the driver knows of a trial that runs: its newest beat, and when it came."""

    beat: Beat | None = None
    at: float = 0.0
    ended: bool = False


class Beats:
    """The driver's side.

    Args:
        home: the sweep's run directory.

    Attributes:
        causes: Tune's id of a trial -> why its process was ended.
    """

    def __init__(self, home: Path, base: JobSpec) -> None:
        self.folder, self.base = folder_of(home), base
        self.heard: dict[str, Heard] = {}
        self.causes: dict[str, str] = {}
        self.looked_at = 0.0

    def look(self, trials: Iterable[Any]) -> None:
        """End what hangs of Tune's trials; now and then."""
        now = time.monotonic()
        if now - self.looked_at < self.base.limits.heartbeat_s:
            return
        self.looked_at = now
        running = {trial.trial_id for trial in trials if trial.status == "RUNNING"}
        for name in set(self.heard) - running:  # after a pause it may be another process
            del self.heard[name]
            self._file(name).unlink(missing_ok=True)
        for name in running - set(self.heard):
            self.heard[name] = Heard()
        for name, heard in self.heard.items():
            cause = None if heard.ended else self._cause(name, heard)
            if cause is not None and heard.beat is not None:
                heard.ended, self.causes[name] = True, cause
                kill(heard.beat.node, heard.beat.pid, KILL_PATIENCE_S)

    def _cause(self, name: str, heard: Heard) -> str | None:
        beat, limits = self._read(name), self.base.limits
        if beat is None:
            return None
        if beat != heard.beat:
            heard.beat, heard.at = beat, time.monotonic()
        elif time.monotonic() - heard.at > limits.heartbeat_s + limits.lost_after_s:
            return f"it gave no answer for {limits.lost_after_s:g} s (stopped or cut off) and was ended"
        return blocked(beat, self.base)

    def _read(self, name: str) -> Beat | None:
        try:
            return Beat(**json.loads(self._file(name).read_bytes()))
        except FileNotFoundError:
            return None

    def _file(self, name: str) -> Path:
        return self.folder / f"{name}.json"
