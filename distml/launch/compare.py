"""`distml compare`: finished runs held against each other, or one spec run once per variation and then compared."""

from __future__ import annotations

import itertools
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from distml.errors import DistmlError, ExitCode, UsageError
from distml.launch.run import BUDGETS, Result, run
from distml.runs.display import SilentDisplay, make_display
from distml.runs.report import compare as compare_runs
from distml.runs.units import duration, number
from distml.spec.loader import load_spec
from distml.spec.matrix import strategy_variants
from distml.spec.schema import SingleSpec

DEFAULT_OUT = Path("runs/compare")
_OPENING, _CLOSING = "[{(", "]})"


@dataclass(frozen=True)
class Variation:
    """One of the runs that `--vary` asks for.

    Attributes:
        label: what tells it from the others; part of a folder's name.
        overrides: `KEY=VALUE` texts.
    """

    label: str
    overrides: tuple[str, ...]


def compare_command(
    sources: list[str], vary: list[str], overrides: list[str], out: Path | None, runtime: str | None = None
) -> int:
    """Compare run directories, or run one spec's variations and compare those.

    Args:
        sources: run directories, or one spec.
        vary: `KEY=A,B,…`; several make every combination.
        overrides: `KEY=VALUE` for all variations.
        out: where compare.png and compare.json go, and the variations' run directories; `runs/compare` by default.
        runtime: `inline` or `ray` for all variations; by default as `distml run` chooses.

    Returns:
        0 if any run finished, else the first failure's exit code; 130 when interrupted.

    Raises:
        UsageError: the arguments do not say what to compare.
    """
    out = DEFAULT_OUT if out is None else out
    runs = [source for source in sources if is_run(source)]
    if len(runs) == len(sources):
        if vary or overrides:
            raise UsageError("--vary and --set are for comparing variations of a spec; these are finished runs")
        print_comparison([Path(source) for source in runs], out)
        return int(ExitCode.DONE)
    if runs:
        other = next(source for source in sources if source not in runs)
        raise UsageError(f"compare takes run directories or one spec; {runs[0]} is a run directory, {other} is not")
    if len(sources) > 1:
        raise UsageError(f"compare takes one spec or several run directories; {sources[0]} is not a run directory")
    if not vary:
        load_spec(sources[0], overrides)  # a misspelt path is the likelier mistake
        raise UsageError(f"{sources[0]} is one spec: say what to vary, for example --vary strategy=all_reduce,single")
    return run_variations(sources[0], variations(vary), overrides, out, runtime)


def is_run(source: str) -> bool:
    """Whether a path is a run directory."""
    return any((Path(source) / name).is_file() for name in ("spec.yaml", "result.json"))


def print_comparison(runs: Sequence[Path], out: Path) -> None:
    """Print the table; write and name the picture."""
    print(compare_runs(runs, out), end="")
    print(f"picture: {out / 'compare.png'}")


# ----------------------------------------------------------------------------------------------------------- variations
def variations(vary: Sequence[str]) -> list[Variation]:
    """Every combination of the values that `--vary` lists.

    Raises:
        UsageError: a text is not `KEY=A,B,…`, or names a key or a value twice.
    """
    axes: dict[str, list[Variation]] = {}
    for text in vary:
        key, equals, values = text.partition("=")
        key = key.strip()
        if not equals or not key or not values.strip():
            raise UsageError(f"--vary {text}: must be KEY=A,B,..., for example --vary optimizer.lr=0.1,0.01")
        if key in axes:
            raise UsageError(f"--vary {text}: {key} is varied already; list all its values in one --vary")
        axes[key] = [variation(key, value) for value in split_values(values, text)]
    found = [
        Variation("-".join(one.label for one in combination), tuple(o for one in combination for o in one.overrides))
        for combination in itertools.product(*axes.values())
    ]
    labels = [one.label for one in found]
    if twice := sorted({label for label in labels if labels.count(label) > 1}):
        raise UsageError(f"--vary names {twice[0]} twice; name each value once")
    return found


def split_values(text: str, whole: str) -> list[str]:
    """`text` cut at the commas that are outside brackets and quotes.

    Raises:
        UsageError: an empty value, or a bracket or quote without its other half.
    """
    pieces, depth, quote = [""], 0, ""
    for char in text:
        if quote:
            quote = "" if char == quote else quote
        elif char in "'\"":
            quote = char
        else:
            depth += (char in _OPENING) - (char in _CLOSING)
        if char == "," and not depth and not quote:
            pieces.append("")
        else:
            pieces[-1] += char
    if depth or quote:
        raise UsageError(f"--vary {whole}: a bracket or quote is not closed")
    values = [piece.strip() for piece in pieces]
    if not all(values):
        raise UsageError(f"--vary {whole}: there is an empty value between its commas")
    return values


def variation(key: str, value: str) -> Variation:
    """One value of one key. For `strategy` also the names that `distml list matrix` prints, as `NAME/MODE`."""
    short = {block.label: block for block in strategy_variants()}
    if key == "strategy" and value in short:
        block = short[value].model_dump(exclude_none=True, exclude_defaults=True)
        text = yaml.safe_dump(block, default_flow_style=True, width=10_000, sort_keys=False).strip()
        return Variation(slug(value), (f"{key}={text}",))
    return Variation(slug(value), (f"{key}={value}",))


def slug(value: str) -> str:
    """A value as part of a folder's name: `{name: x, mode: y}` is `name-x-mode-y`."""
    return re.sub(r"[^A-Za-z0-9._+-]+", "-", value).strip("-.")[:60] or "value"


# ------------------------------------------------------------------------------------------------------------- running
def run_variations(
    source: str, wanted: Sequence[Variation], overrides: Sequence[str], out: Path, runtime: str | None
) -> int:
    """Run each variation into OUT/NAME-LABEL, where a finished one is taken as it is; compare those that finished."""
    finished: list[Path] = []
    codes: list[int] = []
    for position, one in enumerate(wanted, 1):
        head = f"[{position}/{len(wanted)}] {one.label}"
        try:
            result = run_one(source, one, overrides, out, head, runtime)
        except DistmlError as error:
            print(f"{head}: failed: {error}", file=sys.stderr, flush=True)
            codes.append(int(error.exit_code))
            continue
        print(f"{head}: {outcome(result)}", flush=True)
        if result.status == "interrupted":
            return int(ExitCode.INTERRUPTED)
        finished.append(result.directory)
    if not finished:
        return codes[0]
    print_comparison(finished, out)
    if codes:
        print(f"{len(codes)} of {len(wanted)} variations failed and are not in the table", file=sys.stderr)
    return int(ExitCode.DONE)


def run_one(source: str, one: Variation, overrides: Sequence[str], out: Path, head: str, runtime: str | None) -> Result:
    """One variation's run.

    Raises:
        UsageError: its spec is refused, or its directory holds a run of another spec.
        RunError: it failed.
    """
    laid_over = [*overrides, *one.overrides, "storage=null"]  # all have one name, and would be one run there
    if (workers := workers_of_single(source, laid_over)) is not None:
        print(f"{head}: resources.workers: {workers} -> 1, as strategy single has one worker", flush=True)
        laid_over.append("resources.workers=1")
    job = load_spec(source, laid_over).job
    terminal = sys.stdout.isatty()
    budget = ", ".join(f"{value:g} {unit}" for unit, value in job.stop if unit in BUDGETS and value)
    display = make_display(True, one.label, budget) if terminal else NotesDisplay(head)
    with display:
        return run(source, laid_over, out=out / f"{job.name}-{one.label}", runtime=runtime, display=display)


def workers_of_single(source: str, overrides: Sequence[str]) -> int | None:
    """The spec's workers where a variation is `single` and the spec has several; None where nothing is to change.

    Only the spec's own number gives way: one that `--set` or `--vary` names is the user's word on this comparison.
    """
    if any(text.partition("=")[0].strip() in ("resources", "resources.workers") for text in overrides):
        return None
    try:
        job = load_spec(source, [*overrides, "resources.workers=1"]).job
        if not isinstance(job.strategy, SingleSpec):
            return None
        workers = load_spec(source).job.resources.workers
    except UsageError:  # said where the variation itself is read
        return None
    return workers if workers > 1 else None


def outcome(result: Result) -> str:
    """How a run ended, in a line."""
    scores = "  ".join(f"{name} {number(value)}" for name, value in sorted(result.metrics.items())
                       if name.startswith(("eval/", "test/")))  # fmt: skip
    ended = f"{result.status.replace('_', ' ')} at step {result.step} after {duration(result.wall_s)} of training"
    return f"{ended}  {scores}".rstrip()


class NotesDisplay(SilentDisplay):
    """Says only what is out of the ordinary, and whose it is."""

    def __init__(self, head: str) -> None:
        self._head = head

    def note(self, text: str) -> None:
        print(f"{self._head}: {text}", flush=True)
