"""The built-in tasks: their data, their splits, and that they are learned."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from own.oracle import spec_of, train
from sklearn.datasets import load_digits as sklearn_digits

from distml.spec.schema import MLPSpec
from distml.tasks.classification import Classification, load_digits
from distml.tasks.regression import Regression


def test_the_digits_are_scikit_learns():
    images, labels = load_digits()
    expected_images, expected_labels = sklearn_digits(return_X_y=True)
    np.testing.assert_array_equal(images.reshape(-1, 64).numpy() * 16, expected_images)
    np.testing.assert_array_equal(labels.numpy(), expected_labels)
    assert (images.shape, images.dtype, labels.dtype) == ((1797, 8, 8), torch.float32, torch.int64)


def test_splits_are_disjoint_cover_all_and_are_cut_by_the_seed():
    names = ("train", "validation", "test")
    first = [Classification("digits", MLPSpec(name="mlp"), split_seed=0).data(name) for name in names]
    assert [len(labels) for _, labels in first] == [1078, 360, 359]
    joined = torch.cat([part for part, _ in first])
    counted = [images.reshape(-1, 64).unique(dim=0, return_counts=True) for images in (joined, load_digits()[0])]
    assert all(torch.equal(mine, expected) for mine, expected in zip(*counted, strict=True))
    other = Classification("digits", MLPSpec(name="mlp"), split_seed=1).data("test")
    assert not torch.equal(first[2][0], other[0])


@pytest.mark.parametrize(("strategy", "workers"), [("single", 1), ("all_reduce", 2), ("parameter_server", 3)])
def test_digits_are_learned(strategy, workers):
    task = {"name": "classification", "data": "digits", "model": {"name": "mlp", "hidden": [32]}}
    trained = train(spec_of(task, strategy=strategy, workers=workers, steps=150, batch_size=64,
                            optimizer={"name": "adam", "lr": 0.01}))  # fmt: skip
    assert trained.evaluated[-1].metrics["eval/accuracy"] > 0.93
    untrained = train(spec_of(task, strategy=strategy, workers=workers, steps=1, optimizer={"name": "sgd", "lr": 0.0}))
    assert untrained.evaluated[-1].metrics["eval/accuracy"] < 0.3


def test_convolutions_are_learned():
    task = {"name": "classification", "data": "digits", "model": {"name": "cnn", "channels": [4], "hidden": 16}}
    trained = train(spec_of(task, steps=100, batch_size=64, optimizer={"name": "adam", "lr": 0.01}))
    assert trained.evaluated[-1].metrics["eval/accuracy"] > 0.8


def test_evaluations_do_not_depend_on_the_number_of_workers():
    task = {"name": "classification", "data": "digits", "model": {"name": "mlp", "hidden": [8]}}
    found = [train(spec_of(task, strategy="all_reduce", workers=workers, steps=5)).evaluated[-1].metrics
             for workers in (1, 2, 3)]  # fmt: skip
    assert found[0]["eval/accuracy"] == found[1]["eval/accuracy"] == found[2]["eval/accuracy"]
    assert found[0]["eval/loss"] == pytest.approx(found[2]["eval/loss"], abs=1e-6)


@pytest.mark.parametrize(("strategy", "workers"), [("single", 1), ("all_reduce", 3), ("parameter_server", 2)])
def test_regression_reaches_the_closed_form(strategy, workers):
    task = {"name": "regression", "features": 5, "rows": 100}
    trained = train(spec_of(task, strategy=strategy, workers=workers, steps=400, batch_size=60,
                            optimizer={"name": "sgd", "lr": 0.2}))  # fmt: skip
    solution = Regression(5, 100, 0.1).closed_form().numpy()
    found = np.concatenate([trained.named["weight"][0], trained.named["bias"]])
    assert np.abs(found - solution).max() < 1e-3
    noisy = np.concatenate([solution[:5] * 0, solution[5:]])
    assert np.abs(found - noisy).max() > 0.1


def test_the_closed_form_has_no_gradient():
    task = Regression(4, 50, 0.3, split_seed=2)
    model = task.build_model().double()
    solution = task.closed_form()
    with torch.no_grad():
        model.weight.copy_(solution[None, :4])
        model.bias.copy_(solution[4:])
    inputs, targets = task.data("train")
    task.loss(model, (inputs.double(), targets.double()), None).total.backward()
    assert model.weight.grad.abs().max() < 1e-10
    assert [len(task.data(split)[1]) for split in ("train", "validation", "test")] == [30, 10, 10]


def test_label_noise_makes_a_share_of_the_training_labels_wrong_and_no_others():
    def labels(split, **more):
        return Classification("digits", MLPSpec(name="mlp"), split_seed=3, **more).data(split)[1]

    clean, noisy = labels("train"), labels("train", label_noise=0.2)
    assert int((clean != noisy).sum()) == round(0.2 * len(clean))
    assert noisy[clean != noisy].unique().tolist() == list(range(10))
    assert torch.equal(noisy, labels("train", label_noise=0.2))
    assert int((labels("train", label_noise=1.0) == clean).sum()) == 0
    assert all(torch.equal(labels(split), labels(split, label_noise=0.2)) for split in ("validation", "test"))
