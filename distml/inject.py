"""Failures on purpose: `--inject kill:rank=1,step=50` gives users the injector of the tests.

kill:rank=R,step=S      SIGKILL the process of worker R when it reaches step S (server=K for a server)
stop:rank=R,step=S      SIGSTOP it: it lives but no longer answers
nan:rank=R,step=S       its loss is NaN at that step
slow:rank=R,step=S      from that step on it sleeps 50 ms per step
"""

from __future__ import annotations

import os
import re
import signal
import time
from dataclasses import dataclass
from typing import Any

from distml.errors import UsageError

ACTIONS = ("kill", "stop", "nan", "slow")
SLOW_S = 0.05


@dataclass(frozen=True)
class Injection:
    """One failure: `action` for process `role` number `index` at `step`."""

    action: str
    role: str
    index: int
    step: int

    @classmethod
    def parse(cls, text: str) -> Injection:
        """From the command line's form.

        Raises:
            UsageError: it has another form.
        """
        match = re.fullmatch(r"(\w+):(rank|server)=(\d+),step=(\d+)", text.strip())
        if match is None or match[1] not in ACTIONS:
            raise UsageError(
                f"--inject {text}: expected {'|'.join(ACTIONS)} as in 'kill:rank=1,step=50' or 'kill:server=0,step=50'"
            )
        if match[2] == "server" and match[1] == "nan":
            raise UsageError(f"--inject {text}: servers compute no loss; use nan:rank=...")
        return cls(match[1], match[2], int(match[3]), int(match[4]))

    def ends(self, role: str) -> bool:
        """Whether it ends the process of `role`, for example "rank 1"."""
        return self.action in ("kill", "stop") and f"{self.role} {self.index}" == role

    def __str__(self) -> str:
        return f"{self.action}:{self.role}={self.index},step={self.step}"


class Injector:
    """Causes the failures that are meant for one process."""

    def __init__(self, injections: tuple[str, ...], role: str, index: int) -> None:
        parsed = [Injection.parse(text) for text in injections]
        self.own = [one for one in parsed if (one.role, one.index) == (role, index)]

    def reach(self, step: int) -> None:
        """The process begins `step`: die, freeze or sleep if that is meant for it."""
        for one in self.own:
            if one.action == "kill" and step >= one.step:
                os.kill(os.getpid(), signal.SIGKILL)
            if one.action == "stop" and step >= one.step:
                self.own = [other for other in self.own if other is not one]
                os.kill(os.getpid(), signal.SIGSTOP)
            if one.action == "slow" and step >= one.step:
                time.sleep(SLOW_S)

    def spoil(self, loss: Any, step: int) -> Any:
        """The loss, or the error that a NaN would be, where `nan` is meant for this step."""
        for one in self.own:
            if one.action == "nan" and step >= one.step:
                raise ValueError(f"loss is nan (injected by {one})")
        return loss
