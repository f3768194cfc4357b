"""A reverse proxy between s3fs and an S3 server that injects what goes wrong on the way, and counts what it did.

Requests are forwarded byte for byte: the Host header that the client signed is the proxy's, and the server checks the
signature against the header that it gets. Bodies are streamed.

    with Proxy(server.endpoint) as proxy:
        proxy.rules = [Rule("lose", "create", path="/commits/", times=1)]
        ... AWS_ENDPOINT_URL=proxy.endpoint ...
    assert proxy.injected["lose", "create"] == 1
"""

import asyncio
import contextlib
import random
import re
import socket
import struct
import threading
from collections import Counter
from dataclasses import dataclass, field
from urllib.parse import unquote, urlsplit

BLOCK = 1 << 16

ANSWERS = {
    "conflict": (409, "ConditionalRequestConflict"),
    "precondition": (412, "PreconditionFailed"),
    "error": (500, "InternalError"),
    "slow_down": (503, "SlowDown"),
    "denied": (403, "AccessDenied"),
}
"""Told without forwarding. With `_after`, told although the server has done it: the ambiguous ones."""

KINDS = (
    *("conflict", "precondition", "error", "slow_down"),
    *("precondition_after", "error_after"),
    *("hang", "hang_after"),  # past the client's read timeout, before or after the server did it
    *("reset", "reset_middle", "lose"),  # a connection reset before, in the middle of, after forwarding
)
UNCONDITIONAL = "unconditional"
"""Forwards a conditional put without its condition, as a server does that ignores it. Only moto takes it: unsigned."""

UNANSWERED = ("precondition_after", "error_after", "hang_after", "lose")


@dataclass
class Rule:
    """Inject `kind` into the requests that match, from the `skip`-th on, `times` times, with a probability."""

    kind: str
    operation: str = ".*"
    path: str = ""
    skip: int = 0
    times: int | None = None
    probability: float = 1.0
    seed: int = 0
    fired: int = field(init=False, default=0)
    _random: random.Random = field(init=False, repr=False)

    def __post_init__(self):
        assert self.kind in (*KINDS, *ANSWERS, UNCONDITIONAL), self.kind
        self._random = random.Random(self.seed)

    def wants(self, request):
        """Whether this request gets it."""
        if not (re.fullmatch(self.operation, request.operation) and re.search(self.path, request.path)):
            return False
        if self.skip:
            self.skip -= 1
            return False
        if self.fired == self.times or self._random.random() >= self.probability:
            return False
        self.fired += 1
        return True


@dataclass(frozen=True)
class Head:
    """The first lines of a request or an answer, as they came."""

    raw: bytes

    @property
    def start(self):
        return self.raw.split(b"\r\n", 1)[0].decode("latin-1").split(" ")

    def header(self, name):
        match = re.search(rb"\r\n" + name.encode() + rb":[ \t]*([^\r]*)", self.raw, re.IGNORECASE)
        return match[1].decode("latin-1") if match else None

    @property
    def method(self):
        return self.start[0]

    @property
    def path(self):
        return unquote(urlsplit(self.start[1]).path)

    @property
    def status(self):
        return int(self.start[1])

    @property
    def operation(self):
        """create (a conditional put), put, part, complete, read, range, list, head, delete, other."""
        query = urlsplit(self.start[1]).query
        if self.method == "PUT":
            return "create" if self.header("if-none-match") else "part" if "partNumber=" in query else "put"
        if self.method == "GET" and not query.startswith("list-type") and "prefix=" not in query:
            return "range" if self.header("range") else "read"
        return {"GET": "list", "HEAD": "head", "DELETE": "delete"}.get(
            self.method, "complete" if "uploadId=" in query else "other"
        )


class Reset(Exception):
    """Cut the client's connection now."""


class HangUp(Exception):
    """End the client's connection after what was said; the server may have ended its own."""


class Proxy:
    """Listens on loopback in a thread of its own. `rules`, `latency` (seconds a request) may change at any time."""

    def __init__(self, upstream, *, latency=0.0):
        parts = urlsplit(upstream)
        self.upstream = parts.hostname, parts.port
        self.latency = latency
        self.rules = []
        self.seen = Counter()
        self.injected = Counter()

    def __enter__(self):
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        start = asyncio.start_server(self._serve, "127.0.0.1", 0, limit=BLOCK)
        self._server = asyncio.run_coroutine_threadsafe(start, self._loop).result()
        self.endpoint = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    def __exit__(self, *args):
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _end(self):
        self._server.close()
        mine = asyncio.all_tasks() - {asyncio.current_task()}
        for task in mine:
            task.cancel()
        await asyncio.gather(*mine, return_exceptions=True)

    async def _serve(self, reader, writer):
        """Every request of one client's connection, over one connection to the server."""
        with contextlib.ExitStack() as connections:
            connections.callback(writer.close)
            try:
                server = await asyncio.open_connection(*self.upstream)
                connections.callback(server[1].close)
                while True:
                    request = Head(await reader.readuntil(b"\r\n\r\n"))
                    await self._one(request, reader, writer, *server)
            except Reset:
                _reset(writer)
            except (HangUp, asyncio.IncompleteReadError, OSError):
                return

    async def _one(self, request, reader, writer, from_server, to_server):
        kind = self._fault(request)
        if request.header("expect"):
            writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        if self.latency:
            await asyncio.sleep(self.latency)
        if kind in ANSWERS or kind in ("hang", "reset"):
            await _copy(request, reader, None)
            await _instead(kind, writer)
            return
        unconditional = re.sub(rb"\r\nif-none-match:[^\r]*", b"", request.raw, flags=re.IGNORECASE)
        to_server.write(unconditional if kind == UNCONDITIONAL else request.raw)
        if kind == "reset_middle" and request.method in ("PUT", "POST"):
            await _copy(request, reader, to_server, half=True)
            raise Reset
        await _copy(request, reader, to_server)
        answer = await _answer(from_server)
        if kind in UNANSWERED:
            await _copy(answer, from_server, None, of=request)
            await _instead(kind.removesuffix("_after"), writer)
            return
        writer.write(answer.raw)
        await _copy(answer, from_server, writer, of=request, half=kind == "reset_middle")
        if kind == "reset_middle":
            raise Reset

    def _fault(self, request):
        self.seen[request.operation] += 1
        for rule in self.rules:
            if rule.wants(request):
                self.injected[rule.kind, request.operation] += 1
                return rule.kind
        return None


async def _answer(from_server):
    """The server's answer; its own 100 Continue is for us."""
    while True:
        answer = Head(await from_server.readuntil(b"\r\n\r\n"))
        if answer.status >= 200:
            return answer


async def _instead(kind, writer):
    """What the client gets in place of an answer."""
    if kind == "hang":
        await asyncio.sleep(3600)
    if kind not in ANSWERS:
        raise Reset
    status, code = ANSWERS[kind]
    body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>injected by the test</Message></Error>".encode()
    head = f"HTTP/1.1 {status} Injected\r\nContent-Type: application/xml\r\nContent-Length: {len(body)}\r\n"
    writer.write(head.encode() + b"Connection: close\r\n\r\n" + body)
    await writer.drain()
    raise HangUp


async def _copy(head, reader, writer, *, of=None, half=False):
    """The body that belongs to a head, streamed; `of` is the request that an answer answers. Half of it if so told."""
    if head.header("transfer-encoding") == "chunked":
        await _copy_chunks(reader, writer, half=half)
        return
    empty = of is not None and (of.method == "HEAD" or head.status in (204, 304))
    left = 0 if empty else int(head.header("content-length") or 0)
    left = left // 2 if half else left
    while left:
        block = await reader.read(min(left, BLOCK))
        if not block:
            raise Reset
        left -= len(block)
        await _write(writer, block)


async def _copy_chunks(reader, writer, *, half):
    while True:
        size = await reader.readuntil(b"\r\n")
        count = int(size.split(b";")[0], 16)
        chunk = await reader.readexactly(count + 2) if count else await _trailer(reader)
        await _write(writer, size + chunk)
        if half or not count:
            return


async def _trailer(reader):
    lines = b""
    while not lines.endswith(b"\r\n\r\n") and lines != b"\r\n":
        lines += await reader.readuntil(b"\r\n")
    return lines


async def _write(writer, data):
    if writer is not None:
        writer.write(data)
        await writer.drain()


def _reset(writer):
    """Close with RST, not FIN: the client sees a connection reset."""
    raw = writer.get_extra_info("socket")
    with contextlib.suppress(OSError):
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
