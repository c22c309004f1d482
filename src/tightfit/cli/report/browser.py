"""A headless Chromium, spoken to over its DevTools pipe: for `.png`, and for the page's tests.

The pipe (`--remote-debugging-pipe`: JSON messages with a zero byte after each, on the descriptors 3
and 4) needs neither a port nor a library. The browser gets a fresh profile and no network.
"""

import base64
import json
import os
import select
import shutil
import signal
import tempfile
import time
from contextlib import suppress
from fcntl import F_DUPFD_CLOEXEC, fcntl
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tightfit.errors import OutputError

NAMES = (
    "chromium",
    "chromium-browser",
    "google-chrome",
    "google-chrome-stable",
    "chrome",
    "microsoft-edge",
    "brave-browser",
)

_FLAGS = (
    "--headless",
    "--remote-debugging-pipe",
    "--no-first-run",
    "--no-default-browser-check",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-dev-shm-usage",
    "--disable-extensions",
    "--disable-gpu",
    "--disable-sync",
    "--hide-scrollbars",
    "--host-resolver-rules=MAP * ~NOTFOUND",
    "--font-render-hinting=none",
)

_TIMEOUT = 60.0


def find() -> str | None:
    """The path of a Chromium or a relative of it; None if there is none."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


def screenshot(page: bytes, *, width: int = 1040, scale: float = 2.0) -> bytes:
    """The whole page as PNG, in its light theme.

    Raises:
        OutputError: there is no browser, or it fails.
    """
    with tempfile.TemporaryDirectory(prefix="tightfit-") as directory:
        file = Path(directory, "report.html")
        file.write_bytes(page)
        with Chromium() as browser:
            browser.view(width=width, height=900, scale=scale)
            browser.open(file.as_uri())
            return browser.picture()


class Chromium:
    """One browser with one page; use it as a context manager.

    Raises:
        OutputError: no browser was found, it did not start, or it did not answer in time.
    """

    def __init__(self, program: str | None = None) -> None:
        found = program or find()
        if found is None:
            raise OutputError(
                "no Chromium or Chrome was found to draw a .png",
                hint="install one (Debian: apt install chromium), or write .html or .svg",
            )
        self._program = found
        self.events: list[dict[str, Any]] = []
        """What the page reported: console, exceptions, requests."""
        self._buffer = b""
        self._number = 0
        self._session: str | None = None

    def __enter__(self) -> Self:
        self._profile = tempfile.TemporaryDirectory(prefix="tightfit-", ignore_cleanup_errors=True)
        try:
            self._start()
            found = self._call("Target.getTargets")["targetInfos"]
            target = next(one["targetId"] for one in found if one["type"] == "page")
            attached = self._call("Target.attachToTarget", targetId=target, flatten=True)
            self._session = attached["sessionId"]
            for domain in ("Page", "Runtime", "Network", "Log"):
                self.call(f"{domain}.enable")
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stop()

    def view(
        self, *, width: int, height: int, scale: float = 1.0, dark: bool = False, media: str = ""
    ) -> None:
        """Set the window, the preferred theme, and the medium (`print`, or that of a screen)."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=scale,
            mobile=False,
        )
        theme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", media=media, features=[theme])

    def open(self, url: str) -> None:
        """Load a page, and wait until it is complete."""
        self.events.clear()
        self.call("Page.navigate", url=url)
        deadline = time.monotonic() + _TIMEOUT
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self._read(deadline)

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression; a promise is awaited."""
        done = self.call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        if "exceptionDetails" in done:
            raise OutputError(f"the page failed: {done['exceptionDetails'].get('text')}")
        return done["result"].get("value")

    def press(self, key: str, code: int, text: str = "") -> None:
        """Press a key and let it go; `code` is its Windows virtual key code."""
        given = {"key": key, "code": key, "windowsVirtualKeyCode": code}
        down = {"type": "keyDown", "text": text} if text else {"type": "rawKeyDown"}
        self.call("Input.dispatchKeyEvent", **down, **given)
        self.call("Input.dispatchKeyEvent", type="keyUp", **given)

    def picture(self, *, whole: bool = True) -> bytes:
        """The whole page, as far as it scrolls, or what the window shows of it, as PNG."""
        done = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        return base64.b64decode(done["data"])

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Call a method of the DevTools protocol on the page."""
        return self._call(method, **params)

    def _call(self, method: str, **params: Any) -> dict[str, Any]:
        self._number += 1
        number = self._number
        message: dict[str, Any] = {"id": number, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        data = json.dumps(message).encode() + b"\0"
        try:
            while data:
                data = data[os.write(self._to, data) :]
        except OSError:
            raise self._failed("did not start, or stopped") from None
        deadline = time.monotonic() + _TIMEOUT
        while True:
            answer = self._read(deadline)
            if answer.get("id") == number:
                if "error" in answer:
                    raise self._failed(f"refused {method}: {answer['error'].get('message')}")
                result: dict[str, Any] = answer["result"]
                return result

    def _read(self, deadline: float) -> dict[str, Any]:
        """The next message; events are kept."""
        while b"\0" not in self._buffer:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self._from], [], [], left)[0]:
                raise self._failed(f"did not answer in {_TIMEOUT:.0f} s")
            data = os.read(self._from, 1 << 20)
            if not data:
                raise self._failed("did not start, or stopped")
            self._buffer += data
        line, self._buffer = self._buffer.split(b"\0", 1)
        message: dict[str, Any] = json.loads(line)
        if "method" in message:
            self.events.append(message)
        return message

    def _failed(self, what: str) -> OutputError:
        return OutputError(
            f"the browser {self._program} {what}",
            hint="see whether it runs alone with --headless, or write .html or .svg",
        )

    def _start(self) -> None:
        flags = [*_FLAGS, f"--user-data-dir={self._profile.name}"]
        if os.geteuid() == 0:
            # Chromium's sandbox cannot be set up by root, and the page may do nothing anyway.
            flags.append("--no-sandbox")
        theirs_in, self._to = _pipe()
        self._from, theirs_out = _pipe()
        actions = [
            (os.POSIX_SPAWN_DUP2, theirs_in, 3),
            (os.POSIX_SPAWN_DUP2, theirs_out, 4),
            (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
            (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0),
            (os.POSIX_SPAWN_OPEN, 2, os.devnull, os.O_WRONLY, 0),
        ]
        arguments = [self._program, *flags, "about:blank"]
        self._pid = 0
        try:
            self._pid = os.posix_spawn(
                self._program, arguments, os.environ, file_actions=actions, setpgroup=0
            )
        except OSError as error:
            raise self._failed(f"cannot be started: {error.strerror}") from error
        finally:
            os.close(theirs_in)
            os.close(theirs_out)

    def _stop(self) -> None:
        for name in ("_to", "_from"):
            if hasattr(self, name):
                os.close(getattr(self, name))
        if getattr(self, "_pid", 0):
            with suppress(OSError):
                os.killpg(self._pid, signal.SIGKILL)
            with suppress(OSError):
                os.waitpid(self._pid, 0)
        self._profile.cleanup()


def _pipe() -> tuple[int, int]:
    """A pipe on high descriptors, so that none of them is 3 or 4 already."""
    ends = os.pipe()
    high = tuple(fcntl(end, F_DUPFD_CLOEXEC, 20) for end in ends)
    for end in ends:
        os.close(end)
    return high[0], high[1]
