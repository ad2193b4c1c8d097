"""`distml cluster check FILE…`: what would go wrong with a cluster file, before machines are paid for.

file ── documents ──┬─ apiVersion ────────────▶ kuberay ─┐
                    ├─ cluster_name, provider ▶ ray_up ──┼──▶ problems at line and column, in the file's order
                    └─ else ──────────────────▶ plan's own ┘
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from distml.errors import ExitCode, UsageError
from distml.launch.check.documents import read_documents
from distml.launch.check.kuberay import kuberay_problems
from distml.launch.check.ray_up import ray_up_problems
from distml.launch.plan.cluster import read_cluster
from distml.spec.messages import Problem, describe
from distml.spec.yaml import Document, Position, one_line


def cluster_check(files: list[Path]) -> int:
    """The verb `cluster check`; its exit code."""
    code = ExitCode.DONE
    for path in files:
        said, lines = check_file(path)
        print("\n".join(lines) if lines else f"{path}: ok ({said})")
        code = ExitCode.USAGE if lines else code
    return int(code)


def check_file(path: Path) -> tuple[str, list[str]]:
    """What a file is, and a line for everything wrong with it, `file:line:column: what; what to do`."""
    try:
        documents, doubled = read_documents(path)
        said, found = _problems(path, documents)
    except UsageError as error:
        return "", [str(error)]
    placed = sorted([*doubled, *found], key=lambda one: (one[0].line, one[0].column))
    return said, list(dict.fromkeys(f"{position}: {one_line(problem.text)}" for position, problem in placed))


def _problems(path: Path, documents: list[Document]) -> tuple[str, list[tuple[Position, Problem]]]:
    """What the file is, and its problems with their places."""
    for document in documents:
        if not isinstance(document.data, dict):
            raise document.start.error(f"a cluster file is a mapping of keys, got {describe(document.data)}; write one")
    if any("apiVersion" in document.data or "kind" in document.data for document in documents):
        everything = [document.data for document in documents]
        kinds = ", ".join(str(data.get("kind")) for data in everything)
        found = [(document, kuberay_problems(document.data, everything)) for document in documents]
        return f"KubeRay: {kinds}", [one for document, problems in found for one in _placed(document, problems)]
    if len(documents) == 1 and {"cluster_name", "provider"} & set(documents[0].data):
        provider = documents[0].data.get("provider")
        kind = provider.get("type") if isinstance(provider, dict) else None
        return f"ray up: {kind}", list(_placed(documents[0], ray_up_problems(documents[0].data)))
    cluster = read_cluster(path)
    return f"distml plan: {cluster.nodes} x {cluster.gpus_per_node} {cluster.card_name}s", []


def _placed(document: Document, problems: Iterator[Problem]) -> Iterator[tuple[Position, Problem]]:
    """Each problem at the first of its paths that is written, else at the nearest block around it."""
    for problem in problems:
        places = document.keys if problem.at == "key" else document.values
        path = next((path for path in problem.paths if path in places), next(iter(problem.paths), ()))
        in_list = bool(path) and isinstance(path[-1], int)  # which has no key
        yield document.where(path, "value" if in_list else problem.at), problem
