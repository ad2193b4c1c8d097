"""ZeRO 1, 2 and 3 on two processes: `strategy: zero` against DeepSpeed by itself, started by its own launcher.

Both train the same model from the same weights on the same examples, with the same DeepSpeed settings, fused AdamW and
clipping, one torch thread each. They take turns, every one in processes of its own that begin with nothing: ours with
its private Ray, the peer with `deepspeed --num_gpus 2`. Seconds to the first step count from the command; those per
step are the median of windows of 10 after the first 20, by rank 0's clock.
"""

from __future__ import annotations

import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from distml.bench.contenders import EVERYWHERE, ThisHost, run_all, terminable
from distml.bench.exchange import check, in_turn, tell
from distml.bench.table import cells, summary
from distml.bench.transformer_speed import BATCH, BLOCK, LAYERS, SPEC, WIDTH
from distml.errors import RunError
from distml.spec.loader import load_train

OPTIONS = ("repeats", "steps", "contenders")
TARGET_STEP, TARGET_START = 1.03, 1.0
WORKERS, WARM_UP, EVERY, LIMIT_S = 2, 20, 10, 600.0
STAGES = (1, 2, 3)
NAMES = {
    f"{kind}_{stage}": f"{label}, stage {stage}"
    for stage in STAGES
    for kind, label in (("zero", "distml zero"), ("deepspeed", "DeepSpeed itself"))
}
Run = dict[str, float]


def measure(repeats: int = 3, steps: int = 120, contenders: Sequence[str] = ()) -> dict[str, Any]:
    """Let them take turns.

    Args:
        repeats: of each.
        steps: of each repeat, a multiple of 10 and at least 100.
        contenders: some of `NAMES`; none: all.

    Raises:
        RunError: one of them failed.
    """
    check("--contenders", contenders, NAMES)
    names = [name for name in NAMES if name in (contenders or NAMES)]
    runs: dict[str, list[Run]] = {name: [] for name in names}
    with terminable():
        for repeat in range(repeats):
            for name in in_turn(names, repeat, repeats):
                with tempfile.TemporaryDirectory(prefix="distml-bench-") as folder:
                    run = one_run(name, steps, Path(folder))
                runs[name].append(run)
                tell(f"{NAMES[name]}: {run['ms_per_step']:.1f} ms per step, first after {run['start_s']:.1f} s")
    found = {name: {key: summary([one[key] for one in rows]) for key in rows[0]} for name, rows in runs.items()}
    return {"contenders": found, "repeats": repeats, "steps": steps, "targets": targets(runs)}


def one_run(name: str, steps: int, folder: Path) -> Run:
    """Seconds from the command to the first step, milliseconds per step, and the last loss."""
    kind, _, stage = name.partition("_")
    spec = {**SPEC, "strategy": {"name": "zero", "stage": int(stage)}, "stop": {"steps": steps},
            "resources": {"workers": WORKERS}}  # fmt: skip
    path = folder / "spec.yaml"
    path.write_text(yaml.safe_dump(spec), encoding="utf-8")
    return _ours(path, folder) if kind == "zero" else _deepspeed(path, folder)


def _ours(spec: Path, folder: Path) -> Run:
    trace, out = folder / "first-update.json", folder / "run"
    started = time.time()
    arguments = ["-m", "distml", "run", str(spec), "--out", str(out)]
    run_all([(ThisHost(), arguments)], {**EVERYWHERE, "DISTML_TRACE_START": str(trace)}, folder, LIMIT_S)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    times = [(row["step"], row["wall_s"]) for row in rows if "train/loss" in row]
    first = json.loads(trace.read_text())["time"]
    return _numbers(times, first - started, next(row["train/loss"] for row in reversed(rows) if "train/loss" in row))


def _deepspeed(spec: Path, folder: Path) -> Run:
    times, config = folder / "times", folder / "config.json"
    settings = settings_of(spec)
    config.write_text(json.dumps({"spec": str(spec), "times": str(times), "every": EVERY, "deepspeed": settings}))
    script = Path(__file__).parent / "peers" / "raw_deepspeed.py"
    arguments = ["-m", "deepspeed.launcher.runner", "--num_gpus", str(WORKERS), str(script), str(config)]
    started = time.time()
    run_all([(ThisHost(), arguments)], {**EVERYWHERE, "DS_ACCELERATOR": "cpu"}, folder, LIMIT_S)
    rows = [tuple(map(float, line.split())) for line in times.read_text().splitlines()]
    return _numbers([(row[0], row[1]) for row in rows[1:]], rows[0][1] - started, rows[-1][2])


def settings_of(spec: Path) -> dict[str, Any]:
    """What our run tells DeepSpeed."""
    import torch

    from distml.strategies.zero_config import engine_config
    from distml.tasks.build import build_task

    job = load_train(spec).job
    with torch.device("meta"):
        sizes = [parameter.numel() for parameter in build_task(job).build_model().parameters()]
    return engine_config(job, sum(sizes), max(sizes))


def _numbers(times: Sequence[tuple[float, float]], start_s: float, loss: float) -> Run:
    """From (step, seconds) at every tenth step."""
    windows = [(later[1] - earlier[1]) / (later[0] - earlier[0]) * 1e3
               for earlier, later in itertools.pairwise(times) if earlier[0] >= WARM_UP]  # fmt: skip
    if not windows:
        raise RunError(f"no window after {WARM_UP} steps; give --steps 40 or more", phase="bench")
    return {"ms_per_step": statistics.median(windows), "start_s": start_s, "last_train_loss": loss}


def targets(runs: dict[str, list[Run]]) -> list[dict[str, Any]]:
    """Ours against the peer's of the same stage and repeat, medians."""
    wanted = [("ms_per_step", "time per step over DeepSpeed's", TARGET_STEP),
              ("start_s", "time to the first step over its launcher's", TARGET_START)]  # fmt: skip
    found = []
    for stage in STAGES:
        ours, theirs = runs.get(f"zero_{stage}"), runs.get(f"deepspeed_{stage}")
        for key, what, target in wanted if ours and theirs else ():
            assert ours
            assert theirs
            value = statistics.median(a[key] / b[key] for a, b in zip(ours, theirs, strict=True))
            found.append({"what": f"zero-{stage}, {what}", "value": value, "bound": "at most", "target": target,
                          "met": value <= target})  # fmt: skip
    return found


def table(found: dict[str, Any]) -> tuple[str, list[str], list[list[str]], list[str]]:
    """Title, header, body and closing lines."""
    body = [[NAMES[name], *cells(one["ms_per_step"], 1), *cells(one["start_s"], 1),
             f"{one['last_train_loss']['median']:.4f}"] for name, one in found["contenders"].items()]  # fmt: skip
    header = ["", "ms per step", "min", "max", "seconds to first", "min", "max", "last loss"]
    closing = [f"{found['repeats']} x {found['steps']} steps each, taking turns; last loss: ours the mean of 10 steps "
               "of both ranks, DeepSpeed's rank 0's of the last"]  # fmt: skip
    return (
        f"GPT, {LAYERS} layers, {WIDTH} wide, {BATCH} x {BLOCK} tokens a step, {WORKERS} processes",
        header,
        body,
        closing,
    )
