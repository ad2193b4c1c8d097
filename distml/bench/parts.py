"""A bench of several parts, each a module `distml/bench/BENCH_PART.py` with OPTIONS, `measure` and `table`."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import Any

from distml.bench.exchange import target_line, tell
from distml.bench.table import conditions
from distml.errors import RunError

Table = tuple[str, list[str], list[list[str]], list[str]]


def measure_parts(bench: str, chosen: Sequence[str], given: Mapping[str, Any]) -> dict[str, Any]:
    """Run the parts, one after the other; one that fails is told, and the others go on.

    Args:
        given: options; a part takes those that it has, unless they are None or empty.
    """
    about = conditions(parts=chosen, torch_threads=1)
    found, errors = {}, {}
    for name in chosen:
        module = importlib.import_module(f"distml.bench.{bench}_{name}")
        options = {key: given[key] for key in module.OPTIONS if given[key] not in (None, [])}
        try:
            found[name] = module.measure(**options)
        except RunError as error:
            errors[name] = str(error)
            tell(f"{name}: {error}")
    return {"bench": bench, "conditions": about, "parts": found, "errors": errors}


def tables(report: Mapping[str, Any]) -> list[Table]:
    """One table for each part."""
    about, made = report["conditions"], []
    for name, found in report["parts"].items():
        module = importlib.import_module(f"distml.bench.{report['bench']}_{name}")
        title, header, body, lines = module.table(found)
        made.append((title, header, body, [*map(target_line, found["targets"]), *lines]))
    if made:
        made[-1][3].append(
            f"{about['cpus']} CPUs, load before {about['load_before']}, torch {about['torch']}, ray {about['ray']}"
        )
    return made


def failure(report: Mapping[str, Any]) -> str | None:
    """Which parts failed, in one line; None: none."""
    return "; ".join(f"{name}: {error}" for name, error in report["errors"].items()) or None


def target(what: str, value: float, bound: str, wanted: float) -> dict[str, Any]:
    """A target, and whether it is met."""
    met = value <= wanted if bound == "at most" else value >= wanted
    return {"what": what, "value": value, "bound": bound, "target": wanted, "met": met}
