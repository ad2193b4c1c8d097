"""A peer of `distml bench exchange`: a parameter server as Ray's documentation teaches to write one.

A server actor holds model and optimiser; worker actors compute gradients from weights that they are given; the driver
passes references on. Weights travel as a dict of tensors and gradients as a list of arrays, one object per message.
The gradients of a synchronous iteration are averaged here, so that the update is everyone else's.

Usage: python -m distml.bench.peers.server_pattern CONFIG
"""

from __future__ import annotations

from typing import Any

import numpy as np
import ray
import torch
from torch import Tensor, nn

from distml.bench.peers.blocks import Batches, StepClock, build_model, build_optimizer, configuration

PATIENCE_S = 120.0


@ray.remote
class ParameterServer:
    """The one that holds the weights."""

    def __init__(self, config: dict[str, Any]) -> None:
        torch.set_num_threads(1)
        self.model = build_model(config["width"])
        self.optimizer = build_optimizer(config["optimizer"], self.model)

    def apply_gradients(self, *gradients: list[Any]) -> dict[str, Tensor]:
        """One update with the mean of these gradients; the new weights."""
        mean = [np.stack(parts).mean(axis=0) for parts in zip(*gradients, strict=True)]
        self.optimizer.zero_grad()
        for parameter, gradient in zip(self.model.parameters(), mean, strict=True):
            parameter.grad = torch.from_numpy(gradient)
        self.optimizer.step()
        return self.get_weights()

    def get_weights(self) -> dict[str, Tensor]:
        """The weights by name."""
        return {name: tensor.cpu() for name, tensor in self.model.state_dict().items()}


@ray.remote
class DataWorker:
    """One that computes gradients."""

    def __init__(self, config: dict[str, Any], rank: int) -> None:
        torch.set_num_threads(1)
        self.model = build_model(config["width"])
        self.batches, self.clock = Batches(config["width"], rank, config["batch"]), StepClock(config["folder"], rank)

    def compute_gradients(self, weights: dict[str, Tensor]) -> list[Any]:
        """The gradient of the next batch at these weights."""
        self.clock.tick()
        self.model.load_state_dict(weights)
        inputs, targets = next(self.batches)
        self.model.zero_grad()
        nn.functional.mse_loss(self.model(inputs), targets).backward()  # type: ignore[no-untyped-call]
        return [parameter.grad.cpu().numpy() for parameter in self.model.parameters() if parameter.grad is not None]

    def finish(self) -> None:
        """Write the rest of the times."""
        self.clock.flush()


def synchronous(server: Any, workers: list[Any], steps: int) -> None:
    """Every iteration waits for all workers."""
    weights = server.get_weights.remote()
    for step in range(steps):
        gradients = [worker.compute_gradients.remote(weights) for worker in workers]
        weights = server.apply_gradients.remote(*gradients)
        if step % 10 == 9:
            ray.get(weights, timeout=PATIENCE_S)


def asynchronous(server: Any, workers: list[Any], steps: int) -> None:
    """Each gradient is applied when it comes, and its worker goes on with the weights that this made."""
    weights = server.get_weights.remote()
    pending = {worker.compute_gradients.remote(weights): worker for worker in workers}
    for _ in range(steps * len(workers)):
        ready, _ = ray.wait(list(pending), timeout=PATIENCE_S)
        worker = pending.pop(ready[0])
        weights = server.apply_gradients.remote(ready[0])
        pending[worker.compute_gradients.remote(weights)] = worker


def main(config: dict[str, Any]) -> None:
    """Run it on all workers."""
    ray.init(address=config["address"])
    server_class: Any = ParameterServer
    worker_class: Any = DataWorker
    server = server_class.remote(config)
    workers = [worker_class.remote(config, rank) for rank in range(config["workers"])]
    (asynchronous if config["mode"] == "async" else synchronous)(server, workers, config["steps"])
    ray.get([worker.finish.remote() for worker in workers], timeout=PATIENCE_S)


if __name__ == "__main__":
    main(configuration())
