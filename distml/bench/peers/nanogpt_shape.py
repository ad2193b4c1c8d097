"""The peer of `distml bench transformer --part gpu`: plain PyTorch at the shape of nanoGPT's bench.py, on one device.

    python -m distml.bench.peers.nanogpt_shape CONFIG      (CONFIG: JSON)

bfloat16 autocast, torch.compile of the whole model, fused AdamW, clipping at 1, random tokens; it prints one JSON line
with the seconds of each window of ten steps.
"""

from __future__ import annotations

import itertools
import json
import sys
import time
from typing import Any

import torch

from distml.bench.peers.plain_gpt import PlainGPT, train


def main(config: dict[str, Any]) -> None:
    """Train `config["steps"]` steps of `config["batch"]` texts of `config["block"]` tokens."""
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    device = torch.device(config["device"])
    vocabulary, block, batch = config["vocabulary"], config["block"], config["batch"]
    model = PlainGPT(vocabulary, block, config["layers"], config["heads"], config["width"]).to(device)
    tokens = torch.randint(vocabulary, (batch, block + 1), device=device)
    marks: list[float] = []

    def logged(step: int, loss: float) -> None:
        marks.append(time.perf_counter())  # `loss` is a number: the device has come this far

    compiled: Any = torch.compile(model) if config["compile"] else model
    train(compiled, lambda step: (tokens[:, :-1], tokens[:, 1:]), config["steps"], lambda step: 6e-4, logged,
          autocast=torch.bfloat16, betas=(0.9, 0.95), weight_decay=0.1)  # fmt: skip
    print(json.dumps({"windows_s": [later - earlier for earlier, later in itertools.pairwise(marks)]}))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
