"""One small real Ray in this process, with logical CPUs and a token of its own."""

from __future__ import annotations

from collections.abc import Iterator

from distml.runtime.authentication import prepare_authentication


def small_ray() -> Iterator[str]:
    """Its address; it ends when the generator does."""
    prepare_authentication(None)
    import ray

    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False,
             object_store_memory=200 * 2**20)  # fmt: skip
    yield ray.get_runtime_context().gcs_address
    ray.shutdown()
