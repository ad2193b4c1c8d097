"""A member with several workers: a `WorkerGroup`, which ends at each pause and begins again from the cut it ended with.

Of the group's events it keeps the snapshots of the version it ends with: these are the cut. A process that is lost is
the end of the member: whoever decides about it puts another in its place.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from distml.errors import RunError
from distml.events import Evaluated, Event, Failed, Finished, Snapshot
from distml.exchange.flat import CopyVector, copy_vector
from distml.exchange.layout import Array, Layout
from distml.population.transfer import changed_shape, moved
from distml.runtime.cut import Cut, named_tensors, reshard
from distml.runtime.group import Description, Lost, WorkerGroup
from distml.spec.schema import JobSpec
from distml.strategies.agenda import Agenda


class Grouped:
    """What `Member` drives where there are several workers.

    Args:
        start_weights: what `init` starts from.
    """

    def __init__(self, job: JobSpec, group: WorkerGroup, start_weights: Mapping[str, Array] | None) -> None:
        self.job, self.group, self.start_weights = job, group, start_weights
        self.agenda = Agenda(job)
        self.cut: Cut | None = None
        self.is_loaded = False

    def build(self) -> None:
        """Start the workers, and build the task in each.

        Raises:
            UsageError: the task or the resources do not fit.
        """
        self.description: Description = self.group.build(self.start_weights)

    @property
    def layout(self) -> Layout:
        """Of the trained weights."""
        return self.description.layout

    def frozen(self) -> dict[str, Array]:
        """The parameters that are not trained."""
        return self.description.frozen

    @property
    def version(self) -> int:
        """Of the weights."""
        return self.cut.version if self.cut is not None else 0

    # ------------------------------------------------------------------------------------------------------- training
    def run(self, until: int | None) -> Iterator[Event | Lost]:
        """The events up to a version; what cannot be gone on from is the last one."""
        self.cuts: dict[int, Cut] = {}
        self.halves: dict[int, tuple[int, dict[str, Any]]] = {}
        end, judged = self.version, False
        try:
            self.group.begin(self.cut, until)
        except RunError as error:  # a process has died since
            yield Lost(error.role, error.message, error.phase)
            return
        self.is_loaded = True
        for event in self.group.events():
            if isinstance(event, Snapshot):
                self._keep(event)
                continue
            if isinstance(event, Evaluated) and not judged:
                with contextlib.suppress(ValueError):  # the worker has said so already
                    self.agenda.judge(event.version, event.metrics)
                if event.finished in ("goal", "patience"):
                    end, judged = event.version, True
            elif isinstance(event, Finished) and not judged:
                end = max(end, event.version)
            yield event
            if isinstance(event, (Failed, Lost)):
                return
        if end > self.version:
            yield from self._settle(end)

    def _keep(self, event: Snapshot) -> None:
        """A rank's half, and where it speaks for the version the shared half too; the newest versions stay."""
        self.halves[event.rank] = event.version, event.own
        if event.carried is None:
            return
        shared = event.shared or self.group.shared_state(event.version, event.carried)
        if shared is not None:
            self.cuts[event.version] = Cut(event.version, shared)
        for old in sorted(self.cuts)[:-3]:
            del self.cuts[old]

    def _settle(self, end: int) -> Iterator[Event]:
        """From now on the member is at this version."""
        cut = self.cuts.get(end)
        if cut is None:
            yield Failed(0, end, "checkpoint", f"the state of step {end} was not handed over", "")
            return
        cut.own = {rank: half for rank, (version, half) in sorted(self.halves.items()) if version <= end}
        self.agenda.evaluations = [pair for pair in self.agenda.evaluations if pair[0] <= end]
        self.cut = self._remembering(cut)

    def _remembering(self, cut: Cut) -> Cut:
        """With all evaluations so far, and the optimiser's block that made it."""
        rule = self.job.optimizer.model_dump(mode="json", by_alias=True)
        clock = {**cut.shared["clock"], "agenda": self.agenda.state(), "optimizer": rule}
        return Cut(cut.version, {**cut.shared, "clock": clock}, cut.own, cut.averaged)

    def evaluate(self, split: str) -> dict[str, float]:
        """With the weights of now."""
        sums = self.group.evaluate(split, named_tensors(self.state(), self.layout, self.frozen())["model"])
        prefix = "eval" if split == "validation" else split
        return {f"{prefix}/{name}": total / count for name, (total, count) in sorted(sums.items()) if count}

    # ---------------------------------------------------------------------------------------------------------- state
    def standing(self) -> tuple[dict[str, Any], dict[int, dict[str, Any]]]:
        """The clock, and the own halves by rank: the state without its vectors."""
        if self.cut is not None:
            return self.cut.shared["clock"], self.cut.own
        return {"version": 0, "examples": 0, "frames": 0, "updates": 0, "agenda": self.agenda.state()}, {}

    def state(self, copy: CopyVector = copy_vector) -> Cut:
        """What it ended with at the last pause: no copy is needed, as nobody writes into it.

        Raises:
            RuntimeError: there was none yet.
        """
        if self.cut is None:
            raise RuntimeError("a member with several workers has no state before its first interval")
        return self.cut

    def load(self, cut: Cut) -> None:
        """Begin from a state next time."""
        self.cut = reshard(cut, self.job.resources.workers)
        self.agenda.load_state(cut.shared["clock"]["agenda"])
        self.is_loaded = False

    def become(self, job: JobSpec) -> None:
        """Go on with another spec: tasks, streams and optimisers are built anew by the same processes.

        Raises:
            UsageError: the model would change its shape.
        """
        if job == self.job:
            return
        before, old = self.layout, self.job
        self.description = self.group.take(job)
        self.job, self.is_loaded = job, False
        evaluations = self.agenda.evaluations
        self.agenda = Agenda(job)
        self.agenda.evaluations = evaluations
        if self.layout != before:
            raise changed_shape(old, job)
        if self.cut is not None and job.batch_size != old.batch_size:
            self.cut.own = {rank: moved(half, old, job) for rank, half in self.cut.own.items()}

    def live(self, paths: Sequence[str]) -> dict[str, Any]:
        """Values as they are, once the state is loaded."""
        if not self.is_loaded:
            self.group.load(self.cut)
            self.is_loaded = True
        return self.group.live(paths)

    @property
    def activity(self) -> tuple[str, float]:
        """What it is doing, and for how many seconds nothing has moved in this process."""
        return self.group.activity

    def close(self) -> None:
        """End threads and processes."""
        self.group.close()
