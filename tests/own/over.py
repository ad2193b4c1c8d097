"""Carries a job over jobs of a test's own making through: built, trained, recorded also when it fails, closed."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol, TypeVar

from distml.launch.run import prepare_directory
from distml.population.context import OverContext
from distml.runs.directory import Result, RunDirectory
from distml.runs.display import Display, SilentDisplay
from distml.spec.loader import LoadedSpec


class Over(Protocol):
    """What `drive_over` of the launcher asks of a run."""

    def build(self, resume: bool) -> None: ...
    def train(self) -> object: ...
    def fail(self, error: BaseException) -> None: ...
    def close(self) -> None: ...


Run = TypeVar("Run", bound=Over)


def carry_through(
    loaded: LoadedSpec, out: Path, make: Callable[[OverContext], Run], *, resume: bool, display: Display
) -> tuple[Run, Result]:
    """What `make` built in `out`, inline, and how it ended."""
    with RunDirectory.open(out) as directory:
        sources = prepare_directory(directory, loaded, resume, SilentDisplay())
        run = make(OverContext(loaded, directory, sources, "inline", None, display, time.perf_counter()))
        try:
            run.build(resume)
            run.train()
        except BaseException as error:
            run.fail(error)
            raise
        finally:
            run.close()
        result = directory.result.read()
        assert result is not None
        return run, result
