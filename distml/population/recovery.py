"""What is left of members: of those that were lost with their processes, and of those of an earlier run.

States of a member may be in its process alone. What can still be had of them is brought to where nobody's death takes
it away; else the member goes on from its newest good checkpoint, which also has its record; else it begins anew.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from distml.errors import UsageError
from distml.population.folder import MemberFolder
from distml.population.host import Host
from distml.population.individual import Held, Individual, Record
from distml.population.saving import RECORD, Saver, cut_of, record_of
from distml.runs.checkpoints import Checkpoint, CheckpointDamaged
from distml.strategies.agenda import Agenda, Spent

JUDGED = ("goal", "patience")  # why a member's run is over that no budget changes


class Recovery:
    """Brings members back to a state that they can go on from.

    Args:
        note: shows a line.
    """

    def __init__(
        self, host: Host, folders: Mapping[str, MemberFolder], saver: Saver, note: Callable[[str], None]
    ) -> None:
        self.host, self.folders, self.saver, self.note = host, folders, saver, note

    # -------------------------------------------------------------------------------------------------- lost processes
    def rescue(self, one: Individual) -> None:
        """Bring what is left of a lost member's states to safety: they may have been in its process."""
        before, measured = one.own, one.measured
        held = self.secured(one.own)
        one.measured = held if measured is one.own else self.secured(measured)
        if held is not None and one.own is one.record.held:
            one.record = replace(one.record, held=held)
        elif (kept := self.secured(one.record.held)) is not None:
            one.record = replace(one.record, held=kept)
        else:
            one.record = self._from_disk(one)
        one.own = held or one.record.held
        if one.own.step < before.step:
            self.folders[one.name].cut_back(one.own.step)

    def secured(self, held: Held | None) -> Held | None:
        """The same, kept by nobody's process but the run's; None: it is lost."""
        if held is None or held.state is None:
            return held
        try:
            return replace(held, state=self.host.put(self.host.fetch(held.state)))
        except LookupError:
            return None

    def _from_disk(self, one: Individual) -> Record:
        """The newest checkpoint of a member, and with it its record; else it begins anew."""
        self.saver.wait()
        found = self._newest(one.name)
        if found is None:
            return Record(Held(0, one.own.values, None), None, one.decisions, one.events, one.losses, one.copies)
        return replace(self._record(*found), events=one.events, losses=one.losses, copies=one.copies)

    # ---------------------------------------------------------------------------------------------------- earlier runs
    def recall(self, one: Individual, values: Mapping[str, Any]) -> None:
        """Let a new member be what population.json says of it, with the checkpoint that it names."""
        one.record = record = self._renewed(one.name, self._recalled(one, values))
        one.own = record.held
        one.decisions, one.events, one.losses = record.decisions, record.events, record.losses
        one.copies = record.copies
        one.seconds, one.reason = record.seconds, record.reason
        one.measured = record.held if record.held.score is not None else None
        if record.reason is not None or record.error is not None:
            one.phase = "over"
        self.saver.saved[one.name] = record.held.step

    def _recalled(self, one: Individual, values: Mapping[str, Any]) -> Record:
        if not values["checkpoint"]:
            return record_of(values, None)
        name = one.name
        try:
            return self._record(self.folders[name].store.load(int(values["step"])), values)
        except (CheckpointDamaged, UsageError) as error:
            found = self._newest(name)
            if found is None:
                self.note(f"member {name}: {error}; it has no other one, and begins anew")
                return one.record
            self.note(f"member {name}: {error}; it goes on from an older one")
            return self._record(*found)

    def _renewed(self, name: str, record: Record) -> Record:
        """A member whose budget was spent goes on where its base has been given more of it since."""
        folder, state = self.folders[name], record.held.state
        if record.reason in (None, *JUDGED) or state is None or not folder.has_other_stop():
            return record
        job = folder.spec(record.held.values).job
        spent = Agenda(job).spent(Spent.of(self.host.fetch(state).shared["clock"]))
        return record if spent is not None else replace(record, reason=None)

    def _newest(self, name: str) -> tuple[Checkpoint, Mapping[str, Any]] | None:
        checkpoint = self.folders[name].store.newest_good(self.note)
        if checkpoint is None or RECORD not in checkpoint.state:
            return None
        return checkpoint, checkpoint.state[RECORD]

    def _record(self, checkpoint: Checkpoint, values: Mapping[str, Any]) -> Record:
        return record_of(values, self.host.put(cut_of(checkpoint)))
