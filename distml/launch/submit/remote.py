"""What runs on the cluster: `distml run` in a directory of its own, between a line that says what it runs with and one
that says what it came to.

Only the standard library is imported before it is known that the cluster's Python has what distml needs: what is
missing is one line and exit 2, and nothing is ever installed. A run's directory is $DISTML_RUNS/RUN, else
~/distml-runs/RUN, of the machine where the driver runs (the cluster's head) and of the user who started Ray there.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import socket
import sys
from pathlib import Path

NEEDED = ("ray", "torch", "numpy", "pydantic", "PyYAML", "typer", "rich", "safetensors", "psutil")
OFTEN_NEEDED = ("gymnasium", "scikit-learn", "tokenizers", "tensorboard", "matplotlib", "pyarrow")
ROOT = "DISTML_RUNS"
RUN = "DISTML_RUN"  # set here: a stored run has the name that it was submitted under
IN_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # set by Ray for a job's driver
RESULT_MARK = "::distml-result "  # the client takes this line out of the log
USAGE = 2


def main(arguments: list[str]) -> int:
    """Run the job; its exit code.

    Args:
        arguments: the run's name, the spec, and options of `distml run`.
    """
    run, spec, *options = arguments
    lacking = missing(NEEDED)
    if lacking:
        print(f"error: {lacking_line(lacking)}", flush=True)
        return USAGE
    os.environ[RUN] = run
    from distml.errors import UsageError

    try:
        out = directory_of(run, spec, options)
    except UsageError as error:
        print(f"error: {error}", flush=True)
        return USAGE
    print(f"{versions()}; run directory {out}", flush=True)
    others = missing(OFTEN_NEEDED)
    if others:
        print(f"not installed there: {', '.join(others)}; what needs them will say so", flush=True)
    from distml.cli import main as distml

    code = distml(["run", spec, "--out", str(out), *options])
    if code != USAGE:
        report(out)
    return code


def directory_of(run: str, spec: str, options: list[str]) -> Path:
    """Where the run is kept: with a folder as its storage in that, else below `runs_root`.

    Raises:
        UsageError: the storage is a folder of the current directory, which Ray removes after the job.
    """
    from distml.errors import UsageError

    try:
        from distml.spec.loader import load_spec

        storage = load_spec(spec, overrides_of(options)).job.storage
    except (UsageError, ImportError):  # `distml run` says so
        return runs_root() / run
    return (whole_folder(storage) or runs_root()) / run


def overrides_of(options: list[str]) -> list[str]:
    """The values of `--set` among the options of `distml run`, in both of its forms."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    return list(parser.parse_known_args(options)[0].overrides)


def whole_folder(storage: str | None) -> Path | None:
    """The folder that a storage is; None: it is none, or a bucket.

    Raises:
        UsageError: it lies in the current directory, which Ray removes after the job.
    """
    from distml.errors import UsageError
    from distml.spec.storage import folder_of

    folder = folder_of(storage)
    if folder is not None and not folder.is_absolute():
        raise UsageError(f"storage {storage} is relative to a folder that Ray removes after the job; write the whole "
                         "path of a folder that every node sees")  # fmt: skip
    return folder


def run_name(job: str) -> str:
    """The name under which a run is stored: in a submitted job the run's, else that of its job.

    Args:
        job: the job's name.
    """
    return os.environ.get(RUN) or job if IN_JOB in os.environ else job


def runs_root() -> Path:
    """Where runs are kept: in a Ray job not in the current directory, which Ray removes after the job."""
    if IN_JOB not in os.environ:
        return Path("runs")
    return Path(os.environ.get(ROOT) or "~/distml-runs").expanduser()


def missing(distributions: tuple[str, ...]) -> list[str]:
    """Those that this Python does not have."""
    lacking = []
    for name in distributions:
        try:
            importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            lacking.append(name)
    return lacking


def lacking_line(lacking: list[str]) -> str:
    """What is missing and what to do about it."""
    here = f"{sys.executable} on {socket.gethostname()}"
    if "ray" in lacking:
        return (f"the cluster's `python` is {here}, which has no ray: it is not the one that runs the cluster; start "
                "Ray with its environment activated")  # fmt: skip
    return (f"the cluster's Python ({here}) has no {', '.join(lacking)}; nothing is installed for you: start the "
            "cluster from an image, or with setup commands, that have what constraints.txt names")  # fmt: skip


def versions() -> str:
    """What the job runs with, in one line."""
    import distml

    source = Path(distml.__file__).resolve().parent
    sent = "sent with the job" if source.parent == Path.cwd().resolve() else f"installed in {source.parent}"
    found = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("ray", "torch"))
    return (
        f"distml {distml.__version__} ({sent}), {found}, Python {platform.python_version()} on {socket.gethostname()}"
    )


def report(out: Path) -> None:
    """Tell the client what the run has come to."""
    try:
        result = json.loads((out / "result.json").read_bytes())
    except (OSError, ValueError):
        return
    print(RESULT_MARK + json.dumps({**result, "directory": str(out)}), flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
