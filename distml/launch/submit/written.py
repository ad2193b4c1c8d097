"""A spec's texts as they are written: loading makes paths absolute, and on the cluster the spec is read anew, from the
working directory. So a whole path must exist there, and a relative one travels if it begins at the spec or at the
working directory.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distml.spec.jobs import find_job
from distml.spec.loader import LoadedSpec, find_base
from distml.spec.over_jobs import OverJobs
from distml.spec.yaml import parse


@dataclass(frozen=True)
class Written:
    """What stands in a spec, in the file of its base, and in overrides.

    Attributes:
        texts: every text among the values.
        home: where the spec lies.
        base: what names the base's file, and the file; None: there is no such file.
    """

    texts: frozenset[str]
    home: Path
    base: tuple[str, Path] | None = None

    def is_whole(self, path: Path) -> bool:
        """Whether a path of the loaded spec was written in full, so that it means the same file name everywhere."""
        whole = (Path(text).expanduser() for text in self.texts if text.startswith(("/", "~")))
        return any(one.resolve() == path.resolve() for one in whole)

    def begins_at(self, path: Path, folders: Sequence[Path]) -> bool:
        """Whether a relative path that is written leads from one of these folders to a path of the loaded spec."""
        relative = [text for text in self.texts if text.isprintable() and not os.path.isabs(text)]
        return any((folder / text).resolve() == path.resolve() for folder in folders for text in relative)


def as_written(
    spec: str | os.PathLike[str] | Mapping[str, Any], overrides: Sequence[str], loaded: LoadedSpec[Any],
    working_dir: Path,
) -> Written:  # fmt: skip
    """Of a spec that loads.

    Args:
        overrides: as `--set` takes them.
        working_dir: where a spec lies that is no file.
    """
    home, data = working_dir, spec
    if not isinstance(spec, Mapping):
        home = find_job(spec).parent
        data = _parsed(find_job(spec))
    values = dict(_override(text) for text in overrides)
    texts = {*_texts(data), *_texts(values)}
    name = values.get("base", data.get("base") if isinstance(data, Mapping) else None)
    if not (isinstance(loaded.job, OverJobs) and isinstance(name, str)):
        return Written(frozenset(texts), home)
    file = find_base(name, home)
    return Written(frozenset({*texts, *_texts(_parsed(file))}), home, (name, file))


def _parsed(path: Path) -> Any:
    return parse(path.read_bytes(), str(path)).data


def _override(text: str) -> tuple[str, Any]:
    key, _, value = text.partition("=")
    return key.strip(), parse(value, "--set", numbered=False).data


def _texts(data: Any) -> Iterator[str]:
    if isinstance(data, str):
        yield data
    elif isinstance(data, Mapping | list | tuple):
        for value in data.values() if isinstance(data, Mapping) else data:
            yield from _texts(value)
