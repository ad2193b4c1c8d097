"""`distml bench transformer`: language models against plain PyTorch and against DeepSpeed by itself.

speed     tokens per second of one process, against the same model and loop in plain PyTorch
zero      milliseconds per step and seconds to the first one under ZeRO 1, 2 and 3, against DeepSpeed by its launcher
memory    bytes of weights, gradients and optimiser that each rank holds, against the formulas and `distml plan`
loss      validation loss on a text under every synchronous strategy
gpu       tokens per second and share of peak (MFU) on one GPU, against plain PyTorch at nanoGPT's shape

Each is one part; without `--part` those run that need neither a GPU nor a text. The peers take turns with ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distml.bench.exchange import check
from distml.bench.parts import failure, measure_parts, tables
from distml.errors import UsageError

PARTS = ("speed", "zero", "memory", "loss", "gpu")
BY_DEFAULT = ("speed", "zero", "memory")

__all__ = ["PARTS", "failure", "measure", "tables"]


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
    given = {"repeats": repeats, "steps": steps, "text": text, "contenders": list(contenders)}
    return measure_parts("transformer", chosen, given)
