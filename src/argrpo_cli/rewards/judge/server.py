"""A judge behind any OpenAI-compatible server (vLLM, SGLang, a hosted one): `POST /v1/chat/completions` over HTTP.

Many images at once in a bounded number of threads; every attempt bounded in time and in bytes; another attempt, after
a growing pause, where another may help. What comes back is data: JSON of bounded size, read and never run. No
redirect is followed and no proxy used. The key is read from the environment for every request, kept nowhere and cut
out of every message; it is sent to the configured server alone.
"""

from __future__ import annotations

import base64
import email.utils
import http.client
import io
import json
import os
import random
import socket
import ssl
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlsplit

from argrpo_cli.errors import UserError, did_you_mean
from argrpo_cli.files import reason
from argrpo_cli.rewards.judge.replies import UnusableReply

if TYPE_CHECKING:
    from collections.abc import Iterator

    from PIL.Image import Image

KEY_VARIABLES = ("ARGRPO_JUDGE_API_KEY", "OPENAI_API_KEY")  # the first that is set counts, also when it is empty
MAX_REPLY = 1 << 20  # bytes of a response's body
MAX_CONNECT = 10.0  # seconds
MAX_PAUSE = 30.0  # seconds before another attempt, where the server asks for nothing else
MAX_RETRY_AFTER = 60.0  # seconds that a server may ask for
MAX_TOKENS = 512  # the published code's 256 cut many replies to the quality question
RESAMPLING = {"temperature": 0.6, "top_p": 0.95, "top_k": 10}  # the published server path's settings
RETRIED = (408, 425, 429)  # and every 5xx


class Answer(NamedTuple):
    """What became of one image: its score, or NaN and why."""

    score: float
    reason: str = ""


class _Fault(Exception):
    """An exchange that gave no reply: why, whether another attempt may help, and the wait the server asks for."""

    def __init__(self, why: str, *, retry: bool, wait: float = 0.0):
        super().__init__(why)
        self.retry, self.wait = retry, wait


class JudgeServer:
    """One model behind one server. Making it asks the server whether it is there and has the model.

    Args:
        url: such as http://localhost:8000/v1; without a path, /v1 is meant.
        attempts: requests for one image at most.
        concurrency: requests at the same time at most.
        timeout: seconds for one attempt from beginning to end.
        temperature: of the first attempt. 0 gives the same score again. Where a reply has no score, asking again at
            0 would give the same reply, so that further attempts take the settings of the published server path.
        image_format: "png" is lossless; "jpeg" as the published code.
        backoff: seconds of the first pause; each further one is twice as long, with jitter.

    Raises:
        UserError: an option out of range, a key that cannot be sent, a server that is not reached, refuses the key,
            or does not have the model.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        attempts: int = 3,
        concurrency: int = 16,
        timeout: float = 60.0,
        temperature: float = 0.0,
        image_format: str = "png",
        backoff: float = 1.0,
    ):
        for name, value, least in (("attempts", attempts, 1), ("concurrency", concurrency, 1)):
            if not value >= least:
                raise UserError(f"judge: {name} is {value!r}; it must be at least {least}")
        if not 0 < timeout < float("inf"):
            raise UserError(f"judge: timeout is {timeout!r}; give seconds above 0")
        if image_format not in ("png", "jpeg"):
            raise UserError(f"judge: image_format is {image_format!r}; it is png or jpeg")
        self._secure, self._host, self._port, self._path = _parts(url)
        self.url, self.model = f"{'https' if self._secure else 'http'}://{_netloc(self._host, self._port)}{self._path}", model
        self.attempts, self.concurrency, self.timeout, self.backoff = attempts, concurrency, timeout, backoff
        self.temperature, self.image_format = temperature, image_format
        self._top_k_accepted = True
        self._check_server()

    def ask(
        self, images: Sequence[Image], prompts: Sequence[tuple[str, str]], read: Callable[[str], float]
    ) -> list[Answer]:
        """Ask about every image and read the replies, in the order of the images.

        Args:
            prompts: the texts before and after each image.
            read: from a reply to its score, or UnusableReply.
        """
        exchanges = _Exchanges(self.timeout)
        pool = ThreadPoolExecutor(max(1, min(self.concurrency, len(images))), thread_name_prefix="judge")
        try:
            return list(pool.map(lambda image, prompt: self._ask(exchanges, image, prompt, read), images, prompts))
        except BaseException:
            exchanges.stop()
            raise
        finally:
            pool.shutdown(cancel_futures=True)

    def _ask(
        self, exchanges: _Exchanges, image: Image, prompt: tuple[str, str], read: Callable[[str], float]
    ) -> Answer:
        sampling: dict[str, float] = _sampling(self.temperature)
        messages = [{"role": "user", "content": _content(prompt, data_url(image, self.image_format))}]
        why, attempt = "", 0
        while attempt < self.attempts:
            if not self._top_k_accepted:
                sampling.pop("top_k", None)
            body = {"model": self.model, "messages": messages, "max_tokens": MAX_TOKENS, **sampling}
            wait = 0.0
            try:
                reply = _reply_text(self._json(exchanges, "POST", "/chat/completions", body))
                return Answer(read(reply))
            except UnusableReply as error:
                why, sampling = f"{error}: {self._excerpt(reply)}", dict(RESAMPLING)
            except _Fault as fault:
                why, wait = self._clean(str(fault)), fault.wait
                if "top_k" in sampling and not fault.retry:  # not a setting of OpenAI's own; one more without it
                    self._top_k_accepted = False
                    continue
                if not fault.retry:
                    return Answer(float("nan"), why)
            attempt += 1
            if attempt < self.attempts and exchanges.pause(pause(attempt, self.backoff, wait)):
                break
        return Answer(float("nan"), f"{why} (attempt {attempt} of {self.attempts})")

    def _check_server(self) -> None:
        exchanges = _Exchanges(self.timeout)
        for attempt in range(1, self.attempts + 1):
            try:
                listing = self._json(exchanges, "GET", "/models")
                break
            except _Fault as fault:
                if not fault.retry or attempt == self.attempts:
                    raise UserError(f"judge server {self.url}: {self._clean(str(fault))}") from None
                exchanges.pause(pause(attempt, self.backoff, fault.wait))
        rows = listing.get("data") if isinstance(listing, dict) else None
        names = [row["id"] for row in rows if isinstance(row, dict) and isinstance(row.get("id"), str)] if isinstance(
            rows, list
        ) else None
        if names is None:
            raise UserError(f"judge server {self.url}: its /models is no list of models; is this the right url?")
        if self.model not in names:
            has = self._clean(", ".join(names[:8])) or "none"
            hint = self._clean(did_you_mean(self.model, names))
            raise UserError(f"judge server {self.url} does not have the model {self.model!r}; it has {has}{hint}")

    def _json(self, exchanges: _Exchanges, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        """The parsed body of a successful response; _Fault for everything else."""
        headers = {"Accept": "application/json", "Accept-Encoding": "identity", "Connection": "close"}
        if key := api_key():
            headers["Authorization"] = f"Bearer {key}"
        payload = None
        if body is not None:
            headers["Content-Type"] = "application/json"
            payload = json.dumps(body).encode()
        status, received, data = exchanges.exchange(
            self._secure, self._host, self._port, method, self._path + path, payload, headers
        )
        if status in (401, 403):
            said = f"the server refuses the key ({status})" if key else f"the server asks for a key ({status})"
            raise _Fault(f"{said}; set {KEY_VARIABLES[0]} to one that it takes", retry=False)
        if 300 <= status < 400:
            to = self._excerpt(received.get("Location", "another address"))
            raise _Fault(f"the server answers {status}, a redirect to {to}; give the final address as url", retry=False)
        if not 200 <= status < 300:
            retry = status in RETRIED or status >= 500
            hint = "; is this the right url?" if status in (404, 405) else ""
            said = self._excerpt(data.decode("utf-8", "replace"))
            raise _Fault(f"the server answers {status} {said}{hint}", retry=retry, wait=retry_after(received))
        if not data.strip():
            raise _Fault("the server sent an empty response", retry=True)
        try:
            return json.loads(data)
        except (ValueError, RecursionError):
            kind = self._excerpt(received.get("Content-Type", "no content type"))
            raise _Fault(f"the response is not JSON ({kind}): {self._excerpt(data[:2000])}", retry=True) from None

    def _excerpt(self, text: str | bytes) -> str:
        """The beginning of a text from the server, quoted. The key goes before the text is cut."""
        text = text.decode("utf-8", "replace") if isinstance(text, bytes) else text
        text = " ".join(_without_key(text).split())
        return repr(text if len(text) <= 80 else f"{text[:80]}…")

    @staticmethod
    def _clean(text: str) -> str:
        """A message fit for one line: no key, nothing unprintable, no more than 400 characters."""
        text = "".join(c if c.isprintable() else " " for c in _without_key(text))
        return text if len(text) <= 400 else f"{text[:400]}…"


class _Exchanges:
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
        self,
        secure: bool,
        host: str,
        port: int,
        method: str,
        path: str,
        payload: bytes | None,
        headers: dict[str, str],
    ) -> tuple[int, http.client.HTTPMessage, bytes]:
        """Status, headers and body of a response; _Fault where none came in time and whole, or it is too large."""
        deadline = time.monotonic() + self.timeout
        late = _Fault(f"no full response within {self.timeout:g} s", retry=True)
        connect = min(MAX_CONNECT, self.timeout)
        if secure:
            connection = http.client.HTTPSConnection(
                host, port, timeout=connect, context=ssl.create_default_context()
            )
        else:
            connection = http.client.HTTPConnection(host, port, timeout=connect)
        try:
            try:
                connection.connect()
            except TimeoutError:
                raise _Fault(f"no connection within {connect:g} s", retry=True) from None
            except ssl.SSLCertVerificationError as error:
                raise _Fault(f"the server's certificate is not valid: {error.verify_message}", retry=False) from None
            except (OSError, UnicodeError) as error:
                raise _Fault(f"the server is not reached: {_why(error)}", retry=True) from None
            with self._watched(connection.sock, deadline) as expired:
                try:
                    connection.request(method, path, payload, headers)
                    response = connection.getresponse()
                    data = _read(response)
                except (OSError, ValueError, http.client.HTTPException) as error:
                    if expired.is_set():
                        raise late from None
                    raise _Fault(f"the connection was dropped: {_why(error)}", retry=True) from None
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
                raise _Fault("broken off", retry=False)
            yield expired
        finally:
            watch.cancel()
            with self._lock:
                self._open.discard(one)


def api_key() -> str:
    """The key of the environment, or ""; UserError, without the key, for one that no header can carry."""
    name = next((name for name in KEY_VARIABLES if name in os.environ), KEY_VARIABLES[0])
    key = os.environ.get(name, "").strip()
    if not all("!" <= character <= "~" for character in key):
        raise UserError(f"{name} holds characters that no key has, such as a space or a line end; set it anew")
    return key


def pause(attempt: int, backoff: float, asked: float = 0.0) -> float:
    """Seconds to wait after the failed attempt `attempt` (from 1): doubling, with jitter, and no less than asked."""
    return max(min(MAX_PAUSE, backoff * 2.0 ** (attempt - 1)) * random.Random().uniform(0.5, 1.0), asked)


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


def data_url(image: Image, image_format: str) -> str:
    """An image as a data URL of a PNG or JPEG file."""
    buffer = io.BytesIO()
    image.save(buffer, format=image_format.upper())
    return f"data:image/{image_format};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _parts(url: str) -> tuple[bool, str, int, str]:
    """Whether a URL is https, its host, its port, and its path without the end slash."""
    try:
        parts = urlsplit(url.strip())
        host, port = parts.hostname or "", parts.port
    except ValueError:
        raise UserError("judge: the url cannot be read; give one such as http://localhost:8000/v1") from None
    if "@" in parts.netloc or parts.query or parts.fragment:  # they may hold secrets, so the url is not repeated
        raise UserError(
            f"judge: the url of {host} has a user, a query or a fragment; give it without, and a key in "
            f"{KEY_VARIABLES[0]}"
        )
    if parts.scheme not in ("http", "https") or not host or not parts.path.isascii() or not parts.path.isprintable():
        raise UserError(f"judge: url is {url!r}; give one such as http://localhost:8000/v1")
    path = parts.path.rstrip("/").removesuffix("/chat/completions") or "/v1"
    return parts.scheme == "https", host, port or (443 if parts.scheme == "https" else 80), path


def _netloc(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _sampling(temperature: float) -> dict[str, float]:
    """The decoding settings of a request; those beside a temperature above 0 are the published ones."""
    return {**RESAMPLING, "temperature": temperature} if temperature > 0 else {"temperature": 0.0}


def _content(prompt: tuple[str, str], image: str) -> list[dict[str, Any]]:
    before, after = ([{"type": "text", "text": text}] if text else [] for text in prompt)
    return [*before, {"type": "image_url", "image_url": {"url": image}}, *after]


def _reply_text(response: Any) -> str:
    """choices[0].message.content of a chat completion; _Fault where it is not there."""
    try:
        text = response["choices"][0]["message"]["content"]
    except (LookupError, TypeError):
        raise _Fault("the response is no chat completion: no choices[0].message.content", retry=True) from None
    if not isinstance(text, str):
        raise _Fault(f"the response holds no text but {type(text).__name__}", retry=True)
    return text


def _read(response: http.client.HTTPResponse) -> bytes:
    """The body of a response, at most MAX_REPLY bytes; _Fault for more, ConnectionError where the end is missing."""
    if (response.length or 0) > MAX_REPLY:
        raise _Fault(f"the response is larger than {MAX_REPLY} bytes", retry=True)
    data = bytearray()
    while part := response.read1(65536):
        data += part
        if len(data) > MAX_REPLY:
            raise _Fault(f"the response is larger than {MAX_REPLY} bytes", retry=True)
    if response.length:
        raise ConnectionError("the response ends early")
    return bytes(data)


def _break(one: socket.socket) -> None:
    """Wake whoever waits for a socket; it may be closed already."""
    with suppress(OSError, ValueError):
        one.shutdown(socket.SHUT_RDWR)


def _why(error: Exception) -> str:
    """An exception's own words; what http.client quotes of a broken response is left out."""
    if isinstance(error, http.client.RemoteDisconnected):
        return "the server closed it without a response"
    if isinstance(error, http.client.IncompleteRead):
        return "the response ends early"
    return reason(error) if isinstance(error, OSError) else type(error).__name__


def _without_key(text: str) -> str:
    key = api_key()
    return text.replace(key, "***") if key else text
