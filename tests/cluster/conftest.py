"""Clusters of several hosts on this machine."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from distml.bench import hosts
from distml.bench.network import missing


@pytest.fixture(scope="module")
def cluster() -> Iterator[hosts.Cluster]:
    """A head that is kept free of work and two nodes with two CPUs each."""
    reason = missing()
    if reason is not None:
        pytest.skip(reason)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")  # as a private Ray of this process leaves it
        with hosts.cluster(nodes=3) as made:
            yield made
