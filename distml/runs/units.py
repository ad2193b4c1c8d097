"""Numbers as people read them."""

from __future__ import annotations


def number(value: float | None) -> str:
    """A metric in at most a few characters: `0.1234`, `1.2e-05`, `12,345`; `nan` for None."""
    if value is None:
        return "nan"
    if isinstance(value, int) or (abs(value) >= 10_000 and abs(value) < 1e9):
        return f"{value:,.0f}"
    return f"{value:.4g}"


def duration(seconds: float) -> str:
    """Seconds as `0.8 s`, `42 s`, `3 min 20 s`, `5 h 03 min`."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def byte_size(count: float) -> str:
    """Bytes as `512 B`, `1.5 kB`, `23 MB`: powers of 1000."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(count) < 1000 or unit == "TB":
            break
        count /= 1000
    return f"{count:.0f} {unit}" if unit == "B" or abs(count) >= 100 else f"{count:.3g} {unit}"
