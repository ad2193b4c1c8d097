"""The matrix of tasks and strategies."""

from __future__ import annotations

from distml.spec.matrix import matrix, refusal, strategy_variants
from distml.spec.base import ALL_OFFERS

LABELS = [
    "single", "all_reduce", "parameter_server/sync", "parameter_server/async", "parameter_server/ssp", "local_sgd",
]  # fmt: skip


def test_every_strategy_stands_in_it_once_per_mode():
    assert [strategy.label for strategy in strategy_variants()] == LABELS


def test_tasks_without_needs_train_everywhere():
    cells = matrix()
    assert {(cell.task, cell.strategy.label) for cell in cells} == {
        (task, label) for task in ("classification", "regression") for label in LABELS
    }
    assert all(cell.trains for cell in cells)


def test_a_need_refuses_exactly_where_it_is_not_offered():
    for need in ALL_OFFERS:
        cells = [cell for cell in matrix([("mine", frozenset({need}))]) if cell.task == "mine"]
        assert [cell.trains for cell in cells] == [need in cell.strategy.offers for cell in cells]
    refused = next(cell for cell in matrix([("mine", ALL_OFFERS)]) if not cell.trains)
    assert refused.reason == (
        "task mine needs group_mean and one_version, which parameter_server/async does not offer; "
        "strategies that do: single, all_reduce, parameter_server/sync"
    )


def test_a_need_that_nobody_offers():
    reason = refusal("mine", frozenset({"luck"}), strategy_variants()[0])
    assert reason is not None
    assert reason.endswith("strategies that do: none")
