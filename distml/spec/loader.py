"""From a YAML file or a dict to a checked job, or to one line that says where it is wrong."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from pydantic import ValidationError

from distml.errors import UsageError
from distml.spec.blocks import expand
from distml.spec.jobs import find_job
from distml.spec.messages import Problem, describe, near, problems_of, shorten
from distml.spec.overrides import apply_overrides
from distml.spec.own_task import find_own, find_own_task, own_names
from distml.spec.rl_rules import complete
from distml.spec.rules import check_rules
from distml.spec.schema import JobSpec, OwnTaskSpec
from distml.spec.yaml import Document, Position, dump, parse, plain


@dataclass(frozen=True)
class LoadedSpec:
    """A checked job and where it came from.

    Args:
        job: the job.
        path: its file; None for a dict.
        directory: where the file of a user's own task is looked up.
    """

    job: JobSpec
    path: Path | None
    directory: Path

    def dump(self) -> str:
        """The resolved spec as YAML, every default written out; it loads to an equal job."""
        return dump_job(self.job)


def load_spec(
    source: str | os.PathLike[str] | Mapping[str, Any],
    overrides: Mapping[str, object] | Sequence[str] = (),
    *,
    directory: Path | None = None,
) -> LoadedSpec:
    """Read, complete and check a job spec.

    Args:
        source: a file's path, a shipped job's name, or the spec as a dict.
        overrides: `KEY=VALUE` texts with YAML values, or a mapping of dotted keys to values; laid over in order.
        directory: where a user's own task lies; by default the spec's directory, for a dict the current one.

    Raises:
        UsageError: one line, `file:line:column: what is wrong; what to do`.
    """
    path: Path | None = None
    if isinstance(source, Mapping):
        document = _from_dict(source)
    else:
        path = find_job(source)
        document = _read(path)
    if directory is None:
        directory = Path.cwd() if path is None else path.parent
    document.data = expand(document.data)
    apply_overrides(document, overrides)
    _check_kind(document)
    try:
        job = JobSpec.model_validate(document.data, by_alias=True, by_name=False)
    except ValidationError as error:
        raise _first(problems_of(error), document) from None
    needs = None
    if isinstance(job.task, OwnTaskSpec):
        needs = find_own_task(job.task.name, directory, document.where(("task", "name"))).needs
    for path_to_name, name in own_names(job.task):
        find_own(name, directory, document.where(path_to_name))
    job, problems = complete(job, "batch_size" in document.data)
    problems += check_rules(job, needs)
    if problems:
        raise _first(problems, document)
    return LoadedSpec(job, path, directory)


def dump_job(job: JobSpec) -> str:
    """A job as YAML, every default written out; it loads to an equal job."""
    return dump(job.model_dump(mode="python", by_alias=True))


def _from_dict(source: Mapping[str, Any]) -> Document:
    start = Position("<spec>")
    return Document(plain(source, start), start)


def _read(path: Path) -> Document:
    try:
        raw = path.read_bytes()
    except IsADirectoryError:
        raise UsageError(f"{path}: is a directory; name the spec's file in it") from None
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror or error}") from None
    document = parse(raw, str(path))
    if not isinstance(document.data, dict):
        found = "it is empty" if document.data is None else f"got {describe(document.data)}"
        raise document.start.error(f"a spec must be a mapping of keys, {found}; begin with 'distml: v1'")
    return document


def _check_kind(document: Document) -> None:
    """First of all: the keys of another kind would only bring up errors that miss the point."""
    known = get_args(JobSpec.model_fields["kind"].annotation)
    kind = document.data.get("kind", known[0])
    if kind not in known:
        close = near(kind, known) if isinstance(kind, str) else None
        hint = f"did you mean {close!r}? " if close else ""
        raise document.where(("kind",)).error(
            f"kind {shorten(kind)} does not work; {hint}kinds that work: {', '.join(known)}"
        )


def _first(problems: list[Problem], document: Document) -> UsageError:
    """The problem that stands first in the file, then those of overrides; how many more there are."""

    def place(problem: Problem) -> Position:
        places = document.keys if problem.at == "key" else document.values
        path = next((path for path in problem.paths if path in places), problem.paths[0])
        return document.where(path, problem.at)

    ordered = sorted(
        ((place(problem), problem) for problem in problems),
        key=lambda found: (not found[0].numbered, found[1].absent, found[0].line, found[0].column),
    )
    position, text = ordered[0][0], ordered[0][1].text
    more = len(ordered) - 1
    return position.error(f"{text} (and {more} more)" if more else text)
