"""A hub on this machine: as much of its interface as making a repository, a commit and a download ask for.

with hub(folder) as address: ...      # repositories as folders, with what was pushed
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

COMMIT = "1" * 40


@contextmanager
def hub(root: Path, status: int = 200) -> Iterator[str]:
    """Serve `root`; its address. With another `status` everything is answered by that error."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            size = self.headers.get("Content-Length")
            body = self.rfile.read(int(size)) if size else b"".join(self._chunks())
            parts = self.path.split("?")[0].strip("/").split("/")
            if status != 200:
                return self._send({"error": "no"}, status)
            if parts == ["api", "repos", "create"]:
                asked = json.loads(body)
                name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
                (root / name).mkdir(parents=True, exist_ok=True)
                return self._send({"url": f"{self._address()}/{name}", "private": asked.get("private")})
            if parts == ["api", "validate-yaml"]:  # of a README.md
                return self._send({"errors": [], "warnings": []})
            repo = "/".join(parts[2:4])
            if parts[4] == "preupload":  # all are small files, whatever their size
                files = [{"path": one["path"], "uploadMode": "regular"} for one in json.loads(body)["files"]]
                return self._send({"files": [one | {"shouldIgnore": False} for one in files]})
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    target = root / repo / entry["value"]["path"]
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(base64.b64decode(entry["value"]["content"]))
            where = f"{self._address()}/{repo}/commit/{COMMIT}"
            return self._send({"success": True, "commitOid": COMMIT, "commitUrl": where, "hookOutput": ""})

        def do_GET(self) -> None:
            parts = self.path.split("?")[0].strip("/").split("/")
            if parts[0] == "api":
                folder = root / parts[2] / parts[3]
                if not folder.is_dir() or status != 200:
                    return self._send({"error": "Repository not found"}, 404 if status == 200 else status)
                files = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]
                if "tree" in parts:
                    sizes = {name: (folder / name).stat().st_size for name in files}
                    tree = [{"type": "file", "path": name, "size": size, "oid": ""} for name, size in sizes.items()]
                    return self._send(tree)
                listed = [{"rfilename": name} for name in files]
                return self._send({"id": folder.name, "sha": COMMIT, "siblings": listed, "tags": [], "private": False})
            content = (root / parts[0] / parts[1] / "/".join(parts[4:])).read_bytes()
            self._head(content)
            if self.command == "GET":
                self.wfile.write(content)
            return None

        do_HEAD = do_GET

        def _chunks(self) -> Iterator[bytes]:
            while size := int(self.rfile.readline(), 16):
                yield self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()

        def _address(self) -> str:
            return f"http://{self.headers['Host']}"

        def _head(self, content: bytes) -> None:
            self.send_response(200)
            self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()

        def _send(self, answer: Any, code: int = 200) -> None:
            body = json.dumps(answer).encode()
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
