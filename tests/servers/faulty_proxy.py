"""A TCP proxy that harms HTTP on its way: answers 503 or nonsense, resets, cuts bodies, loses answers, delays. Seeded.

It takes one request per connection (it asks both sides to close), so that a fault belongs to one request.
"""

from __future__ import annotations

import asyncio
import random
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import cast

_PIECE = 1 << 16
_BODY = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
_UNAVAILABLE = (
    b"HTTP/1.1 503 Slow Down\r\nContent-Type: application/xml\r\nConnection: close\r\nContent-Length: %d\r\n\r\n"
    % len(_BODY)
)
_GARBLED = b"\x15\x03\x01\x00\x02\x02 no HTTP\r\n\r\n"


@dataclass(frozen=True)
class Faults:
    """The share of requests, 0 to 1, that meets each fault, at most one each; their sum is at most 1."""

    unavailable: float = 0.0
    """Answered with 503 SlowDown; the server never sees the request."""
    garbled: float = 0.0
    """Answered with bytes that are no HTTP; the server never sees the request."""
    reset: float = 0.0
    """The connection is reset before anything is sent on."""
    cut_request: float = 0.0
    """Reset in the middle of the body that is sent to the server; a request without one is let through."""
    cut_response: float = 0.0
    """Reset in the middle of the server's answer (one without body: before it)."""
    lost_answer: float = 0.0
    """The server does what it is asked; its answer is lost."""
    latency_s: float = 0.0
    """Every request waits for a random time up to this."""


@dataclass
class FaultyProxy:
    """A running proxy. ``faults`` may be replaced while it runs; ``met`` counts requests by the fault they met."""

    url: str
    faults: Faults
    met: Counter[str] = field(default_factory=Counter)


@contextmanager
def faulty_proxy(upstream_port: int, faults: Faults, seed: int) -> Iterator[FaultyProxy]:
    """A proxy on loopback in front of a server on loopback, in a thread of its own."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="faulty-proxy", daemon=True)
    thread.start()
    proxy = FaultyProxy("", faults)
    chance = random.Random(seed)

    running: set[asyncio.Task[None]] = set()  # asyncio itself forgets a task that waits for a connection

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = cast("asyncio.Task[None]", asyncio.current_task())
        running.add(task)
        # The client or the server went away, or the proxy is stopped.
        with suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            await _one_request(proxy, chance, upstream_port, reader, writer)
        writer.close()
        running.remove(task)

    async def start() -> asyncio.Server:
        return await asyncio.start_server(serve, "127.0.0.1", 0)

    async def stop() -> None:
        server.close()
        for _ in range(5):  # what was just accepted becomes a connection, and then a task
            await asyncio.sleep(0.01)
            for task in running:
                task.cancel()
        await asyncio.gather(*running)

    server = asyncio.run_coroutine_threadsafe(start(), loop).result()
    proxy.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield proxy
    finally:
        asyncio.run_coroutine_threadsafe(stop(), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


async def _one_request(
    proxy: FaultyProxy,
    chance: random.Random,
    upstream_port: int,
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
) -> None:
    head = await reader.readuntil(b"\r\n\r\n")
    faults = proxy.faults
    kinds = ("unavailable", "garbled", "reset", "cut_request", "cut_response", "lost_answer")
    weights = [getattr(faults, kind) for kind in kinds]
    fault = chance.choices([*kinds, "none"], [*weights, 1.0 - sum(weights)])[0]
    where = chance.random()  # of the body, when it is cut
    headers = _headers(head)
    length = int(headers.get(b"content-length", b"0"))
    if fault == "cut_request" and not length:
        fault = "none"
    proxy.met[fault] += 1
    await asyncio.sleep(chance.uniform(0.0, faults.latency_s))
    if fault in ("unavailable", "garbled"):
        if b"expect" not in headers:  # whose body is sent only on request
            await reader.readexactly(length)
        body = b"" if head.startswith(b"HEAD") else _BODY
        writer.write(_UNAVAILABLE + body if fault == "unavailable" else _GARBLED)
        await writer.drain()
        return
    if fault == "reset":
        writer.transport.abort()
        return
    there, back = await asyncio.open_connection("127.0.0.1", upstream_port)
    try:
        back.write(_closing(head))
        if b"expect" in headers:
            writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        goal = int(length * where) if fault == "cut_request" else length
        await _relay(reader, back, goal)
        if fault == "cut_request":
            back.transport.abort()
            writer.transport.abort()
            return
        answer = await there.readuntil(b"\r\n\r\n")
        size = int(_headers(answer).get(b"content-length", b"0")) if not head.startswith(b"HEAD") else 0
        if fault == "lost_answer" or (fault == "cut_response" and not size):
            writer.transport.abort()
            return
        writer.write(answer)
        await _relay(there, writer, int(size * where) if fault == "cut_response" else None)
        if fault == "cut_response":
            await asyncio.sleep(0.01)  # let what was sent arrive: a reset also drops what waits
            writer.transport.abort()
    finally:
        back.close()


def _headers(head: bytes) -> dict[bytes, bytes]:
    pairs = (line.partition(b":") for line in head.split(b"\r\n")[1:])
    return {name.strip().lower(): value.strip() for name, _, value in pairs}


def _closing(head: bytes) -> bytes:
    """The request without ``Expect`` (answered here) and with ``Connection: close``."""
    lines = [
        line
        for line in head.removesuffix(b"\r\n\r\n").split(b"\r\n")
        if not line.lower().startswith((b"expect:", b"connection:"))
    ]
    return b"\r\n".join([*lines, b"Connection: close", b"", b""])


async def _relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, length: int | None) -> None:
    """``length`` bytes, or all until the sender closes."""
    while length is None or length > 0:
        piece = await reader.read(_PIECE if length is None else min(length, _PIECE))
        if not piece:
            return
        writer.write(piece)
        await writer.drain()
        if length is not None:
            length -= len(piece)
