"""The peers of `distml bench rl`: each a process of its own, with the settings that its own project publishes."""

from __future__ import annotations

import json
import sys
from typing import Any


def configuration() -> dict[str, Any]:
    """What the measurement asks for: `algorithm`, `environment`, `frames`, `seed`, `every`, `path`."""
    config: dict[str, Any] = json.loads(sys.argv[1])
    return config
