"""HTTP exchanges bounded in time and size, which other threads can break off. No redirects, no proxies."""

from __future__ import annotations

import email.utils
import http.client
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import NamedTuple
from urllib.parse import urlsplit

from argrpo_cli.system.errors import UserError
from argrpo_cli.system.files import reason

MAX_REPLY = 1 << 20  # bytes of a response's body
MAX_CONNECT = 10.0  # seconds
MAX_RETRY_AFTER = 60.0  # seconds that a server may ask for


class Fault(Exception):
    """An exchange without a reply: why, whether another attempt may help, the wait the server asks for, its status."""

    def __init__(self, why: str, *, retry: bool, wait: float = 0.0, status: int = 0):
        super().__init__(why)
        self.retry, self.wait, self.status = retry, wait, status


class Address(NamedTuple):
    """Where a server is; `path` has no slash at its end."""

    tls: ssl.SSLContext | None
    host: str
    port: int
    path: str

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'https' if self.tls else 'http'}://{host}:{self.port}{self.path}"


class Exchanges:
    """HTTP exchanges of several threads, each bounded in time and size, that can all be broken off."""

    def __init__(self, timeout: float):
        self.timeout = timeout
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._stopped = threading.Event()

    def pause(self, seconds: float) -> bool:
        """Wait; True when broken off meanwhile."""
        return self._stopped.wait(seconds)

    def stop(self) -> None:
        """Break off every exchange and pause."""
        self._stopped.set()
        with self._lock:
            for one in self._open:
                _break(one)

    def exchange(
        self, server: Address, method: str, path: str, payload: bytes | None, headers: dict[str, str]
    ) -> tuple[int, http.client.HTTPMessage, bytes]:
        """Status, headers and body of a response; Fault where none came in time and whole, or it is too large."""
        deadline = time.monotonic() + self.timeout
        late = Fault(f"no full response within {self.timeout:g} s", retry=True)
        connect = min(MAX_CONNECT, self.timeout)
        if server.tls:
            connection = http.client.HTTPSConnection(server.host, server.port, timeout=connect, context=server.tls)
        else:
            connection = http.client.HTTPConnection(server.host, server.port, timeout=connect)
        try:
            try:
                connection.connect()
            except TimeoutError:
                raise Fault(f"no connection within {connect:g} s", retry=True) from None
            except ssl.SSLCertVerificationError as error:
                raise Fault(f"the server's certificate is not valid: {error.verify_message}", retry=False) from None
            except OSError as error:
                raise Fault(f"the server is not reached: {reason(error)}", retry=True) from None
            except UnicodeError:
                raise Fault("the host is no name that can be looked up", retry=False) from None
            with self._watched(connection.sock, deadline) as expired:
                try:
                    connection.request(method, server.path + path, payload, headers)
                    response = connection.getresponse()
                    data = _read(response)
                except (OSError, ValueError, http.client.HTTPException) as error:
                    if expired.is_set() or isinstance(error, TimeoutError):
                        raise late from None
                    raise Fault(_why(error), retry=True) from None
            if expired.is_set():
                raise late
            return response.status, response.headers, data
        finally:
            connection.close()

    @contextmanager
    def _watched(self, one: socket.socket, deadline: float) -> Iterator[threading.Event]:
        """Shut a socket down at the deadline, however slowly bytes come; the event tells that this happened."""
        expired = threading.Event()

        def expire() -> None:
            expired.set()
            _break(one)

        watch = threading.Timer(max(0.0, deadline - time.monotonic()), expire)
        watch.daemon = True
        one.settimeout(self.timeout)
        with self._lock:
            self._open.add(one)
        watch.start()
        try:
            if self._stopped.is_set():
                raise Fault("broken off", retry=False)
            yield expired
        finally:
            watch.cancel()
            with self._lock:
                self._open.discard(one)


def retry_after(headers: http.client.HTTPMessage) -> float:
    """Seconds that a Retry-After header asks for, as a number or a date, from 0 to MAX_RETRY_AFTER."""
    value = (headers.get("Retry-After") or "").strip()
    if value.isascii() and value.isdigit():
        seconds = float(value[:9])
    else:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except (ValueError, OverflowError):
            seconds = 0.0
    return min(max(seconds, 0.0), MAX_RETRY_AFTER)


def read_url(url: str, key_variable: str) -> Address:
    """The address of a server by its URL; UserError for what is none, or holds what may be a secret."""
    try:
        parts = urlsplit(url.strip())
        host, port = parts.hostname or "", parts.port
    except ValueError:
        raise UserError("judge: the url cannot be read; give one such as http://localhost:8000/v1") from None
    if any(mark in url for mark in "@?#;"):  # the url is not repeated here
        raise UserError(
            f"judge: the url has a user, parameters or a query in it; give it without, and a key in {key_variable}"
        )
    if parts.scheme not in ("http", "https") or not host or not all("!" <= one <= "~" for one in parts.path):
        raise UserError(f"judge: url is {url!r}; give one such as http://localhost:8000/v1")
    path = parts.path.rstrip("/").removesuffix("/chat/completions") or "/v1"
    if parts.scheme == "https":
        return Address(ssl.create_default_context(), host, port or 443, path)
    return Address(None, host, port or 80, path)


def _read(response: http.client.HTTPResponse) -> bytes:
    """The body of a response, at most MAX_REPLY bytes; Fault for more, ConnectionError where the end is missing."""
    if (response.length or 0) > MAX_REPLY:
        raise Fault(f"the response is larger than {MAX_REPLY} bytes", retry=True)
    data = bytearray()
    while part := response.read1(65536):
        data += part
        if len(data) > MAX_REPLY:
            raise Fault(f"the response is larger than {MAX_REPLY} bytes", retry=True)
    if response.length:
        raise ConnectionError("the response ends early")
    return bytes(data)


def _break(one: socket.socket) -> None:
    """Wake whoever waits for a socket; it may be closed already."""
    with suppress(OSError, ValueError):
        one.shutdown(socket.SHUT_RDWR)


def _why(error: Exception) -> str:
    """An exception in words; what http.client quotes of a broken response is left out."""
    if isinstance(error, http.client.IncompleteRead):
        return "the connection was dropped: the response ends early"
    if isinstance(error, http.client.RemoteDisconnected):
        return "the connection was dropped: there is no response"
    if isinstance(error, OSError):
        return f"the connection was dropped: {reason(error)}"
    return f"the response is not HTTP ({type(error).__name__})"
