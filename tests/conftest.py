"""What all tests share: one torch thread, so that sums have one order and cores are left to others; a token cache."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from own.bucket import BucketServer


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    os.environ["DISTML_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def _bucket_server() -> Iterator[BucketServer]:
    from own.bucket import bucket_server

    with bucket_server() as server:
        yield server


@pytest.fixture
def buckets(_bucket_server: BucketServer, monkeypatch: pytest.MonkeyPatch) -> BucketServer:
    """An S3 server on loopback, with the credentials for it in the environment."""
    from own.bucket import KEYS

    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)
    return _bucket_server


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)
