"""Who may reach a Ray of ours, decided before ray is imported: its core reads the token mode once, at import."""

from __future__ import annotations

import os
import secrets
import sys
from pathlib import Path

STUCK_THREAD = "distml-ray-close"  # alive at the end of a command: Ray no longer answers, not even at exit


def cluster_address(address: str | None) -> str | None:
    """The cluster to connect to: the argument, RAY_ADDRESS, that of the surrounding Ray job; None: a private Ray."""
    in_job = "auto" if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ else None
    return address or os.environ.get("RAY_ADDRESS") or in_job


def prepare_authentication(address: str | None) -> None:
    """Choose mode and token for a Ray that this process will start or connect to.

    A private Ray gets token mode and a token that only this process and its children know. For an existing cluster
    the mode is token where a token is at hand (RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token), as Ray's
    own head node decides. A mode that is set already stays. A private Ray also listens on the loopback interface
    only: Ray does so where it is told that the machine is no cluster's, as it takes for granted on a desktop's system.
    """
    if "ray" in sys.modules:
        return
    private = cluster_address(address) is None
    if private:
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    if "RAY_AUTH_MODE" in os.environ:
        return
    if private:
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    elif {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & set(os.environ) or (Path.home() / ".ray" / "auth_token").exists():
        os.environ["RAY_AUTH_MODE"] = "token"
