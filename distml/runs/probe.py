"""Whether several processes see one folder: the driver writes a file, each rank reads it and writes one back.

The files' names are new each time, so that no host has an older answer about them in its cache. No torch here.
"""

from __future__ import annotations

import contextlib
import secrets
from pathlib import Path
from types import TracebackType

from distml.runs.files import write_atomically

PREFIX = ".probe-"


class Probe:
    """The driver's side, a context: what was written goes at its end.

    Args:
        folder: which ranks are to see; made if it is not there.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.token = folder, secrets.token_hex(8)

    def __enter__(self) -> Probe:
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(self.folder / (PREFIX + self.token), self.token)
        return self

    def missing(self, rank: int) -> str | None:
        """What of a rank's answer is not here, or None."""
        name = answer_name(self.token, rank)
        there = (self.folder / name).is_file() and (self.folder / name).read_text() == self.token
        return None if there else f"what it wrote, {name}, is not on the driver's host"

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for path in self.folder.glob(f"{PREFIX}{self.token}*"):
            with contextlib.suppress(OSError):
                path.unlink()


def answer(folder: Path, token: str, rank: int) -> str | None:
    """A rank's side: None, or why it does not see the driver's folder. Makes no folder where there is none."""
    try:
        if (folder / (PREFIX + token)).read_text() != token:
            return f"{PREFIX + token} there is not the driver's"
        write_atomically(folder / answer_name(token, rank), token)
    except OSError as error:
        return error.strerror or str(error)
    return None


def answer_name(token: str, rank: int) -> str:
    """The file that a rank writes."""
    return f"{PREFIX}{token}.{rank}"
