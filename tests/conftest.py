"""What all tests share: one torch thread, so that sums have one order and cores are left to others."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)
