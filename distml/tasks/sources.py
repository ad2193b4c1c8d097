"""A user's Python files as text, so that workers on other hosts have them without installation. No torch, no pickle."""

from __future__ import annotations

import ast
import hashlib
import importlib
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from distml.spec.base import Block
from distml.spec.own_task import own_names
from distml.spec.schema import OwnTaskSpec

PROVIDED = frozenset({"distml", *sys.stdlib_module_names})  # never the user's, also in a checkout of distml


class SourceTree:
    """The user's Python files that a task's module needs: relative path -> text, and the folder they came from."""

    def __init__(self, directory: str = "", files: Mapping[str, str] | None = None) -> None:
        self.directory, self.files = directory, dict(files or {})

    @classmethod
    def collect(cls, task: Block, directory: Path) -> SourceTree:
        """The modules of a user's own classes with those beside them that they import, found through syntax trees."""
        names = [task.name] if isinstance(task, OwnTaskSpec) else [name for _, name in own_names(task)]
        roots = [name.split(":")[0] for name in names]
        files: dict[str, str] = {}
        waiting = list(roots)
        while waiting:
            module = waiting.pop()
            if module not in roots and module.split(".")[0] in PROVIDED:
                continue
            for file in module_files(directory, module):
                relative = file.relative_to(directory).as_posix()
                if relative not in files:
                    files[relative] = file.read_text(encoding="utf-8")
                    waiting += imported_modules(files[relative], module)
        return cls(str(directory), files) if files else cls()

    def install(self) -> Path:
        """Make the files importable: from where they lie if the same text is there, else from a private copy.

        Returns:
            The folder that they are imported from.
        """
        home = Path(self.directory)
        if not self.files:
            return home
        if not all(_same_text(home / name, text) for name, text in self.files.items()):
            home = Path(tempfile.mkdtemp(prefix="distml-code-"))
            for name, text in self.files.items():
                (home / name).parent.mkdir(parents=True, exist_ok=True)
                (home / name).write_text(text, encoding="utf-8")
        sys.path[:] = [str(home), *(entry for entry in sys.path if entry != str(home))]
        if any(_is_stale(name, home) for name in self.files):
            for name in self.files:  # all of them: they hold what they imported from each other
                sys.modules.pop(_module_name(name), None)
        importlib.invalidate_caches()
        return home

    def mark_imported(self) -> None:
        """Remember what the imported modules' text is, so that a later `install` sees whether it has changed."""
        for name in self.files:
            module = sys.modules.get(_module_name(name))
            if module is not None and not hasattr(module, DIGEST):
                setattr(module, DIGEST, _digest(Path(str(module.__file__))))


def _same_text(file: Path, text: str) -> bool:
    try:
        return file.read_text(encoding="utf-8") == text
    except OSError:
        return False


DIGEST = "__distml_digest__"


def _module_name(relative: str) -> str:
    return relative.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _is_stale(relative: str, home: Path) -> bool:
    """Whether a module of this name was imported from elsewhere, or its text has changed since."""
    module = sys.modules.get(_module_name(relative))
    if module is None or getattr(module, "__file__", None) is None:
        return False
    file = home / relative
    return Path(str(module.__file__)) != file or getattr(module, DIGEST, None) not in (None, _digest(file))


def module_files(directory: Path, module: str) -> list[Path]:
    """The files of a dotted module under `directory`, packages' `__init__.py` included; empty if it is not there."""
    parts = module.split(".")
    base = directory.joinpath(*parts)
    own = base.with_suffix(".py") if base.with_suffix(".py").is_file() else base / "__init__.py"
    if not own.is_file():
        return []
    parents = [directory.joinpath(*parts[:depth], "__init__.py") for depth in range(1, len(parts))]
    return [file for file in parents if file.is_file()] + [own]


def imported_modules(source: str, module: str) -> list[str]:
    """Dotted names that a module imports, relative ones resolved against its package."""
    names: list[str] = []
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            package = module.split(".")[: -node.level] if node.level else []
            base = ".".join([*package, *(node.module or "").split(".")]).strip(".")
            names += [base, *(f"{base}.{alias.name}".strip(".") for alias in node.names)]
    return [name for name in names if name]
