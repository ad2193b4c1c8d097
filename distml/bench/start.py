"""`distml bench start`: from the command to the first update of two workers, against Ray Train doing nothing.

One local Ray is started first and serves all contenders; each is a process of its own, as a user would start it, and
they take turns. The clock starts before the process does, so the interpreter and all imports count. Ours stops when
the driver learns of the first update (data loaded, model built and exchanged, one gradient applied); Ray Train's when
the last worker enters a training function that does nothing, and once more when `fit` returns.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from distml.bench.table import cells, conditions, summary, verdict
from distml.errors import RunError

TARGET_S, TARGET_RATIO = 6.5, 0.3
LIMIT_S = 180.0
OURS = ("all_reduce", "parameter_server")
PEER = "ray_train"
SPEC = """\
distml: v1
name: bench-start
task: {{name: classification, data: digits, model: {{name: mlp, hidden: [128]}}}}
strategy: {strategy}
batch_size: 64
stop: {{steps: 20}}
resources: {{workers: 2}}
"""


def measure(repeats: int = 3) -> dict[str, Any]:
    """Let the contenders take turns; seconds from the process's start.

    Raises:
        RunError: one of them failed, or took longer than `LIMIT_S`.
    """
    about = conditions(repeats=repeats, workers=2)
    seconds: dict[str, list[dict[str, float]]] = {name: [] for name in (*OURS, PEER)}
    imported: set[str] = set()
    with local_ray() as address:
        for repeat in range(repeats):
            names = [*OURS, PEER]
            for name in names[repeat % 3 :] + names[: repeat % 3]:
                with tempfile.TemporaryDirectory(prefix="distml-bench-") as folder:
                    if name == PEER:
                        seconds[name].append(start_peer(address, Path(folder)))
                    else:
                        times, modules = start_ours(name, address, Path(folder))
                        seconds[name].append(times)
                        imported |= set(modules)
    found = {name: {what: summary([one[what] for one in all_]) for what in all_[0]} for name, all_ in seconds.items()}
    entered, returned = found[PEER]["entered"]["median"], found[PEER]["returned"]["median"]
    ours = {name: found[name]["first_update"]["median"] for name in OURS}
    return {
        "bench": "start",
        "conditions": about,
        "seconds": found,
        "ratio_to_entered": {name: value / entered for name, value in ours.items()},
        "ratio_to_returned": {name: value / returned for name, value in ours.items()},
        "target_s": TARGET_S,
        "target_ratio": TARGET_RATIO,
        "driver_imported_torch": "torch" in imported,
    }


@contextmanager
def local_ray(cpus: int = 4) -> Iterator[str]:
    """A Ray of this machine alone, on the loopback interface, with a token; its address. It ends with the block.

    Args:
        cpus: as many as it believes to have.
    """
    for variable in ("RAY_ADDRESS", "RAY_JOB_CONFIG_JSON_ENV_VAR"):  # a cluster that the shell is set up for
        os.environ.pop(variable, None)
    from distml.runtime.authentication import prepare_authentication

    prepare_authentication(None)  # before ray is imported; the contenders inherit mode and token
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    ray.init(
        address="local",
        _node_ip_address="127.0.0.1",
        num_cpus=cpus,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
    try:
        yield str(ray.get_runtime_context().gcs_address)
    finally:
        ray.shutdown()


def start_ours(strategy: str, address: str, folder: Path) -> tuple[dict[str, float], list[str]]:
    """`distml run` on two workers: seconds to the first update, and heavy modules that the driver had imported."""
    spec, trace = folder / "spec.yaml", folder / "first-update.json"
    spec.write_text(SPEC.format(strategy=strategy))
    command = ["-m", "distml", "run", str(spec), "--out", str(folder / "run"), "--address", address]
    started = spawn(command, {"DISTML_TRACE_START": str(trace)})
    first = json.loads(trace.read_text())
    return {"first_update": first["time"] - started}, list(first["imported"])


def start_peer(address: str, folder: Path) -> dict[str, float]:
    """TorchTrainer on two workers: seconds until both are in their function, and until `fit` has returned."""
    script = Path(__file__).parent / "peers" / "train_noop.py"
    started = spawn([str(script), address, str(folder)], {})
    entered = max(float((folder / f"entered-{rank}").read_text()) for rank in range(2))
    return {"entered": entered - started, "returned": float((folder / "returned").read_text()) - started}


def spawn(arguments: list[str], environment: dict[str, str], limit_s: float = LIMIT_S) -> float:
    """Run Python with these arguments to its end; when it was started, in seconds since the epoch.

    Raises:
        RunError: it failed, or took longer than `limit_s`.
    """
    started = time.time()
    try:
        process = subprocess.run([sys.executable, *arguments], env={**os.environ, **environment}, timeout=limit_s,
                                 capture_output=True, text=True, check=False)  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise RunError(f"{arguments[:3]} had not ended after {limit_s:g} s", phase="bench") from error
    if process.returncode:
        last = (process.stderr.strip() or process.stdout.strip() or "it said nothing").splitlines()[-1]
        raise RunError(f"{arguments[:3]} ended with {process.returncode}: {last}", phase="bench")
    return started


def rows(report: dict[str, Any]) -> tuple[str, list[str], list[list[str]], list[str]]:
    """Title, header, body and closing lines of the table."""
    seconds, about = report["seconds"], report["conditions"]
    body = []
    for name in OURS:
        ratios = [f"{report[key][name]:.2f}" for key in ("ratio_to_entered", "ratio_to_returned")]
        body.append([f"distml, {name}: first update", *cells(seconds[name]["first_update"], 2), *ratios])
    body.append(["Ray Train: both workers in their function", *cells(seconds[PEER]["entered"], 2), "1.00", ""])
    body.append(["Ray Train: fit() of a no-op returned", *cells(seconds[PEER]["returned"], 2), "", "1.00"])
    slowest = max(seconds[name]["first_update"]["median"] for name in OURS)
    closing = [
        f"seconds to the first update: {verdict(slowest, report['target_s'])}",
        *(
            f"ratio to Ray Train's {what}: {verdict(max(report[key].values()), report['target_ratio'])}"
            for what, key in (("no-op fit()", "ratio_to_returned"), ("workers being there", "ratio_to_entered"))
        ),
        f"ours: the driver {'imported' if report['driver_imported_torch'] else 'did not import'} torch",
        f"{about['repeats']} repeats, taking turns on one Ray; {about['cpus']} CPUs, "
        f"load before {about['load_before']}, ray {about['ray']}",
    ]
    header = ["two workers on a running Ray", "seconds", "min", "max", "ratio to entered", "to fit()"]
    return "From the command to the first update", header, body, closing
