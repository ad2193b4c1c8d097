"""Run directories of jobs over jobs as these would leave them, without training: for what draws and tells of them."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

BASE = """\
  distml: v1
  kind: train
  name: toy
  task: {name: classification, data: digits}
  strategy: {name: single}
  optimizer: {name: adamw, lr: 0.001}
  batch_size: 64
  stop: {steps: 400}
"""
POPULATION = """\
distml: v1
kind: population
name: {name}
base:
{base}members: {members}
every: {every}
space:
  optimizer.lr: {{loguniform: [1.0e-5, 1.0]}}
  batch_size: {{lograndint: [8, 256]}}
  optimizer.name: {{choice: [sgd, adamw, rmsprop]}}
objective: {{metric: eval/loss, mode: min}}
"""
SWEEP = """\
distml: v1
kind: sweep
name: {name}
base:
{base}trials: {trials}
space:
  optimizer.lr: {{loguniform: [1.0e-5, 1.0]}}
  task.model.dropout: {{uniform: [0.0, 0.5]}}
  batch_size: {{lograndint: [8, 256]}}
  optimizer.name: {{choice: [sgd, adamw, rmsprop]}}
objective: {objective}
"""
NAS = """\
distml: v1
kind: nas
name: {name}
base:
{base}trials: {trials}
space: {{name: nasnet}}
controller: {{name: reinforce}}
reward: {{metric: eval/accuracy, cost: flops, target: 1.0e6, doubling_is_worth: 0.05}}
"""
NAMES = ("sgd", "adamw", "rmsprop")


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_result(path: Path, **values: Any) -> None:
    whole = {"status": "done", "step": 400, "wall_s": 42.0, "metrics": {}, "best": None, "checkpoint": None,
             "error": None, "pid": 1, "host": "h"}  # fmt: skip
    (path / "result.json").write_text(json.dumps({**whole, **values}))


def write_population(path: Path, members: int = 4, decisions: int = 8, every: int = 50, seed: int = 0) -> Path:
    """A population that found a falling learning rate; one member became NaN, one died."""
    draw = random.Random(seed)
    path.mkdir(parents=True)
    (path / "spec.yaml").write_text(POPULATION.format(name="toy-pbt", base=BASE, members=members, every=every))
    names = [f"{index:02d}" if members <= 100 else f"{index:03d}" for index in range(members)]
    values = {name: {"optimizer.lr": 10 ** draw.uniform(-5, 0), "batch_size": round(2 ** draw.uniform(3, 8)),
                     "optimizer.name": draw.choice(NAMES)} for name in names}  # fmt: skip
    scores: dict[str, float | None] = dict.fromkeys(names, 2.3)
    rows: list[dict[str, Any]] = [
        {"event": "start", "wall_s": 0.0, "member": name, "step": 0, "score": None, "values": values[name]}
        for name in names
    ]
    wall = 0.0
    for decision in range(1, decisions + 1):
        step = decision * every
        for name in draw.sample(names, len(names)):
            wall += 0.05
            wanted = 10 ** (-1 - 2.5 * decision / decisions)
            away = abs(math.log10(values[name]["optimizer.lr"] / wanted))
            before = scores[name]
            if before is not None:
                scores[name] = before * (0.55 + 0.11 * min(away, 4.0)) + 0.01
            if decision == 3 and name == names[1]:
                scores[name] = None
            event = "finish" if decision == decisions else "decide"
            rows.append({"event": event, "wall_s": wall, "member": name, "step": step, "score": scores[name],
                         "values": values[name]})  # fmt: skip
            if event == "finish":
                continue
            ranked = sorted(names, key=lambda one: math.inf if scores[one] is None else scores[one])
            worst = name in ranked[-max(1, members // 5) :]
            if scores[name] is None or worst:
                donor = draw.choice(ranked[: max(1, members // 5)])
                requested = dict(values[donor])
                requested["optimizer.lr"] = min(max(requested["optimizer.lr"] * draw.choice([0.5, 2.0]), 1e-5), 1.0)
                if draw.random() < 0.2:
                    requested["optimizer.name"] = draw.choice(NAMES)
                row = {"event": "copy", "wall_s": wall, "member": name, "step": step, "score": scores[name],
                       "values": requested, "from": donor, "from_step": step, "from_score": scores[donor],
                       "before": values[name], "requested": requested, "applied": requested, "equal": True,
                       "seconds": 0.004}  # fmt: skip
                if scores[name] is None:
                    row |= {"event": "replace", "cause": "train/loss is NaN"}
                rows[-1] = row  # one event for each decision
                values[name], scores[name] = requested, scores[donor]
    write_lines(path / "lineage.jsonl", rows)
    best = min(names, key=lambda one: math.inf if scores[one] is None else scores[one])
    for name in names:
        (path / "members" / name).mkdir(parents=True)
        (path / "members" / name / "spec.yaml").write_text(f"distml: v1\nname: toy-{name}\n")
        write_result(path / "members" / name, step=decisions * every)
    write_result(path, step=decisions * every * members, wall_s=wall,
                 metrics={"eval/loss": scores[best], "test/loss": 1.01 * (scores[best] or 0)},
                 best={"metric": "eval/loss", "value": scores[best], "step": decisions * every,
                       "member": best})  # fmt: skip
    return path


def write_sweep(path: Path, trials: int = 20, seed: int = 0, objective: str = "{metric: eval/loss, mode: min}",
                failures: int = 1) -> Path:  # fmt: skip
    """A sweep whose later trials are better, with some that failed and a third that was ended early."""
    draw = random.Random(seed)
    path.mkdir(parents=True)
    (path / "spec.yaml").write_text(SWEEP.format(name="toy-sweep", base=BASE, trials=trials, objective=objective))
    rows: list[dict[str, Any]] = []
    best: tuple[float, str] = (math.inf, "")
    for index in range(trials):
        name, wall = f"{index:04d}", 0.5 * index
        values = {"optimizer.lr": 10 ** draw.uniform(-5, 0), "task.model.dropout": draw.uniform(0, 0.5),
                  "batch_size": round(2 ** draw.uniform(3, 8)), "optimizer.name": draw.choice(NAMES)}  # fmt: skip
        rows.append({"trial": name, "event": "proposed", "wall_s": wall, "values": values, "step": 0, "metrics": {},
                     "seconds": 0.0, "error": None})  # fmt: skip
        loss = 0.05 + 0.1 * (math.log10(values["optimizer.lr"]) + 2.5) ** 2 + 0.05 * draw.random()
        event = "failed" if index < failures else "stopped" if index % 3 == 2 else "finished"
        metrics = {"eval/loss": loss, "eval/accuracy": 1 - loss / 3}
        rows.append({"trial": name, "event": event, "wall_s": wall + 0.4, "values": values,
                     "step": 400 if event == "finished" else 100, "metrics": {} if event == "failed" else metrics,
                     "seconds": 0.4, "error": "rank 0: out of memory" if event == "failed" else None})  # fmt: skip
        if event == "finished" and loss < best[0]:
            best = loss, name
    write_lines(path / "trials.jsonl", rows)
    write_result(path, wall_s=0.5 * trials, best={"metric": "eval/loss", "value": best[0], "step": 400,
                                                  "trial": best[1]})  # fmt: skip
    return path


def write_nas(path: Path, trials: int = 60, seed: int = 0) -> Path:
    """A search whose controller learns: later children are better."""
    draw = random.Random(seed)
    path.mkdir(parents=True)
    (path / "spec.yaml").write_text(NAS.format(name="toy-nas", base=BASE, trials=trials))
    rows: list[dict[str, Any]] = []
    weight, baseline, best = -math.log2(1.05), 0.0, (-math.inf, "", 0.0)
    for index in range(trials):
        name = f"{index:04d}"
        decisions = [draw.randrange(6) for _ in range(50)]
        cost = 10 ** draw.uniform(5.2, 7.2)
        accuracy = 0.6 + 0.3 * (1 - math.exp(-cost / 1e6)) + 0.06 * index / trials + draw.gauss(0, 0.02)
        reward = accuracy * (cost / 1e6) ** weight
        baseline = reward if index == 0 else 0.9 * baseline + 0.1 * reward
        rows.append({"trial": name, "event": "proposed", "wall_s": index, "values": {}, "step": 0, "metrics": {},
                     "seconds": 0.0, "error": None, "decisions": decisions, "cost": cost, "reward": None,
                     "logprob": -60.0, "baseline": baseline})  # fmt: skip
        rows.append({**rows[-1], "event": "finished", "wall_s": index + 0.9, "step": 400, "seconds": 0.9,
                     "metrics": {"eval/accuracy": accuracy}, "reward": reward})  # fmt: skip
        best = max(best, (reward, name, accuracy))
    write_lines(path / "trials.jsonl", rows)
    write_result(path, wall_s=float(trials), metrics={"eval/accuracy": best[2], "test/accuracy": best[2] - 0.01},
                 best={"metric": "eval/accuracy", "value": best[2], "step": 400, "trial": best[1]})  # fmt: skip
    return path
