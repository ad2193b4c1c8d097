"""The peer of `distml bench population`: Ray Tune with trainables that do nothing.

Usage: python tune_noop.py pbt|pbt-reuse ADDRESS FOLDER MEMBERS ITERATIONS EVERY
       python tune_noop.py sweep|sweep-reuse ADDRESS FOLDER TRIALS AT-ONCE 0

Writes FOLDER/ticks-NAME, a line for each iteration with the time at which it began, and FOLDER/said.json: seconds of
`fit`, and how many exploits there were.
"""

from __future__ import annotations

import json
import random
import sys
import time
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.tune.schedulers import PopulationBasedTraining

from distml.bench.population_task import meet


class NoOp(tune.Trainable):  # type: ignore[misc]
    """One number that grows by the learning rate."""

    def setup(self, config: dict[str, Any]) -> None:
        """Begin."""
        self.value = 0.0
        self.file = Path(config["folder"]) / f"ticks-{self.trial_id}"

    def step(self) -> dict[str, float]:
        """One iteration."""
        if not self.file.exists():
            meet(self.file, int(self.config["together"]))
        with self.file.open("a") as file:
            file.write(f"{time.time()!r}\n")
        self.value += self.config["lr"]
        return {"score": self.value}

    def save_checkpoint(self, folder: str) -> None:
        """The number."""
        Path(folder, "value.json").write_text(json.dumps(self.value))

    def load_checkpoint(self, folder: Any) -> None:
        """The number."""
        self.value = json.loads(Path(folder, "value.json").read_text())

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Take another trial's values; for `reuse_actors`."""
        self.config = new_config
        self.value = 0.0
        self.file = Path(new_config["folder"]) / f"ticks-{self.trial_id}"
        return True


class Counting(PopulationBasedTraining):  # type: ignore[misc]
    """Counts exploits, and does nothing else."""

    num_exploits = 0

    def _exploit(self, *args: Any, **kwargs: Any) -> None:
        self.num_exploits += 1
        super()._exploit(*args, **kwargs)


def once(config: dict[str, Any]) -> None:
    """A trial of a sweep."""
    tune.report({"score": config["lr"]})


def population(folder: str, members: int, iterations: int, every: int, reuse: bool) -> dict[str, float]:
    """Population-based training of no-ops."""
    scheduler = Counting(
        time_attr="training_iteration", metric="score", mode="max", perturbation_interval=every,
        quantile_fraction=0.25, resample_probability=0.25, hyperparam_mutations={"lr": tune.loguniform(1e-3, 1.0)},
    )  # fmt: skip
    tuner = tune.Tuner(
        tune.with_resources(NoOp, {"cpu": 1}),
        param_space={"lr": tune.loguniform(1e-3, 1.0), "folder": folder, "together": members},
        tune_config=tune.TuneConfig(scheduler=scheduler, num_samples=members, reuse_actors=reuse),
        run_config=tune.RunConfig(storage_path=f"{folder}/tune", stop={"training_iteration": iterations}, verbose=0),
    )
    began = time.perf_counter()
    results = tuner.fit()
    return {"fit_s": time.perf_counter() - began, "exploits": scheduler.num_exploits, "errors": results.num_errors}


def sweep(folder: str, trials: int, at_once: int, reuse: bool) -> dict[str, float]:
    """Trials that report once and end."""
    began = time.perf_counter()
    tuner = tune.Tuner(
        tune.with_resources(once, {"cpu": 1}),
        param_space={"lr": tune.loguniform(1e-3, 1.0)},
        tune_config=tune.TuneConfig(
            num_samples=trials, max_concurrent_trials=at_once, metric="score", mode="max", reuse_actors=reuse
        ),
        run_config=tune.RunConfig(storage_path=f"{folder}/tune", verbose=0),
    )
    results = tuner.fit()
    return {"fit_s": time.perf_counter() - began, "errors": results.num_errors}


def main(what: str, address: str, folder: str, *numbers: str) -> None:
    """Run it."""
    random.seed(0)  # Tune's PBT has no seed of its own
    first, second, third = map(int, numbers)
    began = time.perf_counter()
    ray.init(address=address, log_to_driver=False)
    if what.startswith("sweep"):
        said = sweep(folder, first, second, reuse=what == "sweep-reuse")
    else:
        said = population(folder, first, second, third, reuse=what == "pbt-reuse")
    said["whole_s"] = time.perf_counter() - began
    Path(folder, "said.json").write_text(json.dumps(said))


if __name__ == "__main__":
    main(*sys.argv[1:])
