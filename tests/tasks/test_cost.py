"""What models cost, against products counted by hand."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from distml.errors import UsageError
from distml.spec.architectures import StagesSpec
from distml.spec.loader import load_spec
from distml.tasks.architectures import Stages
from distml.tasks.cost import cost_of

MLP = 64 * 32 + 32 * 10
CNN = 8 * 8 * 9 * 4 + 4 * 4 * 4 * 16 + 16 * 10  # 3 x 3 convolution on 8 x 8, then 4 x 4 of 4 channels


def job(**task):
    return load_spec(
        {"distml": "v1", "name": "x", "task": {"name": "classification", **task}, "stop": {"steps": 1}}
    ).job


@pytest.mark.parametrize(
    ("model", "products", "parameters"),
    [({"name": "mlp", "hidden": [32]}, MLP, MLP + 42),
     ({"name": "cnn", "channels": [4], "hidden": 16}, CNN, 9 * 4 + 4 + 64 * 16 + 16 + 16 * 10 + 10)],
)  # fmt: skip
def test_products_count_twice_and_parameters_once(model, products, parameters):
    assert cost_of(job(model=model), "flops") == 2 * products
    assert cost_of(job(model=model), "parameters") == parameters


def test_other_tasks_are_counted_by_their_losses():
    regression = load_spec({"distml": "v1", "name": "x", "task": {"name": "regression", "features": 8},
                            "stop": {"steps": 1}}).job  # fmt: skip
    assert cost_of(regression, "flops") == 2 * 8
    assert cost_of(regression, "parameters") == 9


def test_images_need_not_be_there():
    cifar = job(data="cifar10", path="nowhere", model={"name": "mlp", "hidden": [4]})
    assert cost_of(cifar, "flops") == 2 * (3072 * 4 + 4 * 10)


def test_efficientnet_b0_has_its_published_multiply_adds():
    with torch.device("meta"):
        model = Stages(StagesSpec(name="stages"), (3, 224, 224), 1000).eval()
        with FlopCounterMode(display=False) as counter:
            model(torch.zeros(1, 3, 224, 224))
    assert counter.get_total_flops() / 2 == pytest.approx(0.386e9, rel=0.01)


def test_a_task_that_acts_has_no_example():
    acting = load_spec("a2c-cartpole").job
    with pytest.raises(UsageError, match="flops cannot be counted"):
        cost_of(acting, "flops")
    assert cost_of(acting, "parameters") > 0
