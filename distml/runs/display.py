"""What a run says on stdout while it goes: a live panel on a terminal, plain lines everywhere else."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, TypeAlias

from distml.runs.units import duration, number

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

Metrics: TypeAlias = Mapping[str, float | None]

PLAIN_INTERVAL_S = 1.0
_RATES = {"throughput/examples_per_s": "examples/s", "throughput/frames_per_s": "frames/s",
          "throughput/tokens_per_s": "tokens/s"}  # fmt: skip
_STALENESS = ("staleness/mean", "staleness/max")


class Display(ABC):
    """What the driver tells. As a context manager it leaves the terminal as it was, whatever happens inside."""

    @abstractmethod
    def start(self, headline: str) -> None:
        """The run begins."""

    @abstractmethod
    def report(self, step: int, fraction: float, metrics: Metrics) -> None:
        """A report of training.

        Args:
            fraction: share of the budget that is spent, 0 to 1.
            metrics: under their full names; None for one that is not a finite number.
        """

    @abstractmethod
    def evaluated(self, step: int, metrics: Metrics) -> None:
        """An evaluation; always shown."""

    @abstractmethod
    def note(self, text: str) -> None:
        """An event, such as a restart; always shown."""

    @abstractmethod
    def finish(self, lines: Iterable[str]) -> None:
        """The run has ended: what it came to."""

    def close(self) -> None:  # noqa: B027 (a display without a terminal has nothing to give back)
        """Give the terminal back; safe to call twice."""

    def __enter__(self) -> Display:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def make_display(console_is_terminal: bool, name: str, budget: str) -> Display:
    """The display for where stdout goes.

    Args:
        name: of the run.
        budget: what the fraction is of, for example `400 steps`.
    """
    return LiveDisplay(name, budget) if console_is_terminal else PlainDisplay(name, budget)


class PlainDisplay(Display):
    """One line per event; reports at most once a second."""

    def __init__(self, name: str, budget: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._name, self._budget, self._clock = name, budget, clock
        self._eta = _Eta(clock)
        self._last_report: float | None = None

    def start(self, headline: str) -> None:
        self._print(f"{self._name}: {headline} ({self._budget})")

    def report(self, step: int, fraction: float, metrics: Metrics) -> None:
        left = self._eta.seconds_left(fraction)
        now = self._clock()
        if self._last_report is not None and now - self._last_report < PLAIN_INTERVAL_S:
            return
        self._last_report = now
        parts = [f"step {step}", f"{fraction:4.0%}", *_training(metrics)]
        self._print("  ".join([*parts, f"{duration(left)} left"] if left is not None else parts))

    def evaluated(self, step: int, metrics: Metrics) -> None:
        self._print("  ".join([f"step {step}", *(f"{name} {number(value)}" for name, value in metrics.items())]))

    def note(self, text: str) -> None:
        self._print(text)

    def finish(self, lines: Iterable[str]) -> None:
        for line in lines:
            self._print(line)

    def _print(self, text: str) -> None:
        try:
            print(text, flush=True)
        except BrokenPipeError:  # `distml run … | head`: nobody reads on, which is no reason to stop training
            self._print = lambda text: None  # type: ignore[method-assign]


class LiveDisplay(Display):
    """A panel that is redrawn in place, with evaluations and events scrolling above it."""

    def __init__(
        self, name: str, budget: str, console: Console | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        from rich.console import Console
        from rich.live import Live

        self._name, self._budget = name, budget
        self._eta = _Eta(clock)
        self._console = console or Console(highlight=False)
        self._step, self._fraction = 0, 0.0
        self._left: float | None = None
        self._training: list[str] = []
        self._evaluation = ""
        # Last: it draws the panel at once.
        self._live = Live(console=self._console, get_renderable=self._panel, refresh_per_second=4, transient=True)

    def start(self, headline: str) -> None:
        self._say(headline, "bold")
        self._live.start()

    def report(self, step: int, fraction: float, metrics: Metrics) -> None:
        self._step, self._fraction, self._training = step, min(max(fraction, 0.0), 1.0), _training(metrics)
        self._left = self._eta.seconds_left(fraction)

    def evaluated(self, step: int, metrics: Metrics) -> None:
        scores = "  ".join(f"{name} {number(value)}" for name, value in metrics.items())
        self._evaluation = f"{scores}  (step {step})"
        self._say(f"step {step}  {scores}")

    def note(self, text: str) -> None:
        self._say(text, "yellow")

    def finish(self, lines: Iterable[str]) -> None:
        self.close()
        for line in lines:
            self._say(line)

    def close(self) -> None:
        self._live.stop()

    def _say(self, text: str, style: str = "") -> None:
        from rich.text import Text

        self._console.print(Text(text, style=style))  # as Text: a bracket in a message is no markup

    def _panel(self) -> RenderableType:
        from rich.console import Group
        from rich.panel import Panel
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        bar = Table.grid(padding=(0, 1), expand=True)
        bar.add_column(ratio=1)
        bar.add_column(justify="right", no_wrap=True)
        left = "" if self._left is None else f"{duration(self._left)} left"
        status = Text(f"{self._fraction:4.0%} of {self._budget}  {left}".rstrip())
        bar.add_row(ProgressBar(total=1.0, completed=self._fraction), status)
        rows: list[RenderableType] = [bar, Text("  ".join([f"step {self._step}", *self._training]))]
        if self._evaluation:
            rows.append(Text(self._evaluation, style="cyan"))
        return Panel(Group(*rows), title=Text(self._name), title_align="left")


class _Eta:
    """Seconds left, from the pace since the first report: a resumed run's earlier part took none of this time."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._first: tuple[float, float] | None = None

    def seconds_left(self, fraction: float) -> float | None:
        now = self._clock()
        if self._first is None:
            self._first = now, fraction
        began, from_fraction = self._first
        if fraction <= from_fraction:
            return None
        return (now - began) / (fraction - from_fraction) * max(1.0 - fraction, 0.0)


def _training(metrics: Metrics) -> list[str]:
    """Loss, rate and staleness out of a report, as far as they are in it."""
    parts = [f"train/loss {number(metrics['train/loss'])}"] if "train/loss" in metrics else []
    parts += [f"{metrics[key]:,.0f} {unit}" for key, unit in _RATES.items() if metrics.get(key) is not None]
    if all(metrics.get(key) is not None for key in _STALENESS):
        parts.append(f"staleness {metrics[_STALENESS[0]]:.1f} (max {metrics[_STALENESS[1]]:.0f})")
    return parts


class SilentDisplay(Display):
    """Shows nothing: the default from Python, where the caller reads the result."""

    def start(self, headline: str) -> None: ...

    def report(self, step: int, fraction: float, metrics: Metrics) -> None: ...

    def evaluated(self, step: int, metrics: Metrics) -> None: ...

    def note(self, text: str) -> None: ...

    def finish(self, lines: Iterable[str]) -> None: ...
