"""A web server for the files of a directory on the loopback interface, as good or bad as wanted."""

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Self


class FileServer:
    """Serves the files of a directory, with byte ranges; counts the bytes of bodies.

    `failing` answers every so many GET requests with 503, `breaking` breaks every so many bodies
    off, `ranges=False` sends whole files, `status` answers everything so, `listing=False` lists
    nothing.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.failing = self.breaking = 0
        self.ranges = self.listing = True
        self.status: int | None = None
        self.requests: list[tuple[str, str, str | None]] = []
        self.sent_bytes = 0
        self.lock = threading.Lock()
        handler = type("Handler", (_Handler,), {"files": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def gets(self, suffix: str) -> list[str | None]:
        """The ranges that were asked for of files with names that end so."""
        return [r for method, path, r in self.requests if method == "GET" and path.endswith(suffix)]


class _Handler(BaseHTTPRequestHandler):
    files: FileServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        files = self.files
        wanted = self.headers.get("Range")
        with files.lock:
            files.requests.append((self.command, self.path, wanted))
            count = sum(method == "GET" for method, _, _ in files.requests)
        is_get = self.command == "GET"
        if files.status is not None:
            self._send(files.status, b"")
            return
        if is_get and files.failing and count % files.failing == 0:
            self._send(503, b"slow down")
            return
        if self.path.endswith("/"):
            place = files.directory / self.path.strip("/")
            names = sorted(p.name for p in place.iterdir()) if files.listing else []
            page = "".join(f'<a href="{name}">{name}</a>\n' for name in names)
            self._send(200 if files.listing else 403, page.encode(), {"Content-Type": "text/html"})
            return
        path = files.directory / self.path.lstrip("/")
        if not path.is_file():
            self._send(404, b"")
            return
        start, stop, status = 0, path.stat().st_size, 200
        headers = {"Accept-Ranges": "bytes", "ETag": f'"{path.stat().st_mtime_ns}-{stop}"'}
        if wanted is not None and files.ranges:
            first, last = wanted.removeprefix("bytes=").split("-")
            start, size, status = int(first), stop, 206
            stop = min(int(last) + 1, size) if last else size
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
        with open(path, "rb") as file:
            file.seek(start)
            data = file.read(stop - start) if is_get else b""
        headers["Content-Length"] = str(stop - start)
        broken = is_get and files.breaking and count % files.breaking == 0
        self._send(status, data, headers, broken=bool(broken))

    def _send(
        self, status: int, body: bytes, headers: dict[str, str] | None = None, broken: bool = False
    ) -> None:
        sent = 0
        try:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                sent = self.wfile.write(body[: len(body) // 2] if broken else body)
            if broken:
                self.close_connection = True
        except ConnectionError:
            self.close_connection = True
        with self.files.lock:
            self.files.sent_bytes += sent
