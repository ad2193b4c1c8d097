"""Secrets that were written into a file, which is kept and shared; they are never repeated in a message."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from distml.spec.messages import Problem
from distml.spec.yaml import KeyPath

_FORMS = {
    "an AWS access key": r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b",
    "an AWS secret key": r"(?i)aws_secret_access_key\s+[A-Za-z0-9/+]+",
    "a private key": r"-----BEGIN [A-Z ]*PRIVATE KEY-----",
    "a GitHub token": r"\bgh[pousr]_[A-Za-z0-9]{30,}\b|\bgithub_pat_\w{20,}",
    "a Hugging Face token": r"\bhf_[A-Za-z0-9]{20,}\b",
    "a Google API key": r"\bAIza[0-9A-Za-z_-]{35}\b",
    "a Google access token": r"\bya29\.[0-9A-Za-z_-]{20,}",
    "a Slack token": r"\bxox[abpr]-[0-9A-Za-z-]{10,}",
    "an API key": r"\bsk-[A-Za-z0-9_-]{20,}",
}
_KNOWN = [(what, re.compile(form)) for what, form in _FORMS.items()]
_NAMED = re.compile(
    r"(?i)(?<![A-Z0-9])(?P<name>[A-Z0-9_]*(?:AUTH_TOKEN|API_TOKEN|ACCESS_TOKEN|HF_TOKEN|API_KEY|SECRET_ACCESS_KEY"
    r"|SECRET_KEY|PASSWORD|CREDENTIALS))(?:=|:\s*)(?P<value>[^\s;&|]+)"
)
_NAME = re.compile(r"(?i)(auth_token|api_token|access_token|hf_token|api_key|secret_access_key|secret_key|password|"
                   r"aws_session_token|aws_access_key_id)$")  # fmt: skip
ADVICE = "keep it out of the file: an environment variable, a file that is mounted, or a secret by its name"


def secrets_in(data: Any, path: KeyPath = ()) -> Iterator[Problem]:
    """Every string that looks like one, or stands under a name of one."""
    if isinstance(data, dict):
        for key, value in data.items():
            if _NAME.search(key) and isinstance(value, str) and _is_literal(value):
                yield Problem(f"a secret stands under {key}; {ADVICE}", ((*path, key),))
            elif key == "env" and isinstance(value, list):
                yield from _environment(value, (*path, key))
            else:
                yield from secrets_in(value, (*path, key))
    elif isinstance(data, list):
        for index, value in enumerate(data):
            yield from secrets_in(value, (*path, index))
    elif isinstance(data, str):
        yield from _in_text(data, path)


def _environment(entries: list[Any], path: KeyPath) -> Iterator[Problem]:
    """Variables of a container: `name` and `value`."""
    for index, entry in enumerate(entries):
        value = entry.get("value") if isinstance(entry, dict) else None
        if isinstance(value, str) and _is_literal(value) and _NAME.search(str(entry.get("name", ""))):
            yield Problem(f"the value of {entry['name']} is a secret; {ADVICE} (valueFrom.secretKeyRef)",
                          ((*path, index, "value"),), "value")  # fmt: skip
        else:
            yield from secrets_in(entry, (*path, index))


def _in_text(text: str, path: KeyPath) -> Iterator[Problem]:
    for what, form in _KNOWN:
        if form.search(text):
            yield Problem(f"{what} stands here; {ADVICE}", (path,), "value")
            return
    for found in _NAMED.finditer(text):
        if _is_literal(found["value"]):
            yield Problem(f"the value of {found['name']} stands here; {ADVICE}", (path,), "value")
            return


def _is_literal(value: str) -> bool:
    """Whether it is the thing itself rather than a variable, a command's output, a path or nothing."""
    bare = value.strip("'\"")
    return bool(bare) and not bare.startswith(("$", "`", "/", "~", "<", "./"))
