"""The one archive that a job's nodes unpack: the files of a working directory, and distml's own source.

Equal content gives an equal archive, byte by byte: Ray names packages by their content, so what is there already is not
sent again. distml always travels, so that a cluster needs no installation of it and runs the version that was checked
here; only a working directory that holds it (a checkout) brings its own.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Mapping
from pathlib import Path

from distml import __version__
from distml.errors import UsageError
from distml.launch.submit.files import Selection
from distml.memory import binary_size
from distml.spec.jobs import jobs_directory

PACKAGE = "distml"
LIMIT_BYTES = 100 * 2**20  # what Ray's dashboard takes in one request (its DASHBOARD_CLIENT_MAX_SIZE)
ENTRY_BYTES = 160  # of an archive, for each file, besides two times its name
EPOCH = (1980, 1, 1, 0, 0, 0)
NUM_LARGEST, NUM_BEHIND = 10, 12
JOB_SUFFIXES = (".yaml", ".py")


class Upload:
    """What is sent.

    Args:
        selection: of the working directory; None: nothing of it.
        texts: further files, by their place in the archive.

    Raises:
        UsageError: the working directory has a `distml` that is not the package.
    """

    def __init__(self, selection: Selection | None, texts: Mapping[str, str] = {}) -> None:
        self.selection = selection
        self.texts = dict(texts)
        self.has_own_package = selection is not None and holds_package(selection)
        self.package = {} if self.has_own_package else package_files()

    @property
    def num_bytes(self) -> int:
        """Of the archive at most: its files are compressed in it."""
        sizes = dict(self.selection.files) if self.selection is not None else {}
        sizes |= {name: path.stat().st_size for name, path in self.package.items()}
        sizes |= {name: len(text.encode()) for name, text in self.texts.items()}
        return sum(size + ENTRY_BYTES + 2 * len(name.encode()) for name, size in sizes.items())

    def check_size(self, limit: int = LIMIT_BYTES) -> None:
        """Refuse what the cluster's dashboard would refuse, before anything is packed.

        Raises:
            UsageError: with what to leave out.
        """
        if self.num_bytes <= limit:
            return
        assert self.selection is not None
        entries = ", ".join(f"{name} ({binary_size(size)})" for name, size in self.selection.largest_entries(3))
        raise UsageError(
            f"{self.selection.root} comes to {binary_size(self.num_bytes)}, and a cluster's dashboard takes "
            f"{binary_size(limit)}; leave out what the job does not need by naming it in "
            f"{self.selection.root / '.rayignore'} (the largest: {entries}), and keep data where the cluster sees it"
        )

    def lines(self) -> list[str]:
        """What is sent and what stays behind, for people."""
        count = sum(path.stat().st_size for path in self.package.values())
        own = f"distml {__version__} itself: {len(self.package)} files, {binary_size(count)}"
        if self.selection is None:
            return [f"sending {own}; nothing of the working directory"]
        chosen = self.selection
        noun = "file" if len(chosen.files) == 1 else "files"
        size = binary_size(chosen.num_bytes)
        lines = [f"sending {len(chosen.files):,} {noun}, {size}, of {chosen.root}; the largest:"]
        lines += [f"  {binary_size(size):>10}  {name}" for name, size in chosen.largest(NUM_LARGEST)]
        lines.append(f"and {own}" if self.package else "with distml's source among them")
        reasons: dict[str, list[str]] = {}
        for name, reason in chosen.behind.items():
            reasons.setdefault(reason, []).append(name)
        for reason, names in reasons.items():
            more = f" and {len(names) - NUM_BEHIND} more" if len(names) > NUM_BEHIND else ""
            lines.append(f"staying behind ({reason}): {', '.join(names[:NUM_BEHIND])}{more}")
        return lines

    def write(self, path: Path) -> None:
        """Pack it.

        Raises:
            UsageError: a file has gone or cannot be read.
        """
        chosen = self.selection
        sources = {name: chosen.source(name) for name in chosen.files} if chosen is not None else {}
        sources |= self.package
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=6) as archive:
            for name in sorted({*sources, *self.texts}):
                data = self.texts[name].encode() if name in self.texts else _content(sources[name])
                executable = name in sources and os.access(sources[name], os.X_OK)
                entry = zipfile.ZipInfo(name, EPOCH)
                entry.external_attr = (0o100755 if executable else 0o100644) << 16
                archive.writestr(entry, data, zipfile.ZIP_DEFLATED)


def package_files() -> dict[str, Path]:
    """distml's own source and the shipped jobs: place in the archive -> file."""
    package = Path(__file__).resolve().parents[2]
    files = {
        f"{PACKAGE}/{path.relative_to(package).as_posix()}": path
        for path in package.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and not path.name.startswith(".")
    }
    jobs = {f"{PACKAGE}/shipped_jobs/{path.name}": path for path in jobs_directory().iterdir()
            if path.suffix in JOB_SUFFIXES}  # fmt: skip
    return files | jobs


def holds_package(selection: Selection) -> bool:
    """Whether the working directory brings distml itself.

    Raises:
        UsageError: something else of that name would be taken for it.
    """
    if f"{PACKAGE}/__init__.py" in selection.files and f"{PACKAGE}/cli.py" in selection.files:
        return True
    if f"{PACKAGE}.py" in selection.files or any(name.startswith(f"{PACKAGE}/") for name in selection.files):
        name = f"{PACKAGE}.py" if f"{PACKAGE}.py" in selection.files else PACKAGE
        raise UsageError(
            f"{selection.root / name} would be taken for distml on the cluster; rename it, name it in "
            f"{selection.root / '.rayignore'}, or choose another --working-dir"
        )
    return False


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}; name it in .rayignore to go on without") from None
