"""For people who call Ray Tune themselves: a distml job as a class that Tune trains.

from ray import tune
import distml.tune

space = {"optimizer.lr": tune.loguniform(1e-4, 1e-1)}
tuner = tune.Tuner(distml.tune.trainable("digits-single"), param_space=space)
tuner.fit()
"""

from __future__ import annotations

from distml.adapters.tune_trainable import trainable

__all__ = ["trainable"]
