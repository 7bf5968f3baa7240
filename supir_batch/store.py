"""Objects behind URIs: list, read, and write whole or not at all. The only file that knows fsspec.

A URI is a local path (absolute or relative to the current folder), ``file://...`` or anything fsspec opens
(``s3://...``, ``gs://...``, ``memory://...``). Endpoint, region and credentials come from the client's own environment
and profiles, never from a URI. Every failure is a :class:`StoreError` whose message begins with the URI. What trying
again can help is tried again; what then still fails is a :class:`TransientStoreError`.
"""

from __future__ import annotations

import errno
import functools
import glob
import hashlib
import io
import os
import posixpath
import random
import re
import secrets
import shutil
import stat
import tempfile
import time
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast

import fsspec
import fsspec.utils

from supir_batch.errors import StoreError, TransientStoreError

PARTIAL_SUFFIX = ".partial"

_T = TypeVar("_T")
_TRIES = 5  # of one operation
_DEADLINE_S = 120.0  # no try begins later than this after the first
_LONGEST_PAUSE_S = 20.0  # between two tries; the first pause is at most 1 s, each next one at most twice as long
_PIECE = 16 * 1024 * 1024  # bytes read at once from a large object
_PART = 16 * 1024 * 1024  # bytes of one part of an upload
_PARTS_AT_ONCE = 4  # of one upload: what it holds in memory
_MOST_PARTS = 10_000  # of one upload, by the rules of S3
_RACE_S = 3.0  # longer than a look and a put take: within it all who race for one name have written
_MAX_NAME_BYTES = 255  # of one path component, on every file system we know

# Object stores have no folders: asking them to make one may create a bucket.
_FOLDERLESS = {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl", "oss", "memory", "http", "https"}

_TRANSIENT_ERRNO = {
    errno.EAGAIN,
    errno.EBUSY,
    errno.ECONNABORTED,
    errno.ECONNREFUSED,
    errno.ECONNRESET,
    errno.EHOSTUNREACH,
    errno.EINTR,
    errno.ENETDOWN,
    errno.ENETUNREACH,
    errno.EPIPE,
    errno.ESTALE,
    errno.ETIMEDOUT,
}
# The clients below fsspec raise their own classes; these parts of their names mean the network, not the request.
_TRANSIENT_NAMES = (
    "Timeout",
    "Connect",
    "Disconnect",
    "HTTPClientError",  # an answer that is no HTTP
    "Incomplete",
    "Payload",
    "SlowDown",
    "ServerError",
)
# What S3 answers to a request that was harmed on its way, or came at the wrong moment; besides 408, 429 and 5xx.
_TRANSIENT_CODES = {
    "BadDigest",
    "ConditionalRequestConflict",
    "IncompleteBody",
    "NoSuchUpload",  # of our own: its parts have been put together, or are gone
    "OperationAborted",
    "RequestTimeout",
    "XAmzContentSHA256Mismatch",
}

_S3 = {"s3", "s3a"}
_S3_OPTIONS = {
    # One request is tried three times, with pauses; the operation it belongs to is tried again by us.
    "config_kwargs": {
        "retries": {"mode": "standard", "total_max_attempts": 3},
        "connect_timeout": 10,
        "read_timeout": 30,
    }
}
_EXTRAS = {"gs": "gs", "gcs": "gs", "az": "az", "abfs": "az", "abfss": "az"}

# By the store's own word, or the status of an answer that has none. The first line that holds the word counts.
_REGION = "the bucket is in another region; set AWS_REGION to its region, or AWS_ENDPOINT_URL to where it is"
_INVALID = "the credentials are not valid there; check AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
_NONE = "there are no credentials for it; set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
_EXPIRED = "the credentials have expired; renew them and run again"
_DENIED = (
    "access denied; cannot {action} it with these credentials: get them the right to "
    "(without the right to list a bucket, what does not exist is denied as well)"
)
_ADVICE = {
    "NoSuchBucket": "does not exist: there is no such bucket; create it, or correct the URI or AWS_ENDPOINT_URL",
    "AuthorizationHeaderMalformed": _REGION,
    "IllegalLocationConstraintException": _REGION,
    "PermanentRedirect": _REGION,
    "TemporaryRedirect": _REGION,
    "301": _REGION,
    "307": _REGION,
    "InvalidAccessKeyId": _INVALID,
    "InvalidToken": _INVALID,
    "SignatureDoesNotMatch": _INVALID,
    "ExpiredToken": _EXPIRED,
    "RequestTimeTooSkewed": "the clock of this machine is wrong, so requests are refused; set it",
    "NoCredentialsError": _NONE,
    "PartialCredentialsError": _NONE,
    "ProfileNotFound": "the profile that AWS_PROFILE names is not in ~/.aws; correct it",
    "UnauthorizedSSOTokenError": _EXPIRED,
    "SSOTokenLoadError": _EXPIRED,
    "TokenRetrievalError": _EXPIRED,
    "AccessDenied": _DENIED,
    "AllAccessDisabled": _DENIED,
    "403": _DENIED,
    "FileExpired": "was changed while it was read; run again",
    "PreconditionFailed": "was changed while it was read; run again",
}

# user:password@ (a port or an ARN is none), and the parameters that signed links and tokens go by.
_PASSWORD = re.compile(r"[\w+.-]+://(?!arn:)[^/:@]*:(?!\d+(/|$))[^@]*@")
_SIGNED = re.compile(
    r"[?&](x-amz-(signature|credential|security-token)|x-goog-(signature|credential)|awsaccesskeyid|googleaccessid|"
    r"signature|sig|token|access_token|password|secret)=",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class ObjectInfo:
    """One object. ``size`` in bytes; -1 marks a listed name that leads nowhere (a broken link).

    ``version`` changes whenever the bytes may have changed: size and mtime locally, size and ETag (or time) elsewhere.
    """

    uri: str
    size: int
    version: str


# --- names ---------------------------------------------------------------------------------------------------------


def is_local(uri: str) -> bool:
    """Whether ``uri`` names a file of this machine."""
    return "://" not in uri or uri.startswith("file://")


def local_path(uri: str) -> Path:
    """The path behind a local ``uri``, not made absolute. ``~/`` is the home folder, ``~a.tif`` a file like others."""
    path = uri.removeprefix("file://")
    return Path(path).expanduser() if path == "~" or path.startswith("~/") else Path(path)


def normalize(uri: str) -> str:
    """One spelling per object: absolute with symlinks resolved for local paths; other URIs lose a trailing slash.

    For comparing. A local path need not exist.
    """
    if is_local(uri):
        with _errors(uri, "resolve"):
            return os.path.realpath(local_path(uri))
    scheme, _, path = uri.partition("://")
    return f"{scheme.lower()}://{path.rstrip('/')}"


def resolve(folder: str, reference: str) -> str:
    """``reference`` itself if absolute or a URI, else ``reference`` seen from ``folder``; ``..`` is allowed.

    Symlinks are kept, so that messages show the path as the user wrote it.
    """
    if not is_local(reference):
        return reference
    path = local_path(reference)
    if path.is_absolute():
        return os.path.normpath(path)
    if is_local(folder):
        return os.path.normpath(local_path(folder).absolute() / path)
    scheme, _, base = folder.partition("://")
    joined = posixpath.normpath(posixpath.join("/" + base, reference)).lstrip("/")
    return f"{scheme}://{joined}"


def join(base: str, *parts: str) -> str:
    """``base`` extended by ``parts``, which may hold several components each but can only lead down.

    Raises StoreError for an absolute part, a URI, a part that names nothing (empty, blank or ``.``), ``..`` and what
    other systems take for it (``..\\``, full-width dots, blanks around), and a NUL character.
    """
    components: list[str] = []
    for part in parts:
        # Delivered to Windows, or normalized by a server on the way, a name must not become another path.
        elsewhere = {piece.strip() for piece in re.split(r"[/\\]", unicodedata.normalize("NFKC", part))}
        if "://" in part or part.startswith("/") or "\0" in part or ".." in elsewhere or elsewhere <= {"", "."}:
            raise StoreError(f"{base}: cannot be extended by {part!r}; use a relative path without '..'")
        components += [piece for piece in part.split("/") if piece not in ("", ".")]
    return "/".join([base.rstrip("/"), *components]) if components else base


def parent(uri: str) -> str:
    """The folder that holds ``uri``; ``.`` for a bare local name."""
    if is_local(uri):
        return str(local_path(uri).parent)
    scheme, _, path = uri.partition("://")
    return f"{scheme}://{path.rstrip('/').rpartition('/')[0]}"


def name(uri: str) -> str:
    """The last component of ``uri``."""
    return uri.rstrip("/").rpartition("/")[2]


def relative_to(uri: str, folder: str) -> str | None:
    """The path of ``uri`` below ``folder`` with forward slashes, or None when it lies elsewhere.

    Spellings count as equal when :func:`normalize` makes them so; the names returned are those of ``uri``.
    """
    if is_local(uri) != is_local(folder):
        return None
    if not is_local(uri):
        return _below(normalize(uri), normalize(folder))
    as_written = _below(os.path.abspath(local_path(uri)), os.path.abspath(local_path(folder)))
    return as_written or _below(normalize(uri), normalize(folder))


def has_glob(uri: str) -> bool:
    """Whether ``uri`` contains a wildcard (``*``, ``?`` or ``[``)."""
    return glob.has_magic(uri)


def glob_root(pattern: str) -> str:
    """The folder in front of a pattern's first wildcard."""
    fixed = pattern[: min((pattern.find(c) for c in "*?[" if c in pattern), default=len(pattern))]
    if is_local(pattern):
        return os.path.dirname(fixed) or "."
    scheme, _, path = fixed.partition("://")
    return f"{scheme}://{path.rpartition('/')[0]}"


def refuse_links(uri: str, folder: str) -> None:
    """Raise StoreError if a folder between ``folder`` and ``uri``, both excluded, is a symbolic link.

    What is written through one would lie elsewhere: beside the originals, or where another image is written as well.
    ``folder`` itself may be a link or a mount, and so may what is above it.
    """
    if not is_local(uri):
        return
    at = local_path(folder)
    for piece in local_path(uri).relative_to(at).parts[:-1]:
        at /= piece
        if at.is_symlink():
            raise StoreError(
                f"{at}: is a symbolic link to {os.readlink(at)}; outputs are written below {folder} only: "
                f"replace it by a folder, or mount there what it leads to"
            )


def place(folder: str, *parts: str) -> str:
    """:func:`join`, for what will be written below ``folder``: no link may lead out of it. Raises StoreError."""
    uri = join(folder, *parts)
    refuse_links(uri, folder)
    return uri


def refuse_credentials(uri: str) -> str:
    """``uri`` itself. Raises StoreError, without saying them, if it holds credentials: they would be in every log."""
    if found := _PASSWORD.match(uri) or _SIGNED.search(uri):
        start = uri[: uri.index("://") + 3] if found.re is _PASSWORD else uri[: found.start()]
        raise StoreError(
            f"{start}...: holds a password or a signature, which would be copied into logs and records; take it out "
            f"and give credentials by environment or profile (AWS_PROFILE, ...)"
        )
    return uri


# --- looking -------------------------------------------------------------------------------------------------------


def find(uri: str) -> ObjectInfo | None:
    """What is at ``uri``; None when nothing is. Raises StoreError for a folder or when it cannot be looked up."""
    if is_local(uri):
        facts = _attempt(uri, "reach", lambda: _local_stat(uri))
        if facts is None:
            return None
        if stat.S_ISDIR(facts.st_mode):
            raise StoreError(f"{uri}: is a folder, not a file")
        return ObjectInfo(uri, facts.st_size, f"{facts.st_size}-{facts.st_mtime_ns}")
    there = _remote_facts(uri)
    if there is None:
        return None
    if there.get("type") == "directory":
        raise StoreError(f"{uri}: is a folder, not a file")
    return _remote_info(uri, there)


def info(uri: str) -> ObjectInfo:
    """What is at ``uri``; raises StoreError when nothing is."""
    found = find(uri)
    if found is None:
        raise StoreError(f"{uri}: does not exist")
    return found


def exists(uri: str) -> bool:
    """Whether an object (not a folder) is at ``uri``."""
    if is_local(uri):
        return local_path(uri).is_file()
    return (_remote_facts(uri) or {"type": "directory"}).get("type") != "directory"


def is_folder(uri: str) -> bool:
    """Whether ``uri`` is a folder, or a prefix with objects below it."""
    if is_local(uri):
        return local_path(uri).is_dir()
    return (_remote_facts(uri) or {}).get("type") == "directory"


def list_tree(uri: str) -> Iterator[ObjectInfo]:
    """Every object below the folder ``uri``, sorted by name; nothing when there is no such folder.

    The order is that of the code points of the names, which is that of their UTF-8 bytes: so S3 lists as well. Locally
    one folder is held in memory at a time, on S3 one page of a thousand. Linked files count, linked folders are not
    entered (they can form loops).
    """
    if is_local(uri):
        root = local_path(uri)
        if root.is_dir():
            yield from _walk(uri.rstrip("/") or "/", root)
        return
    base = uri.rstrip("/")
    if _scheme(uri) in _S3:
        listed = _list_s3(uri, _key(uri).rstrip("/") + "/" if _key(uri) else "", "")
    else:
        listed = _list_remote(base)
    for name, facts in listed:
        yield _remote_info(f"{base}/{name}", facts)


def list_names(uri: str, endings: tuple[str, ...]) -> Iterator[list[str]]:
    """The paths below the folder ``uri`` of all objects whose names end so, folder by folder or otherwise in pieces.

    In any order, and without asking for size or time, so cheaper than :func:`list_tree`. Nothing when there is no such
    folder. Linked folders are not entered.
    """
    if not is_local(uri):
        start = len(uri.rstrip("/")) + 1
        names = (found.uri[start:] for found in list_tree(uri) if found.uri.endswith(endings))
        while piece := list(islice(names, 10_000)):
            yield piece
        return
    folders = [""] if local_path(uri).is_dir() else []
    while folders:
        below = folders.pop()
        with _errors(f"{uri}/{below}", "list"), os.scandir(local_path(uri) / below) as entries:
            found = list(entries)
        inner = {entry.name for entry in found if entry.is_dir(follow_symlinks=False)}
        folders += [f"{below}{name}/" for name in inner]
        yield [below + entry.name for entry in found if entry.name.endswith(endings) and entry.name not in inner]


def expand_glob(pattern: str) -> Iterator[ObjectInfo]:
    """The objects that match ``pattern`` (``**`` spans folders), sorted as by list_tree; no folders, no hidden files.

    On S3 whatever begins with the text in front of the first wildcard is listed: below all folders if a ``/`` follows.
    """
    if is_local(pattern):
        with _errors(pattern, "list"):
            paths = sorted(glob.glob(str(local_path(pattern)), recursive=True))
        for path in paths:
            if not Path(path).is_dir():
                yield _local_info(path, Path(path))
        return
    root = glob_root(pattern).rstrip("/")
    wanted = pattern[len(root) + 1 :]
    fixed = re.split(r"[*?[]", wanted, maxsplit=1)[0]
    with _errors(pattern, "list"):
        matches = re.compile(fsspec.utils.glob_translate(wanted)).match
    if _scheme(pattern) in _S3:
        listed = _list_s3(pattern, _key(f"{root}/{fixed}"), "" if "/" in wanted or "**" in wanted else "/")
    else:
        listed = ((name.removeprefix(fixed), facts) for name, facts in _list_remote(root) if name.startswith(fixed))
    for rest, facts in listed:
        name = fixed + rest
        if matches(name) and (_hidden(wanted) or not _hidden(name)):
            yield _remote_info(f"{root}/{name}", facts)


# --- reading -------------------------------------------------------------------------------------------------------


@contextmanager
def open_read(uri: str) -> Iterator[BinaryIO]:
    """A seekable binary file: each read gives the bytes asked for, or up to the end; else it is a StoreError.

    They are of one version of the object. A read that is cut off is made again.
    """
    with _attempt(uri, "read", lambda: _Reading(uri)) as reading:
        yield cast(BinaryIO, reading)


def read_bytes(uri: str) -> bytes:
    """The whole object."""
    with open_read(uri) as file:
        return file.read()


def read_text(uri: str) -> str:
    """The whole object as UTF-8; a byte-order mark is dropped. Raises StoreError for other encodings."""
    data = read_bytes(uri)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise StoreError(f"{uri}: is not UTF-8 text (byte {error.start}); save it as UTF-8") from error


def sha256(uri: str) -> str:
    """SHA-256 (hex) of the object, read piece by piece."""
    digest = hashlib.sha256()
    with open_read(uri) as file:
        while piece := file.read(_PIECE):
            digest.update(piece)
    return digest.hexdigest()


def download(uri: str, target: Path, expected_sha256: str | None = None) -> str:
    """Copy the object to the local file ``target`` and return its SHA-256 (hex); an interrupted copy is continued.

    The bytes go to a hidden file beside ``target``, named after the object's version, which takes its name once it is
    whole. Raises StoreError when the hash is not ``expected_sha256``, or ``target`` exists with another content.
    """
    if target.exists():
        found = sha256(str(target))
        if found != (expected_sha256 or sha256(uri)):
            raise StoreError(f"{target}: exists with another content than {uri}; it is not overwritten")
        return found
    version = info(uri)
    token = hashlib.sha256(f"{uri} {version.version}".encode()).hexdigest()[:16]
    partial = target.with_name(f".{target.name}.{token}{PARTIAL_SUFFIX}")
    with _errors(uri, "download"):
        target.parent.mkdir(parents=True, exist_ok=True)
        have = partial.stat().st_size if partial.exists() else 0
        with open_read(uri) as source, partial.open("ab") as sink:
            source.seek(have)
            shutil.copyfileobj(source, sink, _PIECE)
            sink.flush()
            os.fsync(sink.fileno())
    found, size = sha256(str(partial)), partial.stat().st_size
    if size != version.size or found != (expected_sha256 or found):
        partial.unlink()
        wanted = f"SHA-256 {expected_sha256}" if size == version.size else f"{version.size} bytes"
        saw = f"SHA-256 {found}" if size == version.size else f"{size} bytes"
        raise StoreError(f"{uri}: arrived with {saw}, expected {wanted}; fetch it again or check where it is from")
    os.replace(partial, target)
    _sync_folder(target.parent)
    return found


@contextmanager
def local_copy(uri: str) -> Iterator[Path]:
    """A local file with the object's bytes: the file itself when local, else a download that is removed afterwards.

    The path keeps the object's extension. Never write to it.
    """
    if is_local(uri):
        with _errors(uri, "read"):
            path = local_path(uri)
            with path.open("rb"):  # missing or forbidden: say so here, with the URI, not deep in a decoder
                pass
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="supir-batch-") as folder:
        path = Path(folder) / f"object{Path(name(uri)).suffix}"
        with open_read(uri) as source, _errors(uri, "download"), path.open("xb") as sink:
            shutil.copyfileobj(source, sink, _PIECE)
        yield path


def filesystem(uri: str) -> tuple[Any, str]:
    """The fsspec file system and the path on it, for libraries that read through fsspec themselves (pyarrow)."""
    refuse_credentials(uri)
    scheme = _scheme(uri)
    if scheme in _S3 and "?versionId=" in uri:  # s3fs would use the object whose name ends in front of it
        raise StoreError(f"{uri}: versions of an object cannot be asked for, nor can a name hold '?versionId='")
    with _errors(uri, "open"):
        # Of the folder above all: a name may hold what fsspec takes for a chain of file systems ("::").
        top = "/".join(uri.split("/", 3)[:3])
        # A cached listing would hide what another run wrote since.
        options = _S3_OPTIONS if scheme in _S3 else {}
        fs, _ = fsspec.core.url_to_fs(top, use_listings_cache=False, **options)
        if scheme in _S3:
            fs.retries = 1
        return fs, str(fs._strip_protocol(uri))


# --- writing -------------------------------------------------------------------------------------------------------


def write_atomic(uri: str, data: bytes | Path) -> None:
    """Put bytes, or a local file's bytes, at ``uri``: afterwards the old object is there or the new one, never a part.

    Local: a hidden temp beside the target, flushed to the disk, then renamed. Elsewhere: one put, or on S3 an upload in
    parts when it is large, which becomes visible when it is completed and is aborted when it cannot be.
    """
    _attempt(uri, "write", lambda: _put_local(local_path(uri), data) if is_local(uri) else _put_remote(uri, data))


def create(uri: str, data: bytes) -> bool:
    """Put ``data`` at ``uri`` if nothing is there; True when it was us. Readers see all of it or nothing.

    ``data`` must hold something that nobody else writes (a random token): by it a lost answer is told from a lost race.
    Local: a temp that is linked to its name. Elsewhere: a put on the condition that nothing is there, which S3, Google
    and Azure keep. A second such put shows whether the server keeps it; with one that does not, all who race wait and
    the last writer has won. On a file system without hard links a reader may for a moment see an empty object.
    """
    if is_local(uri):
        target = local_path(uri)
        return _attempt(uri, "create", lambda: _create_local(target, data))
    if find(uri) is not None:
        return False
    if all(_attempt(uri, "create", lambda: _put_if_absent(uri, data)) for _ in range(2)):
        time.sleep(_RACE_S)
    return read_bytes(uri) == data


def delete(uri: str) -> None:
    """Remove the object; that it is already gone is no error."""

    def remove() -> None:
        with suppress(FileNotFoundError):
            if is_local(uri):
                local_path(uri).unlink()
            else:
                fs, path = filesystem(uri)
                fs.rm_file(path)

    _attempt(uri, "delete", remove)


def remove_partials(uri: str) -> int:
    """Delete what a killed writer left below the folder ``uri``: temps, on S3 uploads in parts; returns how many.

    Call it only while nothing writes there. Other stores have none: their puts are whole or absent.
    """
    if not is_local(uri):
        return _abort_uploads(uri) if _scheme(uri) in _S3 else 0
    stale = [found.uri for found in list_tree(uri) if is_partial(found.uri)]
    for partial in stale:
        delete(partial)
    return len(stale)


def is_partial(uri: str) -> bool:
    """Whether ``uri`` is named like a temp of :func:`write_atomic`."""
    last = name(uri)
    return last.startswith(".") and last.endswith(PARTIAL_SUFFIX)


# --- inside --------------------------------------------------------------------------------------------------------


class _Reading(io.RawIOBase):
    """One version of an object; see open_read."""

    def __init__(self, uri: str) -> None:
        self._uri = uri
        self._at = 0
        if is_local(uri):
            self._file: Any = local_path(uri).open("rb", buffering=0)
        else:
            fs, path = filesystem(uri)
            # An object store is asked for just what is read.
            options = {"cache_type": "none"} if _scheme(uri) in _FOLDERLESS else {}
            self._file = _ask(fs, path, lambda: fs.open(path, "rb", **options))
        self._file.seek(0, io.SEEK_END)
        self._size = self._file.tell()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def read(self, size: int | None = -1) -> bytes:
        left = max(0, self._size - self._at)
        end = self._at + (left if size is None or size < 0 else min(size, left))
        pieces = []
        while self._at < end:
            pieces.append(_attempt(self._uri, "read", lambda: self._piece(min(end - self._at, _PIECE))))
            self._at += len(pieces[-1])
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def readall(self) -> bytes:
        return self.read()

    def readinto(self, buffer: Any) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()

    def _piece(self, size: int) -> bytes:
        self._file.seek(self._at)
        data = bytes(self._file.read(size))
        if len(data) != size:
            raise TransientStoreError(f"{self._uri}: is cut off at byte {self._at + len(data)} of {self._size}")
        return data


def _scheme(uri: str) -> str:
    return uri.partition("://")[0].lower()


def _key(uri: str) -> str:
    """What follows the bucket."""
    return uri.partition("://")[2].partition("/")[2]


def _hidden(path: str) -> bool:
    return path.startswith(".") or "/." in path


def _attempt(uri: str, action: str, work: Callable[[], _T]) -> _T:
    """What ``work`` returns. It is done again while that can help, with pauses of random length (so that many workers
    do not come back at once); raises StoreError.
    """
    start = time.monotonic()
    for tried in range(1, _TRIES + 1):
        try:
            with _errors(uri, action):
                return work()
        except TransientStoreError as error:
            pause = random.SystemRandom().uniform(0, min(2.0 ** (tried - 1), _LONGEST_PAUSE_S))
            waited = time.monotonic() - start
            if tried == _TRIES or waited + pause > _DEADLINE_S:
                raise TransientStoreError(f"{error} (tried {tried} times in {waited:.0f} s)") from error
        time.sleep(pause)
    raise AssertionError("unreachable")


def _local_stat(uri: str) -> os.stat_result | None:
    try:
        return local_path(uri).stat()
    except (FileNotFoundError, NotADirectoryError):
        return None


def _remote_facts(uri: str) -> dict[str, Any] | None:
    """What the store says of ``uri``, or None. Not fsspec's exists: that answers False when the network is down."""

    def ask() -> dict[str, Any] | None:
        fs, path = filesystem(uri)
        try:
            return dict(_ask(fs, path, lambda: fs.info(path)))
        except FileNotFoundError as error:
            if _code(error) == "NoSuchBucket":
                raise
            return None

    return _attempt(uri, "reach", ask)


def _ask(fs: Any, path: str, ask: Callable[[], _T]) -> _T:
    """What ``ask``, which sends a HEAD, returns.

    S3 does not say why it refuses a HEAD, whose answer has no body. So the first byte is asked for: to hear the reason,
    or for the client to learn the region of the bucket.
    """
    try:
        return ask()
    except OSError as error:
        if _code(error) not in ("301", "400", "403") or "/" not in path:
            raise
    try:
        fs.cat_file(path, start=0, end=1)
    except OSError as error:
        if _code(error) != "InvalidRange":  # of an empty object
            raise
    return ask()


def _list_s3(uri: str, prefix: str, delimiter: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """What follows ``prefix`` in each key that begins with it, and its facts; in the order of the keys.

    With a ``delimiter``, only keys that do not have it there.
    """
    request = {"Bucket": uri.partition("://")[2].partition("/")[0], "Prefix": prefix, "Delimiter": delimiter}
    while True:
        page = _attempt(uri, "list", lambda: filesystem(uri)[0].call_s3("list_objects_v2", **request))
        for found in page.get("Contents", []):
            # Whoever makes an empty "folder" in a browser puts an object of that name.
            if found["Key"] != prefix and not found["Key"].endswith("/"):
                yield found["Key"][len(prefix) :], {**found, "size": found["Size"]}
        if not page.get("IsTruncated"):
            return
        request["ContinuationToken"] = page["NextContinuationToken"]


def _list_remote(folder: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The path below ``folder`` of every object there, and its facts; sorted, all in memory."""

    def ask() -> tuple[str, dict[str, Any]]:
        fs, path = filesystem(folder)
        try:
            return path.rstrip("/"), fs.find(path, detail=True)
        except FileNotFoundError:
            return path, {}

    top, found = _attempt(folder, "list", ask)
    for there in sorted(found):
        if there.rstrip("/") != top and not there.endswith("/"):
            yield there[len(top) :].lstrip("/"), found[there]


def _put_local(target: Path, data: bytes | Path) -> None:
    with _temp_beside(target, data) as temp:
        os.replace(temp, target)
        _sync_folder(target.parent)


def _put_remote(uri: str, data: bytes | Path) -> None:
    fs, path = filesystem(uri)
    scheme = _scheme(uri)
    if scheme not in _FOLDERLESS:
        fs.makedirs(posixpath.dirname(path), exist_ok=True)
    size = data.stat().st_size if isinstance(data, Path) else len(data)
    options: dict[str, Any] = {}
    if scheme in _S3:
        options = {"chunksize": max(_PART, -(-size // _MOST_PARTS)), "max_concurrency": _PARTS_AT_ONCE}
    if isinstance(data, Path):
        fs.put_file(str(data), path, **options)
    else:
        fs.pipe_file(path, data, **options)


def _abort_uploads(uri: str) -> int:
    """Give up the uploads in parts below ``uri``: nobody sees their parts, but they cost money."""
    fs, path = filesystem(uri)
    bucket, _, folder = path.partition("/")
    request = {"Bucket": bucket, "Prefix": f"{folder.rstrip('/')}/" if folder else ""}

    def list_page() -> dict[str, Any]:
        try:
            return dict(fs.call_s3("list_multipart_uploads", **request))
        except OSError as error:
            # Not every role may list uploads, nor can every server: then a rule of the bucket has to clear them.
            if isinstance(error, PermissionError) or _code(error) in ("NotImplemented", "MethodNotAllowed"):
                return {}
            raise

    def abort(upload: Mapping[str, Any]) -> None:
        with suppress(FileNotFoundError):  # a try before this one did it
            fs.abort_mpu(bucket, upload["Key"], upload["UploadId"])

    total = 0
    while True:
        page = _attempt(uri, "list uploads below", list_page)
        for upload in page.get("Uploads", []):
            _attempt(uri, "abort an upload below", functools.partial(abort, upload))
            total += 1
        if not page.get("IsTruncated"):
            return total
        request |= {"KeyMarker": page["NextKeyMarker"], "UploadIdMarker": page["NextUploadIdMarker"]}


@contextmanager
def _temp_beside(target: Path, data: bytes | Path) -> Iterator[Path]:
    """A hidden file beside ``target`` with ``data``, on the disk; gone afterwards, also after an interrupt."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temp = target.with_name(_partial_name(target.name))
    try:
        with open(temp, "xb") as sink:
            if isinstance(data, Path):
                with data.open("rb") as source:
                    shutil.copyfileobj(source, sink, 1 << 20)
            else:
                sink.write(data)
            sink.flush()
            os.fsync(sink.fileno())
        yield temp
    finally:
        with suppress(FileNotFoundError):
            temp.unlink()


def _create_local(target: Path, data: bytes) -> bool:
    with _temp_beside(target, data) as temp:
        try:
            os.link(temp, target)
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK):
                raise
            return _create_without_links(target, data)
        _sync_folder(target.parent)
        return True


def _create_without_links(target: Path, data: bytes) -> bool:
    try:
        with open(target, "xb") as sink:
            sink.write(data)
            sink.flush()
            os.fsync(sink.fileno())
    except FileExistsError:
        return False
    return True


def _put_if_absent(uri: str, data: bytes) -> bool:
    """Whether the store took ``data``; False when it answered that something is there already."""
    fs, path = filesystem(uri)
    try:
        fs.pipe_file(path, data, mode="create")
    except OSError as error:
        if isinstance(error, FileExistsError) or _code(error) in ("PreconditionFailed", "412"):
            return False
        if _code(error) not in ("NotImplemented", "501"):
            raise
        fs.pipe_file(path, data)  # a server that refuses conditions
    return True


def _answer(error: BaseException) -> tuple[str, int]:
    """The store's own word for what went wrong (``NoSuchBucket``, ...) and the HTTP status; "" and 0 where unknown."""
    cause: BaseException | None = error
    while cause is not None:
        response = getattr(cause, "response", None)
        if isinstance(response, Mapping):  # botocore, below what s3fs makes of it
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
            return str(response.get("Error", {}).get("Code", "")), int(status)
        cause = cause.__cause__
    for name in ("status_code", "code"):  # azure, gcsfs; not of a cause: aiohttp gives a cut body a code as well
        if isinstance(status := getattr(error, name, None), int):
            return "", status
    return "", 0


def _code(error: BaseException) -> str:
    return _answer(error)[0]


def _below(inner: str, outer: str) -> str | None:
    prefix = outer.rstrip("/") + "/"
    return inner[len(prefix) :] if inner.startswith(prefix) and len(inner) > len(prefix) else None


def _partial_name(target: str) -> str:
    token = secrets.token_hex(4)
    room = _MAX_NAME_BYTES - len(f"..{token}{PARTIAL_SUFFIX}")
    kept = target.encode()[:room].decode(errors="ignore")
    return f".{kept}.{token}{PARTIAL_SUFFIX}"


def _sync_folder(folder: Path) -> None:
    """Make a rename in ``folder`` survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems cannot; the rename stands
            raise
    finally:
        os.close(handle)


def _walk(uri: str, folder: Path) -> Iterator[ObjectInfo]:
    with _errors(uri, "list"), os.scandir(folder) as entries:
        # A folder sorts as "name/", so that the whole listing comes out in the order of the full names.
        ordered = sorted((entry.name + "/" * entry.is_dir(follow_symlinks=False), entry) for entry in entries)
    for _, entry in ordered:
        child = f"{uri.rstrip('/')}/{entry.name}"
        if entry.is_dir(follow_symlinks=False):
            yield from _walk(child, Path(entry.path))
        elif not entry.is_dir():
            with _errors(child, "reach"):
                listed = _local_info(child, Path(entry.path))
            yield listed


def _local_info(uri: str, path: Path) -> ObjectInfo:
    try:
        facts = path.stat()
    except FileNotFoundError:
        return ObjectInfo(uri, -1, "missing")
    return ObjectInfo(uri, facts.st_size, f"{facts.st_size}-{facts.st_mtime_ns}")


def _remote_info(uri: str, facts: Mapping[str, Any]) -> ObjectInfo:
    size = int(facts.get("size") or 0)
    for key in ("ETag", "etag", "md5Hash", "mtime", "LastModified", "last_modified", "updated", "modified", "created"):
        if facts.get(key):
            return ObjectInfo(uri, size, f"{size}-{str(facts[key]).strip(chr(34))}")
    return ObjectInfo(uri, size, str(size))


@contextmanager
def _errors(uri: str, action: str) -> Iterator[None]:
    """Turn whatever the operating system or a storage client raises into our error, with the URI in front."""
    try:
        yield
    except StoreError:
        raise
    except Exception as error:
        advice = _ADVICE.get(_code(error)) or _ADVICE.get(type(error).__name__)
        if advice:
            message = f"{uri}: {advice.format(action=action)}"
        elif isinstance(error, FileNotFoundError):
            message = f"{uri}: does not exist"
        elif isinstance(error, PermissionError):
            message = f"{uri}: access denied; cannot {action} it with these rights"
        elif isinstance(error, IsADirectoryError):
            message = f"{uri}: is a folder, not a file"
        elif isinstance(error, ImportError):
            message = f"{uri}: {_missing_package(uri, error)}"
        else:
            message = f"{uri}: cannot {action} it: {_describe(error)}"
        kind = TransientStoreError if _is_transient(uri, error) else StoreError
        kept = None if _without_secrets(str(error)) != str(error) else error  # a traceback shows its message as well
        raise kind(_without_secrets(message)) from kept


def _missing_package(uri: str, error: ImportError) -> str:
    extra = _EXTRAS.get(_scheme(uri))
    hint = f"pip install 'supir-batch[{extra}]'" if extra else str(error)
    return f"this kind of storage needs another package: {hint}"


def _describe(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__


def _without_secrets(message: str) -> str:
    """A client may quote the endpoint it was given, with a password in it."""
    return re.sub(r"://[^/\s:@]*:[^/\s@]*@", "://", message)


def _is_transient(uri: str, error: Exception) -> bool:
    code, status = _answer(error)
    if code or status:
        return code in _TRANSIENT_CODES or status in (408, 429, 500, 502, 503, 504)
    if isinstance(error, FileNotFoundError | PermissionError | IsADirectoryError | ImportError):
        return False
    if isinstance(error, TimeoutError | ConnectionError) or getattr(error, "errno", None) in _TRANSIENT_ERRNO:
        return True
    # An OSError without a number is what gcsfs raises for a 5xx answer once its own tries are used up.
    unnumbered = isinstance(error, OSError) and error.errno in (None, errno.EIO)
    return not is_local(uri) and (unnumbered or any(part in type(error).__name__ for part in _TRANSIENT_NAMES))
