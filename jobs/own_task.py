import torch
from torch import nn
from torch.nn.functional import cross_entropy

from distml import Mean, Task


class TwoMoons(Task):
    """Which of two interleaved half circles a point lies on."""

    def build_model(self):
        return nn.Sequential(nn.Linear(2, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 2))

    def data(self, split):
        draw = torch.Generator().manual_seed(["train", "validation", "test"].index(split))
        label, angle = torch.arange(2000) % 2, torch.pi * torch.rand(2000, generator=draw)
        upper, lower = (angle.cos(), angle.sin()), (1 - angle.cos(), 0.5 - angle.sin())
        moons = torch.where(label == 0, torch.stack(upper), torch.stack(lower)).T
        return moons + 0.1 * torch.randn(2000, 2, generator=draw), label

    def loss(self, model, batch, progress):
        points, labels = batch
        return cross_entropy(model(points), labels)

    def evaluate(self, model, part, progress):
        points, labels = part.data()
        correct = (model(points).argmax(dim=1) == labels).sum()
        return {"accuracy": Mean(float(correct), len(labels))}
