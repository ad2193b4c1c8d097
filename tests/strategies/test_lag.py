"""Lag-aware training: prefetch and what it costs, steps divided by their staleness, who contributes how much."""

from __future__ import annotations

import pytest
from own.schedule import World

SSP = {"mode": "ssp", "servers": 2}
SEEDS = range(60)


# ------------------------------------------------------------------------------------------------------------ the clock
@pytest.mark.parametrize("phases", [1, 2])
@pytest.mark.parametrize("bound", [0, 1, 2, 3])
@pytest.mark.parametrize("prefetch", [False, True])
def test_in_every_schedule_the_bound_is_kept_and_nobody_waits_for_good(prefetch, bound, phases):
    seen = []
    for seed in SEEDS:
        strategy = {**SSP, "max_staleness": bound, "prefetch": prefetch}
        world = World(strategy, workers=3, phases=phases, seed=seed, steps=25, evaluate={"every": 6})
        world.play()
        assert max(world.staleness) <= bound
        assert (world.clock.version, world.clock.finished) == (25, "steps")
        assert world.evaluated.count(25) == 1
        assert len(world.evaluated) == len(set(world.evaluated))
        given_up = world.heads.keys() - world.answered  # at most what was under way when the run was over
        assert all(prefetch and ticket == world.tickets[rank] - 1 for rank, ticket in given_up)
        seen += world.staleness
    assert set(seen) == set(range(bound + 1))


@pytest.mark.parametrize(
    "mode", [{"mode": "async", "servers": 2}, {**SSP, "max_staleness": 0}, {**SSP, "max_staleness": 2}]
)
@pytest.mark.parametrize("prefetch", [False, True])
def test_workers_that_die_at_any_moment_hang_nobody_and_leave_nothing(prefetch, mode):
    for seed in SEEDS:
        world = World({**mode, "prefetch": prefetch}, workers=3, phases=1, seed=seed, steps=40, evaluate={"every": 7})
        world.play(deaths=4)
        assert (world.clock.version, world.clock.finished) == (40, "steps")
        assert len(world.evaluated) == len(set(world.evaluated))
        if mode["mode"] == "ssp":
            assert max(world.staleness) <= mode["max_staleness"]
        assert world.clock.held == []
