"""What shell commands of a cluster file do, as far as it matters here: `ray start`, its environment, what they open."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

LOOPBACK = ("127.0.0.1", "localhost", "::1")
_SEPARATORS = re.compile(r"&&|\|\||[;\n|]")
_ASSIGNED = re.compile(r"^([A-Za-z_][A-Za-z0-9_]*)=(.*)$", re.DOTALL)
_EVERYWHERE = re.compile(
    r"(?<![\d.])0\.0\.0\.0(?![\d.])|(?:--(?:ip|host|bind|address)[= ]|-b )(?:\*|::)(?=$|[\s'\"])|--bind_all\b"
)


@dataclass(frozen=True)
class RayStart:
    """One `ray start`.

    Attributes:
        options: without the leading dashes; "" for what takes no value.
        environment: what is assigned before it, in its command and in those before it in the same shell.
    """

    options: Mapping[str, str]
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_head(self) -> bool:
        """Whether it starts the head node."""
        return "head" in self.options

    @property
    def dashboard_host(self) -> str:
        """Where the dashboard and the Jobs API listen; Ray's own choice is the loopback interface."""
        return self.options.get("dashboard-host", LOOPBACK[0])


def ray_starts(command: str) -> Iterator[RayStart]:
    """Each `ray start` of a command line."""
    exported: dict[str, str] = {}
    for part in _SEPARATORS.split(command):
        words = _words(part)
        if words[:1] == ["export"]:
            exported.update(found.groups() for found in map(_ASSIGNED.match, words[1:]) if found)  # type: ignore[misc]
            continue
        own: dict[str, str] = {}
        while words and ((found := _ASSIGNED.match(words[0])) or words[0] in ("env", "exec", "nohup", "sudo")):
            if found:
                own[found[1]] = found[2]
            words = words[1:]
        if not words and own:  # an assignment alone lasts for the shell, but its children do not see it
            continue
        if len(words) > 1 and words[0].rsplit("/", 1)[-1] == "ray" and words[1] == "start":
            yield RayStart(dict(_options(words[2:])), {**exported, **own})


def _words(part: str) -> list[str]:
    try:
        return shlex.split(part)
    except ValueError:  # a quote that another part closes
        return part.split()


def _options(words: list[str]) -> Iterator[tuple[str, str]]:
    for index, word in enumerate(words):
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            follows = words[index + 1] if index + 1 < len(words) else "--"
            yield name, value if equals or follows.startswith("--") else follows


def listens_everywhere(command: str) -> str | None:
    """The part of a command that makes something listen on every interface."""
    found = _EVERYWHERE.search(command)
    return found[0] if found else None


def environment_of(run_options: Iterable[str]) -> dict[str, str]:
    """What options of `docker run` set in the container."""
    words = [word for option in run_options for word in _words(str(option))]
    found: dict[str, str] = {}
    for index, word in enumerate(words):
        value = None
        if word in ("-e", "--env") and index + 1 < len(words):
            value = words[index + 1]
        elif word.startswith("--env="):
            value = word.removeprefix("--env=")
        if value is not None and (assigned := _ASSIGNED.match(value)):
            found[assigned[1]] = assigned[2]
    return found
