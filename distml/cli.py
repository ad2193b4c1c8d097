"""The command line: each verb reads its arguments here and does its work elsewhere.

What a verb needs is imported when it runs, so that checking, listing and help start without torch and ray.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterable, Sequence
from enum import Enum
from pathlib import Path
from typing import Annotated, ParamSpec

import typer

from distml import __version__
from distml.errors import DistmlError, ExitCode, UsageError
from distml.runtime.authentication import STUCK_THREAD
from distml.spec.yaml import one_line

P = ParamSpec("P")
BROKEN_PIPE = 141  # what a shell reports for a program that wrote to a closed pipe

app = typer.Typer(
    name="distml",
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Write what is learned once; choose in one line of YAML how its gradients travel.",
)


class RuntimeName(str, Enum):
    """Who runs where."""

    INLINE = "inline"
    RAY = "ray"


class Listing(str, Enum):
    """What `list` can show."""

    TASKS = "tasks"
    STRATEGIES = "strategies"
    JOBS = "jobs"
    MATRIX = "matrix"


SpecArgument = Annotated[str, typer.Argument(metavar="SPEC", help="A spec's file, or a shipped job's name.")]
AddressOption = Annotated[
    str | None, typer.Option(metavar="URL", help="A cluster's dashboard; by default RAY_API_SERVER_ADDRESS.")
]
JobArgument = Annotated[
    str, typer.Argument(metavar="RUN|ID", help="A run directory with a job.json; with --address also a job's id.")
]
RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.")]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Replace a value of the spec; repeatable.")
]


# --------------------------------------------------------------------------------------------------- errors and exits
def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; every error is one line on stderr.

    Args:
        arguments: without the program's name; None: those of the process.
    """
    try:
        code = app(args=None if arguments is None else list(arguments), prog_name="distml", standalone_mode=False)
        _leave_stuck_ray(int(code or 0))
        return int(code or 0)
    except typer.Abort:
        return int(ExitCode.INTERRUPTED)
    except Exception as error:
        if not hasattr(error, "format_message"):
            return _report(error, None, debug=False)
        message = " ".join(str(error.format_message()).split()).rstrip(".")
        return _fail(f"{message}; see distml --help", ExitCode.USAGE)


def _leave_stuck_ray(code: int) -> None:
    """End at once where Ray has died around this process: its own exit handlers would wait for it and then crash."""
    if any(thread.name == STUCK_THREAD for thread in threading.enumerate()):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _verb(function: Callable[P, int | None]) -> Callable[P, int]:
    """Turn whatever a verb raises into one line and an exit code."""

    @functools.wraps(function)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> int:
        out, debug = kwargs.get("out"), kwargs.get("debug")
        try:
            code = function(*args, **kwargs)
            sys.stdout.flush()
            return int(code or 0)
        except (typer.Exit, typer.Abort):
            raise
        except KeyboardInterrupt:
            return int(ExitCode.INTERRUPTED)
        except Exception as error:
            return _report(error, out if isinstance(out, Path) else None, debug=bool(debug))

    return guarded


def _report(error: Exception, run_directory: Path | None, *, debug: bool) -> int:
    if isinstance(error, BrokenPipeError):
        # The reader has left: without this the interpreter would complain when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    if isinstance(error, DistmlError):
        return _fail(str(error), error.exit_code)
    trace = "".join(traceback.format_exception(error))
    if debug:
        print(trace, end="", file=sys.stderr)
    kept = _keep(trace, run_directory)
    line = f"defect: {type(error).__name__}: {error}"
    print(one_line(line) + (f" (traceback in {kept})" if kept else ""), file=sys.stderr)
    return int(ExitCode.DEFECT)


def _keep(trace: str, run_directory: Path | None) -> Path | None:
    """Write a traceback into the run directory if there is one, else into a temporary file."""
    try:
        folder = run_directory if run_directory is not None and run_directory.is_dir() else None
        handle, name = tempfile.mkstemp(prefix="distml-defect-", suffix=".txt", dir=folder)
        with os.fdopen(handle, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(trace)
        return Path(name)
    except OSError:  # a full disk must not hide the defect itself
        return None


def _fail(message: str, code: ExitCode) -> int:
    print(f"error: {one_line(message)}", file=sys.stderr)
    return int(code)


# ------------------------------------------------------------------------------------------------- checking and listing
def _version(wanted: bool) -> None:
    if wanted:
        print(f"distml {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _start(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    if context.invoked_subcommand is None:
        print(context.get_help())
        raise typer.Exit(int(ExitCode.USAGE))


@app.command()
@_verb
def validate(
    specs: Annotated[list[str], typer.Argument(metavar="SPEC...", help="Files, or shipped jobs' names.")],
    overrides: SetOption = None,
) -> int:
    """Check specs: one line each, without starting anything."""
    from distml.spec.loader import load_spec

    code = ExitCode.DONE
    for spec in specs:
        try:
            loaded = load_spec(spec, list(overrides or ()))
        except UsageError as error:
            code = ExitCode(_fail(str(error), ExitCode.USAGE))
        else:
            print(f"{loaded.path}: ok ({loaded.summary})")
    return code


@app.command()
@_verb
def schema() -> None:
    """Print the spec's JSON schema, for editors."""
    from distml.spec.json_schema import json_schema

    print(json.dumps(json_schema(), indent=2))


@app.command("list")
@_verb
def list_(what: Annotated[Listing, typer.Argument(help="What to list.")]) -> None:
    """List what a spec can name, or which task trains under which strategy."""
    from distml.spec import listings

    rows = {
        Listing.TASKS: listings.tasks,
        Listing.STRATEGIES: listings.strategies,
        Listing.JOBS: listings.jobs,
        Listing.MATRIX: listings.pairs,
    }[what]()
    _print_table(rows[0], rows[1:])


def _print_table(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> None:
    """A framed table on a terminal; elsewhere aligned columns, one line per row, nothing cut."""
    lines = [header, *rows]
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table

        table = Table(*header)
        for row in lines[1:]:
            table.add_row(*row)
        Console(markup=False).print(table)
        return
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


@app.command()
@_verb
def new(name: Annotated[str, typer.Argument(metavar="NAME", help="A Python identifier.")]) -> None:
    """Write a starter task NAME.py and its spec NAME.yaml into the current directory."""
    from distml.spec.starter import write_starter

    code, spec = write_starter(name, Path.cwd())
    print(f"wrote {code.name} and {spec.name}; next: distml run {spec.name}")


# ------------------------------------------------------------------------------------------------------------- running
@app.command()
@_verb
def run(
    spec: SpecArgument,
    overrides: SetOption = None,
    out: Annotated[Path | None, typer.Option(help="The run directory; by default runs/NAME.")] = None,
    runtime: Annotated[RuntimeName | None, typer.Option(help="By default inline for one worker, else ray.")] = None,
    address: Annotated[str | None, typer.Option(help="A running Ray cluster.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Move an existing run directory aside.")] = False,
    inject: Annotated[list[str] | None, typer.Option(help="A fault, as kill:rank=1,step=50; repeatable.")] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Print the traceback of a defect.")] = False,
) -> int:
    """Run a job; in a directory with an unfinished run of it, continue that."""
    from distml.launch.run import run_command

    code: int = run_command(
        spec=spec,
        overrides=list(overrides or ()),
        out=out,
        runtime=None if runtime is None else runtime.value,
        address=address,
        fresh=fresh,
        inject=list(inject or ()),
        debug=debug,
    )
    return code


# --------------------------------------------------------------------------------------------------------- on a cluster
@app.command()
@_verb
def submit(
    spec: SpecArgument,
    address: AddressOption = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Print its log; exit as the job does.")] = False,
    overrides: SetOption = None,
    env: Annotated[
        list[str] | None,
        typer.Option(
            metavar="K[=V]", help="A variable of the job's processes, visible to all users of the cluster; repeatable."
        ),
    ] = None,
    working_dir: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Whose files are sent; by default the current directory.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Gets job.json; its name is the run's on the cluster. By default runs/NAME.")
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Move the run's directory on the cluster aside.")] = False,
) -> int:
    """Run a job on a cluster; the same again goes on from its newest checkpoint there."""
    from distml.launch.submit.command import submit_command

    return submit_command(
        spec=spec, overrides=list(overrides or ()), address=address, follow=follow, env=list(env or ()),
        working_dir=working_dir, out=out, fresh=fresh,
    )  # fmt: skip


@app.command()
@_verb
def status(job: JobArgument, address: AddressOption = None) -> int:
    """Say what has become of a submitted job."""
    from distml.launch.submit.command import status_command

    return status_command(target=job, address=address)


@app.command()
@_verb
def logs(
    job: JobArgument,
    address: AddressOption = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="To its end; exit as the job does.")] = False,
) -> int:
    """Print the log of a submitted job."""
    from distml.launch.submit.command import logs_command

    return logs_command(target=job, address=address, follow=follow)


@app.command()
@_verb
def stop(job: JobArgument, address: AddressOption = None) -> int:
    """End a submitted job, say what it has saved; exit 0, also if it was over before."""
    from distml.launch.submit.command import stop_command

    return stop_command(target=job, address=address)


@app.command()
@_verb
def jobs(address: AddressOption = None) -> None:
    """List the jobs of a cluster."""
    from distml.launch.submit.command import jobs_command

    rows = jobs_command(address=address)
    _print_table(rows[0], rows[1:])


@app.command()
@_verb
def plan(
    spec: SpecArgument,
    overrides: SetOption = None,
    cluster: Annotated[Path | None, typer.Option(metavar="FILE", help="Machines and links; else this machine.")] = None,
    shapes: Annotated[bool, typer.Option("--shapes", help="Also print the parameters' shapes.")] = False,
    children: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Also say what N such runs come to; jobs over jobs do so anyway."),
    ] = None,
    gpus: Annotated[
        int | None, typer.Option(min=1, metavar="M", help="GPUs for the children; else the cluster's, or one run's.")
    ] = None,
    hours_each: Annotated[
        float | None, typer.Option(min=0.0, metavar="H", help="GPU-hours of a child; else the plan's.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, in bytes and seconds.")] = False,
) -> int:
    """Say whether a job fits, what it sends and how long it takes, without starting it; exit 4 if it does not fit."""
    from distml.launch.plan.command import Children, plan_command

    many = Children(children, gpus, hours_each) if children is not None else None
    return plan_command(
        spec=spec, overrides=list(overrides or ()), cluster=cluster, as_json=as_json, shapes=shapes, children=many,
        gpus=gpus, hours_each=hours_each,
    )  # fmt: skip


@app.command()
@_verb
def show(run: RunArgument) -> None:
    """Print a run's result and write its report.html; of a run that acts also episode.gif."""
    from distml.launch.episode import draw_episode
    from distml.runs.report import show as show_run

    note = draw_episode(run)
    show_run(run)
    if note is not None:
        print(note)


@app.command()
@_verb
def compare(
    sources: Annotated[list[str], typer.Argument(metavar="RUN...|SPEC", help="Run directories, or one spec.")],
    vary: Annotated[
        list[str] | None, typer.Option(metavar="KEY=A,B,...", help="Run the spec once per value; repeatable.")
    ] = None,
    overrides: SetOption = None,
    out: Annotated[Path | None, typer.Option(help="Where the runs, the table and the picture go.")] = None,
) -> int | None:
    """Compare runs: loss against seconds, examples and bytes, as one table and one picture."""
    from distml.launch.compare import compare_command

    code: int | None = compare_command(sources=sources, vary=list(vary or ()), overrides=list(overrides or ()), out=out)
    return code


@app.command()
@_verb
def evaluate(
    run: RunArgument,
    split: Annotated[str, typer.Option(help="train, validation or test.")] = "test",
) -> int | None:
    """Print the scores of a run's best checkpoint on a split."""
    from distml.launch.evaluate import evaluate_command

    code: int | None = evaluate_command(run=run, split=split)
    return code


@app.command()
@_verb
def export(
    run: RunArgument,
    out: Annotated[Path, typer.Option(help="The directory to write.")],
    format: Annotated[str, typer.Option(help="safetensors, or hf for `transformers`.")] = "safetensors",
) -> int | None:
    """Write a run's weights in a form that needs no distml."""
    from distml.launch.evaluate import export_command

    code: int | None = export_command(run=run, format=format, out=out)
    return code


@app.command()
@_verb
def generate(
    run: RunArgument,
    prompt: Annotated[str, typer.Option(help="The text to go on from.")],
    tokens: Annotated[int, typer.Option(help="How many at most; the text ends before with its document.")] = 200,
    temperature: Annotated[float, typer.Option(help="Below 1 likelier tokens; 0: the likeliest each time.")] = 0.8,
    top_k: Annotated[int | None, typer.Option(help="Draw among the K likeliest only.")] = None,
    seed: Annotated[int, typer.Option(help="Of the draws.")] = 0,
    uncached: Annotated[bool, typer.Option("--uncached", help="Compute all tokens anew for each; to compare.")] = False,
) -> int | None:
    """Print a prompt and what a run's language model writes behind it."""
    from distml.launch.generate import generate_command

    code: int | None = generate_command(
        run=run, prompt=prompt, tokens=tokens, temperature=temperature, top_k=top_k, seed=seed, cached=not uncached
    )
    return code


@app.command()
@_verb
def tokenize(
    path: Annotated[str, typer.Argument(help="A text file, a folder of them, or stdlib.")],
    out: Annotated[Path, typer.Option(help="The folder to write.")],
    tokenizer: Annotated[str, typer.Option(help="bytes, characters, bpe, or a tokenizer.json.")] = "bpe",
    vocabulary: Annotated[int | None, typer.Option(help="bpe: tokens to learn.")] = None,
    mask: Annotated[bool, typer.Option("--mask", help="Reserve the token that masked_language_model needs.")] = False,
    pattern: Annotated[str | None, typer.Option(help="Of the files in a folder, by relative path.")] = None,
    validation: Annotated[float | None, typer.Option(help="Share of the documents.")] = None,
    test: Annotated[float | None, typer.Option(help="Share of the documents.")] = None,
    max_bytes: Annotated[int | None, typer.Option(help="Leave out documents beyond this.")] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Deals out the documents.")] = 0,
) -> int | None:
    """Write text as tokens into a folder that a spec's data can name."""
    from distml.launch.tokenize import tokenize_command

    data = {"pattern": pattern, "validation": validation, "test": test, "max_bytes": max_bytes}
    code: int | None = tokenize_command(
        path=path, tokenizer=tokenizer, vocabulary=vocabulary, mask=mask, out=out, seed=seed,
        settings={key: value for key, value in data.items() if value is not None},
    )  # fmt: skip
    return code


@app.command()
@_verb
def doctor(
    address: Annotated[
        str | None, typer.Option(help="Also look at a cluster: its dashboard's URL, or what ray.init takes.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write its nodes and links for plan --cluster.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of lines.")] = False,
) -> int:
    """Say of everything that runs need whether it is all right, or what to do; exit 2 if anything is not."""
    from distml.launch.doctor import doctor_command

    return doctor_command(address=address, out=out, as_json=as_json)


cluster_app = typer.Typer(help="Cluster files: for ray up, KubeRay and distml plan.")
app.add_typer(cluster_app, name="cluster")


@cluster_app.command("check")
@_verb
def cluster_check(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="YAML for ray up, KubeRay or distml plan.")],
) -> int:
    """Say what would go wrong with a cluster file, without starting anything; exit 2 if anything would."""
    from distml.launch.check.command import cluster_check as check

    return check(files)


def _integers(option: str, texts: list[str]) -> list[int]:
    """The numbers that a repeatable option names, also several at once with commas between them."""

    entries = [entry for text in texts for entry in text.split(",")]
    for entry in entries:
        if not entry.strip().lstrip("-").isdecimal():
            raise UsageError(f"{option} {entry!r} is not a whole number; give for example {option} 1,2")
    return [int(entry) for entry in entries]


@app.command()
@_verb
def bench(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="exchange, loop, population, rl, start, submit or transformer.")
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    repeats: Annotated[int | None, typer.Option(help="Of each contender; they take turns.")] = None,
    size: Annotated[list[str] | None, typer.Option(help="exchange: parameters, 0.1M, 4.2M or 25M; repeatable.")] = None,
    workers: Annotated[
        list[str] | None, typer.Option(metavar="N,N", help="exchange, rl: how many, for example 1,2,4; repeatable.")
    ] = None,
    optimizer: Annotated[list[str] | None, typer.Option(help="exchange: sgd or adam; repeatable.")] = None,
    contenders: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,NAME", help="exchange, population, rl, transformer: only these, for example a3c,sb3_a2c."
        ),
    ] = None,
    environment: Annotated[str | None, typer.Option(help="rl: cartpole, pendulum or pong.")] = None,
    seeds: Annotated[int | None, typer.Option(help="population, rl: how many; each contender once with each.")] = None,
    frames: Annotated[int | None, typer.Option(help="rl: of every contender, instead of its own budget.")] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="rl: laid over the specs of our jobs.")
    ] = None,
    full: Annotated[bool, typer.Option("--full", help="exchange: every size, workers and optimizer.")] = False,
    transport: Annotated[str | None, typer.Option(help="exchange: of distml's strategies, as in a spec.")] = None,
    hosts: Annotated[int | None, typer.Option(help="exchange: 2 for two hosts with a link (needs root).")] = None,
    rate: Annotated[str | None, typer.Option(help="exchange: of that link, 1gbit or 100mbit.")] = None,
    part: Annotated[
        list[str] | None,
        typer.Option(
            help="population: speed, exploit, sweep, pbt, nas; submit: start, faults, placement; "
            "transformer: speed, zero, memory, loss, gpu; repeatable"
        ),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="transformer: of each repeat; population: of each member.")] = None,
    text: Annotated[Path | None, typer.Option(metavar="FILE", help="transformer: what --part loss learns.")] = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="exchange, rl: draw the result, as PNG.")] = None,
) -> int | None:
    """Measure side by side with peers, as ratios from one invocation."""
    from distml.bench import bench_command  # type: ignore[attr-defined, unused-ignore]

    names = [name for name in (contenders or "").split(",") if name]
    code: int | None = bench_command(
        name, json=as_json, plot=plot, repeats=repeats, size=size, workers=_integers("--workers", workers or []),
        optimizer=optimizer, contenders=names, full=full, transport=transport, hosts=hosts, rate=rate,
        environment=environment, seeds=seeds, frames=frames, overrides=overrides, part=part or [], steps=steps,
        text=text,
    )  # fmt: skip
    return code
