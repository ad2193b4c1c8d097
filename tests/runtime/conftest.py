"""One small real Ray for all tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from own.small_ray import small_ray


@pytest.fixture(scope="session")
def shared_ray() -> Iterator[str]:
    """The address of a running Ray with four logical CPUs."""
    yield from small_ray()
