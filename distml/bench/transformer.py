"""`distml bench transformer`: language models against plain PyTorch and against DeepSpeed by itself.

speed     tokens per second of one process, against the same model and loop in plain PyTorch
zero      milliseconds per step and seconds to the first one under ZeRO 1, 2 and 3, against DeepSpeed by its launcher
memory    bytes of weights, gradients and optimiser that each rank holds, against the formulas and `distml plan`
loss      validation loss on a text under every synchronous strategy
gpu       tokens per second and share of peak (MFU) on one GPU, against plain PyTorch at nanoGPT's shape

Each is one part; without `--part` those run that need neither a GPU nor a text. The peers take turns with ours.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from distml.bench.exchange import check, target_line, tell
from distml.bench.table import conditions
from distml.errors import RunError, UsageError

PARTS = ("speed", "zero", "memory", "loss", "gpu")
BY_DEFAULT = ("speed", "zero", "memory")
Table = tuple[str, list[str], list[list[str]], list[str]]


def measure(
    *, part: Sequence[str] = (), repeats: int | None = None, steps: int | None = None, text: Path | None = None,
    contenders: Sequence[str] = (),
) -> dict[str, Any]:  # fmt: skip
    """Run the parts, one after the other.

    Args:
        part: some of `PARTS`; none: those that need neither a GPU nor a text.
        repeats: of speed and zero; None: 5 and 3.
        steps: of each repeat, or of each training of `loss`; None: as many as the part needs.
        text: the file that `loss` learns.
        contenders: of `zero`, `loss` and `gpu`, by name; none: all.

    Raises:
        UsageError: no such part, or one that lacks what it needs.
    """
    chosen = list(dict.fromkeys(part)) or list(BY_DEFAULT)
    check("--part", chosen, PARTS)
    if "loss" in chosen and text is None:
        raise UsageError("--part loss needs a text to learn; give --text FILE, for example tiny Shakespeare's")
    about = conditions(parts=chosen, torch_threads=1)
    given = {"repeats": repeats, "steps": steps, "text": text, "contenders": list(contenders)}
    found, errors = {}, {}
    for name in chosen:
        module = importlib.import_module(f"distml.bench.transformer_{name}")
        options = {key: given[key] for key in module.OPTIONS if given[key] not in (None, [])}
        try:
            found[name] = module.measure(**options)
        except RunError as error:
            errors[name] = str(error)
            tell(f"{name}: {error}")
    return {"bench": "transformer", "conditions": about, "parts": found, "errors": errors}


def tables(report: Mapping[str, Any]) -> list[Table]:
    """One table for each part."""
    about, made = report["conditions"], []
    for name, found in report["parts"].items():
        title, header, body, lines = importlib.import_module(f"distml.bench.transformer_{name}").table(found)
        made.append((title, header, body, [*map(target_line, found["targets"]), *lines]))
    if made:
        made[-1][3].append(
            f"{about['cpus']} CPUs, load before {about['load_before']}, torch {about['torch']}, ray {about['ray']}"
        )
    return made


def failure(report: Mapping[str, Any]) -> str | None:
    """Which parts failed, in one line; None: none."""
    failed = "; ".join(f"{name}: {error}" for name, error in report["errors"].items())
    return failed or None
