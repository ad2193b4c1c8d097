"""Which environments there are, for messages about names that are wrong. Gymnasium is imported when it is asked."""

from __future__ import annotations

import difflib

EXTRAS = {"ALE": "atari"}


def unknown_environment(name: str) -> str | None:
    """What is wrong with an id of Gymnasium's registry, with what comes nearest; None: it is known."""
    import gymnasium

    namespace = name.rpartition("/")[0]
    if name in gymnasium.registry or ":" in name:
        return None
    if namespace in EXTRAS:
        try:
            import ale_py
        except ImportError:
            extra = EXTRAS[namespace]
            return f"environment {name} needs the extra {extra!r}: pip install 'distml[{extra}]'"
        gymnasium.register_envs(ale_py)
        if name in gymnasium.registry:
            return None
    versions = [known for known in gymnasium.registry if known.rpartition("-v")[0] == name.rpartition("-v")[0]]
    close = versions[-1:] or difflib.get_close_matches(name, gymnasium.registry, n=1)
    hint = f"did you mean {close[0]!r}?" if close else "see gymnasium.pprint_registry(), or name your own module:Class"
    return f"unknown environment {name!r}; {hint}"
