"""`storage:` as a spec writes it: a folder that every node sees, or a bucket. Nothing is opened here."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated
from urllib.parse import parse_qsl, urlsplit

from pydantic import Field

STORES = {"s3": "s3://BUCKET/PREFIX", "gs": "gs://BUCKET/PREFIX"}
OPTIONS = ("endpoint_override", "scheme", "region")
FORMS = f"a path, {' or '.join(STORES.values())}"

Storage = Annotated[
    str | None,
    Field(description="where every node and every later cluster finds the run: a folder that all nodes see, "
          "s3://BUCKET/PREFIX or gs://BUCKET/PREFIX; null: nowhere but in the run directory"),
]  # fmt: skip

_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,221}")
_ENDPOINT = re.compile(r"[A-Za-z0-9.\[\]:_-]+")


@dataclass(frozen=True)
class BucketURL:
    """A place in a bucket.

    Attributes:
        scheme: `s3` or `gs`.
        prefix: without slashes at its ends; may be empty.
        options: of `OPTIONS`, those that are written.
    """

    scheme: str
    bucket: str
    prefix: str
    options: Mapping[str, str]

    @property
    def path(self) -> str:
        """Bucket and prefix, as file systems take it."""
        return f"{self.bucket}/{self.prefix}".rstrip("/")


def is_url(storage: str) -> bool:
    """Whether a storage is a bucket's, not a folder's."""
    return "://" in storage


def folder_of(storage: str | None) -> Path | None:
    """The folder in which runs lie that are given no directory, where the storage is one."""
    return None if storage is None or is_url(storage) else Path(storage).expanduser()


def bucket_of(storage: str) -> BucketURL:
    """The parts of a URL.

    Raises:
        ValueError: what is wrong and what to do; never with what may be a password.
    """
    scheme = storage.partition("://")[0]
    if scheme not in STORES:
        raise ValueError(f"does not know {scheme[:20]}://; write {FORMS}")
    try:
        parts = urlsplit(storage)
        options = dict(parse_qsl(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query)))
    except ValueError:
        raise ValueError(f"is no URL of a bucket; write {STORES[scheme]}") from None
    if "@" in parts.netloc or ":" in parts.netloc or "@" in options.get("endpoint_override", ""):
        raise ValueError("must name no user and no password: credentials come from the environment, from files such "
                         "as ~/.aws/credentials, or from the machine's role")  # fmt: skip
    unknown = next((key for key in options if key not in OPTIONS), None)
    if unknown is not None or parts.fragment:
        raise ValueError(f"has an option that does not work here; after a ? may stand {', '.join(OPTIONS)}")
    if options.get("scheme", "https") not in ("http", "https"):
        raise ValueError("has a scheme= that is neither http nor https")
    if not _ENDPOINT.fullmatch(options.get("endpoint_override", "x")):
        raise ValueError("has an endpoint_override= that is no HOST:PORT; http belongs into &scheme=http")
    if not _BUCKET.fullmatch(parts.netloc):
        raise ValueError(f"names no bucket; write {STORES[scheme]}")
    prefix = parts.path.strip("/")
    if prefix and any(part in ("", ".", "..") for part in prefix.split("/")):
        raise ValueError("has a prefix with an empty part, . or ..; write it without")
    return BucketURL(scheme, parts.netloc, prefix, options)


def fault_of(storage: str | None) -> str | None:
    """What is wrong with a storage, after its name; None: nothing that could be told here."""
    if storage is None:
        return None
    if not storage.isprintable() or not storage.strip():
        return f"must be {FORMS}, or null"
    scheme, _, rest = storage.partition(":")
    if is_url(storage):
        try:
            bucket_of(storage)
        except ValueError as error:
            return str(error)
    elif scheme in STORES and rest.startswith("/"):
        return f"has one slash where a URL has two; write {STORES[scheme]}"
    return None
