"""A proxy on loopback between a client and a real server, which does to chosen requests what networks do to them.

It forwards bytes as they are, the Host header too, so that signatures of requests stay valid.
"""

import re
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import BinaryIO, Literal
from urllib.parse import urlsplit

CHUNK = 16 * 1024
FOREVER_SEC = 3600.0
Action = Literal[
    "503", "reset", "cut request", "slow", "stall", "lose response", "cut response", "stall response", "flip"
]


@dataclass
class Fault:
    """What happens to the next `times` requests in whose "METHOD /path" the expression `where` is found.

    503            the request is read, and answered "503 Slow Down" without the server hearing of it
    reset          the connection is reset once the request's head has come
    cut request    both ends are closed after `at` bytes of the request's body
    slow           both bodies pass at `rate` bytes per second
    stall          nothing moves for `seconds` once `at` bytes of the request's body have passed
    lose response  the server does what it was asked; both ends are closed before the client hears of it
    cut response   both ends are closed after `at` bytes of the response's body
    stall response nothing moves for `seconds` once `at` bytes of the response's body have passed, at 0 its head
    flip           bit 0 of byte `at` of the response's body is inverted
    """

    action: Action
    where: str = ""
    times: int = 1
    at: int = 0
    seconds: float = FOREVER_SEC
    rate: float = 0.0


@dataclass
class Exchange:
    """A request that came, and the status it was answered with; 0 until then."""

    line: str  # "METHOD /path"
    status: int = 0


class _CutError(Exception):
    """A fault closes the connection."""


class FaultProxy:
    """Started and stopped by `fault_proxy`. Whatever is told to it holds for requests that come from then on."""

    def __init__(self, upstream: str) -> None:
        parts = urlsplit(upstream)
        self._upstream = (str(parts.hostname), int(parts.port or 80))
        self._faults: list[Fault] = []
        self._lock = threading.Lock()
        self._living: set[socket.socket] = set()
        self._go_on = threading.Event()
        self._closed = False
        self._listener: socket.socket | None = None
        self.exchanges: list[Exchange] = []
        self.port = 0
        self.up()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def plan(self, *faults: Fault) -> None:
        """Add faults; the first that matches a request befalls it."""
        with self._lock:
            self._faults += faults

    def clear(self) -> None:
        """From now on all goes well, and what stalls goes on."""
        with self._lock:
            self._faults.clear()
            self._go_on.set()
            self._go_on = threading.Event()

    def left(self) -> int:
        """How many faults are still to come."""
        with self._lock:
            return sum(fault.times for fault in self._faults)

    def count(self, where: str, status: int | None = None) -> int:
        """How many requests came, or were answered with `status`, in whose "METHOD /path" `where` is found."""
        with self._lock:
            seen = [each for each in self.exchanges if re.search(where, each.line)]
        return sum(status in (None, each.status) for each in seen)

    def down(self) -> None:
        """Close every connection and refuse new ones, as a server that has gone away."""
        with self._lock:
            listener, self._listener = self._listener, None
            living = list(self._living)
        if listener is not None:
            _shut(listener)
        for each in living:
            _shut(each)

    def up(self) -> None:
        """Take connections, on the same port as before."""
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 * CHUNK)  # a stall is felt, not swallowed
        listener.bind(("127.0.0.1", self.port))
        listener.listen(64)
        self.port = int(listener.getsockname()[1])
        self._listener = listener
        threading.Thread(target=self._accept, args=(listener,), daemon=True).start()

    def refuse(self, seconds: float) -> None:
        """Be down for so long."""
        self.down()
        timer = threading.Timer(seconds, lambda: None if self._closed else self.up())
        timer.daemon = True
        timer.start()

    def close(self) -> None:
        self._closed = True
        self.down()
        self.clear()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        """Pass on the requests of one connection, one after the other."""
        server = socket.socket()
        with self._lock:
            self._living |= {client, server}
            gone = self._listener is None
        try:
            with suppress(_CutError, OSError, EOFError, ValueError):
                if not gone:
                    server.connect(self._upstream)
                    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    server.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    from_client, from_server = client.makefile("rb"), server.makefile("rb")
                    while self._exchange(client, server, from_client, from_server):
                        pass
        finally:
            with self._lock:
                self._living -= {client, server}
            _shut(client)
            _shut(server)

    def _exchange(
        self, client: socket.socket, server: socket.socket, from_client: BinaryIO, from_server: BinaryIO
    ) -> bool:
        """One request and its response; False at the end of the connection."""
        head, fields = _read_head(from_client)
        method, path = head.decode("latin-1").split(" ", 2)[:2]
        exchange = Exchange(f"{method} {path}")
        fault = self._note(exchange)
        size = int(fields.get("content-length", 0))
        if fault.action == "reset":
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            raise _CutError
        if fault.action == "503":
            _take(from_client, size)
            exchange.status = 503
            client.sendall(b"HTTP/1.1 503 Slow Down\r\nContent-Length: 0\r\n\r\n")
            return True
        server.sendall(head)
        if fields.get("expect", "").lower() == "100-continue":
            client.sendall(_read_head(from_server)[0])
        self._pass_request(from_client, server, size, fault)
        head, fields = _read_head(from_server)
        while head.startswith(b"HTTP/1.1 1"):
            head, fields = _read_head(from_server)
        if fault.action == "lose response":
            raise _CutError
        if fault.action == "stall response" and fault.at == 0:
            self._go_on.wait(fault.seconds)
        client.sendall(head)
        status = int(head.split(b" ", 2)[1])
        if method != "HEAD" and status not in (204, 304):
            self._pass_response(from_server, client, fields, fault)
        exchange.status = status
        return fields.get("connection", "").lower() != "close"

    def _note(self, exchange: Exchange) -> Fault:
        """Write down the request, and tell the fault that is due."""
        with self._lock:
            self.exchanges.append(exchange)
            for fault in self._faults:
                if fault.times > 0 and re.search(fault.where, exchange.line):
                    fault.times -= 1
                    return fault
        return Fault("slow")  # at no rate: as fast as it comes

    def _pass_request(self, source: BinaryIO, sink: socket.socket, size: int, fault: Fault) -> None:
        limit = min(fault.at, size)
        if fault.action == "cut request":
            sink.sendall(_take(source, limit))
            raise _CutError
        if fault.action == "stall":
            sink.sendall(_take(source, limit))
            size -= limit
            self._go_on.wait(fault.seconds)
        while size:
            data = _take(source, min(size, CHUNK))
            sink.sendall(data)
            size -= len(data)
            _pace(len(data), fault)

    def _pass_response(self, source: BinaryIO, sink: socket.socket, fields: dict[str, str], fault: Fault) -> None:
        """Pass on a body of a stated length; to one in chunks, which no object is, no fault is done."""
        if fields.get("transfer-encoding", "").lower() == "chunked":
            size = 1
            while size:
                line = source.readline()
                size = int(line.split(b";")[0], 16)
                sink.sendall(line + _take(source, size + 2))
            return
        sent, size = 0, int(fields.get("content-length", 0))
        while sent < size:
            data = bytearray(_take(source, min(size - sent, CHUNK)))
            here = fault.at - sent
            if fault.action == "flip" and 0 <= here < len(data):
                data[here] ^= 1
            if fault.action == "cut response" and here < len(data):
                sink.sendall(data[:here])
                raise _CutError
            if fault.action == "stall response" and fault.at > 0 and 0 <= here < len(data):
                sink.sendall(data[:here])
                self._go_on.wait(fault.seconds)
                del data[:here]
                sent += here
            sink.sendall(data)
            sent += len(data)
            _pace(len(data), fault)


def _pace(size: int, fault: Fault) -> None:
    if fault.rate:
        time.sleep(size / fault.rate)


def _read_head(source: BinaryIO) -> tuple[bytes, dict[str, str]]:
    """The first line and the header fields, as they came and as a dictionary with names in lower case."""
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        line = source.readline()
        if not line:
            raise EOFError
        head += line
    lines = [line.split(":", 1) for line in head.decode("latin-1").split("\r\n")[1:] if ":" in line]
    return head, {name.strip().lower(): value.strip() for name, value in lines}


def _take(source: BinaryIO, size: int) -> bytes:
    data = source.read(size)
    if len(data) < size:
        raise EOFError
    return data


def _shut(end: socket.socket) -> None:
    """Wakes up whoever waits for it, which `close` alone does not."""
    with suppress(OSError):
        end.shutdown(socket.SHUT_RDWR)
    end.close()


@contextmanager
def fault_proxy(upstream: str) -> Iterator[FaultProxy]:
    """A proxy in front of the server `upstream`, such as http://127.0.0.1:8333."""
    proxy = FaultProxy(upstream)
    try:
        yield proxy
    finally:
        proxy.close()
