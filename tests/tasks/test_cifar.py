"""CIFAR-10's binary files: what a record is, three splits, normalised images, and what is said when one is missing."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from distml.errors import UsageError
from distml.spec.loader import load_spec
from distml.tasks.build import build_task
from distml.tasks.cifar import RECORD, TEST, TRAINING, check_cifar10, load_cifar10
from distml.tasks.data import take

ROWS = 40  # of a file; the real ones have 10,000


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    where = tmp_path_factory.mktemp("cifar-10-batches-bin")
    generator = np.random.default_rng(0)
    for index, name in enumerate((*TRAINING, *TEST)):
        rows = generator.integers(0, 256, (ROWS, RECORD), dtype=np.uint8)
        rows[:, 0] = generator.integers(0, 10, ROWS)
        rows[:, 1 : 1 + 1024] //= 2  # red is darker
        rows[:, -1] = index  # the last blue pixel says which file
        rows.tofile(where / name)
    return where


def test_splits_cover_the_training_images_once_and_the_test_is_the_official_one(folder):
    splits = load_cifar10(folder, 0)
    assert {name: len(images) for name, images in splits.items()} == {"train": 180, "validation": 20, "test": ROWS}
    joined = torch.cat([splits["train"].pixels, splits["validation"].pixels]).reshape(200, -1)
    raw = np.concatenate([np.fromfile(folder / name, np.uint8).reshape(-1, RECORD)[:, 1:] for name in TRAINING])
    assert sorted(map(bytes, joined.numpy())) == sorted(map(bytes, raw))
    assert (splits["test"].pixels[:, 2, 31, 31] == 5).all()
    assert not torch.equal(load_cifar10(folder, 1)["validation"].pixels, splits["validation"].pixels)


def test_a_record_is_a_label_and_three_planes(folder):
    test = load_cifar10(folder, 0)["test"]
    rows = np.fromfile(folder / TEST[0], np.uint8).reshape(-1, RECORD)
    assert test.labels.tolist() == rows[:, 0].tolist()
    assert int(test.pixels[7, 1, 3, 5]) == rows[7, 1 + 1024 + 3 * 32 + 5]


def test_images_are_normalised_per_channel_by_the_training_split(folder):
    splits = load_cifar10(folder, 0)
    images, labels = take(splits["train"], torch.arange(180))
    assert (images.dtype, images.shape, labels.shape) == (torch.float32, (180, 3, 32, 32), (180,))
    torch.testing.assert_close(images.mean((0, 2, 3)), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(images.std((0, 2, 3)), torch.ones(3), atol=1e-3, rtol=0)
    test, _ = take(splits["test"], torch.tensor([3]))
    expected = (splits["test"].pixels[3:4] / 255.0 - splits["train"].mean) / splits["train"].scale
    torch.testing.assert_close(test, expected)


@pytest.mark.parametrize("model", ["mlp", "cnn", {"name": "nasnet", "repeats": 1, "filters": 2}])
def test_every_model_takes_them(folder, model):
    task = {"name": "classification", "data": "cifar10", "path": str(folder), "model": model}
    job = load_spec({"distml": "v1", "name": "x", "task": task, "stop": {"steps": 1}}).job
    built = build_task(job)
    images, _ = take(built.data("validation"), torch.arange(2))
    assert built.build_model()(images).shape == (2, 10)


def test_what_is_missing_or_torn_is_named_with_what_to_download(folder, tmp_path):
    with pytest.raises(UsageError, match=r"data_batch_1.bin is missing; download cifar-10-binary.tar.gz from https"):
        check_cifar10(tmp_path)
    for name in (*TRAINING, *TEST):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    check_cifar10(tmp_path)
    (tmp_path / TEST[0]).write_bytes(b"x" * 100)
    with pytest.raises(UsageError, match=r"test_batch.bin has 100 bytes, no multiple of 3073"):
        load_cifar10(tmp_path, 5)


@pytest.mark.parametrize(
    ("task", "said"),
    [({"data": "cifar10"}, "add task.path"), ({"path": "x"}, "task.path is for data cifar10, the data is digits"),
     ({"model": {"name": "nasnet", "normal": [{"inputs": [0, 2], "operations": ["identity", "max_3x3"]}]}},
      "task.model.normal.0.inputs.1 is 2, but block 0 can take only 0 and 1")],
)  # fmt: skip
def test_what_does_not_go_together_is_refused(task, said):
    with pytest.raises(UsageError, match=said):
        load_spec({"distml": "v1", "name": "x", "task": {"name": "classification", **task}, "stop": {"steps": 1}})


def test_a_path_is_beside_the_spec(folder):
    (folder / "job.yaml").write_text(
        "distml: v1\nname: x\ntask: {name: classification, data: cifar10, path: .}\nstop: {steps: 1}\n"
    )
    assert load_spec(folder / "job.yaml").job.task.path == str(folder)
