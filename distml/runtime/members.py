"""Hosts of members (`population/host.py`): in this process, or one Ray actor per slot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from distml.population.host import Answer, Handle
from distml.runtime.cut import Cut
from distml.spec.schema import JobSpec
from distml.tasks.sources import SourceTree

Injections = Mapping[str, tuple[str, ...]]


class InlineHost:
    """All members in this process: `wait` carries out one command at a time, in their order; deterministic.

    Args:
        base: what all members have in common: resources, limits.
        sources: the user's files.
        directory: where members have their folders; a member's is `directory / name`.
        slots: members at the same time.
        injections: member -> failures to cause (`kill:rank=0,step=40`), when it is started for the first time.
    """

    def __init__(
        self, base: JobSpec, sources: SourceTree, directory: Path, slots: int, injections: Injections | None = None
    ) -> None:
        raise NotImplementedError


class RayHost:
    """A Ray actor per slot, which holds one member after the other. Connects to Ray, or starts a private one.

    Args:
        base: what all members have in common: resources, limits.
        sources: the user's files.
        directory: where members have their folders; a member's is `directory / name`. Logs of the slots' processes are
            in `directory.parent / "logs"`.
        slots: members at the same time, as many as are wanted; on a running cluster there are at most as many as fit.
        address: of a running Ray cluster; None: RAY_ADDRESS, the surrounding job's, else a private Ray.
        injections: member -> failures to cause (`kill:rank=0,step=40`), when it is started for the first time.

    Raises:
        UsageError: no cluster at the address, or not even one member fits.
    """

    def __init__(
        self, base: JobSpec, sources: SourceTree, directory: Path, slots: int, address: str | None = None,
        injections: Injections | None = None,
    ) -> None:  # fmt: skip
        raise NotImplementedError


class _Face:
    """What both have, as `population/host.py` says."""

    @property
    def slots(self) -> int:
        raise NotImplementedError

    @property
    def hosts(self) -> Sequence[str]:
        """Names of the machines that members run on."""
        raise NotImplementedError

    def start(self, member: str, job: JobSpec, state: Handle | None = None, watch: Sequence[str] = ()) -> None:
        raise NotImplementedError

    def advance(self, member: str, until: int | None, keep: bool) -> None:
        raise NotImplementedError

    def copy(self, member: str, state: Handle, job: JobSpec, keep: bool = False) -> None:
        raise NotImplementedError

    def release(self, member: str) -> None:
        raise NotImplementedError

    def fetch(self, state: Handle) -> Cut:
        raise NotImplementedError

    def put(self, state: Cut) -> Handle:
        raise NotImplementedError

    def wait(self, timeout_s: float) -> list[Answer]:
        raise NotImplementedError

    def close(self) -> None:
        raise NotImplementedError
