"""A Hugging Face Hub on the loopback interface, with as much of its API as reading models takes.

It answers what the real Hub answers: model info and trees, `resolve` with `ETag` and
`X-Repo-Commit`, large files by redirect to another origin (as to the Hub's CDN), byte ranges, and
errors with `X-Error-Code`. Every request is logged with the bytes that it cost.

`HF_ENDPOINT` is read when huggingface_hub is imported, so clients run in a subprocess with `env()`.
"""

import hashlib
import json
import os
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self
from urllib.parse import parse_qs, unquote, urlsplit

LFS_FROM_BYTES = 1_000_000


@dataclass(frozen=True, slots=True)
class Request:
    method: str
    path: str
    status: int
    body_bytes: int
    range: str | None
    authorization: str | None


@dataclass(slots=True, kw_only=True)
class Repo:
    """One model: its files by revision, and how the Hub is to behave about it.

    `info` is added to its model info, `gated` needs the token "let-me-in", `status` answers every
    request so, `slow_seconds` delays every answer, `ranges=False` ignores byte ranges, as some
    proxies do, and the CDN answers the first `cdn_failures` requests with 503.
    """

    revisions: dict[str, dict[str, bytes]] = field(default_factory=dict)
    info: dict[str, Any] = field(default_factory=dict)
    gated: bool = False
    status: int | None = None
    slow_seconds: float = 0.0
    ranges: bool = True
    cdn_failures: int = 0

    def commit(self, revision: str) -> str:
        digest = hashlib.sha1()
        for name, data in sorted(self.revisions[revision].items()):
            digest.update(name.encode() + b"\0" + data)
        return digest.hexdigest()

    def files(self, revision: str) -> dict[str, bytes] | None:
        for name, files in self.revisions.items():
            if revision in (name, self.commit(name)):
                return files
        return None


class HubServer:
    """The server; a context manager that listens on a free port."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.requests: list[Request] = []
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def add(
        self, repo_id: str, files: dict[str, bytes], *, revision: str = "main", **behaviour: Any
    ) -> Repo:
        """Add files as a revision of a (new) repository."""
        repo = self.repos.setdefault(repo_id, Repo())
        repo.revisions[revision] = dict(files)
        for name, value in behaviour.items():
            setattr(repo, name, value)
        return repo

    def add_directory(self, repo_id: str, directory: Path, **behaviour: Any) -> Repo:
        """Add a repository with the files of a directory."""
        files = {
            p.relative_to(directory).as_posix(): p.read_bytes()
            for p in directory.rglob("*")
            if p.is_file()
        }
        return self.add(repo_id, files, **behaviour)

    def env(self, cache: Path, **more: str) -> dict[str, str]:
        """The environment for a client process that uses this server and its own empty cache."""
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
        local = {k: v for k, v in clean.items() if k.lower() not in ("http_proxy", "all_proxy")}
        return local | {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(cache),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_XET": "1",
            "NO_PROXY": "127.0.0.1,localhost",
            **more,
        }

    def bytes_sent(self, containing: str = "") -> int:
        """Bytes of all bodies, or of those of matching paths, since the start or `clear`."""
        return sum(r.body_bytes for r in self.requests if containing in r.path)

    def clear(self) -> None:
        """Forget the requests so far."""
        self.requests.clear()


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self._answer()

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _answer(self) -> None:
        url = urlsplit(self.path)
        parts = [unquote(p) for p in url.path.strip("/").split("/")]
        if parts[0] == "cdn":
            self._cdn(parts[1])
            return
        is_api = parts[:2] == ["api", "models"]
        parts = parts[2:] if is_api else parts
        repo_id, rest = "/".join(parts[:2]), parts[2:]
        repo = self.hub.repos.get(repo_id)
        if repo is None:
            # The Hub does not tell anonymous users what exists.
            self._error(401 if not self._token() else 404, "RepoNotFound", "Repository not found")
            return
        time.sleep(repo.slow_seconds)
        if repo.status is not None:
            self._error(repo.status, None, "Something is wrong here")
            return
        revision = rest[1] if len(rest) > 1 else "main"
        files = repo.files(revision)
        if files is None:
            self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return
        commit = next(repo.commit(r) for r, f in repo.revisions.items() if f is files)
        if is_api:
            self._api(repo_id, rest, files, commit, parse_qs(url.query))
        elif repo.gated and self._token() != "let-me-in":
            self._error(403 if self._token() else 401, "GatedRepo", f"{repo_id} is restricted")
        else:
            self._resolve(repo, "/".join(rest[2:]), files, commit)

    def _api(
        self,
        repo_id: str,
        rest: list[str],
        files: dict[str, bytes],
        commit: str,
        query: dict[str, list[str]],
    ) -> None:
        what = rest[0] if rest else "revision"
        if what == "revision":
            siblings: list[dict[str, Any]] = [{"rfilename": name} for name in sorted(files)]
            if "blobs" in query:
                for sibling in siblings:
                    entry = _entry(sibling["rfilename"], files[sibling["rfilename"]])
                    sibling |= {"size": entry["size"], "blobId": entry["oid"]}
            self._json(
                {"id": repo_id, "modelId": repo_id, "sha": commit, "private": False, "tags": []}
                | {"gated": False, "disabled": False, "siblings": siblings}
                | {"library_name": "transformers", "config": _config_metadata(files)}
                | self.hub.repos[repo_id].info
            )
        elif what == "tree":
            self._json([_entry(name, data) for name, data in sorted(files.items())])
        elif what == "paths-info":
            asked = json.loads(self._body)["paths"]
            self._json([_entry(name, files[name]) for name in asked if name in files])
        else:
            self._error(404, None, "no such endpoint")

    def _resolve(self, repo: Repo, name: str, files: dict[str, bytes], commit: str) -> None:
        headers = {"X-Repo-Commit": commit}
        if name not in files:
            self._error(404, "EntryNotFound", "Entry not found", headers)
            return
        data = files[name]
        entry = _entry(name, data)
        headers["ETag"] = f'"{entry["oid"]}"'
        if "lfs" in entry:
            etag = entry["lfs"]["oid"]
            headers |= {"X-Linked-Size": str(len(data)), "X-Linked-ETag": f'"{etag}"'}
            # Another host name makes it another origin, where the token must not go.
            headers["Location"] = f"http://localhost:{self.hub.port}/cdn/{etag}"
            self._send(302, b"", headers)
        else:
            self._data(data, headers, ranges=repo.ranges)

    def _cdn(self, etag: str) -> None:
        for repo in self.hub.repos.values():
            for files in repo.revisions.values():
                for data in files.values():
                    if hashlib.sha256(data).hexdigest() == etag:
                        if repo.cdn_failures > 0:
                            repo.cdn_failures -= 1
                            self._error(503, None, "Slow down")
                            return
                        self._data(data, {"ETag": f'"{etag}"'}, ranges=repo.ranges)
                        return
        self._error(404, None, "no such blob")

    def _data(self, data: bytes, headers: dict[str, str], *, ranges: bool) -> None:
        wanted = self.headers.get("Range")
        if wanted is None or not ranges:
            self._send(200, data, headers)
            return
        first, last = wanted.removeprefix("bytes=").split("-")
        start, stop = int(first), min(int(last) + 1 if last else len(data), len(data))
        if start >= len(data):
            self._send(416, b"", headers | {"Content-Range": f"bytes */{len(data)}"})
            return
        content_range = f"bytes {start}-{stop - 1}/{len(data)}"
        self._send(206, data[start:stop], headers | {"Content-Range": content_range})

    def _json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _error(
        self, status: int, code: str | None, message: str, headers: dict[str, str] | None = None
    ) -> None:
        codes = {"X-Error-Code": code} if code else {}
        body = json.dumps({"error": message}).encode()
        self._send(status, body, {"X-Error-Message": message, **codes, **(headers or {})})

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        is_head = self.command == "HEAD"
        sent = 0
        try:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            while not is_head and sent < len(body):
                sent += self.wfile.write(body[sent : sent + 65536])
        except ConnectionError:
            self.close_connection = True
        self.hub.requests.append(
            Request(
                method=self.command,
                path=self.path,
                status=status,
                body_bytes=sent,
                range=self.headers.get("Range"),
                authorization=self.headers.get("Authorization"),
            )
        )

    def _token(self) -> str | None:
        value = self.headers.get("Authorization")
        return value.removeprefix("Bearer ") if value else None


def _entry(name: str, data: bytes) -> dict[str, Any]:
    oid = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    entry: dict[str, Any] = {"type": "file", "path": name, "size": len(data), "oid": oid}
    if len(data) >= LFS_FROM_BYTES or name.endswith(".safetensors"):
        sha = hashlib.sha256(data).hexdigest()
        entry["lfs"] = {"oid": sha, "size": len(data), "pointerSize": 134}
    return entry


def _config_metadata(files: dict[str, bytes]) -> dict[str, Any]:
    """What the Hub repeats of config.json in a model's info."""
    try:
        config = json.loads(files["config.json"])
        return {key: config[key] for key in ("architectures", "model_type") if key in config}
    except (KeyError, ValueError, TypeError):
        return {}
