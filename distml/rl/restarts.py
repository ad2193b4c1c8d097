"""Environments that fail begin anew with other seeds, as often as a worker's may over all its streams."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TypeVar

from distml.rl.environments import EnvironmentFailed
from distml.tasks.base import Part

T = TypeVar("T")


class Restarts:
    """How often a worker's environments have failed; its task keeps it, since streams begin anew at checkpoints.

    Args:
        limit: how often they may be begun anew.
    """

    def __init__(self, limit: int = 0) -> None:
        self.limit, self.count = limit, 0

    def add(self, worker: int, error: EnvironmentFailed) -> None:
        """Count a failure and warn of it.

        Raises:
            EnvironmentFailed: it is one more than there may be.
        """
        self.count += 1
        if self.count > self.limit:
            raise EnvironmentFailed(
                f"worker {worker}: {error}; not begun anew again (limits.max_restarts: {self.limit})"
            ) from error
        warnings.warn(
            f"worker {worker}: {error}; its environments begin anew ({self.count} of {self.limit})", stacklevel=2
        )


class Restarting(ABC):
    """One worker's environments, begun from here on and anew wherever they fail.

    Attributes:
        failures: of this stream alone; its seeds follow from it, so they are the same in a run that was resumed.

    Raises:
        EnvironmentFailed: they fail more often than they may.
    """

    def __init__(self, part: Part, restarts: Restarts) -> None:
        self.part, self.restarts = part, restarts
        self.failures, self._has_begun = 0, False
        self.attempt(lambda: None)

    @abstractmethod
    def begin(self) -> None:
        """Make and reset the environments, with seeds that `failures` is mixed into."""

    def attempt(self, act: Callable[[], T]) -> T:
        """What `act` gives, of environments that did not fail meanwhile; nothing else of those that did is left."""
        while True:
            try:
                if not self._has_begun:
                    self.begin()
                    self._has_begun = True
                return act()
            except EnvironmentFailed as error:
                self.restarts.add(self.part.index, error)
                self.failures += 1
                self._has_begun = False
