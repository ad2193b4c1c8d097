"""The jobs that come with distml, found by name."""

from __future__ import annotations

import os
from pathlib import Path

from distml.errors import UsageError
from distml.spec.messages import near
from distml.spec.yaml import one_line


def jobs_directory() -> Path:
    """Where the shipped jobs lie: packed beside the code, or `jobs/` of the checkout."""
    package = Path(__file__).resolve().parents[1]
    packed, checkout = package / "shipped_jobs", package.parent / "jobs"
    is_checkout = (package.parent / "pyproject.toml").is_file() and checkout.is_dir()
    return checkout if is_checkout else packed


def shipped_jobs() -> dict[str, Path]:
    """Every shipped job by its name, the file's name without `.yaml`."""
    return {path.stem: path for path in sorted(jobs_directory().glob("*.yaml"))}


def find_job(name_or_path: str | os.PathLike[str]) -> Path:
    """The file of a spec given by path, or of a shipped job given by name; a file of that name goes first.

    Raises:
        UsageError: there is neither.
    """
    text = os.fspath(name_or_path)
    path = Path(text)
    try:
        if path.exists() and (path.is_file() or text not in shipped_jobs()):
            return path
    except (OSError, ValueError) as error:  # a name that is too long, or that holds a null byte
        raise UsageError(f"{one_line(text)}: not a path: {error}") from None
    jobs = shipped_jobs()
    if text in jobs:
        return jobs[text]
    raise UsageError(one_line(f"{text}: no such file{_hint(path, list(jobs))}"))


def _hint(path: Path, jobs: list[str]) -> str:
    try:
        beside = [str(path.parent / found.name) for found in path.parent.glob("*.y*ml")]
    except OSError:
        beside = []
    close = near(str(path), [*beside, *jobs]) or near(path.stem, jobs)
    return f"; did you mean {close!r}?" if close else f"; shipped jobs: {', '.join(jobs)}"
