"""A hub on this machine: it plays the part of huggingface.co for one model and one dataset, well or badly."""

import hashlib
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """What is served, and how: `trouble` befalls requests for files whose path ends with `spoiled`.

    cut: the connection breaks off in the middle, and whenever the rest is asked for; hang: nothing comes for long;
    a number: that status instead.
    """

    folders: dict[str, Path]  # "models/org/name" or "datasets/org/name" -> a folder with its files
    trouble: str | int | None = None
    spoiled: str = ""
    address: str = ""
    asked: list[str] = field(default_factory=list)


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """Serve `hub` on a free port inside the block."""

    class Handler(_Handler):
        told = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.address = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    told: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        wanted = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.told.asked.append(f"POST {self.path}")
        kind, repo, rest = self._repo(self.path.removeprefix("/api/"))
        folder = self.told.folders.get(f"{kind}/{repo}")
        if folder is None or not rest.startswith("paths-info"):
            return self._send(404, b"{}")
        paths = json.loads(wanted)["paths"] if wanted.startswith(b"{") else []
        self._json([_entry(folder / path, folder) for path in paths if (folder / path).exists()])

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: the tests' output is no place for it."""

    def _repo(self, path: str) -> tuple[str, str, str]:
        kind, org, name, *rest = path.split("?")[0].split("/")
        return kind, f"{org}/{name}", "/".join(rest)

    def _answer(self) -> None:
        self.told.asked.append(f"{self.command} {self.path}")
        path = self.path.split("?")[0].lstrip("/")
        if path.startswith("api/") and path.count("/") >= 3:
            return self._api(*self._repo(path.removeprefix("api/")))
        if not path.startswith("datasets/"):
            path = f"models/{path}"
        if path.count("/") < 5:
            return self._send(404, b"{}")
        kind, repo, rest = self._repo(path)
        folder, file = self.told.folders.get(f"{kind}/{repo}"), rest.partition("/")[2].partition("/")[2]
        if folder is None or not (folder / file).is_file():
            return self._send(404, b"Entry not found", {"X-Error-Code": "EntryNotFound" if folder else "RepoNotFound"})
        self._file(folder / file)

    def _api(self, kind: str, repo: str, rest: str) -> None:
        folder = self.told.folders.get(f"{kind}/{repo}")
        if folder is None:
            return self._send(404, b'{"error": "Repository not found"}', {"X-Error-Code": "RepoNotFound"})
        files = sorted(p for p in folder.rglob("*") if p.is_file())
        if "tree/" in rest:
            inside = folder / rest.partition("tree/")[2].partition("/")[2]
            if not inside.is_dir():
                return self._send(404, b'{"error": "no such folder"}', {"X-Error-Code": "EntryNotFound"})
            return self._json(
                [_entry(p, folder) for p in sorted(inside.rglob("*") if "recursive=True" in self.path else inside.iterdir())]
            )
        siblings = [{"rfilename": str(p.relative_to(folder))} for p in files]
        self._json({"id": repo, "sha": COMMIT, "private": False, "gated": False, "disabled": False, "tags": [], "downloads": 0,
                    "likes": 0, "siblings": siblings, "createdAt": "2025-01-01T00:00:00.000Z",
                    "lastModified": "2025-01-01T00:00:00.000Z"})  # fmt: skip

    def _file(self, file: Path) -> None:
        raw, hub = file.read_bytes(), self.told
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha256(raw).hexdigest()}"', "Accept-Ranges": "bytes"}
        spoiled = hub.trouble is not None and str(file).endswith(hub.spoiled)
        if spoiled and isinstance(hub.trouble, int):
            return self._send(hub.trouble, b"{}")
        if not spoiled or self.command == "HEAD":
            return self._send(200, raw, headers)
        if hub.trouble == "hang":
            time.sleep(5)
        self.close_connection = True
        if "Range" in self.headers:  # it asks for the rest: the connection breaks off at once
            return
        self.send_response(200)
        for name, value in (headers | {"Content-Length": str(len(raw))}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(raw[: len(raw) // 2])

    def _json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, raw: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in ((headers or {}) | {"Content-Length": str(len(raw))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(raw)


def _entry(path: Path, folder: Path) -> dict[str, Any]:
    """A file or folder as the hub's tree lists it."""
    if path.is_dir():
        return {"type": "directory", "oid": COMMIT, "size": 0, "path": str(path.relative_to(folder))}
    return {"type": "file", "oid": hashlib.sha1(path.read_bytes()).hexdigest(), "size": path.stat().st_size,
            "path": str(path.relative_to(folder))}  # fmt: skip
