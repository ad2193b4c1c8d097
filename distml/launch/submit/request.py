"""A job as Ray's Jobs API takes it: an entrypoint for a shell, an environment, metadata. Pure: no cluster, no ray.

A run's name is the name of its local run directory; on the cluster it is the directory of that name below
`$DISTML_RUNS` (see `remote`), so that the same command again goes on from the newest checkpoint there.
"""

from __future__ import annotations

import os
import re
import secrets
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from distml import __version__
from distml.errors import UsageError

REMOTE = "distml.launch.submit.remote"
# The interpreter that runs Ray there, if it is on the PATH of who started Ray; `exec`: a signal reaches it alone.
PYTHON = 'exec "$(command -v python || command -v python3)"'
STOP_WAIT = (
    "RAY_JOB_STOP_WAIT_TIME_S"  # of Ray's supervisor of the job, which has the job's environment; Ray's own is 3
)
STOP_WAIT_S = 60
META_RUN, META_VERSION, META_DIGEST = "distml_run", "distml_version", "distml_spec"
RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@dataclass(frozen=True)
class JobRequest:
    """What a cluster is asked to run.

    Attributes:
        run: the run's name.
        spec: its path in the working directory, or a shipped job's name.
        digest: of the resolved spec.
        options: further arguments of `distml run`.
        env: variables of the job's processes; everyone who may use the cluster can read them.
        submission_id: the run's name and something random.
    """

    run: str
    spec: str
    digest: str
    options: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    submission_id: str = ""

    @property
    def entrypoint(self) -> str:
        """One line for a shell."""
        return f"{PYTHON} -m {REMOTE} {shlex.join([self.run, self.spec, *self.options])}"

    @property
    def env_vars(self) -> dict[str, str]:
        """With the time that a driver has for its last checkpoint when it is stopped."""
        return {STOP_WAIT: str(STOP_WAIT_S), **self.env}

    @property
    def metadata(self) -> dict[str, str]:
        """What finds the job again by its run."""
        return {"job_name": self.run, META_RUN: self.run, META_VERSION: __version__, META_DIGEST: self.digest}


def new_submission_id(run: str) -> str:
    """Unique on any cluster."""
    return f"{run}-{secrets.token_hex(4)}"


def checked_run_name(name: str) -> str:
    """The name of a local run directory as a run's name.

    Raises:
        UsageError: it would not do as a name on the cluster.
    """
    if RUN_NAME.fullmatch(name) is None:
        raise UsageError(
            f"--out: {name!r} cannot name the run on the cluster; use letters, digits, dots, dashes and underscores"
        )
    return name


def parse_env(texts: Sequence[str]) -> dict[str, str]:
    """`K=V`, or `K` for the value that it has here.

    Raises:
        UsageError: no variable's name, one that is not set here, or one that is Ray's own business.
    """
    env: dict[str, str] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if VARIABLE.fullmatch(name) is None:
            raise UsageError(f"--env {name!r} is not a variable's name; write --env NAME=VALUE")
        if not equals:
            if name not in os.environ:
                raise UsageError(f"--env {name}: it is not set here; write --env {name}=VALUE")
            value = os.environ[name]
        env[name] = value
    return checked_env(env)


def checked_env(env: Mapping[str, str]) -> dict[str, str]:
    """Variables without those that would be wrong there.

    Raises:
        UsageError: such a one.
    """
    for name, value in env.items():
        if name.startswith("RAY_AUTH_"):
            raise UsageError(f"--env {name}: leave it out; the job has its cluster's token, and others can read --env")
        if name in ("RAY_ADDRESS", "RAY_JOB_CONFIG_JSON_ENV_VAR"):
            raise UsageError(f"--env {name}: leave it out; Ray sets it for the job")
        if name == STOP_WAIT and not value.isdecimal():
            raise UsageError(f"--env {name}={value}: not a whole number of seconds")
        if "\0" in value:
            raise UsageError(f"--env {name}: its value holds a null byte")
    return dict(env)
