"""A task that relies on every gradient being of the newest weights."""

from __future__ import annotations

from small import Small


class Fresh(Small):
    needs = frozenset({"one_version"})
