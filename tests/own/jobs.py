"""Where the shipped jobs are."""

from __future__ import annotations

from pathlib import Path

JOBS = Path(__file__).resolve().parents[2] / "jobs"
