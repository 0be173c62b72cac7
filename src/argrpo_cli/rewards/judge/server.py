"""A judge behind any OpenAI-compatible server (vLLM, SGLang, a hosted one): `POST /v1/chat/completions` by httpx2.

Many images at once, a bounded number; every attempt bounded in time and in bytes; another attempt, after a growing
pause, where another may help. What comes back is data: JSON of bounded size, read and never run. No redirect is
followed and no proxy used. The key is read from the environment for every request, kept nowhere and cut out of every
message; it is sent to the configured server alone.
"""

from __future__ import annotations

import asyncio
import base64
import email.utils
import io
import json
import math
import os
import random
import ssl
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, NamedTuple
from urllib.parse import urlsplit

from annotated_types import Interval
from anyio.from_thread import start_blocking_portal

from argrpo_cli.rewards.base import Count, Needs, Reward
from argrpo_cli.rewards.judge.questions import UnusableReply
from argrpo_cli.shapes import Condition
from argrpo_cli.system.errors import UserError, did_you_mean
from argrpo_cli.system.files import reason, to_pil

if TYPE_CHECKING:
    from httpx2 import AsyncClient
    from PIL.Image import Image
    from torch import Tensor

KEY_VARIABLES = ("ARGRPO_JUDGE_API_KEY", "OPENAI_API_KEY")  # the first that is set counts, also when it is empty
MAX_REPLY = 1 << 20  # bytes of a response's body
MAX_CONNECT = 10.0  # seconds
MAX_PAUSE = 30.0  # seconds before another attempt, where the server asks for nothing else
MAX_RETRY_AFTER = 60.0  # seconds that a server may ask for
MAX_TOKENS = 512  # the published code's 256 cut many replies to the quality question
RESAMPLING = {"temperature": 0.6, "top_p": 0.95, "top_k": 10}  # the published server path's settings
RETRIED = (408, 425, 429)  # and every 5xx


class Fault(Exception):
    """An exchange without a reply: why, whether another attempt may help, the wait the server asks for, its status."""

    def __init__(self, why: str, retry: bool = True, wait: float = 0.0, status: int = 0):
        super().__init__(why)
        self.retry, self.wait, self.status = retry, wait, status


class Answer(NamedTuple):
    """What became of one image: its score (or what else `ServerReward.read` returns), or NaN and why."""

    score: Any
    reason: str = ""


class ServerReward(Reward):
    """A reward that a model behind a server gives. Making it asks the server whether it is there and has the model.

    A subclass says what is asked about an image (`texts`, or the whole `request`) and how the score is read
    (`read_reply`, or from the whole response `read`).

    Args:
        url: such as http://localhost:8000/v1; without a path, /v1 is meant.
        model: by the name that the server lists.
        attempts: requests for one image at most.
        concurrency: requests at the same time at most.
        timeout: seconds for one attempt from beginning to end.
        image_format: "png" is lossless; "jpeg" as the published code.
        backoff: seconds of the first pause; each further one is twice as long, with jitter.

    Raises:
        UserError: no url, a key that cannot be sent, a server that is not reached, refuses the
            key, or does not have the model.
    """

    remote = True
    published: ClassVar[str]  # name of the model on the hub
    resample: ClassVar[bool] = True  # decode by `temperature`, and otherwise where a reply has no score
    temperature = 0.0
    failures = 0
    _top_k_accepted = True
    _running: Future[Any] | None = None

    def __init__(
        self,
        device: str = "cpu",
        *,
        url: str | None = None,
        model: str | None = None,
        attempts: Count = 3,
        concurrency: Count = 16,
        timeout: Annotated[float, Interval(gt=0, lt=math.inf)] = 60.0,
        image_format: Literal["png", "jpeg"] = "png",
        backoff: float = 1.0,
    ):
        self.device, self.url, self.model = device, self.check_url(url), model or self.published
        self.attempts, self.concurrency, self.timeout, self.backoff = attempts, concurrency, timeout, backoff
        self.image_format = image_format
        self._run(self._check_server)

    @classmethod
    def check_options(cls, options: Mapping[str, Any]) -> None:
        """UserError for an option that it does not have, another type, or a url that is none."""
        super().check_options(options)
        if options.get("url") is not None:
            read_url(options["url"])

    @classmethod
    def check_url(cls, url: str | None) -> str:
        """The address, see `read_url`; UserError where it is missing, too."""
        if url is None:
            raise UserError(
                f"{cls.name}: url is missing; serve {cls.published} with an OpenAI-compatible server and give its "
                "url, such as http://localhost:8000/v1"
            )
        return read_url(url)

    @classmethod
    def needs(cls, options: Mapping[str, Any], device: str = "cpu") -> Needs:
        """Nothing here but the server's address."""
        url, model = options.get("url"), options.get("model") or cls.published
        missing = "" if url else "the option url, that of an OpenAI-compatible server that has the model"
        return Needs(server=True, network=f"{model} at {url or '?'}", missing=missing)

    def score(self, images: Tensor, conditions: Sequence[Condition]) -> Tensor:
        """uint8 [B, 3, H, W] and B conditions to float32 [B]; NaN where there was no score."""
        return self.scores_of(self.answers(images, conditions))

    def texts(self, condition: Condition) -> tuple[str, str]:
        """What is said before an image and after it."""
        raise NotImplementedError

    def request(self, image: Image, condition: Condition) -> dict[str, Any]:
        """The body, without the model, of the chat completion that asks about an image."""
        before, after = ([{"type": "text", "text": text}] if text else [] for text in self.texts(condition))
        picture = {"type": "image_url", "image_url": {"url": data_url(image, self.image_format)}}
        return {"messages": [{"role": "user", "content": [*before, picture, *after]}], "max_tokens": MAX_TOKENS}

    def read_reply(self, reply: str) -> Any:
        """The score in the text of a reply; UnusableReply where there is none."""
        raise NotImplementedError

    def read(self, response: Any, condition: Condition) -> Any:
        """The score in the JSON of a response; UnusableReply where there is none, Fault where it is of another kind."""
        try:
            reply = response["choices"][0]["message"]["content"]
        except (LookupError, TypeError):
            reply = None
        if not isinstance(reply, str):
            raise Fault(f"the response has no text in choices[0].message.content: {_excerpt(json.dumps(response))}")
        try:
            return self.read_reply(reply)
        except UnusableReply as error:
            raise UnusableReply(f"{error}: {_excerpt(reply)}") from None

    def answers(self, images: Tensor, conditions: Sequence[Condition]) -> list[Answer]:
        """uint8 [B, 3, H, W] and B conditions to what became of each image."""
        return self._run(self._ask_all, to_pil(images), conditions)

    def scores_of(self, answers: Sequence[Answer]) -> Tensor:
        """float32 [B] on the reward's device, NaN where there is none, which is counted and the latest reason kept."""
        import torch

        failed = [answer.reason for answer in answers if answer.reason]
        self.failures += len(failed)
        self.last_error = failed[-1] if failed else self.last_error
        return torch.tensor([answer.score for answer in answers], dtype=torch.float32, device=self.device)

    def stop(self) -> None:
        """Break off a `score` in another thread."""
        if self._running is not None:
            self._running.cancel()

    def _run(self, work: Callable[..., Any], *arguments: Any) -> Any:
        """What `work` returns; in a thread of its own, so that Ctrl-C reaches this one, which then breaks it off."""
        with start_blocking_portal() as portal:
            self._running = portal.start_task_soon(work, *arguments)
            return self._running.result()

    def _client(self) -> AsyncClient:
        import httpx2

        return httpx2.AsyncClient(
            headers={"Accept": "application/json", "Accept-Encoding": "identity", "Connection": "close"},
            verify=ssl.create_default_context(),
            timeout=httpx2.Timeout(None, connect=min(MAX_CONNECT, self.timeout)),
            limits=httpx2.Limits(max_connections=None, max_keepalive_connections=0),
            trust_env=False,  # no proxies
            follow_redirects=False,
        )

    async def _ask_all(self, images: Sequence[Image], conditions: Sequence[Condition]) -> list[Answer]:
        """The answers in the order of the images; a request is made when its turn comes, since images are large."""
        turns = asyncio.Semaphore(self.concurrency)

        async def one(image: Image, condition: Condition) -> Answer:
            async with turns:
                return await self._ask(client, await asyncio.to_thread(self.request, image, condition), condition)

        async with self._client() as client:
            return await asyncio.gather(*map(one, images, conditions))

    async def _ask(self, client: AsyncClient, request: dict[str, Any], condition: Condition) -> Answer:
        sampling: dict[str, Any] = {}
        if self.resample:
            sampling = {**(RESAMPLING if self.temperature > 0 else {}), "temperature": self.temperature}
        why, attempt = "", 0
        while attempt < self.attempts:
            if not self._top_k_accepted:
                sampling.pop("top_k", None)
            wait = 0.0
            try:
                response = await self._json(client, {"model": self.model, **request, **sampling})
                return Answer(self.read(response, condition))
            except UnusableReply as error:
                why = _clean(str(error))
                if self.resample:
                    sampling = dict(RESAMPLING)
            except Fault as fault:
                why, wait = _clean(str(fault)), fault.wait
                if fault.status in (400, 422) and "top_k" in sampling:  # OpenAI's own servers know no top_k
                    self._top_k_accepted = False
                    continue
                if not fault.retry:
                    return Answer(math.nan, why)
            attempt += 1
            if attempt < self.attempts:
                await asyncio.sleep(pause(attempt, self.backoff, wait))
        return Answer(math.nan, f"{why} (attempt {attempt} of {self.attempts})")

    async def _check_server(self) -> None:
        async with self._client() as client:
            for attempt in range(1, self.attempts + 1):
                try:
                    listing = await self._json(client)
                    break
                except Fault as fault:
                    if not fault.retry or attempt == self.attempts:
                        raise UserError(f"judge server {self.url}: {_clean(str(fault))}") from None
                    await asyncio.sleep(pause(attempt, self.backoff, fault.wait))
        try:
            names = [str(row["id"]) for row in listing["data"]]
        except (LookupError, TypeError):
            raise UserError(f"judge server {self.url}: its /models is no list of models; is the url right?") from None
        if self.model not in names:
            has = _clean(", ".join(names[:8])) or "none"
            hint = _clean(did_you_mean(self.model, names))
            raise UserError(f"judge server {self.url} does not have the model {self.model!r}; it has {has}{hint}")

    async def _json(self, client: AsyncClient, body: dict[str, Any] | None = None) -> Any:
        """The parsed response to a chat completion, or without one the list of models; Fault for everything else."""
        import httpx2

        key, data = api_key(), bytearray()
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        request: dict[str, Any] = {"method": "GET", "url": f"{self.url}/models"}
        if body is not None:
            headers["Content-Type"] = "application/json"
            request = {"method": "POST", "url": f"{self.url}/chat/completions", "content": json.dumps(body).encode()}
        try:
            async with asyncio.timeout(self.timeout), client.stream(**request, headers=headers) as response:
                async for part in response.aiter_raw():
                    data += part
                    if len(data) > MAX_REPLY:
                        raise Fault(f"the response is larger than {MAX_REPLY} bytes")
        except TimeoutError:
            raise Fault(f"no full response within {self.timeout:g} s") from None
        except httpx2.ConnectTimeout:
            raise Fault(f"no connection within {min(MAX_CONNECT, self.timeout):g} s") from None
        except httpx2.ConnectError as error:
            for cause in _causes(error):
                if isinstance(cause, ssl.SSLCertVerificationError):
                    raise Fault(f"the server's certificate is not valid: {cause.verify_message}", retry=False) from None
            raise Fault(f"the server is not reached: {_system_reason(error)}") from None
        except httpx2.RemoteProtocolError as error:  # its text may quote the response
            if "without sending a response" in str(error):
                raise Fault("the connection was dropped: there is no response") from None
            if "complete message body" in str(error) or "incomplete chunked" in str(error):
                raise Fault("the connection was dropped: the response ends early") from None
            raise Fault("the response is not HTTP") from None
        except httpx2.TransportError as error:
            raise Fault(f"the connection was dropped: {_system_reason(error)}") from None
        except (httpx2.InvalidURL, UnicodeError):
            raise Fault("the host is no name that can be looked up", retry=False) from None
        status, headers = response.status_code, response.headers
        if status in (401, 403):
            why = f"the server {'refuses the key' if key else 'asks for a key'} ({status})"
            raise Fault(f"{why}; set {KEY_VARIABLES[0]} to one that it takes", retry=False)
        if 300 <= status < 400:
            to = _excerpt(headers.get("Location", "another address"))
            raise Fault(f"the server answers {status}, a redirect to {to}; give the final address as url", retry=False)
        if not response.is_success:
            hint = "; is this the right url?" if status in (404, 405) else ""
            retry = status in RETRIED or status >= 500
            raise Fault(f"the server answers {status} {_excerpt(data)}{hint}", retry, retry_after(headers), status)
        if not data.strip():
            raise Fault("the server sent an empty response")
        try:
            return json.loads(data)
        except (ValueError, RecursionError):
            kind = _excerpt(headers.get("Content-Type", "no content type"))
            raise Fault(f"the response is not JSON ({kind}): {_excerpt(data)}") from None


def read_url(url: str) -> str:
    """The address of a server, no slash at its end; UserError for what is none, or holds what may be a secret."""
    try:
        parts = urlsplit(url.strip())
        host, port = parts.hostname or "", parts.port
    except ValueError:
        raise UserError("judge: the url cannot be read; give one such as http://localhost:8000/v1") from None
    if any(mark in url for mark in "@?#;"):  # the url is not repeated here
        raise UserError(
            f"judge: the url has a user, parameters or a query in it; give it without, and a key in {KEY_VARIABLES[0]}"
        )
    if parts.scheme not in ("http", "https") or not host or not all("!" <= one <= "~" for one in parts.path):
        raise UserError(f"judge: url is {url!r}; give one such as http://localhost:8000/v1")
    host = f"[{host}]" if ":" in host else host
    path = parts.path.rstrip("/").removesuffix("/chat/completions") or "/v1"
    return f"{parts.scheme}://{host}{f':{port}' if port else ''}{path}"


def api_key() -> str:
    """The key of the environment, or ""; UserError, without the key, for one that no header can carry."""
    name = next((name for name in KEY_VARIABLES if name in os.environ), KEY_VARIABLES[0])
    key = os.environ.get(name, "").strip()
    if not all("!" <= character <= "~" and character not in '"\\' for character in key):
        raise UserError(f"{name} holds characters that no key has, such as a space or a line end; set it anew")
    return key


def pause(attempt: int, backoff: float, least: float = 0.0) -> float:
    """Seconds to wait after the failed attempt `attempt` (from 1): doubling, with jitter, and no less than `least`."""
    return max(min(MAX_PAUSE, backoff * 2.0 ** (attempt - 1)) * random.Random().uniform(0.5, 1.0), least)


def retry_after(headers: Mapping[str, str]) -> float:
    """Seconds that a Retry-After header asks for, as a number or a date, from 0 to MAX_RETRY_AFTER."""
    value, seconds = headers.get("Retry-After", ""), 0.0
    with suppress(ValueError, OverflowError):
        seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
    with suppress(ValueError):
        seconds = float(int(value[:9]))
    return min(max(seconds, 0.0), MAX_RETRY_AFTER)


def data_url(image: Image, image_format: str = "png") -> str:
    """An image as a data URL of a PNG or JPEG file."""
    buffer = io.BytesIO()
    image.save(buffer, format=image_format.upper())
    return f"data:image/{image_format};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what led to it."""
    while error is not None:
        yield error
        inner = error.exceptions[0] if isinstance(error, BaseExceptionGroup) else None
        error = inner or error.__cause__ or error.__context__


def _system_reason(error: BaseException) -> str:
    """The operating system's own words for a failed connection."""
    for cause in _causes(error):
        if isinstance(cause, OSError) and cause.errno:  # asyncio puts an address in the place of its words
            return os.strerror(cause.errno).lower() if cause.errno > 0 else reason(cause)
    return "the network fails"


def _excerpt(text: str | bytes | bytearray) -> str:
    """The beginning of a text from the server, quoted."""
    return repr(_clean(text if isinstance(text, str) else text.decode("utf-8", "replace"), 80))


def _clean(text: str, most: int = 400) -> str:
    """A text on one line of at most `most` characters, all printable; the key goes before the text is cut."""
    key = api_key()
    text = text.replace(key, "***") if key else text
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return text if len(text) <= most else f"{text[:most]}…"
