"""The peer of `distml bench population`: Optuna alone, whose trials do nothing.

Usage: python optuna_noop.py FOLDER TRIALS. Writes FOLDER/said.json: seconds of `optimize`.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import optuna


def main(folder: str, trials: str) -> None:
    """Run it."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=0))
    began = time.perf_counter()
    study.optimize(lambda trial: trial.suggest_float("lr", 1e-3, 1.0, log=True), n_trials=int(trials))
    Path(folder, "said.json").write_text(json.dumps({"fit_s": time.perf_counter() - began}))


if __name__ == "__main__":
    main(*sys.argv[1:])
