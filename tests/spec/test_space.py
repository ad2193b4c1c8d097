"""Search spaces: what may stand there, what is drawn from them, and how a block of another name takes its keys."""

from __future__ import annotations

import math
import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distml.spec.loader import load_train, with_values
from distml.spec.space import KINDS, Dimension, parse_space

DRAWS = 10_000
DIMENSIONS = [
    Dimension("a", "uniform", -1.0, 2.0),
    Dimension("a", "loguniform", 1e-5, 10.0),
    Dimension("a", "randint", 0, 3),
    Dimension("a", "lograndint", 1, 64),
    Dimension("a", "choice", values=(1, "x", True, 0.5)),
]


def refused(raw) -> str:
    problems = parse_space({"optimizer.lr": raw})[1]
    assert len(problems) == 1
    return problems[0].text


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        (0.1, "space.optimizer.lr must be one of {uniform: […]}, {loguniform: […]}, {randint: […]}, {lograndint: […]}, "
              "{choice: […]}, got 0.1"),
        ({"uniform": [0, 1], "choice": [1, 2]}, "space.optimizer.lr must be one of"),
        ({"loguniforn": [1, 2]}, "unknown kind of dimension 'loguniforn'; did you mean 'loguniform'?"),
        ({"gauss": [1, 2]}, "unknown kind of dimension 'gauss'; known: uniform, loguniform, randint, lograndint, "),
        ({"eps": {"uniform": [1, 2]}}, "space.optimizer.lr is no dimension; write its path with dots, as "
                                       "optimizer.lr.eps: …"),
        ({"uniform": [1]}, "uniform must be [lower, upper], got a list"),
        ({"uniform": 3}, "uniform must be [lower, upper], got 3"),
        ({"uniform": [True, 3]}, "uniform must be two numbers, got true"),
        ({"uniform": [0, 10**400]}, "uniform must be two numbers, got 1000"),
        ({"uniform": [0, math.inf]}, "uniform must be two numbers, got inf"),
        ({"uniform": [math.nan, 1]}, "uniform must be two numbers, got nan"),
        ({"randint": [1, 2.5]}, "randint must be two integers, got 2.5"),
        ({"uniform": ["a", 2]}, "uniform must be two numbers, got the string 'a'"),
        ({"uniform": [3, 1]}, "uniform: the lower end 3 is not below the upper end 1; swap them or use a fixed value"),
        ({"randint": [1, 1]}, "randint: the lower end 1 is not below the upper end 1"),
        ({"loguniform": [0, 1]}, "loguniform: the lower end must be above 0, got 0; use uniform or a positive end"),
        ({"lograndint": [-2, 8]}, "lograndint: the lower end must be above 0, got -2; use randint or a positive end"),
        ({"choice": [1]}, "choice must be a list of at least two values, got a list"),
        ({"choice": "ab"}, "choice must be a list of at least two values, got the string 'ab'"),
        ({"choice": ["a", "b", "a"]}, "choice lists 'a' twice; each value may stand there once"),
        ({"choice": [1, 1.0]}, "choice lists 1.0 twice"),
    ],
)  # fmt: skip
def test_what_is_no_dimension(raw, text):
    assert text in refused(raw)


def test_a_space_without_dimensions():
    (problem,) = parse_space({})[1]
    assert problem.text.startswith("space has no dimension; add one")


def test_true_and_1_are_two_choices():
    assert not parse_space({"a": {"choice": [1, True]}})[1]


@pytest.mark.parametrize("dimension", DIMENSIONS, ids=lambda one: one.kind)
def test_draws_stay_in_bounds_and_keep_their_type(dimension):
    generator = random.Random(0)
    drawn = [dimension.sample(generator) for _ in range(DRAWS)]
    assert all(dimension.contains(value) for value in drawn)
    kind = {"uniform": float, "loguniform": float, "randint": int, "lograndint": int}.get(dimension.kind)
    assert kind is None or {type(value) for value in drawn} == {kind}


@pytest.mark.parametrize("dimension", [one for one in DIMENSIONS if one.is_integer or one.kind == "choice"],
                         ids=lambda one: one.kind)  # fmt: skip
def test_every_value_is_drawn_as_often_as_it_should(dimension):
    """Five standard deviations of a binomial; of lograndint each integer has log((n + 1/2) / (n - 1/2))."""
    generator = random.Random(1)
    seen = Counter(map(repr, (dimension.sample(generator) for _ in range(DRAWS))))
    if dimension.kind == "choice":
        expected = {repr(value): 1.0 for value in dimension.values}
    else:
        whole = range(int(dimension.ends[0]), int(dimension.ends[1]) + 1)
        expected = {repr(n): math.log((n + 0.5) / (n - 0.5)) if dimension.is_log else 1.0 for n in whole}
    total = sum(expected.values())
    assert seen.keys() <= expected.keys()
    for value, weight in expected.items():
        share = weight / total
        assert abs(seen[value] - DRAWS * share) <= 5 * math.sqrt(DRAWS * share * (1 - share)) + 1, value


def test_half_of_a_log_interval_lies_below_its_geometric_middle():
    generator = random.Random(2)
    low = sum(Dimension("a", "loguniform", 1e-4, 1.0).sample(generator) < 1e-2 for _ in range(DRAWS))
    assert abs(low - DRAWS / 2) < 5 * math.sqrt(DRAWS) / 2


@given(low=st.integers(-50, 50), width=st.integers(1, 50), value=st.floats(-1e6, 1e6))
@settings(max_examples=200, deadline=None)
def test_clipping_ends_inside_with_the_type(low, width, value):
    for kind in ("uniform", "randint"):
        dimension = Dimension("a", kind, low, low + width)
        clipped = dimension.clip(value)
        assert dimension.contains(clipped)
        assert type(clipped) is (int if kind == "randint" else float)
        assert dimension.clip(clipped) == clipped


@pytest.mark.parametrize("dimension", DIMENSIONS, ids=lambda one: one.kind)
def test_what_is_written_reads_back(dimension):
    written = list(dimension.values) if dimension.kind == "choice" else [dimension.low, dimension.high]
    space, problems = parse_space({"a": {dimension.kind: written}})
    assert not problems
    assert space == (dimension,)
    assert dimension.kind in KINDS


def test_membership_knows_types():
    assert not Dimension("a", "randint", 1, 4).contains(2.0)
    assert not Dimension("a", "randint", 0, 4).contains(True)
    assert not Dimension("a", "choice", values=(1, 2)).contains(True)
    assert Dimension("a", "uniform", 0, 4).contains(2)


# ------------------------------------------------------------------------------------------------- values over a base
@pytest.fixture(scope="module")
def base():
    return load_train("digits-single", {"optimizer.lr": 0.25, "optimizer.weight_decay": 0.5, "optimizer.eps": 0.125})


def test_another_name_keeps_the_keys_that_both_have(base):
    changed = with_values(base, {"optimizer.name": "sgd"}).job.optimizer
    assert (changed.name, changed.lr, changed.weight_decay) == ("sgd", 0.25, 0.5)
    assert with_values(base, {"optimizer.name": "rmsprop"}).job.optimizer.eps == 0.125
    assert with_values(base, {"optimizer.name": "adamw"}).job == base.job


def test_a_key_of_the_same_name_and_another_type_is_not_kept(base):
    model = with_values(base, {"task.model.name": "cnn"}).job.task.model
    assert (model.name, model.hidden) == ("cnn", 64)  # the other one's is a list


def test_what_chooses_a_block_goes_before_what_lies_in_it(base):
    values = {"optimizer.momentum": 0.5, "optimizer.lr": 0.75, "optimizer.name": "sgd"}
    optimizer = with_values(base, values).job.optimizer
    assert (optimizer.name, optimizer.momentum, optimizer.lr, optimizer.weight_decay) == ("sgd", 0.5, 0.75, 0.5)
    whole = {"optimizer.lr": 0.75, "optimizer": {"name": "sgd", "momentum": 0.25}}
    optimizer = with_values(base, whole).job.optimizer
    assert (optimizer.name, optimizer.momentum, optimizer.lr, optimizer.weight_decay) == ("sgd", 0.25, 0.75, 0.0)
