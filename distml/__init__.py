"""distml: write what is learned once, choose in one line of YAML how its gradients travel."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from distml.launch.run import Result, run
    from distml.launch.submit.handle import submit
    from distml.spec.loader import load_spec
    from distml.tasks.base import Accumulator, Loss, Mean, Part, Progress, Stream, Task

__all__ = ["Accumulator", "Loss", "Mean", "Part", "Progress", "Result", "Stream", "Task", "load_spec", "run", "submit"]

_HOMES = {
    **dict.fromkeys(("Accumulator", "Loss", "Mean", "Part", "Progress", "Stream", "Task"), "distml.tasks.base"),
    **dict.fromkeys(("Result", "run"), "distml.launch.run"),
    "load_spec": "distml.spec.loader",
    "submit": "distml.launch.submit.handle",
}


def __getattr__(name: str) -> Any:
    """Import on first use: the command line starts without torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'distml' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
