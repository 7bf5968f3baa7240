"""The report on localhost, where decisions are saved with the output at once.

Whoever knows the token in the address may look and decide; nothing else is reachable than the report's own files and
the decisions. The pages are those that open from a disk, with one line more that says where decisions go.
"""

from __future__ import annotations

import hmac
import json
import secrets
import socket
import threading
from collections.abc import Callable
from dataclasses import asdict

import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from supir_batch import review, store
from supir_batch.errors import ManifestError, StoreError
from supir_batch.plan import REPORT_FOLDER

_MOST_BYTES = 64 * 1024  # of a decision
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".txt": "text/plain; charset=utf-8",
    ".jpg": "image/jpeg",
    ".png": "image/png",
}
_FOLDERS = ("assets", "data", "pictures")
_SAVES = b'<meta name="decisions" content="decisions">\n<title>'
_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",  # the address holds the token
    "X-Frame-Options": "DENY",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


def new_token() -> str:
    """What nobody guesses."""
    return secrets.token_urlsafe(24)


def serve(output_uri: str, host: str, port: int, token: str, started: Callable[[str], None]) -> None:
    """Serve the report below ``output_uri`` until a signal comes; ``started`` is told the address once it is there.

    ``port`` 0: a free one. Raises ManifestError if nothing can listen there.
    """
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.create_server((host, port), family=family)
    except OSError as error:
        raise ManifestError(f"--host {host} --port {port}: cannot listen there: {error.strerror or error}") from error
    with listener:
        named = f"[{host}]" if ":" in host else host
        # no access log: it would hold the token
        config = uvicorn.Config(application(output_uri, token), log_level="warning", access_log=False)
        started(f"http://{named}:{listener.getsockname()[1]}/{token}/")
        uvicorn.Server(config).run(sockets=[listener])


def application(output_uri: str, token: str) -> Starlette:
    """The report below ``output_uri`` as an ASGI application, all of it under ``/<token>/``."""
    folder = store.join(output_uri, REPORT_FOLDER)
    session, lock = review.Session(output_uri), threading.Lock()

    def knows(request: Request) -> bool:
        return hmac.compare_digest(request.path_params["token"].encode(), token.encode())

    def file(request: Request) -> Response:
        path = request.path_params["path"] or "index.html"
        if not knows(request) or (data := _file(folder, path)) is None:
            return _nothing()
        if path == "index.html":
            data = data.replace(b"<title>", _SAVES, 1)
        kind = _TYPES[_extension(path)]
        kept = {"Cache-Control": "private, max-age=86400"} if path.startswith("pictures/") else {}
        return Response(data, media_type=kind, headers=_HEADERS | kept)

    def decided(request: Request) -> Response:
        if not knows(request):
            return _nothing()
        given = [{key: value for key, value in asdict(one).items() if value not in (None, "")} for one in all_of()]
        return JSONResponse(given, headers=_HEADERS)

    def all_of() -> list[review.Decision]:
        return list(review.read(output_uri).values())

    async def decide(request: Request) -> Response:
        if not knows(request):
            return _nothing()
        if request.headers.get("content-type", "").partition(";")[0] != "application/json":
            return PlainTextResponse("a decision is sent as application/json", 415, _HEADERS)
        body = b""
        async for piece in request.stream():
            body += piece
            if len(body) > _MOST_BYTES:
                return PlainTextResponse("this is too long for a decision", 413, _HEADERS)
        try:
            given = json.loads(body)
            if not isinstance(given, dict):
                raise ManifestError("a decision is an object")
            await run_in_threadpool(save, review.parse(given))
        except (ManifestError, ValueError) as error:
            return PlainTextResponse(str(error), 400, _HEADERS)
        except StoreError as error:
            return PlainTextResponse(str(error), 503, _HEADERS)
        return Response(status_code=204, headers=_HEADERS)

    def save(one: review.Decision) -> None:
        review.refuse_unknown(output_uri, [review.Placed("decision", one)])
        with lock:
            session.add(one)

    served = Starlette(
        routes=[
            Route("/{token}/decisions", decided, methods=["GET"]),
            Route("/{token}/decisions", decide, methods=["POST"]),
            Route("/{token}/{path:path}", file, methods=["GET"]),
        ]
    )
    served.router.redirect_slashes = False  # an answer to those who do not know the token
    return served


def _file(folder: str, path: str) -> bytes | None:
    """A file of the report; None for whatever is none, or lies elsewhere."""
    first = path.partition("/")[0]
    if (path != "index.html" and first not in _FOLDERS) or _extension(path) not in _TYPES:
        return None
    try:
        uri = store.join(folder, path)
        if not store.normalize(uri).startswith(f"{store.normalize(folder)}/"):  # a link may lead out
            return None
        return store.read_bytes(uri)
    except StoreError:
        return None


def _extension(path: str) -> str:
    return path[path.rfind(".") :] if "." in path else ""


def _nothing() -> Response:
    return PlainTextResponse("there is nothing here", 404, _HEADERS)
