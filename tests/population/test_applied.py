"""Values that were asked for in short form are compared as what they resolve to."""

from __future__ import annotations

import pickle

import pytest
from own.sweeps import BASE, OWN

from distml.population.applied import asked, equal, same
from distml.population.member import MemberError
from distml.spec.loader import load_train, with_values

SPEC = {"distml": "v1", "name": "applied", **BASE}


def test_a_short_form_is_what_it_resolves_to():
    base = load_train(SPEC, directory=OWN)
    values = {"optimizer.schedule": "cosine", "optimizer.lr": 0.2}
    job = with_values(base, values).job
    resolved = asked(job, values)
    assert resolved["optimizer.schedule"]["name"] == "cosine"
    assert same(resolved, resolved)
    assert not same(resolved, asked(base.job, values))
    assert not same(values, resolved)  # the control: as it was written


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ({"a": [0.1, 2]}, {"a": (0.1 * (1 + 1e-14), 2)}, True),
        ({"a": [0.1]}, {"a": [0.1001]}, False),
        ({"a": 1}, {"a": 1, "b": 2}, False),
        (True, 1, True),
        (1, True, True),
        (2, True, False),
        (None, 0.0, False),
        ("a", "a", True),
    ],
)
def test_numbers_are_equal_within_rounding_below_blocks_and_lists_too(one, other, expected):
    assert equal(one, other) is expected


def test_a_member_s_error_survives_the_way_between_processes():
    error = MemberError("died", "rank 1: killed", "train", 40, "Traceback")
    found = pickle.loads(pickle.dumps(error))
    assert (str(found), vars(found)) == (str(error), vars(error))
