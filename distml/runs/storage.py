"""Where a run is kept besides its run directory: a folder, or a prefix in a bucket, as the few things that copies need.

A `Place` holds files by relative names with slashes. Written is all or nothing: of a folder by a rename, of a bucket
because an object appears when its last part is there. Credentials are looked up by the file systems themselves
(environment, files, the machine's role). pyarrow is imported when a bucket is opened, not before.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Protocol
from urllib.parse import urlsplit

from distml.errors import UsageError
from distml.limited import within
from distml.runs.files import TEMPORARY_FILES, write_atomically
from distml.spec.storage import BucketURL, bucket_of, is_url

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem

REACH_S = 20.0  # for all that is asked before a run starts
CONNECT_S, REQUEST_S, ATTEMPTS = 3.0, 10.0, 2
ENDPOINT_VARIABLES = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
PROBE = ".distml-probe-"
_CHUNK_BYTES = 4 << 20
_LONGEST_NAME = 1024
_CREDENTIALS = re.compile(
    r"INVALID_ACCESS_KEY|InvalidAccessKey|SIGNATURE_DOES_NOT_MATCH|SignatureDoesNotMatch|INVALID_CLIENT_TOKEN|"
    r"InvalidClientToken|EXPIRED_TOKEN|ExpiredToken|TokenRefresh|UNAUTHENTICATED|Could not create a OAuth2|"
    r"MISSING_AUTHENTICATION|HTTP status 401", re.IGNORECASE)  # fmt: skip
_DENIED = re.compile(r"ACCESS_DENIED|AccessDenied|PERMISSION_DENIED|HTTP status 403|Forbidden", re.IGNORECASE)
_NO_BUCKET = re.compile(r"NO_SUCH_BUCKET|NoSuchBucket|Bucket '[^']*' not found|bucket does not exist", re.IGNORECASE)
_ELSEWHERE = re.compile(r"HTTP status 301|PermanentRedirect", re.IGNORECASE)
_REGION = re.compile(r"bucket is located in '([a-z0-9-]+)'")
_NO_STORE = re.compile(r"RESOURCE_NOT_FOUND", re.IGNORECASE)
_NO_ANSWER = re.compile(r"NETWORK_CONNECTION|UNAVAILABLE|curlCode|Couldn't connect|resolve host|timed? ?out",
                        re.IGNORECASE)  # fmt: skip


class Place(Protocol):
    """A run's files elsewhere, by relative names.

    Attributes:
        url: as it is shown.
    """

    url: str

    def beside(self, name: str) -> Place:
        """The place of another run in the same storage."""

    def read(self, name: str) -> bytes | None:
        """A small file; None: it is not there."""

    def write(self, name: str, data: bytes) -> None:
        """A small file, whole or not at all."""

    def upload(self, name: str, source: Path, watch: Callable[[int], object]) -> None:
        """A file of any size; `watch` is called with the bytes of each piece, and ends it by raising."""

    def download(self, name: str, target: Path, watch: Callable[[int], object]) -> None:
        """The other way."""

    def sizes(self) -> dict[str, int]:
        """All files with their bytes, by checked names.

        Raises:
            OSError: a name leads out of the place.
        """

    def remove(self, name: str) -> None:
        """A file, or a folder with all in it; nothing where there is none. An empty name is the place itself."""

    def give(self, name: str, other: Place) -> None:
        """Move a file to another place of the same storage."""


def open_place(storage: str, run: str) -> Place:
    """Where a storage keeps the run of this name. Asks nobody yet.

    Raises:
        UsageError: pyarrow cannot make a file system of it.
    """
    if not is_url(storage):
        return FolderPlace(Path(storage).expanduser() / run)
    try:
        bucket = bucket_of(storage)
        return BucketPlace(file_system(bucket), f"{bucket.path}/{run}", bucket.scheme)
    except (OSError, ValueError, ImportError) as error:
        raise UsageError(f"storage {storage.partition('?')[0]}: {explained(error)}") from None


def file_system(bucket: BucketURL) -> FileSystem:
    """pyarrow's, with short limits: what waits for it are background threads, or somebody who wants to begin."""
    from pyarrow import fs

    options = dict(bucket.options)
    if bucket.scheme == "gs":
        named = {key: options[key] for key in ("endpoint_override", "scheme") if key in options}
        return fs.GcsFileSystem(retry_time_limit=timedelta(seconds=REQUEST_S), **named)
    endpoint = next((value for name in ENDPOINT_VARIABLES if (value := os.environ.get(name))), "")
    if endpoint and "endpoint_override" not in options:
        parts = urlsplit(endpoint)
        options |= {"endpoint_override": parts.netloc.rpartition("@")[2], "scheme": parts.scheme or "https"}
    return fs.S3FileSystem(
        connect_timeout=CONNECT_S, request_timeout=REQUEST_S, allow_delayed_open=True,
        check_directory_existence_before_creation=True,
        retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=ATTEMPTS), **options,
    )  # fmt: skip


def checked_name(name: str) -> str:
    """A relative name as a storage lists it.

    Raises:
        OSError: it could lead elsewhere.
    """
    parts = name.split("/")
    if any(part in ("", ".", "..") for part in parts) or "\\" in name or not name.isprintable():
        raise OSError(f"a file there has the name {name[:100]!r}, which no run has; remove it")
    if len(name) > _LONGEST_NAME or any(len(part.encode()) > 255 for part in parts):
        raise OSError(f"a file there has a name of {len(name)} characters, which no run has: {name[:60]!r}…; remove it")
    return name


def copy_stream(
    source: Callable[[int], bytes], sink: Callable[[bytes], object], watch: Callable[[int], object]
) -> None:
    """From a `read` to a `write`, piece by piece."""
    while piece := source(_CHUNK_BYTES):
        sink(piece)
        watch(len(piece))


# -------------------------------------------------------------------------------------------------------------- folders
class FolderPlace:
    """In a folder of a file system."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.url = folder, str(folder)

    def beside(self, name: str) -> FolderPlace:
        """See `Place`."""
        return FolderPlace(self.folder.with_name(name))

    def read(self, name: str) -> bytes | None:
        """See `Place`."""
        try:
            return (self.folder / name).read_bytes()
        except FileNotFoundError:
            return None

    def write(self, name: str, data: bytes) -> None:
        """See `Place`."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, data)

    def upload(self, name: str, source: Path, watch: Callable[[int], object]) -> None:
        """See `Place`."""
        _copy_file(source, self.folder / name, watch)

    def download(self, name: str, target: Path, watch: Callable[[int], object]) -> None:
        """See `Place`."""
        _copy_file(self.folder / name, target, watch)

    def sizes(self) -> dict[str, int]:
        """See `Place`. What a killed writer left half done is none of them."""
        found = {}
        for path in self.folder.rglob("*"):
            if path.is_file() and not path.is_symlink() and not path.match(TEMPORARY_FILES):
                with contextlib.suppress(FileNotFoundError):
                    found[checked_name(path.relative_to(self.folder).as_posix())] = path.stat().st_size
        return found

    def remove(self, name: str) -> None:
        """See `Place`."""
        path = self.folder / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)

    def give(self, name: str, other: Place) -> None:
        """See `Place`."""
        assert isinstance(other, FolderPlace)
        target = other.folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(self.folder / name, target)


def _copy_file(source: Path, target: Path, watch: Callable[[int], object]) -> None:
    """Whole or not at all."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with open(source, "rb") as read, open(temporary, "wb") as written:
            copy_stream(read.read, written.write, watch)
            written.flush()
            os.fsync(written.fileno())
        os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


# -------------------------------------------------------------------------------------------------------------- buckets
class BucketPlace:
    """Below a prefix of a bucket.

    Args:
        system: pyarrow's.
        root: bucket and prefix.
        scheme: of the URL.
    """

    def __init__(self, system: FileSystem, root: str, scheme: str) -> None:
        self.system, self.root, self.scheme, self.url = system, root, scheme, f"{scheme}://{root}"

    def beside(self, name: str) -> BucketPlace:
        """See `Place`."""
        return BucketPlace(self.system, f"{self.root.rpartition('/')[0]}/{name}", self.scheme)

    def read(self, name: str) -> bytes | None:
        """See `Place`."""
        try:
            with self.system.open_input_stream(f"{self.root}/{name}") as file:
                return bytes(file.read())
        except FileNotFoundError:
            return None

    def write(self, name: str, data: bytes) -> None:
        """See `Place`."""
        with self.system.open_output_stream(f"{self.root}/{name}") as file:
            file.write(data)

    def upload(self, name: str, source: Path, watch: Callable[[int], object]) -> None:
        """See `Place`. One that is broken off leaves a short object, which no manifest names with that size."""
        with open(source, "rb") as read, self.system.open_output_stream(f"{self.root}/{name}") as file:
            copy_stream(read.read, file.write, watch)

    def download(self, name: str, target: Path, watch: Callable[[int], object]) -> None:
        """See `Place`."""
        target.parent.mkdir(parents=True, exist_ok=True)
        with self.system.open_input_stream(f"{self.root}/{name}") as read, open(target, "wb") as file:
            copy_stream(lambda size: bytes(read.read(size)), file.write, watch)

    def sizes(self) -> dict[str, int]:
        """See `Place`."""
        from pyarrow import fs

        selector = fs.FileSelector(self.root, allow_not_found=True, recursive=True)
        files = [entry for entry in self.system.get_file_info(selector) if entry.type == fs.FileType.File]
        return {checked_name(entry.path.removeprefix(f"{self.root}/")): int(entry.size) for entry in files}

    def remove(self, name: str) -> None:
        """See `Place`."""
        from pyarrow import fs

        path = f"{self.root}/{name}".rstrip("/")
        kind = self.system.get_file_info(path).type
        if kind == fs.FileType.Directory:
            self.system.delete_dir(path)
        elif kind == fs.FileType.File:
            self.system.delete_file(path)

    def give(self, name: str, other: Place) -> None:
        """See `Place`."""
        assert isinstance(other, BucketPlace)
        self.system.move(f"{self.root}/{name}", f"{other.root}/{name}")


# ------------------------------------------------------------------------------------------------- before a run starts
def check_reachable(storage: str) -> None:
    """Write, read, list and remove a file there, within `REACH_S`.

    Raises:
        UsageError: what failed and what to do, one line.
    """
    place = open_place(storage, PROBE + secrets.token_hex(8))
    name, token = "driver", secrets.token_bytes(16)

    def look() -> None:
        place.write(name, token)
        if place.read(name) != token or place.sizes().get(name) != len(token):
            raise OSError("what was just written there is not there")
        place.remove("")

    with refused(storage.partition("?")[0]):
        within(REACH_S, "an answer", look)


@contextlib.contextmanager
def refused(url: str) -> Iterator[None]:
    """What a storage fails with, as one line of a user's matter."""
    try:
        yield
    except OSError as error:
        raise UsageError(f"storage {url}: {explained(error)}") from None


def explained(error: BaseException) -> str:
    """A file system's error in one line: what it means and what to do."""
    text = " ".join(str(error).split())
    if isinstance(error, ImportError):
        return f"pyarrow is not installed ({text}); install it, or use a folder that every node sees"
    if isinstance(error, OSError) and error.strerror:  # of a folder
        return f"{error.strerror}{f' ({error.filename})' if error.filename else ''}"
    region = _REGION.search(text)
    for pattern, meaning in (
        (_ELSEWHERE, "the bucket is in another region; write it after the URL, as in "
                     f"?region={region[1] if region is not None else 'eu-west-1'}, or set AWS_DEFAULT_REGION"),
        (_NO_BUCKET, "there is no such bucket; make it, or correct its name"),
        (_CREDENTIALS, "the credentials are not taken; check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
                       "~/.aws/credentials or GOOGLE_APPLICATION_CREDENTIALS"),
        (_DENIED, "no permission, or no credentials were found (environment, files, the machine's role); it takes "
                  "reading, writing, listing and deleting there"),
        (_NO_STORE, "what answers there knows no buckets; check ?endpoint_override=HOST:PORT&scheme= and "
                    "AWS_ENDPOINT_URL"),
        (_NO_ANSWER, "no answer from the store; check the network, the region, ?endpoint_override=HOST:PORT&scheme= "
                     "and AWS_ENDPOINT_URL"),
    ):  # fmt: skip
        if pattern.search(text):
            return f"{meaning} ({text[:160]})"
    return text[:300]
