"""A server that speaks the OpenAI protocol and misbehaves as told: a real one, on a local port.

Every image is of one grey; the grey is its name. `script[grey]` lists what happens at each attempt for that image: a
fault's name, or any other text, which is then the reply. After the list, and without one, the reply is `reply(grey)`.
"""

from __future__ import annotations

import base64
import io
import json
import threading
from collections import Counter, defaultdict
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from PIL import Image

MODEL = "Qwen/Qwen2.5-VL-3B-Instruct"


def completion(text: Any) -> dict[str, Any]:
    return {"object": "chat.completion", "choices": [{"message": {"role": "assistant", "content": text}}]}


class FakeServer(ThreadingHTTPServer):
    """Start with `with FakeServer() as server`; `server.url` is its address."""

    daemon_threads = True
    request_queue_size = 64  # of connections at the same time that wait to be taken; more are refused

    def __init__(self, reply: Callable[[int], str] | None = None, models: Any = None):
        super().__init__(("127.0.0.1", 0), Handler)
        self.reply = reply or (lambda grey: json.dumps({"score": grey % 6}))
        self.models = {"object": "list", "data": [{"id": MODEL}]} if models is None else models
        self.models_fault = ""
        self.script: dict[int, list[str]] = {}
        self.whole: dict[int, Any] = {}  # responses to send as they are, or functions of what is asked
        self.before: Callable[[int], object] = lambda grey: None  # what an answer waits for
        self.attempts: Counter[int] = Counter()
        self.bodies: dict[int, list[dict[str, Any]]] = defaultdict(list)
        self.keys: list[str | None] = []
        self.visited: list[str] = []
        self.now = self.most = 0
        self.lock, self.closing = threading.Lock(), threading.Event()
        self.thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def __enter__(self) -> FakeServer:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        self.shutdown()
        self.server_close()

    def handle_error(self, *_: object) -> None:
        """A client that went away is no news."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FakeServer

    def log_message(self, *_: object) -> None:
        pass

    def send(self, status: int, body: bytes, kind: str = "application/json", **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        self.server.keys.append(self.headers["Authorization"])
        self.server.visited.append(self.path)
        if self.server.models_fault:
            self.fault(self.server.models_fault)
        elif self.path == "/v1/models":
            self.send(200, json.dumps(self.server.models).encode())
        else:
            self.send(404, b'{"error": "no such path"}')

    def do_POST(self) -> None:
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        parts = [part for message in body["messages"] for part in message["content"] if isinstance(part, dict)]
        [url] = [part["image_url"]["url"] for part in parts if part["type"] == "image_url"]
        grey = Image.open(io.BytesIO(base64.b64decode(url.partition("base64,")[2]))).getpixel((0, 0))[0]
        with server.lock:
            attempt, server.attempts[grey] = server.attempts[grey], server.attempts[grey] + 1
            server.bodies[grey].append(body)
            server.keys.append(self.headers["Authorization"])
            server.visited.append(self.path)
            server.now += 1
            server.most = max(server.most, server.now)
        server.before(grey)
        with server.lock:
            server.now -= 1
        script = server.script.get(grey, [])
        if attempt < len(script) or grey not in server.whole:
            self.fault(script[attempt] if attempt < len(script) else server.reply(grey))
            return
        whole = server.whole[grey]
        self.send(200, json.dumps(whole(body) if callable(whole) else whole).encode())

    def fault(self, name: str) -> None:
        """Do as the fault says; what is no fault is a reply."""
        key = self.headers["Authorization"] or "no key"
        good = json.dumps(completion('{"score": 2}')).encode()
        match name:
            case "slow":
                self.server.closing.wait()
            case "drip" | "drip headers":
                if name == "drip":
                    self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
                while not self.server.closing.wait(0.05):
                    self.wfile.write(b"x")
            case "429":
                self.send(429, b'{"error": "too many"}', Retry_After="1")
            case "500":
                self.send(500, f'{{"error": "broken, {key} was the key"}}'.encode())
            case "400":
                self.send(400, f'{{"error": "bad image, {key}"}}'.encode())
            case "401":
                self.send(401, f"Incorrect API key provided: {key}".encode())
            case "dropped":
                self.close_connection = True
            case "dropped within":
                self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n" + good)
                self.close_connection = True
            case "dropped chunk":
                self.wfile.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nff\r\n" + good)
                self.close_connection = True
            case "not http":
                self.wfile.write(f"{key} this is no HTTP\r\n\r\n".encode())
                self.close_connection = True
            case "invalid json":
                self.send(200, f'{{"choices": [{{"message" {key}'.encode())
            case "deep json":
                self.send(200, b"[" * 200_000)
            case "html":
                self.send(200, f"<html>{key} Please log in</html>".encode(), "text/html")
            case "json as text":
                self.send(200, good, "text/plain")
            case "wrong schema":
                self.send(200, json.dumps({"result": f"{key} 5"}).encode())
            case "empty":
                self.send(200, b"")
            case "empty choices":
                self.send(200, b'{"choices": []}')
            case "no text":
                self.send(200, json.dumps(completion(None)).encode())
            case "empty text":
                self.send(200, json.dumps(completion("")).encode())
            case "huge":
                self.send(200, b'{"choices": "' + b"x" * (1 << 20) + b'"}')
            case "endless":
                self.wfile.write(b"HTTP/1.1 200 OK\r\n\r\n")
                self.close_connection = True
                while not self.server.closing.is_set():
                    self.wfile.write(b" " * 65536)
            case "redirect":
                host = f"localhost:{self.server.server_port}"  # another name, so another host
                self.send(307, b"", Location=f"http://{host}/stolen?{key}")
            case _:
                self.send(200, json.dumps(completion(name)).encode())
