"""Whether what a job needs travels with it: its spec, the modules of a user's own classes, weights and text.

On the cluster the same would be one line too, minutes later.
"""

from __future__ import annotations

import contextlib
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from distml.errors import UsageError
from distml.launch.submit.files import Selection
from distml.launch.submit.written import Written
from distml.spec.base import Block
from distml.spec.jobs import jobs_directory
from distml.spec.language import STDLIB, TokenizerFileSpec
from distml.spec.language_rules import TextTaskSpecs
from distml.spec.loader import LoadedSpec, with_values
from distml.spec.nas import NasSpec
from distml.spec.own_task import find_module, own_names
from distml.spec.rllib import RLlibSpec
from distml.spec.schema import ClassificationSpec, JobSpec, OwnTaskSpec
from distml.spec.space import parse_space
from distml.tasks.sources import PROVIDED, SourceTree, imported_modules


def sent_as(spec: Path, root: Path, selection: Selection) -> str:
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


def check_base(written: Written, selection: Selection | None) -> None:
    """Refuse a base whose file is not sent, or would not be found there; shipped jobs travel with distml.

    Raises:
        UsageError: it lies elsewhere, or stays behind.
    """
    if written.base is None:
        return
    name, file = written.base
    if file.parent.resolve() == jobs_directory().resolve():
        return
    _check_file(file, "base is", selection)
    assert selection is not None
    if os.path.isabs(name) or not written.begins_at(file, (written.home, selection.root)):
        raise UsageError(f"base {name} is in another place on the cluster; write its path from the spec")


def check_modules(loaded: LoadedSpec[Any], selection: Selection | None) -> Iterator[str]:
    """Refuse a user's own modules that stay behind; notes about those that the cluster must have.

    Raises:
        UsageError: with the module and why it is not sent.
    """
    home = loaded.base.directory if loaded.base is not None else loaded.directory
    if home.resolve() == jobs_directory().resolve():  # a shipped job's, which travel with distml
        return
    tasks = [job.task if isinstance(job, JobSpec) else job for job in _jobs(loaded)]
    yield from dict.fromkeys(line for task in tasks for line in _check_modules_of(task, home, selection))


def _check_modules_of(task: Block, home: Path, selection: Selection | None) -> Iterator[str]:
    names = [task.name] if isinstance(task, OwnTaskSpec) else [name for _, name in own_names(task)]
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


def check_data(loaded: LoadedSpec[Any], written: Written, selection: Selection | None) -> Iterator[str]:
    """Refuse weights, text and other data that are written as relative paths and stay behind; notes about whole paths.

    Raises:
        UsageError: with the key and why its file is not there on the cluster.
    """
    home = loaded.base.directory if loaded.base is not None else loaded.directory
    for key, text in dict.fromkeys(found for job in _jobs(loaded) for found in _paths(job)):
        path = Path(text).expanduser()
        if written.is_whole(path):
            inside = selection is not None and relative(path, selection.root) is not None
            hint = "; it would be sent if it were written relative to the spec" if inside else ""
            yield f"note: {key} {text} is not sent; it must exist on the cluster{hint}"
        elif selection is None:
            raise UsageError(f"{key} {text} is not sent; add --working-dir DIR, or write the whole path that it has "
                             "on the cluster")  # fmt: skip
        else:
            _check_sent(key, path, written, home, selection)


def _check_sent(key: str, path: Path, written: Written, home: Path, selection: Selection) -> None:
    """A path that was written relative to something.

    Args:
        home: where the spec lies, or the base's file.
    """
    name, text = relative(path, selection.root), str(path)
    if name is None:
        raise UsageError(f"{key} {text} is not sent: it lies outside the working directory {selection.root}; write "
                         "the whole path that it has on the cluster")  # fmt: skip
    completed = path.is_absolute()
    there = written.begins_at(path, (home, selection.root)) if completed else _is_same(selection.root / path, path)
    if not there:  # it begins in the current directory, which is another
        raise UsageError(f"{key} {text}: the job begins in the working directory, {selection.root}; write {name}")
    why = selection.why_behind(name)
    if why is not None:
        raise UsageError(
            f"{key} {text} is not sent: {why}; of a run, 'distml export RUN --out DIR' writes weights that can be "
            "sent; large data belongs where the cluster sees it"
        )
    if not path.exists():
        raise UsageError(f"{key} {text} does not exist; data that is on the cluster is named by its whole path")


def check_recording(loaded: LoadedSpec[Any], written: Written) -> None:
    """Refuse episodes that RLlib would record into the job's directory.

    Raises:
        UsageError: with the key.
    """
    folder = loaded.job.config.get("output") if isinstance(loaded.job, RLlibSpec) else None
    if isinstance(folder, str) and "://" not in folder and not written.is_whole(Path(folder)):
        raise UsageError(f"config.output {folder} is in a folder that Ray removes after the job; write the whole path "
                         "of a folder on the cluster")  # fmt: skip


def _jobs(loaded: LoadedSpec[Any]) -> Iterator[Block]:
    """The job; of one over jobs its base, and that with each choice of its space that may name a class or a file."""
    if loaded.base is None:
        yield loaded.job
        return
    yield loaded.base.job
    space = () if isinstance(loaded.job, NasSpec) and "name" in loaded.job.space else parse_space(loaded.job.space)[0]
    for dimension in space:
        names_things = dimension.path.partition(".")[0] in ("task", "init")
        for value in dimension.values if names_things else ():
            with contextlib.suppress(UsageError):  # it only goes with another choice
                yield with_values(loaded.base, {dimension.path: value}).job


def _paths(job: Block) -> Iterator[tuple[str, str]]:
    """Keys that name files or folders that a job reads, with what they name."""
    if isinstance(job, RLlibSpec):
        recorded = job.config.get("input_")
        if isinstance(recorded, str) and "://" not in recorded:
            yield "config.input_", recorded
    if not isinstance(job, JobSpec):
        return
    if job.init is not None and job.init.source is not None:
        yield "init.from", job.init.source
    if isinstance(job.task, ClassificationSpec) and job.task.path is not None:
        yield "task.path", job.task.path
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


def _is_same(one: Path, other: Path) -> bool:
    return one.resolve() == other.resolve()


def _is_installed(file: Path) -> bool:
    return any(file.is_relative_to(sysconfig.get_path(name)) for name in ("purelib", "platlib", "stdlib"))
