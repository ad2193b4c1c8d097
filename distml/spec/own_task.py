"""A user's own task, looked at without running it: its file, its class and what it needs."""

from __future__ import annotations

import ast
import importlib.util
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from distml.errors import UsageError
from distml.spec.base import Block, Need
from distml.spec.messages import near
from distml.spec.rl import ActingBlock, EnvironmentSpec, OnPolicyBlock, OwnPolicySpec
from distml.spec.rllib import RLlibSpec
from distml.spec.yaml import KeyPath, Position


@dataclass(frozen=True)
class OwnTask:
    """What the source says about a user's task.

    Args:
        path: the file that defines it.
        needs: the literal set in the class body; None where the class has none or it is not a literal, so that only
            the import can tell.
    """

    path: Path
    needs: frozenset[str] | None


def find_own_task(name: str, directory: Path, start: Position) -> OwnTask:
    """Find `module:Class` beside the spec, else among the installed modules; nothing of it is imported.

    Args:
        name: the import path, already known to have this form.
        directory: where the spec lies.
        start: where the spec names it.

    Raises:
        UsageError: no such file or class, a file that does not parse, or a need that does not exist.
    """
    path, body = find_own(name, directory, start)
    return OwnTask(path, None if body is None else _needs(body, path))


def is_own(environment: EnvironmentSpec) -> bool:
    """Whether it is a user's own class; module:Id-v0 is Gymnasium's way to import a module first."""
    return environment.id.partition(":")[2].isidentifier()


def own_names(task: Block) -> list[tuple[KeyPath, str]]:
    """The import paths of a user's own policy and environment in a block that acts, with their places in the spec."""
    if isinstance(task, RLlibSpec):
        return [(("environment", "id"), task.environment.id)] if is_own(task.environment) else []
    if not isinstance(task, ActingBlock):
        return []
    found: list[tuple[KeyPath, str]] = []
    if is_own(task.environment):
        found.append((("task", "environment", "id"), task.environment.id))
    if isinstance(task, OnPolicyBlock) and isinstance(task.policy, OwnPolicySpec):
        found.append((("task", "policy", "name"), task.policy.name))
    return found


def find_own(name: str, directory: Path, start: Position) -> tuple[Path, ast.ClassDef | None]:
    """The file of a `module:Class`, and the class's body where it is defined there and not imported into it.

    Raises:
        UsageError: no such file or class, or a file that does not parse.
    """
    module, _, class_name = name.partition(":")
    path = find_module(module, directory)
    if path is None:
        raise start.error(_no_module(module, directory))
    body = _parse(path)
    classes = {node.name: node for node in body if isinstance(node, ast.ClassDef)}
    if class_name in classes:
        return path, classes[class_name]
    if class_name in set(_other_names(body)):
        return path, None
    close = near(class_name, classes)
    hint = f"did you mean {module}:{close}?" if close else f"its classes: {', '.join(classes) or 'none'}"
    raise start.error(f"{path} defines no class {class_name}; {hint}")


def find_module(module: str, directory: Path) -> Path | None:
    """The source file of a module beside the spec or installed; its packages are not imported."""
    top, *rest = module.split(".")
    roots = [directory / top]
    try:
        spec = None if top == "__main__" else importlib.util.find_spec(top)
    except (ImportError, ValueError, AttributeError):  # modules that are half imported have no spec
        spec = None
    if spec is not None and not rest and spec.origin and spec.origin.endswith(".py"):
        roots.append(Path(spec.origin).with_suffix(""))
    roots += [Path(root) for root in (spec.submodule_search_locations or ())] if spec is not None else []
    for root in roots:
        base = root.joinpath(*rest)
        for candidate in (base.with_name(base.name + ".py"), base / "__init__.py"):
            if candidate.is_file():
                return candidate
    return None


def _no_module(module: str, directory: Path) -> str:
    wanted = "/".join(module.split(".")) + ".py"
    try:
        beside = sorted(path.stem for path in directory.glob("*.py"))
    except OSError:
        beside = []
    close = near(module, beside)
    hint = f"did you mean {close}.py?" if close else f"Python files there: {', '.join(beside[:8]) or 'none'}"
    return f"no module {module!r}: there is no {directory / wanted} and none is installed; {hint}"


def _parse(path: Path) -> list[ast.stmt]:
    """The top-level statements, those inside `if`, `try` and `with` included."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an odd escape in a string is for the user's own linter
            tree = ast.parse(path.read_bytes(), str(path))
    except SyntaxError as error:
        start = Position(str(path), error.lineno or 1, max(error.offset or 1, 1))
        raise start.error(f"not valid Python: {error.msg}; correct it") from None
    except (ValueError, RecursionError, MemoryError) as error:
        raise Position(str(path)).error(f"not valid Python: {error}; correct it") from None
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from None
    return list(_statements(tree.body))


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    for node in body:
        yield node
        if isinstance(node, ast.If | ast.Try | ast.With):
            yield from _statements(node.body)
            yield from _statements(getattr(node, "orelse", []))
            for handler in getattr(node, "handlers", []):
                yield from _statements(handler.body)


def _other_names(body: list[ast.stmt]) -> Iterator[str]:
    """Names bound at the top by an import or an assignment, which may be classes."""
    for node in body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield from (alias.asname or alias.name for alias in node.names)
        elif isinstance(node, ast.Assign):
            yield from (target.id for target in node.targets if isinstance(target, ast.Name))


def _needs(node: ast.ClassDef, path: Path) -> frozenset[str] | None:
    for statement in node.body:
        if isinstance(statement, ast.Assign):
            targets, value = statement.targets, statement.value
        elif isinstance(statement, ast.AnnAssign) and statement.value is not None:
            targets, value = [statement.target], statement.value
        else:
            continue
        if any(isinstance(target, ast.Name) and target.id == "needs" for target in targets):
            return _literal_needs(value, path)
    return None


def _literal_needs(value: ast.expr, path: Path) -> frozenset[str] | None:
    if isinstance(value, ast.Call):
        is_set = isinstance(value.func, ast.Name) and value.func.id in ("frozenset", "set") and not value.keywords
        if not is_set or len(value.args) > 1:
            return None
        if not value.args:
            return frozenset()
        value = value.args[0]
    if not isinstance(value, ast.Set | ast.Tuple | ast.List):
        return None
    known, needs = get_args(Need), set()
    for item in value.elts:
        if not isinstance(item, ast.Constant):
            return None
        if item.value not in known:
            start = Position(str(path), item.lineno, item.col_offset + 1)
            close = near(item.value, known) if isinstance(item.value, str) else None
            hint = f"did you mean {close!r}? (known: {', '.join(known)})" if close else f"known: {', '.join(known)}"
            raise start.error(f"unknown need {item.value!r}; {hint}")
        needs.add(str(item.value))
    return frozenset(needs)
