"""A Ray and an algorithm on it: built, restored, and always ended again."""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ray
from ray.rllib.algorithms.algorithm import Algorithm

from distml.adapters.rllib_build import EVALUATION, asked_for, main_threads, make_config, make_environment
from distml.errors import DistmlError, UsageError
from distml.runtime.connection import connect, diverted_output
from distml.runtime.endings import close_within
from distml.spec.rllib import RLlibSpec
from distml.tasks.build import describe
from distml.tasks.sources import SourceTree

CLOSE_PATIENCE_S = 20.0
FEWER = {
    "CPU": "lower num_env_runners and the like in config",
    "GPU": "set num_gpus_per_learner and num_gpus_per_env_runner in config to 0 for CPUs",
}
LOGGERS = ("ray.rllib", "ray._common", "ray.data", "ray.train", "ray.tune", "py.warnings")  # of "ray", init takes care


class Session:
    """One algorithm of RLlib on a private Ray, or on a cluster.

    Args:
        job: the spec.
        sources: the file of a user's own environment.
        address: of a running cluster; None: RAY_ADDRESS, the surrounding job's cluster, else a private Ray.
        logs: where what Ray and RLlib say goes.

    Attributes:
        algorithm: once it is built.
    """

    def __init__(self, job: RLlibSpec, sources: SourceTree, address: str | None, logs: Path) -> None:
        self.job, self.sources, self.address, self.logs = job, sources, address, logs
        self.algorithm: Algorithm = None
        self.owns_ray = False
        self.quiet = contextlib.ExitStack()

    def build(self, start: int, evaluation: int = EVALUATION) -> None:
        """Connect to Ray and build the algorithm.

        Args:
            start: the iteration it will go on from.
            evaluation: which episodes its evaluations are of.

        Raises:
            UsageError: the environment, the config or the resources do not fit.
        """
        self.quiet.enter_context(diverted_output(self.logs / "ray.log"))
        self.quiet.enter_context(diverted_logging(self.logs / "rllib.log"))
        if self.job.needs_msgpack and importlib.util.find_spec("msgpack_numpy") is None:
            raise UsageError("RLlib writes and reads whole episodes with msgpack_numpy; pip install msgpack-numpy")
        environment: Any = make_environment({}, spec=self.job.environment, sources=self.sources)
        environment.close()
        try:
            config = make_config(self.job, self.sources, start=start, evaluation=evaluation)
            config.validate()
            cpus, gpus = asked_for(self.job, config)
        except Exception as error:
            raise self._refused(error) from error
        given = self.job.resources.cpus
        if given is not None and given < cpus:
            raise UsageError(f"resources.cpus is {given}, the processes of {self.job.algorithm} reserve {cpus}; "
                             "raise it, or lower num_env_runners and the like in config")  # fmt: skip
        self.owns_ray = connect(self.address, given or cpus, self.job.limits.start_s)
        for name, asked in (("CPU", cpus), ("GPU", gpus)):
            there = ray.cluster_resources().get(name, 0)
            if asked > there:
                where = "machine" if self.owns_ray else "cluster"
                raise UsageError(f"{self.job.algorithm} asks for {asked:g} {name}s, this {where} has {there:g}; "
                                 f"{FEWER[name]}")  # fmt: skip
        main_threads(config)
        try:
            self.algorithm = config.build_algo()
        except Exception as error:
            raise self._refused(error) from error

    def _refused(self, error: Exception) -> DistmlError:
        if isinstance(error, DistmlError):
            return error
        return UsageError(f"RLlib cannot build {self.job.algorithm} with this config: {explain(error)}")

    def restore(self, folder: Path, step: int) -> None:
        """Load a checkpoint that this run wrote (see `rllib_seal`).

        Raises:
            UsageError: it does not fit the algorithm.
        """
        try:
            self.algorithm.restore_from_path(str(folder.resolve()))
        except Exception as error:
            raise UsageError(f"the checkpoint {folder} does not fit: {explain(error)}") from error
        if self.algorithm.iteration != step:
            raise UsageError(f"{folder} is of iteration {self.algorithm.iteration}, not {step}")

    def close(self) -> None:
        """End the algorithm and a Ray of our own; does not wait for a Ray that no longer answers."""
        close_within(self._close, CLOSE_PATIENCE_S)
        self.quiet.close()

    def _close(self) -> None:
        if self.algorithm is not None:
            self.algorithm.stop()
            for folder in (Path(self.algorithm.logdir), Path(self.algorithm.logdir).parent):
                with contextlib.suppress(OSError):  # RLlib makes ~/ray_results/…, and puts nothing there
                    folder.rmdir()
            self.algorithm = None
            gc.collect()  # what reads recorded episodes ends with its last reference, and needs Ray for it
        if self.owns_ray:
            ray.shutdown()


def explain(error: BaseException) -> str:
    """A failure of RLlib's in one line: what a process of Ray's met, and what an error without words came from."""
    while True:
        if isinstance(error, ray.exceptions.RayTaskError) and isinstance(error.cause, Exception):
            error = error.cause
        elif not str(error) and (cause := error.__cause__ or error.__context__) is not None:
            error = cause
        else:
            return describe(error)


@contextlib.contextmanager
def diverted_logging(path: Path) -> Iterator[None]:
    """What RLlib logs and what libraries warn of goes to `path`, not to the terminal."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path, encoding="utf-8")
    loggers = [logging.getLogger(name) for name in LOGGERS]
    before = [(logger, logger.handlers[:], logger.propagate) for logger in loggers]
    logging.captureWarnings(True)
    for logger in loggers:
        logger.handlers, logger.propagate = [handler], False
    try:
        yield
    finally:
        logging.captureWarnings(False)
        for logger, handlers, propagate in before:
            logger.handlers, logger.propagate = handlers, propagate
        handler.close()
