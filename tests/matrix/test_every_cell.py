"""Every pair of task and strategy trains, or is refused with the reason that the matrix prints."""

from __future__ import annotations

import math

import pytest
from own.oracle import job_of, spec_of, train

from distml.errors import UsageError
from distml.spec.matrix import Cell, matrix

FREE = ("small:Small", "bn:BN", "dropout:Dropout", "target:Target", "grow:Grow", "anew:Anew", "uneven:Uneven",
        "gan_1d:GAN")  # fmt: skip
OWN = dict.fromkeys(FREE, ()) | {"centred:Centred": ("group_mean",), "fresh:Fresh": ("one_version",)}
CELLS = matrix((name, frozenset(needs)) for name, needs in OWN.items())
STEPS = 4


def spec(cell: Cell) -> dict:
    return spec_of(cell.task, strategy=cell.strategy.model_dump(), steps=STEPS, log={"every": 1, "to": []},
                   workers=1 if cell.strategy.label == "single" else 3)  # fmt: skip


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: f"{cell.task}-{cell.strategy.label}")
def test_a_cell_trains_or_says_why_not(cell):
    if not cell.trains:
        with pytest.raises(UsageError) as caught:
            job_of(spec(cell))
        assert cell.reason in str(caught.value)
        return
    trained = train(spec(cell))
    totals = [total / count for report in trained.reports for total, count in report.means.values()]
    assert totals
    assert all(math.isfinite(total) for total in totals)
    assert max(strategy.progress.version for strategy in trained.strategies) == STEPS
    assert {event.reason for event in trained.finished} == {"steps"}
    assert len(trained.finished) == len(trained.strategies)
    assert [event.version for event in trained.evaluated] == [STEPS]
    assert math.isfinite(trained.evaluated[0].metrics["eval/loss"])


def test_the_matrix_has_both_kinds_of_cells():
    assert {(cell.task, cell.strategy.label) for cell in CELLS if not cell.trains} == {
        (task, label)
        for task in ("centred:Centred", "fresh:Fresh")
        for label in ("parameter_server/async", "parameter_server/ssp", "local_sgd")
    }
    assert len(CELLS) == (len(OWN) + 2) * 6
