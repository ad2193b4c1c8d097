"""Which files of a working directory travel to a cluster. Nothing is read but names, sizes and ignore files.

Left behind are: what nobody wants there (`ALWAYS_BEHIND`, virtual environments), runs and checkpoints, what .gitignore
and .rayignore name (Git's rules: the deepest file that says something decides, a folder that is ignored is not looked
into; also those of the folders above, up to the repository's), and links that leave the directory.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from pathspec import GitIgnoreSpec

from distml.errors import UsageError
from distml.spec.yaml import one_line

ALWAYS_BEHIND = frozenset(
    {".git", ".hg", ".svn", ".venv", "venv", "__pycache__", ".mypy_cache", ".pytest_cache", ".ruff_cache",
     ".ipynb_checkpoints", ".tox", ".nox", "node_modules", "checkpoints"}
)  # fmt: skip
RUNS = "runs"  # at the top of the working directory: where `distml run` writes
IGNORE_FILES = (".gitignore", ".rayignore")
NEVER, IGNORED, LEAVES, SPECIAL = "never sent", "ignored", "a link that leaves the directory", "not a file"


@dataclass
class Selection:
    """What of a working directory is sent.

    Attributes:
        root: the directory, resolved.
        files: relative POSIX path -> bytes.
        sources: of what is sent under a link's name: the file that it leads to.
        behind: relative path of what stays behind (folders are not looked into) -> why.
    """

    root: Path
    files: dict[str, int] = field(default_factory=dict)
    sources: dict[str, Path] = field(default_factory=dict)
    behind: dict[str, str] = field(default_factory=dict)

    @property
    def num_bytes(self) -> int:
        """Of all files."""
        return sum(self.files.values())

    def largest(self, count: int) -> list[tuple[str, int]]:
        """The largest files, the largest first."""
        return sorted(self.files.items(), key=lambda item: (-item[1], item[0]))[:count]

    def largest_entries(self, count: int) -> list[tuple[str, int]]:
        """The largest files and folders at the top, `name/` for folders."""
        sizes: dict[str, int] = {}
        for name, size in self.files.items():
            top, slash, _ = name.partition("/")
            sizes[top + slash] = sizes.get(top + slash, 0) + size
        return sorted(sizes.items(), key=lambda item: (-item[1], item[0]))[:count]

    def source(self, name: str) -> Path:
        """Where the content of one of `files` lies."""
        return self.sources.get(name, self.root / name)

    def why_behind(self, name: str) -> str | None:
        """Why a path is not sent; None: it is, or is not there at all.

        Args:
            name: relative to the root; a folder counts as sent if anything in it is.
        """
        if name in self.files or name == "." or any(file.startswith(name + "/") for file in self.files):
            return None
        for path in (name, *(str(parent) for parent in Path(name).parents)):
            if path in self.behind:
                return self.behind[path] if path == name else f"{path} is {self.behind[path]}"
        return None


def select(directory: Path) -> Selection:
    """Choose what travels.

    Raises:
        UsageError: there is no such directory, or something in it cannot be read or named in an archive.
    """
    if not directory.is_dir():
        raise UsageError(f"--working-dir {directory}: there is no such directory")
    selection = Selection(directory.resolve())
    links: list[str] = []
    _walk(selection, "", _rules_above(selection.root), links)
    for link in links:
        _follow(selection, link)
    return selection


# ------------------------------------------------------------------------------------------------------------- the walk
@dataclass(frozen=True)
class Rules:
    """The patterns of one ignore file.

    Attributes:
        folder: where it stands below the root, "" or with a slash at its end.
        inside: the root as seen from there, where it stands above the root; "" or with a slash at its end.
    """

    folder: str
    inside: str
    spec: GitIgnoreSpec

    def ignores(self, path: str) -> bool | None:
        """Of a path relative to the root, a folder's with a slash at its end; None: they do not say."""
        return self.spec.check_file(self.inside + path[len(self.folder) :]).include


def _walk(selection: Selection, folder: str, above: tuple[Rules, ...], links: list[str]) -> None:
    """Add a folder's files; `folder` is "" for the root, else ends with a slash."""
    here = selection.root / folder
    entries = _entries(here)
    names = {entry.name for entry in entries}
    rules = (*above, *(Rules(folder, "", _patterns(here / name)) for name in IGNORE_FILES if name in names))
    for entry in entries:
        path = folder + entry.name
        _check_name(path, selection.root)
        is_folder = entry.is_dir(follow_symlinks=False)
        reason = _reason(entry, is_folder, folder, rules)
        if reason is not None:
            selection.behind[path] = reason
        elif entry.is_symlink():
            links.append(path)
        elif is_folder:
            _walk(selection, path + "/", rules, links)
        elif entry.is_file(follow_symlinks=False):
            selection.files[path] = entry.stat(follow_symlinks=False).st_size
        else:
            selection.behind[path] = SPECIAL


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as found:
            return sorted(found, key=lambda entry: entry.name)
    except OSError as error:
        raise UsageError(f"{folder}: cannot be read: {error.strerror}; name it in .rayignore to go on") from None


def _reason(entry: os.DirEntry[str], is_folder: bool, folder: str, rules: tuple[Rules, ...]) -> str | None:
    if is_folder and (entry.name in ALWAYS_BEHIND or (entry.name == RUNS and not folder) or _is_left(Path(entry.path))):
        return NEVER
    return IGNORED if _is_ignored(folder + entry.name + ("/" if is_folder else ""), rules) else None


def _is_left(folder: Path) -> bool:
    """A virtual environment, a run directory, a checkpoint."""
    return (
        (folder / "pyvenv.cfg").is_file()
        or ((folder / "result.json").is_file() and (folder / "spec.yaml").is_file())
        or ((folder / "manifest.json").is_file() and (folder / "state.json").is_file())
    )


def _is_ignored(path: str, rules: tuple[Rules, ...]) -> bool:
    answers = (one.ignores(path) for one in reversed(rules))
    return next((answer for answer in answers if answer is not None), False)


def _patterns(file: Path) -> GitIgnoreSpec:
    try:
        return GitIgnoreSpec.from_lines(file.read_text(encoding="utf-8", errors="surrogateescape").splitlines())
    except OSError as error:
        raise UsageError(f"{file}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise UsageError(f"{file}: {one_line(str(error))}; correct the pattern") from None


def _rules_above(root: Path) -> tuple[Rules, ...]:
    """Of the folders above the root, up to the repository's top; none outside a repository."""
    if not any((folder / ".git").exists() for folder in (root, *root.parents)):
        return ()
    rules: list[Rules] = []
    inside, folder = "", root
    while not (folder / ".git").exists():
        inside, folder = f"{folder.name}/{inside}", folder.parent
        if (folder / ".gitignore").is_file():
            rules.insert(0, Rules("", inside, _patterns(folder / ".gitignore")))
    return tuple(rules)


def _check_name(path: str, root: Path) -> None:
    try:
        path.encode()
    except UnicodeEncodeError:
        shown = os.fsencode(path).decode("ascii", "backslashreplace")
        raise UsageError(f"{root}: {shown} has a name that is not text; rename it, or name it in .rayignore") from None


# ---------------------------------------------------------------------------------------------------------------- links
def _follow(selection: Selection, link: str) -> None:
    """Send under a link's name what it leads to, if that is sent itself."""
    target = Path(os.path.realpath(selection.root / link))
    if not target.is_relative_to(selection.root):
        selection.behind[link] = f"{LEAVES} ({target})"
        return
    inside = target.relative_to(selection.root).as_posix()
    if inside in selection.files and inside not in selection.sources:
        _copy(selection, inside, link)
        return
    below = [name for name in selection.files if name.startswith(inside + "/") and name not in selection.sources]
    contains_itself = inside == "." or link.startswith(inside + "/")
    if not below or contains_itself:
        why = "leads to a folder around it" if contains_itself else f"leads to {inside}, which is not sent"
        selection.behind[link] = f"a link that {why}"
    for name in () if contains_itself else below:
        _copy(selection, name, link + name[len(inside) :])


def _copy(selection: Selection, name: str, as_name: str) -> None:
    selection.files[as_name] = selection.files[name]
    selection.sources[as_name] = selection.root / name
