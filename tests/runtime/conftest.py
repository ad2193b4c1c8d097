"""One small real Ray for all tests of this folder, with logical CPUs and a token of its own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from distml.runtime.authentication import prepare_authentication


@pytest.fixture(scope="session")
def shared_ray() -> Iterator[str]:
    """The address of a running Ray with four logical CPUs."""
    prepare_authentication(None)
    import ray

    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, object_store_memory=200 * 2**20)
    yield ray.get_runtime_context().gcs_address
    ray.shutdown()
