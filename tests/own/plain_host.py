"""A host in plain Python: members are two numbers on the surface of `surrogate.py`. The oracle of the real hosts."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from distml.exchange.layout import Layout
from distml.population.host import Advanced, Answer, Copied, Gone, Ready
from distml.runtime.cut import Cut
from distml.spec.schema import JobSpec

LAYOUT = Layout.build([("theta", (2,), 0, 0)])


class Climber:
    """θ, trained by gradient descent; noise of its own stands for the stream."""

    def __init__(self, job: JobSpec, state: Cut | None) -> None:
        self.job, self.step, self.theta = job, 0, np.full(2, 0.9)
        self.stream = 0
        if state is not None:
            self.step, self.theta = state.version, state.shared["weights"].copy()
            self.stream = state.own[0]["stream"]

    def live(self, watch: Sequence[str]) -> dict[str, Any]:
        tree = self.job.model_dump(mode="python", by_alias=True)
        found = {}
        for path in watch:
            value: Any = tree
            for key in path.split("."):
                value = value[key]
            found[path] = value
        return found

    def advance(self, until: int | None) -> str | None:
        h = np.array([self.job.task.args["h0"], self.job.task.args["h1"]])
        limit = self.job.stop.steps
        while (until is None or self.step < until) and self.step < limit:
            self.theta -= self.job.optimizer.lr * 2.0 * h * self.theta
            self.step, self.stream = self.step + 1, self.stream + 1
        return "steps" if self.step >= limit else None

    def metrics(self) -> dict[str, float]:
        return {
            "eval/quality": 1.2 - float(np.square(self.theta).sum()),
            "train/loss": float(np.square(self.theta).sum()),
        }

    def state(self) -> Cut:
        shared = {
            "weights": self.theta.copy(),
            "moments": {},
            "carried": {},
            "clock": {"version": self.step, "examples": self.step},
        }
        return Cut(self.step, shared, {0: {"stream": self.stream}})


class PlainHost:
    """Members' commands are carried out one at a time.

    Args:
        order: which member's next command `wait` carries out; None: as they were given.
        gone: called before an interval with (member, step, values); what it returns makes the member `Gone`.
        loses: whether a member's states go with it when it dies.
    """

    hosts = ("here",)

    def __init__(
        self,
        slots: int,
        order: random.Random | None = None,
        gone: Callable[[str, int, JobSpec], str | None] | None = None,
        loses: bool = False,
        ignores: bool = False,
    ) -> None:
        self.slots, self.order, self.gone, self.loses, self.ignores = slots, order, gone, loses, ignores
        self.members: dict[str, Climber | None] = {}
        self.watch: dict[str, Sequence[str]] = {}
        self.commands: list[tuple[str, Callable[[], Answer | None]]] = []
        self.states: dict[int, tuple[str, Cut]] = {}
        self.said: list[tuple[Any, ...]] = []
        self.kept = 0

    # ------------------------------------------------------------------------------------------------------- commands
    def start(self, member: str, job: JobSpec, state: Any = None, watch: Sequence[str] = ()) -> None:
        if len(self.members) >= self.slots:
            raise RuntimeError("no free slot")
        assert member not in self.members
        self.said.append(("start", member))
        self.members[member], self.watch[member] = None, watch

        def work() -> Answer:
            if state is not None and state not in self.states:
                return Gone(member, "failed", "its state was lost", "start")
            climber = Climber(job, None if state is None else self.states[state][1])
            self.members[member] = climber
            return Ready(member, LAYOUT, {}, 2, climber.live(watch))

        self.commands.append((member, work))

    def advance(self, member: str, until: int | None, keep: bool) -> None:
        assert member in self.members
        self.said.append(("advance", member, until))

        def work() -> Answer:
            climber = self.members[member]
            assert climber is not None
            kind = self.gone(member, climber.step, climber.job) if self.gone is not None else None
            if kind is not None:
                return self._dies(member, kind, "train", climber.step)
            before = climber.step
            finished = climber.advance(until)
            metrics = climber.metrics()
            rows = [{"step": step, "wall_s": float(step)} for step in range(before + 1, climber.step)]
            rows.append({"step": climber.step, "wall_s": float(climber.step), **metrics})
            return Advanced(
                member,
                climber.step,
                metrics,
                rows,
                finished,
                self._keep(member, climber) if keep else None,
                float(climber.step),
            )

        self.commands.append((member, work))

    def copy(self, member: str, state: Any, job: JobSpec, keep: bool = False) -> None:
        assert member in self.members
        self.said.append(("copy", member))

        def work() -> Answer:
            climber = self.members[member]
            assert climber is not None
            kind = self.gone(f"copy {member}", climber.step, job) if self.gone is not None else None
            if kind is not None:
                return self._dies(member, kind, "copy", climber.step)
            if state not in self.states:
                return Gone(member, "failed", "the donor's state was lost", "copy", climber.step)
            climber.theta = self.states[state][1].shared["weights"].copy()
            if not self.ignores:
                climber.job = job
            return Copied(member, climber.live(self.watch[member]), 0.0, self._keep(member, climber) if keep else None)

        self.commands.append((member, work))

    def release(self, member: str) -> None:
        self.said.append(("release", member))
        self.members.pop(member, None)
        self.commands = [(name, work) for name, work in self.commands if name != member]

    # --------------------------------------------------------------------------------------------------------- states
    def fetch(self, state: Any) -> Cut:
        if state not in self.states:
            raise LookupError("it was lost")
        return self.states[state][1]

    def put(self, state: Cut) -> int:
        self.kept += 1
        self.states[self.kept] = ("", state)
        return self.kept

    def _keep(self, member: str, climber: Climber) -> int:
        self.kept += 1
        self.states[self.kept] = (member, climber.state())
        return self.kept

    def _dies(self, member: str, kind: str, phase: str, step: int) -> Gone:
        if kind == "died" and self.loses:
            self.states = {key: kept for key, kept in self.states.items() if kept[0] != member}
        return Gone(member, kind, f"{kind} on purpose", phase, step)  # type: ignore[arg-type]

    # -------------------------------------------------------------------------------------------------------- answers
    def wait(self, timeout_s: float) -> list[Answer]:
        if not self.commands:
            return []
        index = 0
        if self.order is not None:
            firsts = {name: place for place, (name, _) in reversed(list(enumerate(self.commands)))}
            index = firsts[self.order.choice(sorted(firsts))]
        _, work = self.commands.pop(index)
        answer = work()
        return [answer] if answer is not None else []

    def close(self) -> None:
        self.members.clear()
