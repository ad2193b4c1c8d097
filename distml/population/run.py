"""`kind: population`: members train at the same time; now and then the worse copy the better and change their values.

    PopulationRun ── start, advance, copy, release ──▶ Host: slots, each with one member
    PopulationRun ◀── Ready, Advanced, Copied, Gone ── Host.wait
                  ── event ──▶ lineage.jsonl      ── reports ──▶ members/NN/metrics.jsonl
                  ── snapshot ──▶ Saver (a thread): members/NN/checkpoints, then population.json

Asynchronous: a member that answers is decided about at once, against the others' newest scores, and nobody waits.
Synchronous: a member that answers waits until all have; then all are decided about, in their order. A decision depends
on scores, the seed, the member and how many decisions there were about it, so never on who answered first.

A decision that copies gives an `Order`: load the donor's shared half, then apply the new values, then compare with what
is read back. A member that is lost (dead, failed, not finite) is started again from its own newest state, for the sake
of its budget, stream and random states, and given such an order. With more members than slots, orders come first, then
whoever is least advanced; the others are parked, each with its whole state. The run waits in `Host.wait` alone, which
answers `Gone` when a member no longer does. No torch and no ray here.
"""

from __future__ import annotations

import contextlib
import math
import random
import socket
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from distml.errors import DistmlError, RunError, UsageError
from distml.inject import of_member
from distml.population.applied import asked, same
from distml.population.closing import best_text, closing_table, test_scores
from distml.population.context import OverContext
from distml.population.exploit import exploit, goodness, ranked, successor
from distml.population.explore import explore, sample
from distml.population.folder import MEMBERS, MemberFolder
from distml.population.host import Advanced, Answer, Copied, Gone, Host, Ready
from distml.population.individual import Held, Individual, Order, Record, Values
from distml.population.lineage import Lineage
from distml.population.recovery import Recovery
from distml.population.saving import Best, Saver, Snapshot, read_population
from distml.runs.checkpoints import folder_name
from distml.runs.files import write_atomically
from distml.runs.history import Goal
from distml.runtime.endings import StopSignals, close_all, record_of_end
from distml.spec.messages import near
from distml.spec.population import NoExploitSpec, NoExploreSpec, PopulationSpec
from distml.spec.search_rules import space_of
from distml.strategies.agenda import Agenda

WAIT_S = 0.25  # so long a signal may wait for its answer
SHOW_EVERY_S = 1.0
DRAWS = 100  # of values that the base must take together, before it is taken that there are none


class PopulationRun:
    """One population.

    Args:
        context: what it runs in.
        host: who trains its members; by default what `context.where` says.
    """

    def __init__(self, context: OverContext, host: Host | None = None) -> None:
        assert isinstance(context.loaded.job, PopulationSpec)
        self.context, self.job, self.given = context, context.loaded.job, host
        self.directory, self.display = context.directory, context.display
        self.space = space_of(self.job)
        self.paths = tuple(dimension.path for dimension in self.space)
        self.metric, self.mode = self.job.objective.metric, self.job.objective.mode
        goal = self.job.stop.goal
        self.goal = None if goal is None else Goal(goal.metric, goal.at_least, goal.at_most)
        self.lineage = Lineage(self.directory.path)
        self.signals = StopSignals()
        self.hosts: Sequence[str] = [socket.gethostname()]
        self.folders: dict[str, MemberFolder] = {}
        self.members: dict[str, Individual] = {}
        self.whole: dict[str, Record] = {}  # the newest ones that belong together: synchronous, of one round
        self.durable: dict[str, Record] = {}  # of them those that the next snapshot has
        self.best: Best | None = None
        self.has_goal, self.is_built, self.last_cause = False, False, ""
        self.target, self.decided = self.job.every, 0  # synchronous: the step of the next decision, and of the last
        self.earlier_s, self.shown_at = 0.0, 0.0
        self.began: float | None = None  # when the first member was there

    # -------------------------------------------------------------------------------------------------------- the run
    def build(self, resume: bool) -> None:
        """Start the host, and find the state to go on from.

        Raises:
            UsageError: the spec, the resources or what is on the disk do not fit.
        """
        width = max(2, len(str(self.job.members - 1)))
        names = [f"{index:0{width}d}" for index in range(self.job.members)]
        self.folders = {name: MemberFolder(self.context.loaded, self.directory.path, name) for name in names}
        earlier = read_population(self.directory.path) if resume else None
        if earlier is None:
            self.members = {name: self._new(name) for name in names}
        injections = {name: of_member(self.context.inject, index) for index, name in enumerate(names)}
        self.host = self.given or make_host(self.context, self.job, injections)
        self.hosts = self.host.hosts
        self.signals.take()
        self.saver = Saver(self.directory.path, self.folders, self.host.fetch, self.metric)
        self.recovery = Recovery(self.host, self.folders, self.saver, self.display.note)
        if earlier is not None:
            self._recall(earlier)
        self.lineage.cut_back({name: one.events for name, one in self.members.items()})
        for one in self.members.values():
            folder = self.folders[one.name]
            folder.prepare(self.context.sources.files)
            folder.write_spec(one.own.values)
            folder.cut_back(one.own.step)
        self.whole = {name: one.record for name, one in self.members.items()}
        self.durable = dict(self.whole)
        self.saver.write(self._snapshot())
        self.is_built = True

    def train(self) -> None:
        """To the end; result.json says how it ended.

        Raises:
            UsageError: nothing could be trained. RunError: it failed later.
        """
        try:
            self._train()
        except UsageError as error:
            if not self.total_steps:
                raise
            raise RunError(str(error), role="population", phase="train", step=self.total_steps) from error

    def _train(self) -> None:
        self.shown_at = time.monotonic()
        self.display.start(f"population of {self.job.members}, {self.host.slots} at a time, {self.job.base.task.name}, "
                           f"{self.job.base.strategy.label}")  # fmt: skip
        for one in self.members.values():
            if not one.events:
                self._event(one, "start")
        self.signals.is_training = True
        self._schedule()
        while (reason := self._reason()) is None:
            slots = self.host.slots
            for answer in self.host.wait(WAIT_S):
                self.handle(answer)
                self._schedule()
            if self.host.slots > slots:  # there is room for more members at a time
                self._schedule()
            self._look_after_lost()
            self._show()
        self.signals.is_training = False
        self._finish(reason)

    def handle(self, answer: Answer) -> None:
        """Act on what a member has answered."""
        one = self.members[answer.member]
        if isinstance(answer, Ready):
            self._ready(one, answer)
        elif isinstance(answer, Advanced):
            self._advanced(one, answer)
        elif isinstance(answer, Copied):
            one.phase = "idle"
            self._carried_out(one, answer.applied, answer.seconds, answer.state)
        elif isinstance(answer, Gone):
            self._gone(one, answer)

    def _reason(self) -> str | None:
        """Why the whole population ends now, or None."""
        if self.signals.asked:
            return "requested"
        if self.has_goal:
            return "goal"
        if self.job.stop.seconds is not None and self.wall_s >= self.job.stop.seconds:
            return "seconds"
        if any(one.is_busy for one in self.members.values()):
            return None
        if all(one.record.error is not None for one in self.members.values()):
            raise RunError(f"all members failed; the last one: {self.last_cause}", role="population", phase="train",
                           step=self.total_steps)  # fmt: skip
        if all(one.is_over for one in self.members.values()):
            return "members"
        assert self.job.stop.steps is not None, "nobody has anything to do, and the population is not over"
        return "steps"

    @property
    def wall_s(self) -> float:
        """Seconds since the start, counted over resumes."""
        return self.earlier_s + (time.perf_counter() - self.began if self.began is not None else 0.0)

    @property
    def total_steps(self) -> int:
        """Of all members together."""
        return sum(one.own.step for one in self.members.values())

    # ------------------------------------------------------------------------------------------------------- the slots
    def _schedule(self) -> None:
        """Give every slot something to do: first what was decided, then whoever is least advanced."""
        if self.job.synchronous:
            self._decide_round()
        ready = [one for one in self.members.values() if not one.is_busy and self._has_work(one)]
        ready.sort(key=lambda one: (one.order is None, one.own.step, not one.is_in_slot, one.name))
        free = self.host.slots - sum(one.is_busy for one in self.members.values())
        chosen: list[Individual] = []
        for one in ready:
            if len(chosen) < free and (one.order is not None or self._has_budget()):
                chosen.append(one)
                if one.order is None and one.is_in_slot:
                    self._advance(one)
        for one in self.members.values():
            if one.phase == "idle" and one not in chosen and self._slots_lack(chosen):
                self.host.release(one.name)
                one.phase = "parked"
        for one in chosen:
            if not one.is_in_slot:
                self._start(one)
            elif one.order is not None:
                self._carry_out(one, one.order)

    def _has_work(self, one: Individual) -> bool:
        if one.is_over or one.phase == "lost":
            return False
        return one.order is not None or not self.job.synchronous or (one.own.step < self.target and not one.reason)

    def _has_budget(self) -> bool:
        """Whether another interval may begin: no more than `stop.steps` are spent or under way."""
        limit = self.job.stop.steps
        if limit is None:
            return True
        if self.job.synchronous:  # a round is for all or for nobody
            return self.job.members * self.decided < limit
        under_way = sum(self._until(one) - one.own.step for one in self.members.values() if one.phase == "training")
        return self.total_steps + under_way < limit

    def _slots_lack(self, chosen: Sequence[Individual]) -> bool:
        held = sum(one.is_in_slot for one in self.members.values())
        return held + sum(not one.is_in_slot for one in chosen) > self.host.slots

    def _until(self, one: Individual) -> int:
        every = self.job.every
        return self.target if self.job.synchronous else (one.own.step // every + 1) * every

    def _advance(self, one: Individual) -> None:
        one.phase = "training"
        self.host.advance(one.name, self._until(one), keep=True)

    def _start(self, one: Individual) -> None:
        """Bring a member into a slot, as it was with its newest state; what is to be done with it comes next."""
        one.phase = "starting"
        values = one.own.values
        if one.order is not None and (one.own.state is None or one.order.state is None):
            values = one.order.requested
        self.host.start(one.name, self.folders[one.name].spec(values).job, one.own.state, self.paths)

    def _carry_out(self, one: Individual, order: Order) -> None:
        """Copy, then apply; in this order, or what was loaded would overwrite what was applied."""
        one.phase = "copying"
        self.host.copy(one.name, order.state, self.folders[one.name].spec(order.requested).job, keep=True)

    # --------------------------------------------------------------------------------------------------------- answers
    def _ready(self, one: Individual, answer: Ready) -> None:
        one.phase = "idle"
        self.began = self.began or time.perf_counter()
        self.saver.layout, self.saver.frozen = answer.layout, answer.frozen
        order = one.order
        if order is not None and order.state is None:  # it begins with what it was ordered to have
            self._carried_out(one, answer.live, 0.0, one.own.state)
        elif order is None or one.own.state is not None:
            self._check(one, one.own.values, answer.live)

    def _advanced(self, one: Individual, answer: Advanced) -> None:
        self.folders[one.name].append(answer.rows)
        one.phase, one.losses_in_a_row = "idle", 0
        one.seconds, one.metrics, one.reason = answer.seconds, answer.metrics, answer.finished
        check_reported("objective.metric", self.metric, answer.metrics)
        if self.goal is not None:
            check_reported("stop.goal.metric", self.goal.metric, answer.metrics)
        one.own = Held(answer.step, one.own.values, answer.state, answer.metrics[self.metric], answer.metrics)
        one.measured = one.own
        if not self.job.synchronous:
            self._decide([one])

    def _gone(self, one: Individual, answer: Gone) -> None:
        before, order = one.phase, one.order
        self.last_cause = f"member {one.name}, {answer.phase}: {answer.cause}"
        if answer.kind == "failed" and not answer.step and not self.total_steps:
            raise UsageError(self.last_cause)
        one.phase, one.order, one.cause, one.died = "lost", None, answer.cause, answer.kind == "died"
        one.losses, one.losses_in_a_row = one.losses + 1, one.losses_in_a_row + 1
        if before == "copying" and order is not None and order.source is not None:
            donor = self.members[order.source[0]]
            donor.measured = self.recovery.secured(donor.measured)  # it may be what has died
        self.host.release(one.name)
        if one.losses_in_a_row > self.job.limits.max_restarts:
            self._give_up(one)
            return
        step, times = answer.step or one.own.step, f"{one.losses_in_a_row} of {self.job.limits.max_restarts}"
        self.display.note(
            f"member {one.name} was lost at step {step} ({answer.cause}); it is replaced ({times} in a row)"
        )
        if answer.kind == "died" or before != "training":
            self._rescue(one)
        if not self.job.synchronous or before != "training":
            self._replace(one)

    # ------------------------------------------------------------------------------------------------------- decisions
    def _decide_round(self) -> None:
        """Synchronous: decide about all, once all that train have come to `target`."""
        alive = [one for one in self.members.values() if not one.is_over]
        if not alive or any(one.is_busy or one.order is not None for one in alive):
            return
        if any(one.own.step < self.target and not one.reason and one.phase != "lost" for one in alive):
            return
        lost = [one for one in alive if one.phase == "lost"]
        if len(lost) < len(alive):
            self.decided, self.target = self.target, self.target + self.job.every
            self._decide([one for one in alive if one.phase != "lost"])
        for one in lost:
            self._replace(one)

    def _decide(self, ones: Sequence[Individual]) -> None:
        """Whether they go on, or copy another one, or are over; what changes nothing is done at once."""
        for one in ones:
            self._judge(one)
        for one in ones:
            one.decisions += 1
            one.order = None if one.reason or self.has_goal else self._order(one)
        for one in ones:
            if one.reason:
                self._event(one, "finish", reason=one.reason)
                one.phase = "over"
                self.host.release(one.name)
            elif one.order is None:
                self._event(one, "decide")
            if one.order is None:
                self._settle(one, one.own)

    def _judge(self, one: Individual) -> None:
        """Whether it is the best so far, and good enough to end the population."""
        held = one.own
        known = self.best.held.score if self.best is not None else None
        if math.isfinite(held.score or 0.0) and goodness(held.score, self.mode) > goodness(known, self.mode):
            self.best = Best(one.name, held)
        if self.goal is not None and self.goal.is_met(held.metrics[self.goal.metric]):
            self.has_goal = True

    def _order(self, one: Individual) -> Order | None:
        generator = random.Random(f"{self.job.seed}/decide/{one.name}/{one.decisions}")
        donor = exploit(self.job.exploit, one.name, self._scores(), self.mode, generator)
        if donor is not None:
            return self._copy_of(one, donor, "copy", generator)
        if isinstance(self.job.exploit, NoExploitSpec) and not isinstance(self.job.explore, NoExploreSpec):
            return Order("decide", self._explored(one, one.own.values, generator), one.own.state)
        return None

    def _copy_of(
        self, one: Individual, donor: str, event: Any, generator: random.Random, cause: str | None = None
    ) -> Order:
        held = self.members[donor].measured
        assert held is not None
        values = self._explored(one, held.values, generator)
        return Order(event, values, held.state, (donor, held.step, held.score), cause)

    def _explored(self, one: Individual, values: Values, generator: random.Random) -> Values:
        """Others to try; the same ones where the base takes nothing that was drawn."""
        drawn = self._drawn(one.name, lambda: explore(self.job.explore, self.space, values, generator))
        return values if drawn is None else drawn

    def _drawn(self, name: str, draw: Callable[[], Values]) -> Values | None:
        """The first draw that the base takes: what is allowed one by one need not be so together. None: there is none.

        All draws are from one generator, so that the same seed always comes to the same values.
        """
        for _ in range(DRAWS):
            values = draw()
            with contextlib.suppress(UsageError):
                self.folders[name].spec(values)
                return values
        return None

    def _scores(self) -> dict[str, float | None]:
        """Newest scores whose weights can be copied."""
        return {name: one.measured.score if one.measured is not None else None for name, one in self.members.items()}

    def _replace(self, one: Individual) -> None:
        """A lost member goes on as a clone of a good one; if nobody is good, from where it was, with other values.

        One whose process died, and which is better than that good one, goes on as it was: its values are not to blame.
        """
        generator = random.Random(f"{self.job.seed}/replace/{one.name}/{one.losses}")
        donor = successor(self.job.exploit, one.name, self._scores(), self.mode, generator)
        one.phase = "parked"
        values, own = one.own.values, one.own
        survives = (
            one.died and own.state is not None and math.isfinite(own.score if own.score is not None else math.nan)
        )
        if donor is not None and survives and not self._is_better(donor, own):
            one.order = Order("replace", values, None, None, one.cause)
            return
        if donor is not None:
            one.order = self._copy_of(one, donor, "replace", generator, one.cause)
            return
        if not isinstance(self.job.exploit, NoExploitSpec):
            values = self._explored(one, values, generator)
        one.order = Order("replace", values, None, None, one.cause)

    def _is_better(self, donor: str, own: Held) -> bool:
        return goodness(self._scores()[donor], self.mode) > goodness(own.score, self.mode)

    def _carried_out(self, one: Individual, applied: Mapping[str, Any], seconds: float, state: Any) -> None:
        """An order was carried out: check, record, and go on from there."""
        order = one.order
        assert order is not None
        more: dict[str, Any] = {"before": one.own.values, "requested": order.requested, "applied": dict(applied),
                                "equal": self._is_applied(one, order.requested, applied),
                                "seconds": seconds}  # fmt: skip
        if order.event != "decide":
            donor, step, score = order.source or (None, None, None)
            more |= {"from": donor, "from_step": step, "from_score": score}
        if order.cause is not None:
            more["cause"] = order.cause
        score = one.own.score if order.event == "decide" else None
        held = Held(one.own.step, order.requested, state, score, one.own.metrics)
        self._event(one, order.event, order.requested, **more)
        self._check(one, order.requested, applied)
        one.order = None
        one.copies += order.event == "copy"
        if order.event == "replace":
            one.own = held  # its record stays what was decided last: a resume meets the loss once more
        else:
            self._settle(one, held)

    def _is_applied(self, one: Individual, requested: Values, applied: Mapping[str, Any]) -> bool:
        return same(asked(self.folders[one.name].spec(requested).job, requested), applied)

    def _check(self, one: Individual, requested: Values, applied: Mapping[str, Any]) -> None:
        if not self._is_applied(one, requested, applied):
            found = {path: applied.get(path) for path in requested}
            raise RuntimeError(f"member {one.name} at step {one.own.step} computes with {found}, not with "
                               f"{dict(requested)}, which it was given")  # fmt: skip

    def _event(self, one: Individual, event: str, values: Values | None = None, **more: Any) -> None:
        one.events += 1
        self.lineage.append({"event": event, "wall_s": self.wall_s, "member": one.name, "step": one.own.step,
                             "score": one.score, "values": dict(values or one.own.values), **more})  # fmt: skip

    # ---------------------------------------------------------------------------------------------- states, and losses
    def _settle(self, one: Individual, held: Held) -> None:
        """A decision is carried out: a recovery goes on from here, and a resume too where a checkpoint is due."""
        one.settle(held)
        due = self.job.checkpoint.every
        if not self.job.synchronous:
            self.whole[one.name] = one.record
            if one.reason or one.decisions % due == 0:
                self.durable[one.name] = one.record
                self.saver.put(self._snapshot())
        elif all(other.is_over or other.record.held.step >= self.decided for other in self.members.values()):
            self.whole = {name: other.record for name, other in self.members.items()}
            if self.decided // self.job.every % due == 0:
                self.durable = dict(self.whole)
                self.saver.put(self._snapshot())

    def _snapshot(self) -> Snapshot:
        return Snapshot(self.wall_s, dict(self.durable), self.best)

    def _rescue(self, one: Individual) -> None:
        """What is left of a lost member's states is what a recovery and a resume go on from."""
        self.recovery.rescue(one)
        self.whole[one.name] = self.durable[one.name] = one.record

    def _look_after_lost(self) -> None:
        """Members in no slot whose states were kept by a process that died: they go on like lost ones."""
        while self.saver.lost:
            one = self.members[self.saver.lost.pop()]
            before = one.own.step
            if one.is_in_slot or one.phase == "lost" or one.record.error is not None:
                continue
            self._rescue(one)
            if one.own.step < before:
                one.cause, one.reason, one.died = "its state was lost with the process that kept it", None, True
                one.losses += 1
                self._replace(one)

    def _give_up(self, one: Individual) -> None:
        self.display.note(f"member {one.name} is given up: {one.cause}")
        self._event(one, "finish", reason="given up", cause=one.cause)
        one.phase, one.measured = "over", None
        one.record = replace(one.record, events=one.events, losses=one.losses, copies=one.copies, error=one.cause)
        self.whole[one.name] = self.durable[one.name] = one.record

    def _new(self, name: str) -> Individual:
        generator = random.Random(f"{self.job.seed}/start/{name}")
        values = self._drawn(name, lambda: sample(self.space, generator))
        if values is None:
            raise UsageError(f"space: of {DRAWS} combinations of {', '.join(self.paths)} the base takes none; "
                             f"{self._refusal(name, sample(self.space, generator))}; narrow the space")  # fmt: skip
        held = Held(0, values, None)
        return Individual(name, held, Record(held))

    def _refusal(self, name: str, values: Values) -> str:
        """Why the base does not take these values."""
        try:
            self.folders[name].spec(values)
        except UsageError as error:
            return f"with {dict(values)}: {error}"
        return ""

    def _recall(self, earlier: Mapping[str, Any]) -> None:
        """Go on from population.json and the checkpoints that it names."""
        self.earlier_s = float(earlier["wall_s"])
        for name, values in earlier["members"].items():
            self.members[name] = self._new(name)
            self.recovery.recall(self.members[name], values)
        best = earlier["best"]
        if best is not None and best["step"] in self.folders[best["member"]].store.steps():
            self.best = Best(best["member"], Held(best["step"], best["values"], None, best["value"], best["metrics"]))
            self.saver.best_saved = best["member"], best["step"]
        self.decided = max((one.own.step for one in self.members.values() if not one.is_over), default=0)
        self.decided -= self.decided % self.job.every
        self.target = self.decided + self.job.every
        self.display.note(f"resuming at {self.total_steps} steps of all members together")

    # --------------------------------------------------------------------------------------------------------- the end
    def _finish(self, reason: str) -> None:
        wall_s = self.wall_s
        status = "interrupted" if reason == "requested" else "done"
        if self.goal is not None and reason != "requested":
            status = "goal_met" if reason == "goal" else "goal_missed"
        self._keep_all()
        for one in self.members.values():
            self.folders[one.name].finish(one, "interrupted" if reason == "requested" else "done", self.metric)
        self.host.close()
        standing = self._standing() | {"wall_s": wall_s}
        metrics: dict[str, Any] = standing["metrics"]
        if self.began is not None:
            metrics["timing/start_s"] = self.began - self.context.started
        if self.best is not None:
            folder, held = self.folders[self.best.member], self.best.held
            write_atomically(self.directory.path / "best.yaml", best_text(folder.spec(held.values), self.job.name))
            if status != "interrupted":
                metrics |= self._tested(folder)
        for line in closing_table(self.members.values(), ranked(self._scores(), self.mode), self.metric):
            self.display.note(line)
        self.directory.result.update(status=status, **standing, checkpoint=self._best_checkpoint(), error=None)

    def _tested(self, folder: MemberFolder) -> dict[str, float]:
        """The best member on the test split; nothing where that fails, for all the training is not lost by it."""
        try:
            return test_scores(folder.path)
        except DistmlError as error:
            self.display.note(f"the best member, {folder.name}, was not measured on the test split: {error}")
            return {}

    def _standing(self) -> dict[str, Any]:
        """What result.json says of a population at any time."""
        best, metrics = None, {}
        if self.best is not None:
            held, metrics = self.best.held, dict(self.best.held.metrics)
            best = {"metric": self.metric, "value": held.score, "step": held.step, "member": self.best.member}
        return {"step": self.total_steps, "wall_s": self.wall_s, "best": best, "metrics": metrics}

    def _best_checkpoint(self) -> str | None:
        """Of the best member, relative to the run directory; None: it is not on the disk."""
        if self.best is None or self.best.held.step not in self.folders[self.best.member].store.steps():
            return None
        return f"{MEMBERS}/{self.best.member}/checkpoints/{folder_name(self.best.held.step)}"

    def _keep_all(self) -> None:
        """Write the newest snapshot, whether checkpoints are due or not."""
        while True:
            self.durable = dict(self.whole)
            self.saver.put(self._snapshot(), important=True)
            self.saver.wait()
            if not self.saver.lost:
                return
            while self.saver.lost:
                self._rescue(self.members[self.saver.lost.pop()])

    def _show(self) -> None:
        """Progress: on the terminal and in result.json."""
        now = time.monotonic()
        if self.began is None or now - self.shown_at < SHOW_EVERY_S:
            return
        self.shown_at = now
        scores = [score for score in self._scores().values() if score is not None]
        shown: dict[str, float | None] = {}
        if scores and self.best is not None:
            shown = {f"best {self.metric}": self.best.held.score, "median": statistics.median(scores)}
        self.display.report(self.total_steps, self._fraction(), {})
        if shown:
            self.display.evaluated(self.total_steps, shown)
        self.directory.result.update(durable=False, status="running", **self._standing())

    def _fraction(self) -> float:
        stop, own = self.job.stop, Agenda(self.job.base).budget_steps
        shares = [used / limit for used, limit in ((self.total_steps, stop.steps), (self.wall_s, stop.seconds),
                  (self.total_steps, own and own * self.job.members)) if limit]  # fmt: skip
        return min(1.0, max(shares, default=0.0))

    def fail(self, error: BaseException) -> None:
        """Record how the population failed, or that it was interrupted before it began; what is written stays."""
        with contextlib.suppress(DistmlError, OSError, AttributeError, LookupError):
            self._keep_all()
        ended = record_of_end(error, self.total_steps)
        with contextlib.suppress(OSError):  # a full disk must not hide the error itself
            for one in self.members.values():
                self.folders[one.name].finish(one, ended["status"], self.metric)
            known = self._standing() | {"checkpoint": self._best_checkpoint()} if self.is_built else {}
            self.directory.result.update(**known, **ended)

    def close(self) -> None:
        """End all processes and threads; safe to call twice."""
        closes = [self.host.close, self.saver.close] if hasattr(self, "saver") else []
        close_all(*closes, *(folder.close for folder in self.folders.values()), self.lineage.close)


def check_reported(key: str, metric: str, metrics: Mapping[str, float]) -> None:
    """Whether the first report already has what is watched.

    Args:
        key: of the spec, which names it.

    Raises:
        UsageError: it has not.
    """
    if metric not in metrics:
        known = sorted(name for name in metrics if name.startswith("eval/"))
        close = near(metric, known)
        hint = f"; did you mean {close!r}?" if close else ""
        raise UsageError(f"{key}: the base does not report {metric!r}; it reports {', '.join(known)}{hint}")


def make_host(context: OverContext, job: PopulationSpec, injections: Mapping[str, tuple[str, ...]]) -> Host:
    """The host that a population's context asks for."""
    from distml.launch.run import start_weights
    from distml.runtime.members import InlineHost

    first = start_weights(job.base)
    directory, slots = context.directory.path / MEMBERS, min(job.max_concurrent or job.members, job.members)
    if context.where == "inline":
        return InlineHost(job.base, context.sources, directory, slots, injections, first)
    from distml.runtime.ray_members import RayHost

    return RayHost(job.base, context.sources, directory, slots, context.address, injections, first,
                   context.display.note)  # fmt: skip
