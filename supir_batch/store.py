"""Objects behind URIs: list, read, and write whole or not at all. The only file that knows fsspec.

A URI is a local path (absolute or relative to the current folder), ``file://...`` or anything fsspec opens
(``s3://...``, ``gs://...``, ``memory://...``). Every failure is a :class:`StoreError` whose message begins with the
URI; it is a :class:`TransientStoreError` when trying again can help.
"""

from __future__ import annotations

import errno
import glob
import hashlib
import os
import posixpath
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec

from supir_batch.errors import StoreError, TransientStoreError

PARTIAL_SUFFIX = ".partial"

_PIECE = 4 * 1024 * 1024  # bytes read at once from a large object
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
_TRANSIENT_NAMES = ("Timeout", "Connect", "Disconnect", "Incomplete", "Payload", "SlowDown", "ServerError")


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
    """The path behind a local ``uri``, not made absolute."""
    return Path(uri.removeprefix("file://")).expanduser()


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

    Raises StoreError for an absolute part, a URI, an empty part, ``..`` or a NUL character.
    """
    components: list[str] = []
    for part in parts:
        pieces = part.split("/")
        if not part or "://" in part or part.startswith("/") or ".." in pieces or "\0" in part:
            raise StoreError(f"{base}: cannot be extended by {part!r}; use a relative path without '..'")
        components += [piece for piece in pieces if piece not in ("", ".")]
    if not components:
        return base
    return "/".join([base.rstrip("/"), *components])


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


# --- looking -------------------------------------------------------------------------------------------------------


def find(uri: str) -> ObjectInfo | None:
    """What is at ``uri``; None when nothing is. Raises StoreError for a folder or when it cannot be looked up."""
    with _errors(uri, "reach"):
        if is_local(uri):
            path = local_path(uri)
            try:
                stat = path.stat()
            except (FileNotFoundError, NotADirectoryError):
                return None
            if path.is_dir():
                raise StoreError(f"{uri}: is a folder, not a file")
            return ObjectInfo(uri, stat.st_size, f"{stat.st_size}-{stat.st_mtime_ns}")
        fs, path_there = filesystem(uri)
        try:
            facts = fs.info(path_there)
        except FileNotFoundError:
            return None
        if facts.get("type") == "directory":
            raise StoreError(f"{uri}: is a folder, not a file")
        return _remote_info(uri, facts)


def info(uri: str) -> ObjectInfo:
    """What is at ``uri``; raises StoreError when nothing is."""
    found = find(uri)
    if found is None:
        raise StoreError(f"{uri}: does not exist")
    return found


def exists(uri: str) -> bool:
    """Whether an object (not a folder) is at ``uri``."""
    with _errors(uri, "reach"):
        return _remote_type(uri) not in (None, "directory") if not is_local(uri) else local_path(uri).is_file()


def is_folder(uri: str) -> bool:
    """Whether ``uri`` is a folder, or a prefix with objects below it."""
    with _errors(uri, "reach"):
        return _remote_type(uri) == "directory" if not is_local(uri) else local_path(uri).is_dir()


def list_tree(uri: str) -> Iterator[ObjectInfo]:
    """Every object below the folder ``uri``, sorted by name; nothing when there is no such folder.

    Linked files count, linked folders are not entered (they can form loops).
    """
    if is_local(uri):
        root = local_path(uri)
        if root.is_dir():
            yield from _walk(uri.rstrip("/") or "/", root)
        return
    with _errors(uri, "list"):
        fs, path = filesystem(uri)
        try:
            found = fs.find(path, detail=True)
        except FileNotFoundError:
            return
    stripped = str(path).rstrip("/")
    for there in sorted(found):
        # An object store lists the prefix itself when someone made an empty "folder" object of that name.
        if there.rstrip("/") != stripped and not there.endswith("/"):
            yield _remote_info(uri.rstrip("/") + there[len(stripped) :], found[there])


def expand_glob(pattern: str) -> list[ObjectInfo]:
    """The objects that match ``pattern`` (``**`` spans folders), sorted by name; no folders, no hidden files."""
    with _errors(pattern, "list"):
        if is_local(pattern):
            paths = sorted(glob.glob(str(local_path(pattern)), recursive=True))
            return [_local_info(path, Path(path)) for path in paths if not Path(path).is_dir()]
        fs, path_there = filesystem(pattern)
        root = glob_root(pattern)
        stripped = str(fs._strip_protocol(root)).rstrip("/")
        found = fs.glob(path_there, detail=True)
        return [
            _remote_info(root.rstrip("/") + there[len(stripped) :], found[there])
            for there in sorted(found)
            if found[there].get("type") != "directory"
        ]


# --- reading -------------------------------------------------------------------------------------------------------


def read_bytes(uri: str) -> bytes:
    """The whole object."""
    with _errors(uri, "read"):
        if is_local(uri):
            return local_path(uri).read_bytes()
        fs, path = filesystem(uri)
        return bytes(fs.cat_file(path))


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
    with _errors(uri, "read"), _open(uri, 0) as file:
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
        with _open(uri, have) as source, partial.open("ab") as sink:
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
        with _errors(uri, "download"):
            fs, there = filesystem(uri)
            fs.get_file(there, str(path))
        yield path


def filesystem(uri: str) -> tuple[Any, str]:
    """The fsspec file system and the path on it, for libraries that read through fsspec themselves (pyarrow)."""
    with _errors(uri, "open"):
        # A cached listing would hide what another run wrote since.
        fs, path = fsspec.core.url_to_fs(uri, use_listings_cache=False)
        return fs, str(path)


# --- writing -------------------------------------------------------------------------------------------------------


def write_atomic(uri: str, data: bytes | Path) -> None:
    """Put bytes, or a local file's bytes, at ``uri``: afterwards the old object is there or the new one, never a part.

    Local: a hidden temp beside the target, flushed to the disk, then renamed. Elsewhere: one put.
    """
    if not is_local(uri):
        with _errors(uri, "write"):
            fs, path = filesystem(uri)
            if uri.partition("://")[0].lower() not in _FOLDERLESS:
                fs.makedirs(posixpath.dirname(path), exist_ok=True)
            if isinstance(data, Path):
                fs.put_file(str(data), path)
            else:
                fs.pipe_file(path, data)
        return
    target = local_path(uri)
    with _errors(uri, "write"), _temp_beside(target, data) as temp:
        os.replace(temp, target)
        _sync_folder(target.parent)


def create(uri: str, data: bytes) -> bool:
    """Put ``data`` at ``uri`` if nothing is there; True when it was us. Readers see all of it or nothing.

    ``data`` must hold something that nobody else writes (a random token): by it a lost answer is told from a lost race.
    Local: a temp that is linked to its name. Elsewhere: a put on the condition that nothing is there, which S3, Google
    and Azure keep. A second such put shows whether the server keeps it; with one that does not, all who race wait and
    the last writer has won. On a file system without hard links a reader may for a moment see an empty object.
    """
    if is_local(uri):
        target = local_path(uri)
        with _errors(uri, "create"), _temp_beside(target, data) as temp:
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
    if find(uri) is not None:
        return False
    with _errors(uri, "create"):
        if _put_if_absent(uri, data) and _put_if_absent(uri, data):
            time.sleep(_RACE_S)
    return read_bytes(uri) == data


def delete(uri: str) -> None:
    """Remove the object; that it is already gone is no error."""
    with _errors(uri, "delete"), suppress(FileNotFoundError):
        if is_local(uri):
            local_path(uri).unlink()
        else:
            fs, path = filesystem(uri)
            fs.rm_file(path)


def remove_partials(uri: str) -> int:
    """Delete the temps that a killed writer left below the folder ``uri``; returns how many.

    Call it only while nothing writes there. Remote stores have none: their puts are whole or absent.
    """
    if not is_local(uri):
        return 0
    stale = [found.uri for found in list_tree(uri) if is_partial(found.uri)]
    for partial in stale:
        delete(partial)
    return len(stale)


def is_partial(uri: str) -> bool:
    """Whether ``uri`` is named like a temp of :func:`write_atomic`."""
    last = name(uri)
    return last.startswith(".") and last.endswith(PARTIAL_SUFFIX)


# --- inside --------------------------------------------------------------------------------------------------------


def _open(uri: str, offset: int) -> Any:
    """A binary file open for reading from ``offset`` on."""
    if is_local(uri):
        file: Any = local_path(uri).open("rb")
    else:
        fs, path = filesystem(uri)
        file = fs.open(path, "rb")
    try:
        file.seek(offset)
    except BaseException:
        file.close()
        raise
    return file


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


def _code(error: BaseException | None) -> str:
    """The store's own word for what went wrong (``NoSuchBucket``, ``AccessDenied``, ...); empty when there is none."""
    while error is not None:
        response = getattr(error, "response", None)
        if isinstance(response, Mapping):
            return str(response.get("Error", {}).get("Code", ""))
        error = error.__cause__
    return ""


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
        stat = path.stat()
    except FileNotFoundError:
        return ObjectInfo(uri, -1, "missing")
    return ObjectInfo(uri, stat.st_size, f"{stat.st_size}-{stat.st_mtime_ns}")


def _remote_type(uri: str) -> str | None:
    """``file``, ``directory`` or None. Not fsspec's isfile / isdir: those answer False when the network is down."""
    fs, path = filesystem(uri)
    try:
        return str(fs.info(path)["type"])
    except FileNotFoundError:
        return None


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
    except FileNotFoundError as error:
        raise StoreError(f"{uri}: does not exist") from error
    except PermissionError as error:
        raise StoreError(f"{uri}: access denied; cannot {action} it with these credentials") from error
    except IsADirectoryError as error:
        raise StoreError(f"{uri}: is a folder, not a file") from error
    except ImportError as error:
        raise StoreError(f"{uri}: this kind of storage needs another package: {error}") from error
    except Exception as error:
        message = f"{uri}: cannot {action} it: {_describe(error)}"
        raise (TransientStoreError if _is_transient(uri, error) else StoreError)(message) from error


def _describe(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__


def _is_transient(uri: str, error: Exception) -> bool:
    if isinstance(error, TimeoutError | ConnectionError):
        return True
    if isinstance(error, OSError) and error.errno in _TRANSIENT_ERRNO:
        return True
    if is_local(uri):
        return False
    if isinstance(error, OSError) and error.errno in (None, errno.EIO):
        return True  # what s3fs and gcsfs raise for a 5xx answer once their own retries are used up
    return any(part in type(error).__name__ for part in _TRANSIENT_NAMES)
