"""A private Ray is a new one, whatever else was started on this machine."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

CONNECT = """
from distml.runtime.authentication import prepare_authentication
prepare_authentication(None)
from distml.runtime.connection import connect
print(connect(None, 1, 30.0))
import ray
print(ray.cluster_resources()["CPU"])
ray.shutdown()
"""


@pytest.mark.slow
def test_a_cluster_that_was_started_last_is_left_alone():
    """`ray start` leaves its address where `ray.init` looks for one."""
    with tempfile.TemporaryDirectory(prefix="d", ignore_cleanup_errors=True) as folder:
        (Path(folder) / "ray").mkdir()
        (Path(folder) / "ray" / "ray_current_cluster").write_text("127.0.0.1:1")
        env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        found = subprocess.run([sys.executable, "-c", CONNECT], env={**env, "RAY_TMPDIR": folder}, timeout=120,
                               capture_output=True, text=True)  # fmt: skip
    assert found.stdout.split() == ["True", "1.0"], found.stderr[-2000:]
