"""The matrix of tasks and strategies."""

from __future__ import annotations

from distml.spec.base import ALL_OFFERS
from distml.spec.matrix import matrix, refusal, strategy_variants

LABELS = [
    "single", "all_reduce", "parameter_server/sync", "parameter_server/async", "parameter_server/ssp", "local_sgd",
    "zero/1", "zero/2", "zero/3",
]  # fmt: skip


def test_every_strategy_stands_in_it_once_per_mode():
    assert [strategy.label for strategy in strategy_variants()] == LABELS


ANYWHERE = ("classification", "regression", "language_model", "masked_language_model")
ACTING = ("actor_critic", "reinforce", "ppo", "q_learning", "sarsa")
LAGGING = ("parameter_server/async", "parameter_server/ssp", "local_sgd")
SYNCHRONOUS_ONLY = {"trpo": "group_mean", "bandit": "one_version"}  # task -> the need that others do not offer
NOT_OFFERED = {(task, label): need for task, need in SYNCHRONOUS_ONLY.items() for label in LAGGING} | {
    (task, "zero/3"): "whole_weights" for task in (*ACTING, *SYNCHRONOUS_ONLY)}  # fmt: skip
IN_PHASES = {("trpo", "zero/1"), ("trpo", "zero/2")}  # all that it needs is offered


def test_every_task_stands_in_it_with_every_strategy():
    assert {(cell.task, cell.strategy.label) for cell in matrix()} == {
        (task, label) for task in (*ANYWHERE, *ACTING, *SYNCHRONOUS_ONLY) for label in LABELS
    }


def test_what_is_refused_is_refused_for_the_need_that_is_not_offered():
    refused = {(cell.task, cell.strategy.label): cell.reason for cell in matrix() if not cell.trains}
    assert refused.keys() == NOT_OFFERED.keys() | IN_PHASES
    for task, label in NOT_OFFERED:
        reason = refused[task, label]
        assert reason.startswith(f"task {task} needs {NOT_OFFERED[task, label]}, which {label} does not offer; ")


def test_several_phases_are_refused_where_a_step_has_one():
    refused = {(cell.task, cell.strategy.label): cell.reason for cell in matrix()}
    for task, label in IN_PHASES:
        assert refused[task, label] == (
            f"task {task} updates its weights in 2 phases, and {label} knows one; "
            "strategies that do: single, all_reduce, parameter_server/sync"
        )
    zero = next(strategy for strategy in strategy_variants() if strategy.label == "zero/1")
    assert refusal("mine", frozenset(), zero, num_phases=1) is None


def test_a_need_refuses_exactly_where_it_is_not_offered():
    for need in ALL_OFFERS:
        cells = [cell for cell in matrix([("mine", frozenset({need}))]) if cell.task == "mine"]
        assert [cell.trains for cell in cells] == [need in cell.strategy.offers for cell in cells]
    refused = next(cell for cell in matrix([("mine", ALL_OFFERS)]) if cell.task == "mine" and not cell.trains)
    assert refused.reason == (
        "task mine needs group_mean and one_version, which parameter_server/async does not offer; "
        "strategies that do: single, all_reduce, parameter_server/sync, zero/1, zero/2"
    )


def test_a_need_that_nobody_offers():
    reason = refusal("mine", frozenset({"luck"}), strategy_variants()[0])
    assert reason is not None
    assert reason.endswith("strategies that do: none")
