"""A model's parameters and gradients as views of two flat vectors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from own.gan_1d import Pair
from torch import nn

from distml.exchange.flat import TAIL, Carried, FlatModel, from_numpy, to_numpy


def flat_of(model: nn.Module, phases=("*",), groups=()) -> FlatModel:
    return FlatModel(model, phases, groups)


def test_parameters_and_gradients_are_views():
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    flat = flat_of(model)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    model(torch.ones(4, 3)).sum().backward()
    assert torch.equal(flat.phase_message(0), torch.tensor([4.0] * 8 + [0.0] * TAIL))
    flat.weights.fill_(2.0)
    assert all(bool((p == 2.0).all()) for p in model.parameters())
    assert model.weight.grad.untyped_storage().data_ptr() == flat.gradients.untyped_storage().data_ptr()
    assert model.weight.untyped_storage().data_ptr() == flat.weights.untyped_storage().data_ptr()


def test_gradients_accumulate_into_the_same_storage():
    model = nn.Linear(1, 1, bias=False)
    flat = flat_of(model)
    for _ in range(3):
        model(torch.ones(1, 1)).sum().backward()
    assert flat.gradients[0] == 3.0


def test_phases_and_groups_order_the_vector_and_each_phase_has_its_tail():
    model = Pair()
    flat = flat_of(model, ("d.*", "g.*"), ("*.bias",))
    names = [entry.name for entry in flat.layout.entries]
    assert names == ["d.0.weight", "d.2.weight", "d.0.bias", "d.2.bias",
                     "g.0.weight", "g.2.weight", "g.0.bias", "g.2.bias"]  # fmt: skip
    assert [segment.group for segment in flat.layout.segments] == [0, 1, 0, 1]
    d, g = (sum(p.numel() for p in part.parameters()) for part in (model.d, model.g))
    assert (flat.phase_message(0).numel(), flat.phase_message(1).numel()) == (d + TAIL, g + TAIL)
    flat.phase_message(0).fill_(1.0)
    assert all(bool((p.grad == 1).all()) for p in model.d.parameters())
    assert all(bool((p.grad == 0).all()) for p in model.g.parameters())
    flat.phase_message(1).fill_(2.0)
    assert all(bool((p.grad == 1).all()) for p in model.d.parameters())
    assert flat.gradients.numel() == d + g + 2 * TAIL
    in_order = (model.g[0].weight, model.g[2].weight, model.g[0].bias, model.g[2].bias)
    assert torch.equal(flat.phase_weights(1), torch.cat([p.data.reshape(-1) for p in in_order]))


def test_another_phases_parameters_are_constants():
    flat = flat_of(Pair(), ("d.*", "g.*"))
    for phase, own in ((0, "d"), (1, "g"), (0, "d")):
        flat.select_phase(phase)
        assert all(p.requires_grad == name.startswith(own) for name, p in flat.model.named_parameters())


def test_the_first_pattern_that_matches_owns_a_parameter():
    flat = flat_of(nn.Linear(2, 2), ("*",), ("*.nothing", "bias", "*"))
    assert {entry.name: entry.group for entry in flat.layout.entries} == {"bias": 2, "weight": 3}


def test_tied_parameters_are_one():
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    model[1].weight = model[0].weight
    flat = flat_of(model)
    assert [entry.name for entry in flat.layout.entries] == ["0.weight"]
    flat.weights.fill_(1.0)
    assert model[1].weight is model[0].weight
    model(torch.ones(1, 3)).sum().backward()
    assert bool((flat.gradients[:9] == 6.0).all())  # 3 from each use


def test_frozen_parameters_stay_out():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    model[0].requires_grad_(False)
    flat = flat_of(model)
    assert set(flat.frozen()) == {"0.weight", "0.bias"}
    assert flat.layout.numel == 3
    before = flat.fingerprint()
    model[0].bias.data.add_(1.0)
    assert flat.fingerprint() != before


def test_models_that_cannot_be_one_vector_are_refused():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1).double())
    with pytest.raises(ValueError, match=r"one type.*float32.*float64"):
        flat_of(model)
    with pytest.raises(ValueError, match="no parameter to train"):
        flat_of(nn.Linear(2, 2).requires_grad_(False))
    with pytest.raises(ValueError, match=r"'g\..*' matches no phase"):
        flat_of(Pair(), ("d.*",))


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_narrow_trained_parameters_are_refused(kind):
    with pytest.raises(ValueError, match=rf"must be float32 or float64, weight is {kind}"):
        flat_of(nn.Linear(2, 2).to(kind))
    model = nn.Sequential(nn.Linear(2, 2).to(kind).requires_grad_(False), nn.Linear(2, 2))  # frozen ones may be
    assert flat_of(model).layout.numel == 6


def test_carried_tensors_are_the_persistent_buffers():
    model = nn.BatchNorm1d(2)
    model.register_buffer("cache", torch.zeros(5), persistent=False)
    carried = Carried(model)
    assert set(carried.tensors) == {"running_mean", "running_var", "num_batches_tracked"}
    assert carried.floating == ["running_mean", "running_var"]
    carried.set_average(torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64))
    assert torch.equal(model.running_var, torch.tensor([3.0, 4.0]))
    assert torch.equal(carried.average_vector(), torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64))
    assert set(carried.integers()) == {"num_batches_tracked"}
    carried.load({"num_batches_tracked": np.array(7), "unknown": np.zeros(1)})
    assert int(model.num_batches_tracked) == 7


def test_read_only_memory_is_never_written():
    array = np.zeros(3)
    array.flags.writeable = False
    from_numpy(array).add_(1.0)
    assert array.sum() == 0.0
    assert to_numpy(torch.tensor([1.5], dtype=torch.bfloat16)).dtype == np.float32
