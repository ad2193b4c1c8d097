"""Failures on purpose: `--inject kill:rank=1,step=50` gives users the injector of the tests.

kill:rank=R,step=S      SIGKILL the process of worker R when it reaches step S (server=K for a server, member=M for a
                        population's member, whose rank 0 it then is)
stop:rank=R,step=S      SIGSTOP it: it lives but no longer answers
nan:rank=R,step=S       its loss is NaN at that step
slow:rank=R,step=S      from that step on it sleeps 50 ms per step

`kill` and `stop` take a further `,at=STAGE`: not between two steps but in the midst of an exchange in shared memory, or
of writing a part of a checkpoint.
"""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from distml.errors import UsageError

ACTIONS = ("kill", "stop", "nan", "slow")
ROLES = ("rank", "server", "member")
STAGES = (
    "gradients",  # synchronous: its gradients are written, the others do not know yet
    "sums",  # its shard is in part updated
    "weights",  # its shard is updated, the others do not know yet
    "lock",  # asynchronous: it has just become the servers
    "update",  # the next version is in part written
    "publish",  # it is written, and nobody knows of it
    "answer",  # the others can read it, this worker does not yet
    "save",  # of its part of a checkpoint there is a file without its values
)
SLOW_S = 0.05


@dataclass(frozen=True)
class Injection:
    """One failure: `action` for process `role` number `index` at `step`, in the midst of it if there is a `stage`."""

    action: str
    role: str
    index: int
    step: int
    stage: str | None = None

    @classmethod
    def parse(cls, text: str) -> Injection:
        """From the command line's form.

        Raises:
            UsageError: it has another form.
        """
        match = re.fullmatch(rf"(\w+):({'|'.join(ROLES)})=(\d+),step=(\d+)(?:,at=(\w+))?", text.strip())
        if match is None or match[1] not in ACTIONS:
            raise UsageError(
                f"--inject {text}: expected {'|'.join(ACTIONS)} as in 'kill:rank=1,step=50' or 'kill:server=0,step=50'"
                "; of a population 'kill:member=3,step=40'"
            )
        if match[2] == "server" and match[1] == "nan":
            raise UsageError(f"--inject {text}: servers compute no loss; use nan:rank=...")
        if match[5] is not None and (match[2] != "rank" or match[1] not in ("kill", "stop")):
            raise UsageError(f"--inject {text}: at=... is for kill:rank=... and stop:rank=...")
        if match[5] not in (None, *STAGES):
            raise UsageError(f"--inject {text}: unknown stage {match[5]!r}; stages are {', '.join(STAGES)}")
        return cls(match[1], match[2], int(match[3]), int(match[4]), match[5])

    def ends(self, role: str) -> bool:
        """Whether it ends the process of `role`, for example "rank 1"."""
        return self.action in ("kill", "stop") and f"{self.role} {self.index}" == role

    def __str__(self) -> str:
        return f"{self.action}:{self.role}={self.index},step={self.step}" + (f",at={self.stage}" if self.stage else "")


def of_member(injections: Sequence[str], index: int) -> tuple[str, ...]:
    """What is meant for member `index` of a population, as its own rank 0 knows it."""
    parsed = [Injection.parse(text) for text in injections]
    own = [one for one in parsed if (one.role, one.index) == ("member", index)]
    return tuple(str(replace(one, role="rank", index=0)) for one in own)


class Injector:
    """Causes the failures that are meant for one process."""

    def __init__(self, injections: tuple[str, ...], role: str, index: int) -> None:
        parsed = [Injection.parse(text) for text in injections]
        self.own = [one for one in parsed if (one.role, one.index) == (role, index)]
        self.step = 0

    def reach(self, step: int) -> None:
        """The process begins `step`: die, freeze or sleep if that is meant for it."""
        self.step = step
        self.at(None)
        if any(one.action == "slow" and step >= one.step for one in self.own):
            time.sleep(SLOW_S)

    def at(self, stage: str | None) -> None:
        """The process reaches a stage of an exchange: die or freeze if that is meant for it."""
        for one in [one for one in self.own if one.stage == stage and self.step >= one.step]:
            if one.action == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if one.action == "stop":
                self.own = [other for other in self.own if other is not one]
                os.kill(os.getpid(), signal.SIGSTOP)

    def spoil(self, loss: Any, step: int) -> Any:
        """The loss, or the error that a NaN would be, where `nan` is meant for this step."""
        for one in self.own:
            if one.action == "nan" and step >= one.step:
                raise FloatingPointError(f"loss is nan (injected by {one})")
        return loss
