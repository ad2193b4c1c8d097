"""The errors a user meets: one clear line each, and the exit code it ends with."""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """What a `distml` command ends with."""

    DONE = 0
    DEFECT = 1
    USAGE = 2
    FAILED = 3
    GOAL_MISSED = 4
    INTERRUPTED = 130


class DistmlError(Exception):
    """Base of the errors that end a command with one line instead of a traceback."""

    exit_code: ExitCode = ExitCode.DEFECT


class UsageError(DistmlError):
    """What the user's spec, files, arguments or resources explain, found before the first update."""

    exit_code = ExitCode.USAGE


class RunError(DistmlError):
    """The run failed after its first update.

    Args:
        message: the cause, one line.
        role: the process that failed, for example `rank 1` or `server 0`.
        phase: what it was doing: `start`, `stream`, `loss`, `backward`, `exchange`, `evaluate`, `checkpoint`.
        step: the version of the weights it was working on.
    """

    exit_code = ExitCode.FAILED

    def __init__(self, message: str, *, role: str = "driver", phase: str = "", step: int | None = None) -> None:
        self.message, self.role, self.phase, self.step = message, role, phase, step
        where = ", ".join(part for part in (role, phase, "" if step is None else f"step {step}") if part)
        super().__init__(f"{where}: {message}")
