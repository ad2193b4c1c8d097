"""`distml new`: the shipped job of an own task, written out under another name."""

from __future__ import annotations

import importlib.util
import keyword
import sys
from pathlib import Path

from distml.errors import UsageError
from distml.spec.jobs import jobs_directory

TEMPLATE_MODULE, TEMPLATE_CLASS, TEMPLATE_JOB = "own_task", "TwoMoons", "own-task"


def write_starter(name: str, directory: Path) -> tuple[Path, Path]:
    """Write NAME.py and NAME.yaml.

    Args:
        name: a Python identifier; hyphens become underscores.
        directory: where the files go.

    Returns:
        The files of the task and of its spec.

    Raises:
        UsageError: the name cannot be a module's, or a file of that name exists; nothing is written.
    """
    module = name.replace("-", "_")
    if not (module.isascii() and module.isidentifier()) or keyword.iskeyword(module):
        raise UsageError(f"the name {name!r} must be a Python identifier: letters, digits and _, not a keyword")
    code, spec = directory / f"{module}.py", directory / f"{module}.yaml"
    for path in (code, spec):
        if path.exists():
            raise UsageError(f"{path.name} exists; choose another name or remove it")
    if module in (*sys.stdlib_module_names, "__main__") or importlib.util.find_spec(module) is not None:
        raise UsageError(f"{module}.py would hide the installed module {module!r}; choose another name")
    class_name = _class_name(module)
    shipped = jobs_directory()
    source = (shipped / f"{TEMPLATE_MODULE}.py").read_text(encoding="utf-8")
    job = (shipped / f"{TEMPLATE_JOB}.yaml").read_text(encoding="utf-8")
    job = job.replace(f"run {TEMPLATE_JOB}", f"run {module}.yaml").replace(TEMPLATE_JOB, module.strip("_") or "task")
    job = job.replace(TEMPLATE_MODULE, module).replace(TEMPLATE_CLASS, class_name)
    for path, text in ((code, source.replace(TEMPLATE_CLASS, class_name)), (spec, job)):
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    return code, spec


def _class_name(module: str) -> str:
    """CamelCase that ends in Task, so that it is never a keyword or a name that the template imports."""
    camel = "".join(part.capitalize() for part in module.split("_"))
    stem = camel.removesuffix("Task") or "My"
    return f"{stem}Task"
