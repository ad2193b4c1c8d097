"""From a task's block in the spec to a `Task`, importing a user's own class where the block names one.

A user's files travel as text (`SourceTree`), so that workers on other hosts have them without installation; nothing
is pickled.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import inspect
import os
import sys
import tempfile
import traceback
from collections.abc import Mapping
from pathlib import Path

from distml.errors import UsageError
from distml.spec.schema import ClassificationSpec, JobSpec, OwnTaskSpec, RegressionSpec
from distml.tasks.base import Task

PACKAGE = str(Path(__file__).resolve().parents[1]) + os.sep


class SourceTree:
    """The user's Python files that a task's module needs: relative path -> text, and the folder they came from."""

    def __init__(self, directory: str = "", files: Mapping[str, str] | None = None) -> None:
        self.directory, self.files = directory, dict(files or {})

    @classmethod
    def collect(cls, task: object, directory: Path) -> SourceTree:
        """The module of an own task with the modules beside it that it imports, found through their syntax trees."""
        if not isinstance(task, OwnTaskSpec):
            return cls()
        files: dict[str, str] = {}
        waiting = [task.name.split(":")[0]]
        while waiting:
            module = waiting.pop()
            for file in module_files(directory, module):
                relative = file.relative_to(directory).as_posix()
                if relative not in files:
                    files[relative] = file.read_text(encoding="utf-8")
                    waiting += imported_modules(files[relative], module)
        return cls(str(directory), files)

    def install(self) -> None:
        """Make the files importable: from where they lie if the same text is there, else from a private copy."""
        if not self.files:
            return
        home = Path(self.directory)
        if not all(_same_text(home / name, text) for name, text in self.files.items()):
            home = Path(tempfile.mkdtemp(prefix="distml-code-"))
            for name, text in self.files.items():
                (home / name).parent.mkdir(parents=True, exist_ok=True)
                (home / name).write_text(text, encoding="utf-8")
        if str(home) not in sys.path:
            sys.path.insert(0, str(home))
        for name in self.files:
            _forget_foreign_module(name, home)
        importlib.invalidate_caches()

    def fingerprint(self) -> str:
        """SHA-256 over the files' names and texts."""
        digest = hashlib.sha256()
        for name in sorted(self.files):
            digest.update(f"{name}\0{self.files[name]}\0".encode())
        return digest.hexdigest()


def _same_text(file: Path, text: str) -> bool:
    try:
        return file.read_text(encoding="utf-8") == text
    except OSError:
        return False


def _forget_foreign_module(relative: str, home: Path) -> None:
    """Drop a module of the same name that was imported from elsewhere, or whose text has changed since."""
    name = relative.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    module = sys.modules.get(name)
    file = home / relative
    if module is None or getattr(module, "__file__", None) is None:
        return
    known = getattr(module, "__distml_digest__", None)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    if Path(str(module.__file__)) != file or (known is not None and known != digest):
        del sys.modules[name]


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


def build_task(job: JobSpec) -> Task:
    """The task that a job names.

    Raises:
        UsageError: an own task cannot be imported or constructed; one line with the file and line of the cause.
    """
    spec = job.task
    if isinstance(spec, OwnTaskSpec):
        return build_own_task(spec)
    if isinstance(spec, RegressionSpec):
        from distml.tasks.regression import Regression

        return Regression(spec.features, spec.rows, spec.noise, split_seed=job.seed)
    from distml.tasks.classification import Classification

    assert isinstance(spec, ClassificationSpec)
    return Classification(spec.data, spec.model, split_seed=job.seed)


def build_own_task(spec: OwnTaskSpec) -> Task:
    """Import and construct a user's own class."""
    module_name, class_name = spec.name.split(":")
    try:
        module = importlib.import_module(module_name)
        if module.__file__ and os.path.exists(module.__file__):
            digest = hashlib.sha256(Path(module.__file__).read_bytes()).hexdigest()
            module.__distml_digest__ = digest  # type: ignore[attr-defined]
    except Exception as error:
        raise UsageError(f"task {spec.name!r} cannot be imported: {describe(error)}") from error
    task_class = getattr(module, class_name, None)
    if not (isinstance(task_class, type) and issubclass(task_class, Task)):
        raise UsageError(f"task {spec.name!r}: {class_name} in {module_name} is not a subclass of distml.Task")
    try:
        inspect.signature(task_class).bind(**spec.args)
        return task_class(**spec.args)
    except Exception as error:
        raise UsageError(f"task {spec.name!r} cannot be constructed: {describe(error)}") from error


def describe(error: BaseException) -> str:
    """An exception in one line, with the innermost file and line that it comes from outside the libraries."""
    message = " ".join(str(error).split()) or "no message"
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if "site-packages" not in f.filename and not f.filename.startswith((PACKAGE, "<"))]
    where = f" ({os.path.basename(own[-1].filename)}:{own[-1].lineno})" if own else ""
    return f"{type(error).__name__}: {message[:500]}{where}"
