"""A judge behind any OpenAI-compatible server (vLLM, SGLang, a hosted one): `POST /v1/chat/completions` over HTTP.

Many images at once in a bounded number of threads; every attempt bounded in time and in bytes; another attempt, after
a growing pause, where another may help. What comes back is data: JSON of bounded size, read and never run. No
redirect is followed and no proxy used. The key is read from the environment for every request, kept nowhere and cut
out of every message; it is sent to the configured server alone.
"""

from __future__ import annotations

import base64
import io
import json
import os
import random
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from argrpo_cli.rewards.judge.exchange import Exchanges, Fault, read_url, retry_after
from argrpo_cli.rewards.judge.replies import UnusableReply
from argrpo_cli.system.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from PIL.Image import Image

KEY_VARIABLES = ("ARGRPO_JUDGE_API_KEY", "OPENAI_API_KEY")  # the first that is set counts, also when it is empty
MAX_PAUSE = 30.0  # seconds before another attempt, where the server asks for nothing else
MAX_TOKENS = 512  # the published code's 256 cut many replies to the quality question
RESAMPLING = {"temperature": 0.6, "top_p": 0.95, "top_k": 10}  # the published server path's settings
RETRIED = (408, 425, 429)  # and every 5xx


class Answer(NamedTuple):
    """What became of one image: its score, or NaN and why."""

    score: float
    reason: str = ""


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
        if not 0 <= temperature < float("inf"):
            raise UserError(f"judge: temperature is {temperature!r}; it must be 0 or more")
        if image_format not in ("png", "jpeg"):
            raise UserError(f"judge: image_format is {image_format!r}; it is png or jpeg")
        self.server, self.model = read_url(url, KEY_VARIABLES[0]), model
        self.attempts, self.concurrency, self.timeout, self.backoff = attempts, concurrency, timeout, backoff
        self.temperature, self.image_format = temperature, image_format
        self._top_k_accepted = True
        self._exchanges: Exchanges | None = None
        self._check_server()

    def ask(
        self, images: Sequence[Image], prompts: Sequence[tuple[str, str]], read: Callable[[str], float]
    ) -> list[Answer]:
        """Ask about every image and read the replies, in the order of the images.

        Args:
            prompts: the texts before and after each image.
            read: from a reply to its score, or UnusableReply.
        """

        def request(image: Image, prompt: tuple[str, str]) -> dict[str, Any]:
            content = _content(prompt, data_url(image, self.image_format))
            return {"messages": [{"role": "user", "content": content}], "max_tokens": MAX_TOKENS}

        def text(response: Any) -> float:
            reply = self._text(response)
            try:
                return read(reply)
            except UnusableReply as error:
                raise UnusableReply(f"{error}: {self._excerpt(reply)}") from None

        jobs = zip(images, prompts, strict=True)
        return self.complete([partial(request, image, prompt) for image, prompt in jobs], text)

    def complete(
        self, requests: Sequence[Callable[[], dict[str, Any]]], read: Callable[[Any], float], resample: bool = True
    ) -> list[Answer]:
        """Chat completions of any kind, in the order of the requests.

        Args:
            requests: each makes the body of one, without the model; made when its turn comes, since images are large.
            read: from the response's JSON to the score, or UnusableReply.
            resample: decode by `temperature`, and otherwise where a reply has no score; False leaves the body as it is.
        """
        exchanges = self._exchanges = Exchanges(self.timeout)
        pool = ThreadPoolExecutor(max(1, min(self.concurrency, len(requests))), thread_name_prefix="judge")
        try:
            return list(pool.map(lambda request: self._complete(exchanges, request(), read, resample), requests))
        except BaseException:
            exchanges.stop()
            raise
        finally:
            pool.shutdown(cancel_futures=True)

    def stop(self) -> None:
        """Break off `complete` in another thread."""
        if self._exchanges is not None:
            self._exchanges.stop()

    def _complete(
        self, exchanges: Exchanges, request: dict[str, Any], read: Callable[[Any], float], resample: bool
    ) -> Answer:
        sampling: dict[str, float] = _sampling(self.temperature) if resample else {}
        why, attempt = "", 0
        while attempt < self.attempts:
            if not self._top_k_accepted:
                sampling.pop("top_k", None)
            body = {"model": self.model, **request, **sampling}
            wait = 0.0
            try:
                return Answer(read(self._json(exchanges, "POST", "/chat/completions", body)))
            except UnusableReply as error:
                why = self._clean(str(error))
                if resample:
                    sampling = dict(RESAMPLING)
            except Fault as fault:
                why, wait = self._clean(str(fault)), fault.wait
                if fault.status in (400, 422) and "top_k" in sampling:  # OpenAI's own servers know no top_k
                    self._top_k_accepted = False
                    continue
                if not fault.retry:
                    return Answer(float("nan"), why)
            attempt += 1
            if attempt < self.attempts and exchanges.pause(pause(attempt, self.backoff, wait)):
                break
        return Answer(float("nan"), f"{why} (attempt {attempt} of {self.attempts})")

    def _check_server(self) -> None:
        exchanges = Exchanges(self.timeout)
        for attempt in range(1, self.attempts + 1):
            try:
                listing = self._json(exchanges, "GET", "/models")
                break
            except Fault as fault:
                if not fault.retry or attempt == self.attempts:
                    raise UserError(f"judge server {self.server}: {self._clean(str(fault))}") from None
                exchanges.pause(pause(attempt, self.backoff, fault.wait))
        try:
            names = [str(row["id"]) for row in listing["data"]]
        except (LookupError, TypeError):
            raise UserError(
                f"judge server {self.server}: its /models is no list of models; is the url right?"
            ) from None
        if self.model not in names:
            has = self._clean(", ".join(names[:8])) or "none"
            hint = self._clean(did_you_mean(self.model, names))
            raise UserError(f"judge server {self.server} does not have the model {self.model!r}; it has {has}{hint}")

    def _json(self, exchanges: Exchanges, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        """The parsed body of a successful response; Fault for everything else."""
        headers = {"Accept": "application/json", "Accept-Encoding": "identity", "Connection": "close"}
        if key := api_key():
            headers["Authorization"] = f"Bearer {key}"
        payload = None
        if body is not None:
            headers["Content-Type"] = "application/json"
            payload = json.dumps(body).encode()
        status, received, data = exchanges.exchange(self.server, method, path, payload, headers)
        if status in (401, 403):
            said = f"the server refuses the key ({status})" if key else f"the server asks for a key ({status})"
            raise Fault(f"{said}; set {KEY_VARIABLES[0]} to one that it takes", retry=False)
        if 300 <= status < 400:
            to = self._excerpt(received.get("Location", "another address"))
            raise Fault(f"the server answers {status}, a redirect to {to}; give the final address as url", retry=False)
        if not 200 <= status < 300:
            retry = status in RETRIED or status >= 500
            hint = "; is this the right url?" if status in (404, 405) else ""
            said = self._excerpt(data)
            wait = retry_after(received)
            raise Fault(f"the server answers {status} {said}{hint}", retry=retry, wait=wait, status=status)
        if not data.strip():
            raise Fault("the server sent an empty response", retry=True)
        try:
            return json.loads(data)
        except (ValueError, RecursionError):
            kind = self._excerpt(received.get("Content-Type", "no content type"))
            raise Fault(f"the response is not JSON ({kind}): {self._excerpt(data)}", retry=True) from None

    def _text(self, response: Any) -> str:
        """choices[0].message.content of a chat completion; Fault where it is not there."""
        try:
            text = response["choices"][0]["message"]["content"]
        except (LookupError, TypeError):
            text = None
        if not isinstance(text, str):
            said = self._excerpt(json.dumps(response))
            raise Fault(f"the response has no text in choices[0].message.content: {said}", retry=True)
        return text

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


class ServerReward:
    """What rewards share that ask a server: breaking off, and counting what has no score."""

    remote = True
    device: str
    server: JudgeServer
    failures = 0
    last_error = ""

    def stop(self) -> None:
        """Break off `score` in another thread."""
        self.server.stop()

    def scores_of(self, answers: Sequence[Answer]) -> Tensor:
        """float32 [B] on the reward's device, NaN where there is none, which is counted and the latest reason kept."""
        failed = [answer.reason for answer in answers if answer.reason]
        self.failures += len(failed)
        self.last_error = failed[-1] if failed else self.last_error
        return torch.tensor([answer.score for answer in answers], dtype=torch.float32, device=self.device)


def api_key() -> str:
    """The key of the environment, or ""; UserError, without the key, for one that no header can carry."""
    name = next((name for name in KEY_VARIABLES if name in os.environ), KEY_VARIABLES[0])
    key = os.environ.get(name, "").strip()
    if not all("!" <= character <= "~" and character not in '"\\' for character in key):
        raise UserError(f"{name} holds characters that no key has, such as a space or a line end; set it anew")
    return key


def pause(attempt: int, backoff: float, asked: float = 0.0) -> float:
    """Seconds to wait after the failed attempt `attempt` (from 1): doubling, with jitter, and no less than asked."""
    return max(min(MAX_PAUSE, backoff * 2.0 ** (attempt - 1)) * random.Random().uniform(0.5, 1.0), asked)


def data_url(image: Image, image_format: str) -> str:
    """An image as a data URL of a PNG or JPEG file."""
    buffer = io.BytesIO()
    image.save(buffer, format=image_format.upper())
    return f"data:image/{image_format};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _sampling(temperature: float) -> dict[str, float]:
    """The decoding settings of a request; those beside a temperature above 0 are the published ones."""
    return {**RESAMPLING, "temperature": temperature} if temperature > 0 else {"temperature": 0.0}


def _content(prompt: tuple[str, str], image: str) -> list[dict[str, Any]]:
    before, after = ([{"type": "text", "text": text}] if text else [] for text in prompt)
    return [*before, {"type": "image_url", "image_url": {"url": image}}, *after]


def _without_key(text: str) -> str:
    key = api_key()
    return text.replace(key, "***") if key else text
