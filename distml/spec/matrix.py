"""Which task trains under which strategy: what the one needs against what the other offers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, get_args

from distml.spec.base import StrategyBlock, TaskBlock
from distml.spec.blocks import blocks_under, names_of
from distml.spec.schema import JobSpec, OwnTaskSpec, ParameterServerSpec


@dataclass(frozen=True)
class Cell:
    """One pair of the matrix.

    Args:
        task: the task's name.
        strategy: a strategy block that is valid in a job.
        reason: why the pair is refused; None: it trains.
    """

    task: str
    strategy: StrategyBlock
    reason: str | None

    @property
    def trains(self) -> bool:
        """Whether a job of this pair is accepted."""
        return self.reason is None


def built_in_tasks() -> dict[str, type[TaskBlock]]:
    """The tasks that a spec can name, a user's own aside."""
    blocks = [block for block in blocks_under(JobSpec, "task") if block is not OwnTaskSpec]
    return {name: block for block in blocks for name in names_of(block) if issubclass(block, TaskBlock)}


def strategy_variants() -> list[StrategyBlock]:
    """Every strategy, those with a `mode` or a `stage` once for each."""
    variants: list[StrategyBlock] = []
    for block in blocks_under(JobSpec, "strategy"):
        for name in names_of(block):
            key = next((key for key in ("mode", "stage") if key in block.model_fields), None)
            forms = get_args(block.model_fields[key].annotation) if key is not None else ()
            values: list[dict[str, Any]] = [{"name": name, str(key): form} for form in forms] or [{"name": name}]
            for value in values:
                if block is ParameterServerSpec and value.get("mode") == "ssp":
                    value["max_staleness"] = 4
                strategy = block.model_validate(value)
                assert isinstance(strategy, StrategyBlock)
                variants.append(strategy)
    return variants


def refusal(task: str, needs: frozenset[str], strategy: StrategyBlock, num_phases: int = 1) -> str | None:
    """Why a task does not train under a strategy, naming those that would do; None where it does."""
    missing = sorted(needs - strategy.offers)
    if not missing and _has_phases(strategy, num_phases):
        return None
    known = strategy_variants()
    fitting = [other.label for other in known if needs <= other.offers and _has_phases(other, num_phases)]
    lack = (
        f"needs {' and '.join(missing)}, which {strategy.label} does not offer" if missing
        else f"updates its weights in {num_phases} phases, and {strategy.label} knows one"
    )  # fmt: skip
    return f"task {task} {lack}; strategies that do: {', '.join(fitting) or 'none'}"


def _has_phases(strategy: StrategyBlock, num_phases: int) -> bool:
    return strategy.max_phases is None or num_phases <= strategy.max_phases


def matrix(extra: Iterable[tuple[str, frozenset[str]]] = ()) -> list[Cell]:
    """Every pair of task and strategy.

    Args:
        extra: further tasks as (name, needs).
    """
    built_in = [(name, block.needs, block.num_phases) for name, block in built_in_tasks().items()]
    return [
        Cell(name, strategy, refusal(name, needs, strategy, num_phases))
        for name, needs, num_phases in [*built_in, *((name, needs, 1) for name, needs in extra)]
        for strategy in strategy_variants()
    ]
