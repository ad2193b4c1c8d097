"""NASNet's cells and EfficientNet's rows: their known sizes, and that whatever a search decides can be trained."""

from __future__ import annotations

import pytest
import torch

from distml.population.evolution import RandomController
from distml.spec.architectures import OPERATIONS, CellBlockSpec, NasNetSpec, StageSpec, StagesSpec
from distml.spec.decisions import CellSpace, DecisionSpace, RowSpace
from distml.spec.loader import load_spec, with_values
from distml.tasks.architectures import NASNET_OPERATIONS, Cell, CellBlock, NasNet, StageLayer, Stages
from distml.tasks.build import build_task

SHAPES = {"digits": (8, 8), "cifar10": (3, 32, 32)}
SMALL = {
    "nasnet": {"name": "nasnet", "repeats": 1, "filters": 2},
    "stages": {"name": "stages", "stem": 8, "stem_stride": 1, "head": 8, "rows": [
        {"operation": "separable", "channels": 8, "layers": 1, "stride": 1 + index % 2} for index in range(7)]},
}  # fmt: skip


def count(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def base(data: str, model: dict):
    path = {"path": "cifar-10-batches-bin"} if data == "cifar10" else {}
    return load_spec({"distml": "v1", "name": "x", "stop": {"steps": 1},
                      "task": {"name": "classification", "data": data, **path, "model": model}})  # fmt: skip


def space_of(name: str, loaded) -> DecisionSpace:
    from distml.spec.architectures import NasNetSpace, StagesSpace

    return CellSpace(NasNetSpace(name="nasnet")) if name == "nasnet" else RowSpace(
        StagesSpace(name="stages"), loaded.job.task.model)  # fmt: skip


def test_stages_as_they_stand_are_efficientnet_b0():
    """5,288,548 parameters are those of torchvision's and of the authors' EfficientNet-B0."""
    with torch.device("meta"):
        assert count(Stages(StagesSpec(name="stages"), (3, 224, 224), 1000)) == 5_288_548


def test_nasnet_as_it_stands_is_about_as_large_as_nasnet_a():
    """6 @ 768 has 3.3 M; it also concatenates a cell's input, which is not a block's output, to the cell's."""
    with torch.device("meta"):
        size = count(NasNet(NasNetSpec(name="nasnet", repeats=6, filters=32), (3, 32, 32), 10))
    assert 0.9 * 3.3e6 < size < 3.3e6


@pytest.mark.parametrize("data", SHAPES)
@pytest.mark.parametrize("name", SMALL)
def test_whatever_is_decided_trains(name, data):
    loaded = base(data, SMALL[name])
    space = space_of(name, loaded)
    proposals = RandomController(space.options, seed=1)
    for _ in range(6):
        choices = proposals.propose()
        job = with_values(loaded, space.values(choices)).job
        model = build_task(job).build_model().train()
        logits = model(torch.randn(2, *SHAPES[data]))
        assert logits.shape == (2, 10)
        logits.square().sum().backward()
        assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("size", [1, 2, 5, 8])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_keeps_channels_and_has_its_stride(name, stride, size):
    operation = torch.nn.Sequential(*NASNET_OPERATIONS[name](4, stride)).eval()
    half = -(-size // stride)
    assert operation(torch.randn(2, 4, size, size)).shape == (2, 4, half, half)


def blocks(*inputs: tuple[int, int], combine: str = "add") -> list[CellBlockSpec]:
    return [CellBlockSpec(inputs=list(pair), operations=["identity", "identity"], combine=combine) for pair in inputs]


def test_a_cell_gives_the_blocks_that_nobody_takes():
    assert Cell(blocks((0, 1), (0, 1), (1, 1)), 4, 4, 2, False, False).channels == 3 * 2
    assert Cell(blocks((0, 1), (2, 1), (3, 3)), 4, 4, 2, False, False).channels == 1 * 2
    cell = Cell(blocks((0, 1), (2, 0), (0, 0)), 3, 5, 2, False, False).eval()
    previous, older = torch.randn(1, 3, 4, 4), torch.randn(1, 5, 4, 4)
    one, other = cell.previous(previous), cell.older(older)
    expected = torch.cat([one + other + one, one + one], 1)  # block 0 is taken by block 1
    torch.testing.assert_close(cell(previous, older), expected)


def test_blocks_after_the_stride_are_small_already():
    cell = Cell(blocks((0, 1), (2, 0)), 3, 5, 2, True, True).eval()
    assert cell(torch.randn(1, 3, 4, 4), torch.randn(1, 5, 8, 8)).shape == (1, 2, 2, 2)


def test_a_concatenation_is_one_and_an_addition_the_other():
    states = [torch.randn(1, 2, 3, 3), torch.randn(1, 2, 3, 3)]
    added = CellBlock(blocks((0, 1))[0], 2, False).eval()
    torch.testing.assert_close(added(states), states[0] + states[1])
    joined = CellBlock(blocks((0, 1), combine="concatenate")[0], 2, False).eval()
    torch.testing.assert_close(joined(states), joined.merge(torch.cat(states, 1)))


@pytest.mark.parametrize(
    ("skip", "channels", "stride", "around"),
    [("identity", 8, 1, True), ("identity", 8, 2, False), ("identity", 4, 1, False), ("none", 8, 1, False),
     ("pool", 8, 2, True), ("pool", 4, 2, False)],
)  # fmt: skip
def test_a_skip_is_there_where_shapes_allow_it(skip, channels, stride, around):
    spec = StageSpec(operation="mbconv_3", kernel=5, skip=skip, channels=channels)
    layer = StageLayer(spec, 8, stride).eval()
    images = torch.randn(2, 8, 6, 6)
    plain = layer.layers(images)
    assert (not torch.equal(layer(images), plain)) == around
    assert plain.shape == (2, channels, 6 // stride, 6 // stride)


def test_a_rows_settings_change_what_is_built():
    row = {"operation": "mbconv_6", "kernel": 3, "squeeze_excitation": 0.25, "skip": "identity", "channels": 8}
    first = count(StageLayer(StageSpec(**row), 8, 1))
    for key, value in (("operation", "mbconv_3"), ("operation", "conv"), ("kernel", 5), ("squeeze_excitation", 0.0),
                       ("channels", 16)):  # fmt: skip
        assert count(StageLayer(StageSpec(**{**row, key: value}), 8, 1)) != first


def test_same_seed_same_model():
    spec = NasNetSpec(name="nasnet", repeats=1, filters=2)
    models = []
    for _ in range(2):
        torch.manual_seed(3)
        models.append(NasNet(spec, (1, 8, 8), 10))
    assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True))
