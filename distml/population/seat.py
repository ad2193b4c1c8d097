"""A place for one member at a time: what it is told, it does; what comes of it is an `Answer`. Nothing raises.

Both hosts have it: one in this process, one in each slot's actor. States in its answers are the states themselves.
"""

from __future__ import annotations

import contextlib
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from distml.errors import RunError, UsageError
from distml.exchange.flat import CopyVector, copy_vector
from distml.exchange.layout import Array
from distml.population.host import Advanced, Answer, Copied, Gone, Ready
from distml.population.member import MakeGroup, Member, MemberError
from distml.runtime.cut import Cut
from distml.spec.schema import JobSpec
from distml.tasks.build import describe
from distml.tasks.sources import SourceTree


class Seat:
    """See the file's head.

    Args:
        directory: where members have their folders.
        start_weights: what `init` starts from.
        make_group: makes the group of a member with several workers.
        memory: for each state in turn, what copies its vectors.
    """

    def __init__(
        self, sources: SourceTree, directory: Path, start_weights: Mapping[str, Array] | None = None,
        make_group: Callable[[str, tuple[str, ...]], MakeGroup] | None = None,
        memory: Callable[[], CopyVector] = lambda: copy_vector,
    ) -> None:  # fmt: skip
        self.memory = memory
        self.sources, self.directory, self.start_weights = sources, directory, start_weights
        self.make_group = make_group
        self.member: Member | None = None
        self.watch: tuple[str, ...] = ()

    def start(
        self, name: str, job: JobSpec, state: Cut | None, watch: Sequence[str], injections: tuple[str, ...]
    ) -> Answer:
        """Build a member."""

        def begin() -> Answer:
            made = self.make_group(name, injections) if self.make_group is not None else None
            folder = self.directory / name
            member = self.member = Member(job, self.sources, folder, injections, made, self.start_weights,
                                          self.memory)  # fmt: skip
            built = member.build(state)
            return Ready(name, built.layout, built.frozen, built.parameters, member.live(self.watch))

        self.release()
        self.watch = tuple(watch)
        return self._answer(name, "start", begin)

    def advance(self, name: str, until: int | None, keep: bool) -> Answer:
        """Train it."""

        def advanced() -> Answer:
            stand = self._of(name).advance(until, keep)
            return Advanced(name, stand.step, stand.metrics, stand.rows, stand.finished, stand.state, stand.seconds)

        return self._answer(name, "train", advanced)

    def copy(self, name: str, state: Callable[[], Cut], job: JobSpec, keep: bool) -> Answer:
        """Let it take another one's shared half, then new values."""

        def copied() -> Answer:
            started, member = time.perf_counter(), self._of(name)
            applied = member.copy(state(), job, self.watch)
            kept = member.state() if keep else None
            return Copied(name, applied, time.perf_counter() - started, kept)

        return self._answer(name, "copy", copied)

    def release(self) -> None:
        """End the member, if there is one."""
        member, self.member = self.member, None
        if member is not None:
            member.close()

    def refuse(self, name: str, phase: str, error: Exception) -> Answer:
        """A member that cannot even be tried."""
        self.release()
        return Gone(name, "failed", str(error), phase)

    def _of(self, name: str) -> Member:
        if self.member is None:
            raise RuntimeError(f"member {name} is not here")
        return self.member

    def _answer(self, name: str, phase: str, act: Callable[[], Answer]) -> Answer:
        """What an action gives; where it fails, the member is gone."""
        try:
            return act()
        except MemberError as error:
            self._write(name, error.traceback)
            gone = Gone(name, error.kind, error.cause, error.phase, error.step)
        except (UsageError, LookupError, RunError) as error:
            gone = Gone(name, "failed", str(error), phase, self.step)
        except Exception as error:
            self._write(name, traceback.format_exc())
            not_finite = isinstance(error, FloatingPointError)
            gone = Gone(name, "not_finite" if not_finite else "failed", describe(error), phase, self.step)
        with contextlib.suppress(Exception):  # what has failed may fail in closing, too
            self.release()
        return gone

    def _write(self, name: str, text: str) -> None:
        """Leave a traceback in the member's folder, where that is on this host."""
        with contextlib.suppress(OSError):
            (self.directory / name).mkdir(parents=True, exist_ok=True)
            (self.directory / name / "error.txt").write_text(text)

    @property
    def step(self) -> int | None:
        """The member's, as far as there is one."""
        member = self.member
        return member.step if member is not None else None

    @property
    def activity(self) -> tuple[str, float]:
        """What the member is doing, and for how many seconds it has not moved in it."""
        member = self.member
        return member.activity if member is not None else ("start", 0.0)
