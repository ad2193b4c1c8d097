"""Who writes into a place of a storage: an object with a sign of life, as storages have no locks.

A driver writes holder.json before it touches anything else, and a new beat every `BEAT_S`. Whoever comes later watches
it: one that changes belongs to a live driver; one that has not changed for `WATCH_S` is taken over, whatever clocks
say. A driver of this machine whose process is gone needs no watching. One that finds another's token in its place (it
was frozen, or cut off, for longer than that) has lost it and writes no more; so that it finds it in time, one that has
not renewed its hold for `SILENT_S` looks before it writes. Of two that come at once, the last to write has the place.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from distml.errors import UsageError
from distml.runs.storage import Place, explained

HOLDER = "holder.json"
BEAT_S, WATCH_S, LOOK_S, SETTLE_S = 10.0, 60.0, 1.0, 1.0
SILENT_S = 2 * BEAT_S


@dataclass(frozen=True)
class Held:
    """What holder.json says.

    Attributes:
        machine: host, boot and process namespace: only there does `pid` mean something.
        beat: grows while the driver lives.
    """

    host: str
    machine: str
    pid: int
    token: str
    beat: int = 0

    def __str__(self) -> str:
        return f"process {self.pid} on host {self.host}"

    @property
    def is_gone(self) -> bool:
        """Whether it ran on this machine and does no more; False: that cannot be told."""
        return self.machine == this_machine() and not Path(f"/proc/{self.pid}").exists()


def this_machine() -> str:
    """The host, since its last boot, as this process sees its processes."""
    boot, namespace = "", ""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        namespace = os.readlink("/proc/self/ns/pid")
    return f"{socket.gethostname()} {boot} {namespace}"


def now_s() -> float:
    """A clock that goes on while the machine is suspended, as `time.monotonic` does not."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class Holder:
    """This process's hold on a place; its threads may beat and look at once.

    Args:
        watch_s: without a new beat, another one's hold is over.
        look_s: between two looks.
    """

    def __init__(self, place: Place, watch_s: float = WATCH_S, look_s: float = LOOK_S) -> None:
        self.place, self.watch_s, self.look_s = place, watch_s, look_s
        self.own = Held(socket.gethostname(), this_machine(), os.getpid(), secrets.token_hex(16))
        self.renewed_s = now_s()
        self._lock = threading.Lock()
        self._is_released = False

    def read(self) -> Held | None:
        """Who holds the place; None: nobody, or what is there is not ours to read."""
        data = self.place.read(HOLDER)
        try:
            values = json.loads(data or b"null")
            held = Held(**{item.name: values[item.name] for item in fields(Held)})
            return replace(held, pid=int(held.pid), beat=int(held.beat))
        except (ValueError, TypeError, KeyError):
            return None

    def acquire(self, note: Callable[[str], object]) -> None:
        """Take the place, from a dead driver after having watched it.

        Raises:
            UsageError: a live driver holds it.
            OSError: of the storage.
        """
        found = self.read()
        if found is not None and not found.is_gone:
            note(f"{self.place.url} was held by {found}; looking for up to {self.watch_s:g} s whether it still runs")
            self._watch(found)
        now = self.read()  # another one may have come meanwhile
        if now is not None and (found is None or (now.token, now.beat) != (found.token, found.beat)):
            self._refuse(now)
        self.renew()
        time.sleep(min(SETTLE_S, self.look_s))  # two may have come at once: the last to write has it
        now = self.read()
        if now is not None and now.token != self.own.token:
            self._refuse(now)
        if found is not None:
            note(f"{self.place.url}: taken over from {found}, which no longer runs")

    def _watch(self, found: Held) -> None:
        began = time.monotonic()
        while time.monotonic() - began < self.watch_s:
            time.sleep(self.look_s)
            now = self.read()
            if now is None:  # it has ended meanwhile
                return
            if (now.token, now.beat) != (found.token, found.beat):
                self._refuse(now)

    def _refuse(self, now: Held) -> None:
        raise UsageError(f"{self.place.url} is held by {now}, heard of less than {self.look_s + 1:.0f} s ago; wait "
                         "until it ends, stop it, or give the run another name")  # fmt: skip

    def renew(self) -> None:
        """A new sign of life."""
        began = now_s()
        self.own = replace(self.own, beat=self.own.beat + 1)
        self.place.write(HOLDER, json.dumps(asdict(self.own)).encode())
        self.renewed_s = began

    def beat(self) -> Held | None:
        """Renew the hold, unless another one has taken the place: then who."""
        with self._lock:
            now = self.read()
            if now is not None and now.token != self.own.token:
                return now
            if not self._is_released:  # a beat after the end would hold the place for nobody
                self.renew()
            return None

    def look(self) -> Held | None:
        """`beat`, if the last one is so long ago that another one may have taken the place."""
        return self.beat() if now_s() - self.renewed_s > SILENT_S else None

    def release(self) -> str | None:
        """Give the place up, where it is still ours; what went wrong, if something did."""
        self._is_released = True
        try:
            with self._lock:
                now = self.read()
                if now is not None and now.token == self.own.token:
                    self.place.remove(HOLDER)
        except Exception as error:
            return explained(error)
        return None
