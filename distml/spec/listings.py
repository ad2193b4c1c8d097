"""Tables of what a spec can name: a header row, then one row each."""

from __future__ import annotations

from distml.spec.jobs import shipped_jobs
from distml.spec.matrix import built_in_tasks, matrix, strategy_variants

Rows = list[tuple[str, ...]]

MODES = {
    "sync": " A step waits for all workers.",
    "async": " Each gradient is a step, nobody waits.",
    "ssp": " Nobody waits unless a gradient would be too stale.",
}


def tasks() -> Rows:
    """The built-in tasks, what they need, and how to name one's own."""
    rows = [(name, _listed(block.needs), block.summary) for name, block in built_in_tasks().items()]
    own = ("module:Class", "as its class says", "your own distml.Task; distml new NAME writes one")
    return [("task", "needs", "what is learned"), *rows, own]


def strategies() -> Rows:
    """The strategies with what they offer."""
    rows = []
    for block in strategy_variants():
        mode = MODES.get(block.label.partition("/")[2], "")
        rows.append((block.label, _listed(block.offers), _first_line(block.__doc__) + mode))
    return [("strategy", "offers", "how gradients travel"), *rows]


def jobs() -> Rows:
    """The shipped jobs with their first comment."""
    rows = []
    for name, path in shipped_jobs().items():
        comment = _first_line(path.read_text(encoding="utf-8"))
        rows.append((name, comment.lstrip("# ")))
    return [("job", "what it shows"), *rows]


def pairs() -> Rows:
    """Every pair of built-in task and strategy."""
    return [
        ("task", "strategy", "result"),
        *((cell.task, cell.strategy.label, cell.reason or "trains") for cell in matrix()),
    ]


def _listed(names: frozenset[str]) -> str:
    return ", ".join(sorted(names)) or "-"


def _first_line(text: str | None) -> str:
    return (text or "").strip().partition("\n")[0]
