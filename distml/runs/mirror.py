"""A run directory, copied to its storage while the run goes on, by threads that no step waits for.

    run directory ──snapshot──▶ DIR/.mirror (hard links) ──▶ files of new checkpoints ──▶ metrics ──▶ manifests
                                                             ──▶ other small files ──▶ mirror.json ──▶ removals

The copying thread looks every `PASS_S`. It consumes files alone, so that all kinds of jobs have it. A snapshot holds
what belongs together: checkpoints by links, which stay when the run prunes them, and small files by their bytes. In the
storage a checkpoint is there when its manifest.json is, which comes last; a journal that names checkpoints comes after
them, metrics come before them, as a resume cuts those back; what the run has pruned goes last of all. Whatever
instruction the driver is killed at, the storage holds a state to go on from.

The beating thread renews the hold on the place (`holder.py`). Both are daemons with nothing to wait for but the
storage, whose calls have limits; `close` waits for them, for as long as it is told.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from distml.runs.checkpoints import MANIFEST, PARTIAL, RANKS, REPLACED, file_names
from distml.runs.files import TEMPORARY_FILES, write_atomically
from distml.runs.holder import BEAT_S, HOLDER, Held, Holder
from distml.runs.probe import PREFIX
from distml.runs.storage import Place, explained

PASS_S, SMALL_EVERY_S, LONGEST_PAUSE_S = 2.0, 5.0, 60.0
CLOSING_PAUSE_S = 2.0
QUIET_S = 1.0  # a last copy that takes longer is announced
SMALL_BYTES_PER_S = 200e3  # a file that grows is copied whole: a large one more rarely
IN_MEMORY_BYTES = 8 << 20
SETTLE_TRIES, SETTLE_PAUSE_S = 20, 0.05
LINKS = ".mirror"
MIRROR = "mirror.json"
METRICS = "metrics.jsonl"
MAKES_RUN = ("spec.yaml", "result.json")
NAMING = ("population.json", "trials.jsonl")  # journals that name checkpoints: never copied without these
OTHERS_TOP = (LINKS, "tune")  # what Tune writes is of no use to a later run
OTHERS = ("lock", MIRROR, HOLDER, "__pycache__")
NO_LINKS = (errno.EPERM, errno.EXDEV, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EMLINK, errno.ENOSYS)


@dataclass(frozen=True)
class Mark:
    """mirror.json, in the run directory and in the storage: which of them is newer, without clocks.

    Attributes:
        run: the same wherever the run goes.
        sequence: grows with every copy.
        writer: the driver that wrote it; empty in a directory that is just being fetched.
    """

    run: str
    sequence: int
    writer: str

    @classmethod
    def parse(cls, data: bytes | None) -> Mark | None:
        """None: there is none, or it is not one."""
        try:
            values = json.loads(data or b"null")
            return cls(str(values["run"]), int(values["sequence"]), str(values["writer"]))
        except (ValueError, TypeError, KeyError):
            return None

    @property
    def data(self) -> bytes:
        """As it is written."""
        return json.dumps({"format": 1, **asdict(self)}).encode()


@dataclass
class Scan:
    """What a run directory holds, by relative names: checkpoints' folders, and all other files with their stamps."""

    checkpoints: dict[str, Path] = field(default_factory=dict)
    small: dict[str, tuple[int, int]] = field(default_factory=dict)


@dataclass
class Snapshot:
    """What is copied in one go.

    Attributes:
        scan: all that was there.
        manifests: of the checkpoints that are new.
        texts: small files that are due; None: too large for memory, copied as they are then.
        is_settled: whether checkpoints and texts are of one moment; a run that writes checkpoints faster than they
            can be linked may not give one before its end.
    """

    scan: Scan
    manifests: dict[str, bytes] = field(default_factory=dict)
    texts: dict[str, bytes | None] = field(default_factory=dict)
    is_settled: bool = False


class Stopped(OSError):
    """The copy is to end: no time is left, or another driver has the place."""


# ------------------------------------------------------------------------------------------------------------- scanning
def scan(root: Path) -> Scan:
    """A run directory, without what is being written."""
    found = Scan()
    for folder, folders, files in os.walk(root):
        here = Path(folder)
        relative = here.relative_to(root).as_posix()
        name = relative.removesuffix(REPLACED)
        if MANIFEST in files:
            if name == relative or not (root / name).exists():  # a writer was killed between two renames
                found.checkpoints[name] = here
            folders.clear()
            continue
        skipped = OTHERS_TOP if here == root else ()
        folders[:] = [one for one in folders if one not in (*OTHERS, *skipped) and not one.endswith((PARTIAL, RANKS))]
        for file in files:
            path = here / file
            if file in OTHERS or path.match(TEMPORARY_FILES) or file.startswith(PREFIX) or path.is_symlink():
                continue
            with contextlib.suppress(FileNotFoundError):
                status = path.stat()
                found.small[path.relative_to(root).as_posix()] = status.st_mtime_ns, status.st_size
    return found


def link_folder(source: Path, target: Path) -> None:
    """The same files under another name; copies, where the file system has no links.

    Raises:
        FileNotFoundError: it was pruned meanwhile.
    """
    target.mkdir(parents=True)
    for path in sorted(source.rglob("*")):  # folders before what is in them
        other = target / path.relative_to(source)
        if path.is_dir():
            other.mkdir()
        else:
            _link(path, other)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        shutil.copyfile(source, target)


# -------------------------------------------------------------------------------------------------------------- copying
class Mirror:
    """Copies one run directory to one place.

    Args:
        root: the run directory.
        place: where to.
        holder: of the place, acquired.
        mark: of the run.
        there: the place's files, as it was begun.
        damaged: checkpoints there that are not what their manifests say; if they are here, they are copied anew.
        note: says a line.
        lost: called once, from a thread, when another driver has taken the place.
    """

    def __init__(
        self, root: Path, place: Place, holder: Holder, mark: Mark, there: dict[str, int],
        note: Callable[[str], object], lost: Callable[[], object], damaged: Iterable[str] = (),
    ) -> None:  # fmt: skip
        self.root, self.place, self.holder, self.mark, self.note = root, place, holder, mark, note
        self._lost = lost
        self.committed: dict[str, bytes | None] = {}  # checkpoints there; None: not read yet; empty: damaged
        self.known: set[str] = set()  # small files there
        self._sort(there, damaged)
        self._stamps: dict[str, tuple[tuple[int, int], float]] = {}
        self._sent: dict[str, tuple[bytes, set[str]]] = {}  # files of a checkpoint whose copy was broken off
        self._seen: set[str] = set()
        self._incomplete: dict[str, bytes] = {}  # checkpoints here that lack files which their manifests name
        self._fresh_parents: set[str] = set()
        self._wake = threading.Event()
        self._deadline: float | None = None
        self._taken_by: Held | None = None
        self._failure: str | None = None
        self._is_closing_said = False
        self._threads: list[threading.Thread] = []
        self._over = threading.Event()

    def _sort(self, there: dict[str, int], damaged: Iterable[str]) -> None:
        """Files of a checkpoint that lacks its manifest, as a driver was killed before it wrote it, count as small."""
        folders = {name.rpartition("/")[0] for name in there if name.endswith(f"/{MANIFEST}")}
        self.committed = {**dict.fromkeys(folders), **dict.fromkeys(folders.intersection(damaged), b"")}
        inside = tuple(f"{name}/" for name in folders)
        self.known = {name for name in there if not name.startswith(inside) and name not in (MIRROR, HOLDER)}

    # -- one copy
    def copy(self, everything: bool = False) -> None:
        """Bring the place up to the run directory.

        Args:
            everything: also small files that would wait for a while.

        Raises:
            OSError: of the storage; what was done stays done.
        """
        links = self.root / LINKS
        shutil.rmtree(links, ignore_errors=True)
        try:
            snapshot = self._snapshot(links, everything)
            for name in sorted(snapshot.manifests):
                self._send(name, links / name, snapshot.manifests[name])
            first = [name for name in snapshot.texts if self._goes_first(name)]
            self._write(snapshot, first)
            for name in sorted(snapshot.manifests):
                self._commit(name, snapshot.manifests[name])
            later = [name for name in snapshot.texts if name not in first]
            self._write(snapshot, [name for name in later if snapshot.is_settled or name not in NAMING])
            if snapshot.manifests or snapshot.texts:
                self._mark()
            if snapshot.is_settled:
                self._remove(snapshot.scan)
        finally:
            shutil.rmtree(links, ignore_errors=True)

    def _goes_first(self, name: str) -> bool:
        """Metrics, and what makes a run of a folder with checkpoints, where it is not there yet."""
        file = name.rpartition("/")[2]
        return file == METRICS or (file in MAKES_RUN and name not in self.known)

    def _snapshot(self, links: Path, everything: bool) -> Snapshot:
        """Of one moment, if the run gives one: the same checkpoints before and after the small files were read."""
        for left in reversed(range(SETTLE_TRIES)):
            snapshot = Snapshot(scan(self.root))
            try:
                for name, folder in snapshot.scan.checkpoints.items():
                    self._take(snapshot, name, folder, links / name, is_last=left < SETTLE_TRIES // 2)
            except FileNotFoundError:  # it was just removed, or is being removed
                shutil.rmtree(links, ignore_errors=True)
                snapshot.manifests.clear()  # what they name is not linked any more
                time.sleep(SETTLE_PAUSE_S)
                continue
            snapshot.texts = dict(self._due(snapshot.scan, everything or bool(snapshot.manifests)))
            if scan(self.root).checkpoints == snapshot.scan.checkpoints:
                snapshot.is_settled = True
                break
            time.sleep(SETTLE_PAUSE_S)
        self._seen |= snapshot.scan.checkpoints.keys()
        return snapshot

    def _take(self, snapshot: Snapshot, name: str, folder: Path, target: Path, is_last: bool) -> None:
        """Link a checkpoint that is new; pass over one that lacks files, if it has done so for a while (`is_last`).

        Raises:
            FileNotFoundError: it was pruned meanwhile.
        """
        manifest = (folder / MANIFEST).read_bytes()
        if name in self.committed and self.committed[name] is None:
            self.committed[name] = self.place.read(f"{name}/{MANIFEST}")
        if self.committed.get(name) == manifest:
            return
        try:
            files = set(json.loads(manifest)["files"])
        except (ValueError, TypeError, KeyError):  # damaged, and no checkpoint
            return
        if not target.exists():
            link_folder(folder, target)
        missing = files - file_names(target)
        if not missing:
            self._incomplete.pop(name, None)
            snapshot.manifests[name] = manifest
        elif not is_last and self._incomplete.get(name) != manifest:  # listed while it was being removed
            raise FileNotFoundError(folder)
        elif self._incomplete.get(name) != manifest:
            self._incomplete[name] = manifest
            self.note(f"checkpoint {name} is damaged ({min(missing)}: missing) and is not copied to {self.place.url}")

    def _due(self, found: Scan, everything: bool) -> Iterator[tuple[str, bytes | None]]:
        now = time.monotonic()
        for name, stamp in found.small.items():
            before, at = self._stamps.get(name, (None, -1e9))
            pause = max(SMALL_EVERY_S, stamp[1] / SMALL_BYTES_PER_S)
            if stamp == before or not (everything or now - at >= pause):
                continue
            with contextlib.suppress(FileNotFoundError):
                yield name, (self.root / name).read_bytes() if stamp[1] <= IN_MEMORY_BYTES else None

    def _send(self, name: str, folder: Path, manifest: bytes) -> None:
        """A checkpoint's files without its manifest, which is not there while they are changed."""
        before, sent = self._sent.get(name, (b"", set()))
        if before != manifest:  # what is there is of another state, or of an earlier driver
            self._discard(name)
            self._sent[name] = manifest, (sent := set())
        for path in sorted(folder.rglob("*")):
            file = path.relative_to(folder).as_posix()
            if path.is_file() and file != MANIFEST and file not in sent:
                self._hold()
                self.place.upload(f"{name}/{file}", path, self._watch)
                sent.add(file)

    def _discard(self, name: str) -> None:
        """Remove a checkpoint there, if anything of it is: the manifest first, so that it is whole or none."""
        inside = {file for file in self.known if file.startswith(f"{name}/")}
        if name in self.committed or name in self._sent or inside:
            self._hold()
            self.place.remove(f"{name}/{MANIFEST}")
            self.committed[name] = b""
            self.place.remove(name)
            del self.committed[name]
            self.known -= inside

    def _commit(self, name: str, manifest: bytes) -> None:
        self._hold()
        self.place.write(f"{name}/{MANIFEST}", manifest)
        self.committed[name] = manifest
        self._sent.pop(name, None)
        self._fresh_parents.add(name.rpartition("/")[0])

    def _write(self, snapshot: Snapshot, names: list[str]) -> None:
        for name in names:
            self._hold()
            text = snapshot.texts[name]
            with contextlib.suppress(FileNotFoundError):
                if text is None:
                    self.place.upload(name, self.root / name, self._watch)
                else:
                    self.place.write(name, text)
                self.known.add(name)
                self._stamps[name] = snapshot.scan.small[name], time.monotonic()

    def _mark(self) -> None:
        """In the storage first: a directory with the mark of its own writer holds all that the storage has."""
        self._hold()
        self.mark = replace(self.mark, sequence=self.mark.sequence + 1)
        self.place.write(MIRROR, self.mark.data)
        write_atomically(self.root / MIRROR, self.mark.data, durable=False)

    def _remove(self, found: Scan) -> None:
        """What the run no longer has: all that it has is there by now."""
        for name in sorted(self.known - found.small.keys()):
            self._hold()
            self.place.remove(name)
            self.known.discard(name)
        parents = {name.rpartition("/")[0] for name in found.checkpoints}
        for name in sorted(self.committed.keys() - found.checkpoints.keys()):
            parent = name.rpartition("/")[0]
            pruned = parent in parents and (name in self._seen or parent in self._fresh_parents)
            if pruned or not (self.root / parent).exists():
                self._discard(name)

    def _hold(self) -> None:
        """Before anything is changed there: not if another driver may have taken the place."""
        self._watch(0)
        self._taken_by = self._taken_by or self.holder.look()
        self._watch(0)

    def _watch(self, _: int) -> None:
        if self._taken_by is not None:
            raise Stopped(f"{self._taken_by} has taken it over")
        if self._deadline is not None and time.monotonic() > self._deadline:
            raise Stopped("no time is left")

    # -- threads
    @property
    def is_started(self) -> bool:
        """Whether the place may differ from what it was."""
        return bool(self._threads)

    @property
    def is_lost(self) -> bool:
        """Whether another driver has taken the place."""
        return self._taken_by is not None

    def start(self) -> None:
        """Begin to copy and to beat."""
        for work, name in ((self._copying, "mirror"), (self._beating, "mirror-beat")):
            self._threads.append(threading.Thread(target=work, name=name, daemon=True))
            self._threads[-1].start()

    def _copying(self) -> None:
        pause = 0.0
        while True:
            self._wake.wait(pause)
            closing = self._deadline is not None
            try:
                self.copy(everything=closing)
            except Exception as error:  # a defect here must not end a run that trains
                self._failed(explained(error) if isinstance(error, OSError) else f"{type(error).__name__}: {error}")
                if self._taken_by is not None or (closing and time.monotonic() > (self._deadline or 0.0)):
                    return
                pause = min(max(2 * pause, PASS_S), LONGEST_PAUSE_S)
                if self._deadline is not None:
                    time.sleep(CLOSING_PAUSE_S)
                continue
            if self._failure is not None:
                self.note(f"storage {self.place.url} takes copies again")
            self._failure, pause = None, PASS_S
            if closing:
                return

    def _failed(self, cause: str) -> None:
        if self._failure is None and self._deadline is None and self._taken_by is None:
            self.note(f"storage {self.place.url}: {cause}; trying again, the run goes on in {self.root}")
        elif self._deadline is not None and not self._is_closing_said and self._taken_by is None:
            self._is_closing_said = True
            self.note(f"storage {self.place.url}: {cause}; trying again")
        self._failure = self._failure if self._failure is not None and self._deadline is not None else cause

    def _beating(self) -> None:
        while not self._over.wait(BEAT_S):
            with contextlib.suppress(Exception):  # the copying thread says what the storage fails with
                self._taken_by = self.holder.beat()
            if self._taken_by is not None:
                self.note(f"storage {self.place.url} was taken over by {self._taken_by}; this run ends")
                if self._deadline is None:  # else it has ended, and `close` says what became of it
                    self._lost()
                return

    def close(self, limit_s: float) -> str | None:
        """A last copy, of everything, and the end of the threads.

        Returns:
            What is not in the storage and why, or None.

        Raises:
            KeyboardInterrupt: a signal came meanwhile; nothing more is written.
        """
        self._deadline = time.monotonic() + limit_s
        self._wake.set()
        if not self._threads:
            self._threads.append(threading.Thread(target=self._copying, name="mirror", daemon=True))
            self._threads[0].start()
        try:
            self._threads[0].join(min(QUIET_S, limit_s))
            if self._threads[0].is_alive():
                self.note(f"copying what came last to {self.place.url}, up to {limit_s:.0f} s")
            self._threads[0].join(limit_s + CLOSING_PAUSE_S)
        except KeyboardInterrupt:
            self._deadline = 0.0
            self.note(f"storage {self.place.url} lacks what came last: stopped; all of it is in {self.root}")
            raise
        finally:
            self._over.set()
        if self._threads[0].is_alive():
            return self._failure or f"not all was copied within {limit_s:.0f} s"
        return self._failure
