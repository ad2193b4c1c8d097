"""From a YAML file or a dict to a checked job, or to one line that says where it is wrong."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic

from pydantic import ValidationError
from typing_extensions import TypeVar

from distml.errors import UsageError
from distml.spec.base import Block
from distml.spec.blocks import expand, rename
from distml.spec.image_rules import complete_images
from distml.spec.jobs import find_job
from distml.spec.language_rules import complete_text
from distml.spec.messages import Problem, describe, near, problems_of, shorten
from distml.spec.nas import NasSpec
from distml.spec.over_jobs import OverJobs
from distml.spec.overrides import apply_overrides
from distml.spec.own_task import find_own, find_own_task, own_names
from distml.spec.population import PopulationSpec
from distml.spec.rl_rules import complete
from distml.spec.rllib import RLlibSpec, check_rllib, find_recorded
from distml.spec.rules import check_rules
from distml.spec.schema import JobSpec, OwnTaskSpec
from distml.spec.search_rules import check_own_limits, check_search
from distml.spec.storage import fault_of
from distml.spec.sweep import SweepSpec
from distml.spec.yaml import Document, KeyPath, Position, dump, parse, plain
from distml.spec.zero_rules import complete as complete_zero

J = TypeVar("J", bound=Block, covariant=True, default=JobSpec)
KINDS: dict[str, type[Block]] = {
    "train": JobSpec, "population": PopulationSpec, "sweep": SweepSpec, "nas": NasSpec, "rllib": RLlibSpec,
}  # fmt: skip


@dataclass(frozen=True)
class LoadedSpec(Generic[J]):
    """A checked job and where it came from.

    Args:
        job: the job, of the class that `KINDS` has for its kind.
        path: its file; None for a dict.
        directory: where the file of a user's own task is looked up.
        base: of a job over jobs: the training job.
    """

    job: J
    path: Path | None
    directory: Path
    base: LoadedSpec[JobSpec] | None = None

    @property
    def summary(self) -> str:
        """Name, task and strategy; of a job for RLlib: name, algorithm and environment."""
        job: Block = self.job
        if isinstance(job, RLlibSpec):
            return f"{job.name}, {job.algorithm} of RLlib, {job.environment.id}"
        if isinstance(job, OverJobs):
            return f"{job.name}, {getattr(job, 'kind')} of {job.base.task.name}, {job.base.strategy.label}"  # noqa: B009
        assert isinstance(job, JobSpec)
        return f"{job.name}, {job.task.name}, {job.strategy.label}"

    def dump(self) -> str:
        """The resolved spec as YAML, every default written out; it loads to an equal job."""
        return dump_job(self.job)


def load_spec(
    source: str | os.PathLike[str] | Mapping[str, Any],
    overrides: Mapping[str, object] | Sequence[str] = (),
    *,
    directory: Path | None = None,
) -> LoadedSpec[Any]:
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
    root = KINDS.get(str(document.data.get("kind")), JobSpec)
    home = _take_base(document, root, directory) or directory
    document.data = expand(document.data, root)
    apply_overrides(document, overrides, root)
    _check_kind(document)
    root = KINDS[document.data.get("kind", "train")]
    home = _take_base(document, root, directory) or home
    document.data = expand(document.data, root)  # once more, for an override of the kind
    try:
        job = root.model_validate(document.data, by_alias=True, by_name=False)
    except ValidationError as error:
        raise first_error(problems_of(error, root), document) from None
    _check_storage(job, document)
    if isinstance(job, RLlibSpec):
        return LoadedSpec(_checked_rllib(job, directory, document), path, directory)
    if isinstance(job, OverJobs):
        return _checked_over(job, document, path, home)
    assert isinstance(job, JobSpec)
    return LoadedSpec(_checked_train(job, directory, document), path, directory)


def load_train(
    source: str | os.PathLike[str] | Mapping[str, Any],
    overrides: Mapping[str, object] | Sequence[str] = (),
    *,
    directory: Path | None = None,
) -> LoadedSpec[JobSpec]:
    """`load_spec` where only a training job will do.

    Raises:
        UsageError: also for a job of another kind.
    """
    loaded = load_spec(source, overrides, directory=directory)
    if not isinstance(loaded.job, JobSpec):
        where = "the spec" if isinstance(source, Mapping) else os.fspath(source)
        raise UsageError(f"{where} is a job of kind {loaded.job.kind}; this works with jobs of kind train only")
    return loaded


def _take_base(document: Document, root: type[Block], directory: Path) -> Path | None:
    """Put the base in its place where a job over jobs names a file, and complete one that is written as a block.

    Returns:
        The directory of the base's file; None: it is no file.
    """
    base = document.data.get("base")
    if not issubclass(root, OverJobs) or base is None:
        return None
    if isinstance(base, dict):
        named = {"distml": document.data.get("distml"), "name": document.data.get("name")}
        document.data["base"] = {**{key: value for key, value in named.items() if value is not None}, **base}
        return None
    start = document.where(("base",))
    if not isinstance(base, str):
        raise start.error(f"base must be a training job: a block, a file or a shipped job's name; got {describe(base)}")
    try:
        found = _load_base(find_base(base, directory))
    except UsageError as error:
        raise start.error(f"base: {error}") from None
    document.data["base"] = found.job.model_dump(mode="python", by_alias=True)
    return found.directory


def find_base(base: str, directory: Path) -> Path:
    """The file of a base: beside the spec, where the path leads from here, or a shipped job's.

    Raises:
        UsageError: there is none.
    """
    beside = directory / base
    return find_job(beside if beside.is_file() else base)


def _load_base(path: Path) -> LoadedSpec[JobSpec]:
    kind = _read(path).data.get("kind", "train")
    if kind in KINDS and kind != "train":  # before its own base is read, which may be the very file that names it
        raise UsageError(f"{path} is a job of kind {kind}; a base must be of kind train")
    return load_train(path)


def _checked_over(job: OverJobs, document: Document, path: Path | None, directory: Path) -> LoadedSpec[Any]:
    """A job over jobs whose base and space are checked; `directory` is the base's."""
    problems = check_own_limits(job)
    job = job.with_limits()
    base = LoadedSpec(_checked_train(job.base, directory, document.below("base")), path, directory)
    job = job.model_copy(update={"base": base.job})
    problems += check_search(job, lambda values: with_values(base, values))
    if problems:
        raise first_error(problems, document)
    return LoadedSpec(job, path, directory, base)


def with_values(base: LoadedSpec[JobSpec], values: Mapping[str, Any], **changes: Any) -> LoadedSpec[JobSpec]:
    """The base with other values at some of its paths.

    Args:
        values: by dotted path, as a search proposes them. Those that choose a block come first: `optimizer`, then
            `optimizer.name`, then `optimizer.lr`; a block of another name keeps the keys that both have.
        changes: whole top-level keys besides.

    Raises:
        UsageError: a path does not exist, or a value may not stand there; without a file's name.
    """
    data = {**base.job.model_dump(mode="python", by_alias=True), **changes}
    ordered = dict(sorted(values.items(), key=lambda item: (item[0].count("."), not item[0].endswith(".name"))))
    for path, value in ordered.items():
        if path.endswith(".name"):
            rename(data, path.removesuffix(".name"), value)
    loaded = load_train(data, ordered, directory=base.directory)
    return replace(loaded, path=base.path)


def _check_storage(job: Block, document: Document) -> None:
    """Of any kind of job; a base has none, as its variants' runs lie in the folder of the job over them."""
    assert isinstance(job, JobSpec | OverJobs | RLlibSpec)
    fault = fault_of(job.storage)
    if fault is not None and "@" in str(job.storage):
        raise UsageError(f"storage {fault}")  # no place: that of an override is its text, with the password
    if fault is not None:
        raise document.where(("storage",), "value").error(f"storage {fault}")
    if isinstance(job, OverJobs) and job.base.storage is not None:
        raise document.where(("base", "storage"), "key").error(
            "storage belongs to the top of the spec, beside base: all runs of a job over jobs are stored together; "
            "move it there"
        )


def _checked_rllib(job: RLlibSpec, directory: Path, document: Document) -> RLlibSpec:
    for path_to_name, name in own_names(job):
        find_own(name, directory, document.where(path_to_name))
    job, problems = find_recorded(job, directory)
    problems += check_rllib(job)
    if problems:
        raise first_error(problems, document)
    return job


def _checked_train(job: JobSpec, directory: Path, document: Document) -> JobSpec:
    needs = None
    if isinstance(job.task, OwnTaskSpec):
        needs = find_own_task(job.task.name, directory, document.where(("task", "name"))).needs
    for path_to_name, name in own_names(job.task):
        find_own(name, directory, document.where(path_to_name))
    job, problems = complete_zero(job, lambda path: document.where(path) if is_written(document.data, path) else None)
    job, more = complete(job, "batch_size" in job.model_fields_set)
    problems += more
    job = complete_images(job, directory)
    job, missing = complete_text(job, directory, document.data["task"])
    problems += missing
    problems += check_rules(job, needs)
    if problems:
        raise first_error(problems, document)
    return job


def is_written(data: Any, path: KeyPath) -> bool:
    """Whether a key is there, and not null."""
    for key in path:
        data = data.get(key) if isinstance(data, Mapping) else None
    return data is not None


def dump_job(job: Block) -> str:
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
    known = list(KINDS)
    kind = document.data.get("kind", known[0])
    if kind not in known:
        close = near(kind, known) if isinstance(kind, str) else None
        hint = f"did you mean {close!r}? " if close else ""
        raise document.where(("kind",)).error(
            f"kind {shorten(kind)} does not work; {hint}kinds that work: {', '.join(known)}"
        )


def first_error(problems: list[Problem], document: Document) -> UsageError:
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
