"""Our side of `distml bench population`'s no-ops: one run from Python, timed like the peers.

Usage: python our_over.py SPEC ADDRESS FOLDER. Writes FOLDER/said.json: seconds of `run`.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from distml.launch.run import run


def main(spec: str, address: str, folder: str) -> None:
    """Run it."""
    began = time.perf_counter()
    result = run(spec, out=Path(folder) / "run", address=address)
    whole = time.perf_counter() - began
    Path(folder, "said.json").write_text(json.dumps({"whole_s": whole, "wall_s": result.wall_s}))


if __name__ == "__main__":
    main(*sys.argv[1:])
