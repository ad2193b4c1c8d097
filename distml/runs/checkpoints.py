"""Checkpoints: folders that are either committed and verified, or not there.

    ROOT/step-00000100/{STEM.safetensors …, state.json, manifest.json}    ROOT/best.json

Writing: everything goes into `step-….partial`, each file is hashed as it is written and fsynced, manifest.json last;
then the folder is fsynced and renamed: the rename is the commit. Only after it are older ones pruned. To replace a
committed checkpoint of the same step, that one is set aside as `step-….replaced` between the two renames, and counts
as the checkpoint of its step as long as the new one does not have its name. Whatever instruction a writer is killed
at, each step is found in its old or its new form.

A state that is spread over ranks is written by them, each its part (`parts.py`), into `step-….TOKEN.ranks`. When all
are there, that folder becomes the partial one, with the hashes that the ranks took; what ranks had written when they
died is never taken over, and goes when the next driver begins.

Reading: sizes and SHA-256 of all files against the manifest, no file missing, none too many; parts must be complete.
No pickle anywhere.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import sys
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from distml.errors import RunError, UsageError
from distml.runs.background import BackgroundWriter
from distml.runs.files import TEMPORARY_FILES, fsync_folder, strict_json, write_atomically
from distml.runs.parts import MODEL, OPTIMIZER, CheckpointDamaged, Files, PartReader, is_part
from distml.runs.tensors import check_tensors, new_file, read_tensors, write_tensors

__all__ = [
    "Checkpoint",
    "CheckpointDamaged",
    "CheckpointFailed",
    "CheckpointStore",
    "folder_name",
    "load_folder",
    "read_tensors",
    "resolve_source",
]

FORMAT = 1
MANIFEST, STATE, BEST = "manifest.json", "state.json", "best.json"
PARTIAL, REPLACED, RANKS = ".partial", ".replaced", ".ranks"
_FOLDER = re.compile(r"step-(\d{8,})")
_STEM = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_CHUNK_BYTES = 1 << 20


@dataclass
class Parts:
    """What all ranks have written of a checkpoint: their folder, and the files' entries in the manifest."""

    folder: Path
    files: Files


@dataclass
class Checkpoint:
    """A run's state at one version of the weights.

    Attributes:
        step: the version.
        tensors: file stem (`model`, `optimizer`, `own`, …) to tensor name to array.
        state: JSON values.
        more: writes further files and folders into the checkpoint's folder, which the manifest then covers too.
        parts: model and optimiser, where ranks have written them; their folder becomes the checkpoint's.
        folder: where it was read from.
    """

    step: int
    tensors: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    state: dict[str, Any] = field(default_factory=dict)
    more: Callable[[Path], None] | None = None
    parts: Parts | None = None
    folder: Path | None = None

    def model(self) -> dict[str, np.ndarray]:
        """The model's tensors; from the folder, where the checkpoint was read without them."""
        if MODEL in self.tensors or self.folder is None:
            return self.tensors[MODEL]
        with PartReader(self.folder) as reader:
            return {name: reader.whole(MODEL, name) for name in reader.names(MODEL)}


class CheckpointFailed(RunError):
    """A checkpoint could not be written, or what it supersedes not removed; `__cause__` says why."""

    def __init__(self, step: int, problem: str, cause: OSError) -> None:
        message = f"checkpoint {folder_name(step)} {problem}: {cause.strerror or cause}"
        super().__init__(message, phase="checkpoint", step=step)


def folder_name(step: int) -> str:
    """The folder of a step's checkpoint."""
    return f"step-{step:08d}"


def ranks_folder_name(step: int, token: str) -> str:
    """The folder that ranks write their parts into.

    Args:
        token: the same on all ranks that were started together, so that none meets what an earlier one, which may not
            know yet that its run is over, has written.
    """
    return f"{folder_name(step)}.{token}{RANKS}"


# ----------------------------------------------------------------------------------------------------------- one folder
def write_folder(folder: Path, checkpoint: Checkpoint) -> None:
    """Write all files of a checkpoint and make them durable; `folder` must not exist.

    Raises:
        ValueError: a value that the formats do not hold.
        OSError: it cannot be written.
    """
    check(checkpoint)
    files: Files = {}
    if checkpoint.parts is None:
        folder.mkdir(parents=True)
    else:
        files |= checkpoint.parts.files
        _take_over(checkpoint.parts, folder)
    for stem, tensors in checkpoint.tensors.items():
        with new_file(folder / f"{stem}.safetensors", files) as file:
            write_tensors(file, tensors)
    with new_file(folder / STATE, files) as file:
        file.write(strict_json(checkpoint.state, "state").encode())
    if checkpoint.more is not None:
        checkpoint.more(folder)
        _enter_others(folder, files)
    manifest = {"format": FORMAT, "step": checkpoint.step, "files": files}
    with new_file(folder / MANIFEST, {}) as file:
        file.write(strict_json(manifest, "manifest").encode())
    fsync_folder(folder)


def _take_over(parts: Parts, folder: Path) -> None:
    """Give the ranks' folder the name `folder`; their files are durable already.

    Raises:
        OSError: it does not hold what they have said.
    """
    there = file_names(parts.folder)
    for name in sorted(there ^ parts.files.keys()):
        raise OSError(f"{parts.folder / name} is {'not of this checkpoint' if name in there else 'not there'}")
    for name, entry in parts.files.items():
        size = (parts.folder / name).stat().st_size
        if size != entry["bytes"]:
            raise OSError(f"{parts.folder / name} has {size} bytes, not the {entry['bytes']} that were written")
    parts.folder.rename(folder)


def check(checkpoint: Checkpoint) -> None:
    """Refuse what cannot be written as it is.

    Raises:
        ValueError: a step below 0, a stem that is not a file's name, an array of an unknown type, a state that is not
            strict JSON.
    """
    if checkpoint.step < 0:
        raise ValueError(f"step {checkpoint.step} is below 0")
    for stem, tensors in checkpoint.tensors.items():
        if not _STEM.fullmatch(stem):
            raise ValueError(f"{stem!r} cannot be the stem of a file's name")
        check_tensors(tensors)
    strict_json(checkpoint.state, "state")


def _enter_others(folder: Path, files: dict[str, dict[str, Any]]) -> None:
    """Make files and folders durable that somebody else has written, and enter the files into the manifest's."""
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_dir():
            fsync_folder(path)
        elif name not in files:
            with open(path, "rb") as file:
                os.fsync(file.fileno())
            size, sha256 = _hash_file(path)
            files[name] = {"sha256": sha256, "bytes": size}


def file_names(folder: Path) -> set[str]:
    """All files under a folder, as relative paths; a link counts as a file, wherever it leads."""
    found = (path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    return {path.relative_to(folder).as_posix() for path in found}


def verify(folder: Path) -> dict[str, Any]:
    """The manifest of a folder, once all its files agree with it.

    Raises:
        CheckpointDamaged: names the file.
    """
    manifest = _read_manifest(folder)
    files = manifest["files"]
    there = file_names(folder) - {MANIFEST}
    for name in sorted(files.keys() - there):
        raise CheckpointDamaged(folder, f"{name}: missing")
    for name in sorted(there - files.keys()):
        raise CheckpointDamaged(folder, f"{name}: not in the manifest")
    for name, entry in files.items():
        try:
            size, sha256 = _hash_file(folder / name)
        except OSError as error:
            raise CheckpointDamaged(folder, f"{name}: {error.strerror or error}") from error
        if size != entry["bytes"]:
            raise CheckpointDamaged(folder, f"{name}: {size} bytes, not {entry['bytes']}")
        if sha256 != entry["sha256"]:
            raise CheckpointDamaged(folder, f"{name}: hash differs")
    return manifest


def load_folder(folder: Path, *, whole: bool = True) -> Checkpoint:
    """A verified checkpoint; its arrays have memory of their own.

    Args:
        whole: with the model and the optimiser's state, whoever wrote them in how many parts; without, these are left
            to those who read their own parts of the folder.

    Raises:
        CheckpointDamaged: names the file.
    """
    manifest = verify(folder)
    stems = [name.removesuffix(".safetensors") for name in manifest["files"] if _is_ours(name)]
    try:
        tensors = {stem: read_tensors(folder / f"{stem}.safetensors") for stem in stems
                   if whole or stem not in (MODEL, OPTIMIZER)}  # fmt: skip
        if not whole or any(map(is_part, manifest["files"])):
            tensors |= _read_parts(folder, whole)
        state = json.loads((folder / STATE).read_bytes())
    except CheckpointDamaged:
        raise
    except (UsageError, OSError, ValueError) as error:
        raise CheckpointDamaged(folder, str(error)) from error
    return Checkpoint(manifest["step"], tensors, state, folder=folder)


def _read_parts(folder: Path, whole: bool) -> dict[str, dict[str, np.ndarray]]:
    """Model and optimiser, put together of all parts; if not `whole` they are only looked through."""
    with PartReader(folder) as reader:
        reader.check()
        if not whole:
            return {}
        moments = [kind for kind in reader.kinds() if kind != MODEL]
        return {
            MODEL: {name: reader.whole(MODEL, name) for name in reader.names(MODEL)},
            OPTIMIZER: {f"{kind}/{name}": reader.whole(kind, name) for kind in moments for name in reader.names(kind)},
        }


def _is_ours(name: str) -> bool:
    """Whether a file holds tensors of `Checkpoint.tensors` by itself."""
    return name.endswith(".safetensors") and "/" not in name and not is_part(name)


def _read_manifest(folder: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        version, step = manifest["format"], manifest["step"]
        for entry in manifest["files"].values():
            int(entry["bytes"]), str(entry["sha256"])
    except OSError as error:
        raise CheckpointDamaged(folder, f"{MANIFEST}: {error.strerror or error}") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointDamaged(folder, f"{MANIFEST}: not a manifest") from error
    if version != FORMAT:
        raise CheckpointDamaged(folder, f"{MANIFEST}: format {version!r}; this distml reads {FORMAT}")
    name = folder.name.removesuffix(REPLACED)
    if _FOLDER.fullmatch(name) and name != (folder_name(step) if isinstance(step, int) else ""):
        raise CheckpointDamaged(folder, f"{MANIFEST}: of step {step!r}")
    return dict(manifest)


def _hash_file(path: Path) -> tuple[int, str]:
    digest, size = hashlib.sha256(), 0
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
            size += len(chunk)
    return size, digest.hexdigest()


# ------------------------------------------------------------------------------------------------------------ the store
@dataclass(frozen=True)
class _Best:
    step: int
    metric: str
    value: float


class CheckpointStore:
    """A run's checkpoints. One process writes at a time (the run directory's lock); any may read.

    Args:
        root: the folder; made at the first write.
        keep: how many of the newest stay; the best one stays besides.
    """

    def __init__(self, root: Path, keep: int) -> None:
        if keep < 1:
            raise ValueError(f"keep is {keep}; at least 1 checkpoint must stay")
        self.root, self.keep = root, keep
        self._background = BackgroundWriter(self._commit)
        self._lock = (
            threading.Lock()
        )  # over the names in `root` and `_marks`; never held while a checkpoint's data is written
        self._marks: dict[int, _Best] = {}  # best ones whose checkpoint is not committed yet

    # -- writing
    def write(self, checkpoint: Checkpoint) -> Path:
        """Commit a checkpoint, after those that `write_async` has in line, and prune.

        Returns:
            Its folder.

        Raises:
            ValueError: a value that the formats do not hold.
            CheckpointFailed: it, or one in line before it, could not be written.
        """
        check(checkpoint)
        self._background.wait()
        self._commit(checkpoint)
        return self.root / folder_name(checkpoint.step)

    def write_async(self, checkpoint: Checkpoint, *, important: bool = False) -> bool:
        """Commit a checkpoint on a background thread. The caller must not change its arrays any more.

        At most one is being written and one waits. A newer one takes the place of the one that waits, except that an
        important one (the best, the last) is never dropped: one that is not important is then let go, and an
        important one waits for the place.

        Returns:
            Whether it is in line.

        Raises:
            ValueError: a value that the formats do not hold.
            CheckpointFailed: an earlier one could not be written; this one is not in line.
        """
        check(checkpoint)
        with self._lock:
            important = important or checkpoint.step in self._marks
        return self._background.put(checkpoint, important=important)

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until all checkpoints in line are committed; False when they are not after `timeout_s` seconds.

        Raises:
            CheckpointFailed: one could not be written.
        """
        return self._background.wait(timeout_s)

    def close(self) -> None:
        """Commit what is in line and end the thread.

        Raises:
            CheckpointFailed: one could not be written.
        """
        self._background.close()

    def __enter__(self) -> CheckpointStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def prune(self, step: int, keep: int) -> None:
        """Keep the newest `keep` up to a committed step, and the best: fewer than a write leaves.

        Raises:
            CheckpointFailed: one could not be removed.
        """
        try:
            with self._lock:
                self._prune(step, keep)
        except OSError as error:
            raise CheckpointFailed(step, "is there, but tidying up failed", error) from error

    # -- best
    def mark_best(self, step: int, metric: str, value: float) -> None:
        """Name the best checkpoint so far. It takes effect, durably, together with the commit of that step.

        Raises:
            ValueError: `value` is not finite.
            CheckpointFailed: the mark could not be written.
        """
        best = _Best(step, metric, float(value))
        strict_json(best.value, metric)
        with self._lock:
            self._marks[step] = best
            try:
                self._settle_marks()
            except OSError as error:
                raise CheckpointFailed(step, "could not be marked as the best", error) from error

    def best(self, metric: str | None = None) -> tuple[int, float] | None:
        """Step and value of the best checkpoint, also of one that is still in line.

        Args:
            metric: only if that was the metric.
        """
        with self._lock:
            pending = self._marks[max(self._marks)] if self._marks else None
            best = pending or self._read_best()
        return (best.step, best.value) if best is not None and metric in (None, best.metric) else None

    def stored_best_step(self) -> int | None:
        """The step that best.json names, whether its checkpoint is here or not."""
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
            return int(json.loads((self.root / BEST).read_bytes())["step"])
        return None

    # -- reading
    def steps(self) -> list[int]:
        """Steps of the committed checkpoints, oldest first."""
        names = [entry.name.removesuffix(REPLACED) for entry in self.root.iterdir()] if self.root.is_dir() else []
        return sorted({int(match[1]) for name in names if (match := _FOLDER.fullmatch(name))})

    def load(self, step: int, *, whole: bool = True) -> Checkpoint:
        """The verified checkpoint of a step (see `load_folder`).

        Raises:
            CheckpointDamaged: names the file.
            UsageError: there is none.
        """
        folder = self._folder(step)
        if not folder.is_dir():
            steps = ", ".join(map(str, self.steps())) or "none"
            raise UsageError(f"there is no checkpoint of step {step} in {self.root}; there are: {steps}")
        return load_folder(folder, whole=whole)

    def newest_good(self, report: Callable[[str], None], *, whole: bool = True) -> Checkpoint | None:
        """The newest checkpoint that verifies; None when there is none.

        Args:
            report: called with one line for each damaged one that was passed over.
            whole: see `load_folder`.
        """
        damaged, found = [], None
        for step in reversed(self.steps()):
            try:
                found = self.load(step, whole=whole)
                break
            except CheckpointDamaged as error:
                damaged.append((step, error.reason))
        outcome = f"using {folder_name(found.step)}" if found else "there is no good one before it"
        for step, reason in damaged:
            report(f"checkpoint {folder_name(step)} is damaged ({reason}); {outcome}")
        return found

    # -- what ranks write
    def ranks_folders(self) -> list[Path]:
        """The folders that ranks write into, or have written into before they died."""
        return sorted(self.root.glob(f"step-*{RANKS}"))

    def discard(self, folders: Iterable[Path]) -> None:
        """Remove such folders; nobody writes into them any more."""
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)  # what stays is removed the next time

    # -- inside
    def _commit(self, checkpoint: Checkpoint) -> None:
        """Write, publish, prune. Unless it is published, all is as it was."""
        partial = self.root / (folder_name(checkpoint.step) + PARTIAL)
        try:
            with self._lock:
                self._clear_leftovers()
            write_folder(partial, checkpoint)
            with self._lock:
                self._publish(partial, checkpoint.step)
        except OSError as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise CheckpointFailed(checkpoint.step, "could not be written", error) from error
        try:
            with self._lock:
                self._settle_marks()
                self._prune(checkpoint.step, self.keep)
        except OSError as error:
            raise CheckpointFailed(checkpoint.step, "is there, but tidying up failed", error) from error

    def _clear_leftovers(self) -> None:
        """Finish what dead writers left half done."""
        for replaced in self.root.glob(f"step-*{REPLACED}"):
            final = replaced.with_name(replaced.name.removesuffix(REPLACED))
            if final.exists():
                shutil.rmtree(replaced)
            else:
                replaced.rename(final)
        for partial in self.root.glob(f"step-*{PARTIAL}"):
            shutil.rmtree(partial)
        for file in self.root.glob(TEMPORARY_FILES):
            file.unlink()

    def _publish(self, partial: Path, step: int) -> None:
        """Give a complete folder its name, in place of an older one unless that is good and the same."""
        final = self.root / folder_name(step)
        replaced = final.with_name(final.name + REPLACED)
        if final.exists():
            with contextlib.suppress(CheckpointDamaged):
                if verify(final) == _read_manifest(partial):
                    shutil.rmtree(partial)
                    return
            final.rename(replaced)
        partial.rename(final)
        fsync_folder(self.root)
        if replaced.exists():
            shutil.rmtree(replaced)

    def _settle_marks(self) -> None:
        """Make the marks durable whose checkpoints are committed; a later one supersedes earlier ones."""
        for step in sorted(self._marks):
            if self._folder(step).exists():
                self._write_best(self._marks[step])
                self._marks = {other: best for other, best in self._marks.items() if other > step}

    def _prune(self, written: int, keep: int) -> None:
        """Keep the newest `keep` up to the one just written, and the best.

        Later ones exist when the run went back to an older checkpoint. Damaged ones among them are why, and must not
        take the place of good ones; good ones are not ours to judge.
        """
        best = self._read_best()
        steps = self.steps()
        spared = {*[step for step in steps if step <= written][-keep:], *self._marks}
        if best is not None:
            spared.add(best.step)
        for step in steps:
            if step <= written and step not in spared:
                self._remove(step)
            elif step > written:
                try:
                    verify(self._folder(step))
                except CheckpointDamaged:
                    self._remove(step)

    def _remove(self, step: int) -> None:
        """Take the name first: a writer killed in the middle leaves a partial folder, not a damaged checkpoint."""
        partial = self.root / (folder_name(step) + PARTIAL)
        self._folder(step).rename(partial)
        shutil.rmtree(partial)

    def _folder(self, step: int) -> Path:
        final = self.root / folder_name(step)
        replaced = final.with_name(final.name + REPLACED)
        return replaced if replaced.exists() and not final.exists() else final

    def _write_best(self, best: _Best) -> None:
        write_atomically(self.root / BEST, strict_json(vars(best), "best"))

    def _read_best(self) -> _Best | None:
        """None also for one whose checkpoint is gone."""
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
            values = json.loads((self.root / BEST).read_bytes())
            best = _Best(int(values["step"]), str(values["metric"]), float(values["value"]))
            return best if self._folder(best.step).exists() else None
        return None


# ---------------------------------------------------------------------------------------------------------------- sourc
def resolve_source(path: Path | str, report: Callable[[str], None] | None = None) -> dict[str, np.ndarray]:
    """The model's tensors from a run directory (its best checkpoint, else its newest), a checkpoint or a file.

    Args:
        path: a run directory, a checkpoint's folder or a .safetensors file.
        report: called with one line when a damaged checkpoint was passed over; by default it goes to stderr.

    Raises:
        CheckpointDamaged: the checkpoint named, or the run's best one, is damaged.
        UsageError: there are no model tensors there.
    """
    path = Path(path).expanduser()
    if path.is_file() and is_part(path.name) and (path.parent / MANIFEST).is_file():
        raise UsageError(f"{path} is one of several files that hold a model together; name their folder {path.parent}")
    if path.is_file() and path.suffix == ".safetensors":
        return read_tensors(path)
    if (path / MANIFEST).is_file():
        checkpoint: Checkpoint | None = load_folder(path)
    elif (path / "checkpoints").is_dir():
        store = CheckpointStore(path / "checkpoints", keep=1)
        best = store.best()
        checkpoint = store.load(best[0]) if best else store.newest_good(report or _to_stderr)
    else:
        what = "is none of them" if path.exists() else "does not exist"
        raise UsageError(f"weights come from a run directory, a checkpoint or a .safetensors file; {path} {what}")
    if checkpoint is None:
        raise UsageError(f"{path} has no checkpoint to take weights from")
    if MODEL not in checkpoint.tensors:
        raise UsageError(f"the checkpoint of step {checkpoint.step} in {path} holds no model")
    return checkpoint.tensors[MODEL]


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr)
