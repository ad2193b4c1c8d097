"""Whether this run wrote a checkpoint of RLlib's: these are pickles, and whoever loads one runs what is in it.

A SHA-256 manifest says that nothing was damaged, not who wrote it. So every checkpoint carries an HMAC over its files
and step, under a random key in RUN/rllib.key that only its owner may read. A whole run directory that comes from
somewhere else brings a key of its own, so the key file's change time (nanoseconds, set by the kernel, in no archive) is
part of the HMAC's key: an archive that is unpacked, a copy and a `chmod` all change it, and what they bring is refused,
as is a key that another user made here. Renaming the run directory changes nothing. This protects against files from
elsewhere, not against whoever may already write with this user's rights.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import secrets
from pathlib import Path

from distml.errors import UsageError
from distml.runs.checkpoints import folder_name
from distml.runs.files import strict_json

KEY_FILE, SEAL_FILE, RLLIB_FOLDER = "rllib.key", "seal.json", "rllib"


def make_key(run: Path) -> None:
    """Give the run directory its key, if it has none."""
    try:
        handle = os.open(run / KEY_FILE, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return
    with os.fdopen(handle, "w") as file:
        file.write(secrets.token_hex(32))
        file.flush()
        os.fsync(file.fileno())


def seal(run: Path, folder: Path, step: int) -> None:
    """Write the seal of a checkpoint whose RLlib files are complete."""
    (folder / SEAL_FILE).write_text(strict_json({"hmac": _mac(run, folder, step)}, "seal"))


def opened(run: Path, step: int) -> Path:
    """RLlib's folder in a checkpoint of this run.

    Raises:
        UsageError: this run did not write it, as far as can be told.
    """
    folder = run / "checkpoints" / folder_name(step)
    try:
        found = json.loads((folder / SEAL_FILE).read_text())["hmac"]
        is_ours = hmac.compare_digest(str(found), _mac(run, folder, step))
    except (OSError, ValueError, KeyError, TypeError):
        is_ours = False
    if not is_ours:
        raise UsageError(
            f"{folder} was not written here by this run, or {run / KEY_FILE} was touched: RLlib's checkpoints are "
            "pickles, and loading one from elsewhere runs what is in it; go on in the run's original directory, "
            "or begin anew with --fresh or another --out"
        )
    return folder / RLLIB_FOLDER


def _mac(run: Path, folder: Path, step: int) -> str:
    root = folder / RLLIB_FOLDER
    digests = {
        path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if not path.is_dir()
    }
    return hmac.new(_key(run), json.dumps([step, digests], sort_keys=True).encode(), hashlib.sha256).hexdigest()


def _key(run: Path) -> bytes:
    """The key's text and its file's change time.

    Raises:
        PermissionError: another user made it, who could have sealed anything.
    """
    with open(run / KEY_FILE, "rb") as file:
        found = os.fstat(file.fileno())
        if found.st_uid != os.geteuid():
            raise PermissionError(f"{KEY_FILE} is another user's")
        return b"%b %d" % (file.read(), found.st_ctime_ns)
