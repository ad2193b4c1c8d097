"""A run directory together with its place in a storage: which of them is newer, fetching, and the copies while it runs.

    open the directory (its lock) ─▶ take the place (its holder) ─▶ compare ─▶ fetch, or go on, or begin ─▶ the run,
    while a `Mirror` copies ─▶ a last copy ─▶ give the place up

What is fetched is held against its manifests before it counts, names are checked, nothing is unpickled or run.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from distml.errors import DistmlError, RunError, UsageError
from distml.runs.checkpoints import MANIFEST, PARTIAL, CheckpointDamaged, CheckpointStore, folder_name, verify
from distml.runs.directory import RunDirectory
from distml.runs.files import write_atomically
from distml.runs.holder import HOLDER, Holder
from distml.runs.mirror import MIRROR, Mark, Mirror
from distml.runs.storage import PROBE, FolderPlace, Place, checked_name, open_place, refused
from distml.runs.units import duration

FINISH_S = 600.0  # for the last copy of a run that has ended
FAIL_S = 60.0  # of one that has failed, which is to say so
PARTIAL_NAME = re.compile(r"(^|/)step-\d{8,}/")
Note = Callable[[str], object]


def place_of(storage: str | None, run: str, directory: Path) -> Place | None:
    """Where a run directory is copied to; None: nowhere, or it lies in the storage itself.

    Raises:
        UsageError: no file system can be made of the storage.
    """
    if storage is None:
        return None
    place = open_place(storage, run)
    if isinstance(place, FolderPlace) and place.folder.resolve() == directory.expanduser().resolve():
        return None
    return place


@contextlib.contextmanager
def opened(path: Path, place: Place | None, fresh: bool, note: Note, lost: Callable[[], object], stop_s: float | None,
           ) -> Iterator[tuple[RunDirectory, Mirror | None]]:  # fmt: skip
    """The run directory, locked; with a place also held there, as new as what is stored, and copied until the end.

    Args:
        fresh: move what is here, and what is stored, aside.
        lost: called from a thread when another driver has taken the place.
        stop_s: how long an interrupted run has for its last copy; None: as long as another one.

    Raises:
        UsageError: the directory or the place is in use, or they hold different runs.
        RunError: the run has ended, and its last copy failed; phase storage.
    """
    if place is None:
        with RunDirectory.open(path, fresh=fresh) as directory:
            yield directory, None
        return
    directory = RunDirectory.open(path)
    holder = Holder(place)
    try:
        with refused(place.url):
            holder.acquire(note)
            if fresh:  # not before: who does not get the place moves nothing
                directory.close()
                directory = RunDirectory.open(path, fresh=True)
            directory, mark, damaged = _meet(directory, place, fresh, note)
            mirror = Mirror(directory.path, place, holder, mark, place.sizes(), note, lost, damaged)
        try:
            yield directory, mirror
        except BaseException as error:
            _close_after(mirror, error, stop_s)
            raise
        _close(mirror, directory, stop_s)
    finally:
        holder.release()
        directory.close()


def _close(mirror: Mirror, directory: RunDirectory, stop_s: float | None) -> None:
    result = directory.result.read()
    interrupted = result is not None and result.status == "interrupted"
    problem = mirror.close(stop_s if interrupted and stop_s is not None else FINISH_S)
    again = "" if mirror.is_lost else ", and the same command again copies it"
    if problem is not None:
        raise RunError(
            f"{mirror.place.url} lacks what came last: {problem}; all of it is in {directory.path}{again}",
            phase="storage", step=result.step if result is not None else None,
        )  # fmt: skip


def _close_after(mirror: Mirror, error: BaseException, stop_s: float | None) -> None:
    """After an exception, which is what is said; that the copy failed too is a note."""
    if isinstance(error, UsageError) and not mirror.is_started:  # nothing was trained, and nothing written there
        return
    limit = FAIL_S if stop_s is None else min(FAIL_S, stop_s)
    problem = mirror.close(limit if isinstance(error, DistmlError) else min(limit, 10.0))
    if problem is not None:
        mirror.note(f"storage {mirror.place.url} lacks what came last: {problem}; all of it is in {mirror.root}")


# ------------------------------------------------------------------------------------------------------------ comparing
def _meet(directory: RunDirectory, place: Place, fresh: bool, note: Note) -> tuple[RunDirectory, Mark, list[str]]:
    """Make directory and place hold the same run, and put a new mark on both; with checkpoints damaged there."""
    path, damaged = directory.path, list[str]()
    there = Mark.parse(place.read(MIRROR))
    if there is None:
        _refuse_foreign(place)
    elif fresh:
        note(f"{place.url} moved to {_move_aside(place).url}")
        there = None
    here = Mark.parse(_read(path / MIRROR))
    if there is not None:
        if here is not None and not here.writer:
            _empty(path)
            here = None
        elif here is None and not _holds_run(path):
            pass
        elif here is None or here.run != there.run:
            raise UsageError(
                f"{path} and {place.url} hold different runs of this name; use --out with an empty folder to go on "
                "with the stored one, --fresh to move both aside, or another name"
            )
        elif here.writer != there.writer and here.sequence <= there.sequence:
            directory.close()
            directory = RunDirectory.open(path, fresh=True)
            note(f"{path} is older than {place.url} and was moved to {directory.moved_to}")
            here = None
        if here is None:
            damaged = fetch(place, there, path, note)
    known = [mark for mark in (here, there) if mark is not None]
    mark = Mark(known[0].run if known else secrets.token_hex(8), max((one.sequence for one in known), default=0) + 1,
                secrets.token_hex(8))  # fmt: skip
    write_atomically(path / MIRROR, mark.data)  # here first: a driver killed between the two goes on from here
    place.write(MIRROR, mark.data)
    return directory, mark, damaged


def _read(path: Path) -> bytes | None:
    with contextlib.suppress(FileNotFoundError):
        return path.read_bytes()
    return None


def _holds_run(path: Path) -> bool:
    return (path / "spec.yaml").exists() or (path / "result.json").exists()


def _empty(path: Path) -> None:
    """Remove what a fetch that was broken off has left."""
    for entry in path.iterdir():
        if entry.name not in ("lock", MIRROR):
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


def _refuse_foreign(place: Place) -> None:
    foreign = sorted(name for name in place.sizes() if name != HOLDER and not name.startswith(PROBE))
    if foreign:
        raise UsageError(f"{place.url} is not empty and holds no run of distml ({foreign[0]}); nothing was touched; "
                         "give the run another name, or storage another prefix")  # fmt: skip


def _move_aside(place: Place) -> Place:
    """To NAME.1, or the next free number; the mark last, so that what is left behind by a kill is still a run."""
    name = place.url.rpartition("/")[2]
    number = 1
    while (other := place.beside(f"{name}.{number}")).sizes():
        number += 1
    for file in sorted(place.sizes(), key=lambda one: one == MIRROR):
        if file != HOLDER and not file.startswith(PROBE):
            place.give(file, other)
    return other


# ------------------------------------------------------------------------------------------------------------- fetching
def fetch(place: Place, mark: Mark, path: Path, note: Note) -> list[str]:
    """Bring a stored run into a folder that has none: small files, and the checkpoints that a run goes on from.

    Of a job over jobs all that are stored; of another one the newest that verifies, and the best.

    Returns:
        Checkpoints that were looked at and are damaged there, by their folders' names.

    Raises:
        OSError: of the storage, or of the folder.
    """
    began = time.monotonic()
    write_atomically(path / MIRROR, replace(mark, sequence=0, writer="").data)
    sizes = place.sizes()
    folders = sorted(name.rpartition("/")[0] for name in sizes if name.endswith(f"/{MANIFEST}"))
    inside = tuple(f"{name}/" for name in folders)
    for name, size in sizes.items():
        if not name.startswith(inside) and not PARTIAL_NAME.search(name) and name not in (MIRROR, HOLDER, "lock"):
            _bring(place, name, size, path / name)
    taken: list[str] = []
    damaged: list[str] = []
    for parent in sorted({name.rpartition("/")[0] for name in folders}):
        own = [name for name in folders if name.rpartition("/")[0] == parent]
        fetch_one = functools.partial(_fetch_one, place, sizes, path, note, damaged)
        taken += _fetch_checkpoints(path, own, "/" in parent, fetch_one)
    write_atomically(path / MIRROR, mark.data)
    what = ", ".join(taken) if len(taken) <= 3 else f"{len(taken)} checkpoints"
    note(f"fetched the run from {place.url} into {path} ({what or 'no checkpoint yet'}) in "
         f"{duration(time.monotonic() - began)}")  # fmt: skip
    return damaged


def _fetch_checkpoints(path: Path, own: list[str], every: bool, fetch_one: Callable[[str], bool]) -> list[str]:
    """Checkpoints of one folder, the newest first; the names of those that are good."""
    taken = [name for name in reversed(own) if every and fetch_one(name)]
    if not every:
        newest = next((name for name in reversed(own) if fetch_one(name)), None)
        taken = [newest] if newest is not None else []
        best = CheckpointStore(path / own[0].rpartition("/")[0], keep=1).stored_best_step()
        named = f"{own[0].rpartition('/')[0]}/{folder_name(best)}" if best is not None else None
        if named in own and named not in taken and fetch_one(named):
            taken.append(named)
    return [name.rpartition("/")[2] for name in taken]


def _fetch_one(place: Place, sizes: dict[str, int], path: Path, note: Note, damaged: list[str], name: str) -> bool:
    """One checkpoint, as a partial folder until its files agree with its manifest; else added to `damaged`."""
    final = path / name
    partial = final.with_name(final.name + PARTIAL)
    try:
        for file, size in sizes.items():
            if file.startswith(f"{name}/"):
                _bring(place, file, size, partial / file.removeprefix(f"{name}/"))
        verify(partial)
    except CheckpointDamaged as error:
        note(f"{place.url}/{name} is damaged ({error.reason}); it is left out")
        damaged.append(name)
        shutil.rmtree(partial, ignore_errors=True)
        return False
    os.replace(partial, final)
    return True


def _bring(place: Place, name: str, size: int, target: Path) -> None:
    checked_name(name)
    place.download(name, target, lambda _: None)
    if target.stat().st_size != size:
        raise OSError(f"{name} came with {target.stat().st_size} bytes, not {size}; is it being written?")
