"""One rank of `distml bench transformer --part memory`: two steps of a run, and the bytes that this rank holds in them.

    python -m distml.bench.memory_rank CONFIG      (CONFIG: JSON with spec, rank, size, folder)

The first step makes all there is to be made. In the second, what is held is read after each micro-batch's backward (the
most counts: under stage 1 a rank has all gradients until the last one), and every storage that an operation makes is
counted while it lives; the most of them, with what was held before the step, is the peak.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from distml.errors import RunError
from distml.exchange.process_group import LOOPBACK, ProcessGroup, open_rendezvous
from distml.loop import Trainer
from distml.spec.loader import load_train
from distml.strategies.zero import Zero
from distml.tasks.build import build_task
from distml.tasks.data import micro_batches
from distml.tasks.footprint import LiveBytes

LIMIT_S = 120.0


def join(rank: int, size: int, folder: Path) -> ProcessGroup:
    """The group of all ranks; rank 0 says in a file where it is met.

    Raises:
        RunError: rank 0 has not said so in time.
    """
    place, listener = folder / "port", None
    if rank == 0:
        listener = open_rendezvous(LOOPBACK)
        place.with_suffix(".new").write_text(str(listener.getsockname()[1]))
        place.with_suffix(".new").rename(place)
    deadline = time.monotonic() + LIMIT_S
    while not place.exists():
        if time.monotonic() > deadline:
            raise RunError(f"waited {LIMIT_S:g} s for rank 0's port in {place}", phase="bench")
        time.sleep(0.05)
    port = int(place.read_text())
    return ProcessGroup(rank, size, LOOPBACK, port, listener, torch.device("cpu"), LIMIT_S)


def storages() -> set[int]:
    """Those of all tensors that are there, so that a view of one is not taken for something new."""
    there = [one for one in gc.get_objects() if isinstance(one, torch.Tensor)]
    return {tensor.untyped_storage()._cdata for tensor in there}


def held(trainer: Trainer) -> dict[str, Any]:
    """What this rank holds after the backwards of a step, and the most in the step."""
    strategy = trainer.strategy
    assert isinstance(strategy, Zero)
    batch = trainer.stream.next(trainer.model, strategy.progress)
    pieces = list(micro_batches(batch, trainer.job.micro_batch_size))
    before, found = strategy.engine.live_bytes(), []
    with LiveBytes(storages()) as live:
        for index, piece in enumerate(pieces, start=1):
            strategy.backward(strategy.loss(0, piece, index == len(pieces)))
            found.append(strategy.engine.live_bytes())
        strategy.exchange(0)
        strategy.step()
    most = max(found, key=lambda one: sum(one.values()))
    return {**most, "peak": before["weights"] + before["optimizer"] + live.peak}


def main(config: dict[str, Any]) -> None:
    """Train two steps."""
    torch.set_num_threads(1)
    job = load_train(config["spec"]).job
    rank, size, folder = int(config["rank"]), int(config["size"]), Path(config["folder"])
    trainer = Trainer(job, build_task(job), rank, size)
    trainer.build()
    trainer.connect(join(rank, size, folder), None)
    found = [held(trainer) for _ in range(2)][-1]
    (folder / f"held-{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
