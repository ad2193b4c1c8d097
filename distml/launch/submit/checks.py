"""Whether what a job needs travels with it: its spec, the modules of a user's own classes, weights and text.

On the cluster the same would be one line too, minutes later.
"""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from distml.errors import UsageError
from distml.launch.submit.files import Selection
from distml.spec.base import Block
from distml.spec.jobs import jobs_directory
from distml.spec.language import STDLIB, TokenizerFileSpec
from distml.spec.language_rules import TextTaskSpecs
from distml.spec.loader import LoadedSpec
from distml.spec.over_jobs import OverJobs
from distml.spec.own_task import find_module, own_names
from distml.spec.schema import JobSpec, OwnTaskSpec
from distml.tasks.sources import PROVIDED, SourceTree, imported_modules


def place_of(spec: Path, root: Path, selection: Selection) -> str:
    """The spec's path in what is sent.

    Raises:
        UsageError: it lies elsewhere, or stays behind.
    """
    name = relative(spec, root)
    if name is None:
        raise UsageError(f"{spec} lies outside the working directory {root}; add --working-dir {spec.parent}")
    if name not in selection.files:
        raise UsageError(f"{spec} is not sent: {selection.why_behind(name) or 'it has gone'}; move it or send it")
    return name if not name.startswith("-") else f"./{name}"


def check_modules(loaded: LoadedSpec[Any], selection: Selection | None) -> Iterator[str]:
    """Refuse a user's own modules that stay behind; notes about those that the cluster must have.

    Raises:
        UsageError: with the module and why it is not sent.
    """
    task = _acting(loaded)
    names = [task.name] if isinstance(task, OwnTaskSpec) else [name for _, name in own_names(task)]
    home = loaded.base.directory if loaded.base is not None else loaded.directory
    if home.resolve() == jobs_directory().resolve():  # a shipped job's, which travel with distml
        return
    files = SourceTree.collect(task, home).files
    for name in files:
        _check_file(home / name, f"{names[0]} needs", selection)
    beside = {name.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for name in files}
    wanted = {name.partition(":")[0] for name in names}
    for name, text in files.items():
        wanted |= set(imported_modules(text, name.removesuffix(".py").replace("/", ".")))
    for top in sorted({module.partition(".")[0] for module in wanted} - PROVIDED):
        found = find_module(top, home)
        if top in beside or found is None:  # not there at all: a name that is imported from a module, or a guarded one
            continue
        if _is_installed(found):
            if top in {name.partition(":")[0].partition(".")[0] for name in names}:
                yield f"note: {top} is installed here and is not sent; the cluster must have it too"
        elif not any(file.partition("/")[0] == top for file in files):
            _check_file(found, f"{names[0]} imports {top}, which is", selection)


def _check_file(file: Path, what: str, selection: Selection | None) -> None:
    if selection is None:
        raise UsageError(f"{what} {file}, and nothing of a directory is sent; add --working-dir {file.parent}")
    name = relative(file, selection.root)
    if name is None:
        raise UsageError(f"{what} {file}, which lies outside the working directory {selection.root} and is not sent")
    if name not in selection.files:
        why = selection.why_behind(name) or "it has gone"
        raise UsageError(f"{what} {file}, which is not sent: {why}; take it out of .gitignore or .rayignore")


def check_data(loaded: LoadedSpec[Any], selection: Selection | None) -> Iterator[str]:
    """Refuse weights and text inside the working directory that stay behind; notes about those outside.

    Raises:
        UsageError: with the key and why its file is not sent.
    """
    for key, text in _paths(loaded):
        path = Path(text).expanduser()
        if not path.exists():
            continue
        name = relative(path, selection.root) if selection is not None else None
        if name is None or selection is None:
            yield f"note: {key} {text} is not sent; it must exist on the cluster"
            continue
        why = selection.why_behind(name)
        if why is not None:
            raise UsageError(
                f"{key} {text} is not sent: {why}; of a run, 'distml export RUN --out DIR' writes weights that can be "
                "sent; large data belongs where the cluster sees it"
            )


def _training_job(loaded: LoadedSpec[Any]) -> Block:
    """The job, of one over jobs its base."""
    return loaded.job.base if isinstance(loaded.job, OverJobs) else loaded.job


def _acting(loaded: LoadedSpec[Any]) -> Block:
    """The block that may name a user's own classes."""
    job = _training_job(loaded)
    return job.task if isinstance(job, JobSpec) else job


def _paths(loaded: LoadedSpec[Any]) -> Iterator[tuple[str, str]]:
    """Keys that name files or folders, with what they name."""
    job = _training_job(loaded)
    if not isinstance(job, JobSpec):
        return
    if job.init is not None and job.init.source is not None:
        yield "init.from", job.init.source
    if isinstance(job.task, TextTaskSpecs):
        if job.task.data.path != STDLIB:
            yield "task.data.path", job.task.data.path
        if isinstance(job.task.tokenizer, TokenizerFileSpec):
            yield "task.tokenizer.path", job.task.tokenizer.path


def relative(path: Path, root: Path) -> str | None:
    """A path below a resolved root, as it is named there; None: it lies elsewhere."""
    for named in (Path(os.path.abspath(path)), path.parent.resolve() / path.name, path.resolve()):
        if named.is_relative_to(root):
            return named.relative_to(root).as_posix()
    return None


def _is_installed(file: Path) -> bool:
    return any(file.is_relative_to(sysconfig.get_path(name)) for name in ("purelib", "platlib", "stdlib"))
