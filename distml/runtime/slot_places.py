"""Where the slots of a host of members are: a group of bundles for each, waited for while others have the room.

The first group is waited for as a training job's is; without it nobody could train. The others are asked for after it,
and a slot counts from when its group has nodes: on a busy cluster a population or a search begins with fewer members at
a time, and more train as room comes free. No torch here.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from ray.util.placement_group import PlacementGroup, placement_group_table, remove_placement_group

from distml.runtime.placement import PLACED, Outlook, cluster_nodes, reserve, situation, wait_for_place
from distml.runtime.planning import groups_that_fit, request_of
from distml.spec.schema import JobSpec

SHORTLY_S = 1.0  # that the others' groups may take on a cluster that has room for them
POLL_S = 0.02
LOOK_EVERY_S = 1.0


class SlotPlaces:
    """The groups of all slots, and which of them have nodes now.

    Args:
        base: what each member asks for.
        outlook: of such a job.
        say: told what is waited for.
    """

    def __init__(self, base: JobSpec, outlook: Outlook, say: Callable[[str], None]) -> None:
        self.base, self.outlook, self.say = base, outlook, say
        self.groups: list[PlacementGroup] = []
        self.placed: set[int] = set()
        self.looked = 0.0

    def take(self, wanted: int) -> int:
        """Ask for as many slots as are wanted and the whole cluster has room for; how many these are.

        Raises:
            UsageError: after `limits.start_s` not even one has a place.
        """
        nodes = [node for node in cluster_nodes() if node.id not in self.outlook.reserved]
        number = max(1, min(wanted, groups_that_fit(nodes, request_of(self.base))))
        self.groups = [reserve(self.base, self.outlook.reserved)]
        wait_for_place(self.groups[0], self.base, self.say, awaits=self.outlook.awaits)
        self.groups += [reserve(self.base, self.outlook.reserved) for _ in range(number - 1)]
        deadline = time.monotonic() + SHORTLY_S
        self._look()
        while len(self.placed) < number and time.monotonic() < deadline:
            time.sleep(POLL_S)
            self._look()
        if len(self.placed) < number:
            self.say(f"{self._standing()}, the others wait for theirs: {self.situation()}")
        return number

    def look(self, at_once: bool = False) -> set[int]:
        """Learn which slots have a place, now and then while some have none; those that have come to one."""
        before = self.placed
        if at_once or (len(before) < len(self.groups) and time.monotonic() - self.looked >= LOOK_EVERY_S):
            self._look()
        came = self.placed - before
        if came:
            self.say(self._standing())
        return came

    def _look(self) -> None:
        self.looked, table = time.monotonic(), placement_group_table()
        self.placed = {index for index, group in enumerate(self.groups)
                       if table.get(group.id.hex(), {}).get("state") == PLACED}  # fmt: skip

    def _standing(self) -> str:
        return f"{len(self.placed)} of {len(self.groups)} slots for members have a place"

    def situation(self) -> str:
        """What is free, and who has the rest."""
        return situation(self.groups, self.base, self.outlook.awaits)

    def close(self) -> None:
        """Give all of them back."""
        for group in self.groups:
            remove_placement_group(group)
        self.groups, self.placed = [], set()
