"""The logical index: blocks, shards, names; and what must not depend on the number of shards."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from own.oracle import job_of, spec_of

from distml.exchange.layout import MAX_BLOCK, MIN_BLOCK, Entry, Layout
from distml.strategies.optimizer import FlatOptimizer, block_square_norms
from distml.strategies.shard import shard_slice

ROWS = [("a.weight", (30, 20), 1, 0), ("a.bias", (30,), 1, 1), ("b.weight", (500,), 0, 0), ("b.bias", (), 0, 1),
        ("c", (7, 3, 50), 1, 0)]  # fmt: skip

rows = st.lists(st.tuples(st.integers(0, 700), st.integers(0, 2), st.integers(0, 2)), min_size=1, max_size=12).map(
    lambda found: [(f"p{i}", (n,), phase, group) for i, (n, phase, group) in enumerate(found)]
)


def test_entries_stand_by_phase_then_group_then_as_named():
    layout = Layout.build(ROWS)
    assert [entry.name for entry in layout.entries] == ["b.weight", "b.bias", "a.weight", "c", "a.bias"]
    assert [entry.offset for entry in layout.entries] == [0, 500, 501, 1101, 2151]
    assert layout.numel == 2181
    assert [(s.start, s.stop, s.phase, s.group) for s in layout.segments] == [
        (0, 500, 0, 0), (500, 501, 0, 1), (501, 2151, 1, 0), (2151, 2181, 1, 1)]  # fmt: skip
    assert [layout.phase_range(phase) for phase in range(3)] == [(0, 501), (501, 2181), (2181, 2181)]


def test_blocks_are_counted_from_their_segments_start():
    layout = Layout.build(ROWS)
    assert layout.block_size == MIN_BLOCK
    assert layout.blocks[:5] == ((0, 256), (256, 500), (500, 501), (501, 757), (757, 1013))
    assert layout.blocks[-2:] == ((2037, 2151), (2151, 2181))


def test_blocks_grow_with_the_model_up_to_a_limit():
    sizes = [Layout.build([("w", (numel,), 0, 0)]).block_size for numel in (1, 64 * 256, 64 * 256 + 1, 10**6, 10**9)]
    assert sizes == [256, 256, 512, 16384, MAX_BLOCK]


@settings(max_examples=60, deadline=None)
@given(rows, st.integers(1, 9))
def test_shards_cover_the_vector_once_and_are_cut_at_blocks(found, count):
    layout = Layout.build(found)
    shards = [layout.shard(index, count) for index in range(count)]
    assert (shards[0][0], shards[-1][1]) == (0, layout.numel)
    assert all(before[1] == after[0] for before, after in itertools.pairwise(shards))
    assert all(start <= stop for start, stop in shards)
    starts = {start for start, _ in layout.blocks} | {layout.numel}
    assert {start for start, _ in shards} <= starts
    if layout.numel:
        assert max(abs(start - layout.numel * k / count) for k, (start, _) in enumerate(shards)) <= layout.block_size


@settings(max_examples=40, deadline=None)
@given(rows)
def test_names_and_flatten_are_inverse(found):
    layout = Layout.build(found)
    vector = np.arange(layout.numel, dtype=np.float32)
    named = layout.names(vector)
    assert set(named) == {name for name, *_ in found}
    assert np.array_equal(layout.flatten(named), vector)
    assert Layout.from_json(layout.to_json()) == layout


def test_names_are_views_in_their_shapes():
    layout = Layout.build(ROWS)
    vector = np.zeros(layout.numel)
    layout.names(vector)["c"][6, 2, 49] = 1.0
    assert vector[2150] == 1.0
    assert layout.names(vector)["b.bias"].shape == ()
    assert layout.entries[1] == Entry("b.bias", (), 0, 1, 500, 1)


@pytest.mark.parametrize("phase", [0, 1])
@pytest.mark.parametrize("count", [1, 2, 3, 5, 8])
def test_block_norms_do_not_depend_on_the_number_of_shards(phase, count):
    layout = Layout.build(ROWS)
    start, stop = layout.phase_range(phase)
    gradient = torch.randn(stop - start, generator=torch.Generator().manual_seed(0))
    whole = block_square_norms(layout, gradient, (0, layout.numel), phase)
    shards = [layout.shard(index, count) for index in range(count)]
    parts = [block_square_norms(layout, gradient[shard_slice(layout, shard, phase)], shard, phase) for shard in shards]
    assert [norm for part in parts for norm in part] == whole
    assert sum(whole) == pytest.approx(float(gradient.double().square().sum()), rel=1e-12)


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw", "rmsprop"])
@pytest.mark.parametrize("count", [2, 3, 7])
def test_an_optimizer_per_shard_updates_as_the_whole_one(optimizer, count):
    groups = [{"match": "*", "lr": 0.05, "weight_decay": 0.1}]
    momentum = {"momentum": 0.9} if optimizer in ("sgd", "rmsprop") else {}
    spec = job_of(spec_of(optimizer={"name": optimizer, "lr": 0.01, "groups": groups, **momentum})).optimizer
    layout = Layout.build(ROWS)
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(layout.numel, generator=generator)
    whole, parts = weights.clone(), [weights[slice(*layout.shard(k, count))].clone() for k in range(count)]
    one = FlatOptimizer(spec, layout, (0, layout.numel), whole, None)
    many = [FlatOptimizer(spec, layout, layout.shard(k, count), whole, None) for k in range(count)]
    for version in range(4):
        for phase in (0, 1):
            start, stop = layout.phase_range(phase)
            gradient = torch.randn(stop - start, generator=generator)
            one.update(whole, gradient, phase, version)
            for k, own in enumerate(many):
                own.update(parts[k], gradient[shard_slice(layout, layout.shard(k, count), phase)], phase, version)
        for each in (one, *many):
            each.step_done()
    assert torch.equal(torch.cat(parts), whole)
    assert not torch.equal(whole, weights)
