"""A headless Chromium, driven over its DevTools pipe. One page at a time; every answer is waited for.

Source: https://chromedevtools.github.io/devtools-protocol/ (messages end with a NUL byte; the browser reads
descriptor 3 and writes 4).
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from pathlib import Path

NAMES = ("chromium-headless-shell", "chromium")
TIMEOUT_S = 60.0


def find_browser() -> str | None:
    """The smaller one if both are there."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class BrowserError(Exception):
    """The browser ended, refused, or did not answer."""


class Browser:
    """A browser with one page. A context manager.

    Attributes:
        complaints: texts of console messages and exceptions of the page, violations of its policy among them.
        requests: URLs that it asked for, but for the page's own.
    """

    def __init__(self, program: str) -> None:
        self._profile = tempfile.TemporaryDirectory(prefix="browser-", ignore_cleanup_errors=True)
        to_browser, self._write = os.pipe()
        self._read, from_browser = os.pipe()

        def connect() -> None:
            # Over 3 and 4 may lie ends of the pipes themselves.
            reader, writer = os.dup(to_browser), os.dup(from_browser)
            low, high = os.dup2(reader, 100), os.dup2(writer, 101)
            os.dup2(low, 3)
            os.dup2(high, 4)

        argv = [program, "--headless", "--remote-debugging-pipe", f"--user-data-dir={self._profile.name}"]
        argv += ["--disable-gpu", "--hide-scrollbars", "--no-first-run", "--disable-dev-shm-usage"]
        argv += ["--no-sandbox"] if os.geteuid() == 0 else []
        self._process = subprocess.Popen(
            [*argv, "about:blank"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            close_fds=False,
            preexec_fn=connect,
        )
        os.close(to_browser)
        os.close(from_browser)
        self._buffer = b""
        self._number = 0
        self._session: str | None = None
        self._loaded = False
        self.complaints: list[str] = []
        self.requests: list[str] = []
        targets = self("Target.getTargets")["targetInfos"]
        page = next(target["targetId"] for target in targets if target["type"] == "page")
        self._session = self("Target.attachToTarget", targetId=page, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self(f"{domain}.enable")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._session = None
        try:
            with contextlib.suppress(BrowserError, OSError):
                self("Browser.close")
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._write)
        os.close(self._read)
        self._profile.cleanup()

    def __call__(self, method: str, **params: Any) -> dict[str, Any]:
        """Sends a command; what it returned."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise BrowserError(f"{method}: {answer['error']}")
                result: dict[str, Any] = answer["result"]
                return result

    def _next(self) -> dict[str, Any]:
        deadline = time.monotonic() + TIMEOUT_S
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._read], [], [], max(0.0, deadline - time.monotonic()))
            data = os.read(self._read, 1 << 20) if ready else b""
            if not data:
                raise BrowserError("the browser ended" if ready else "the browser does not answer")
            self._buffer += data
        raw, _, self._buffer = self._buffer.partition(b"\0")
        message: dict[str, Any] = json.loads(raw)
        self._note(message.get("method", ""), message.get("params", {}))
        return message

    def _note(self, event: str, params: dict[str, Any]) -> None:
        if event == "Runtime.consoleAPICalled":
            self.complaints.append(str([arg.get("value") for arg in params["args"]]))
        elif event == "Runtime.exceptionThrown":
            self.complaints.append(str(params["exceptionDetails"]))
        elif event == "Log.entryAdded":
            self.complaints.append(params["entry"]["text"])
        elif event == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        elif event == "Page.loadEventFired":
            self._loaded = True

    def look(self, *, width: int, height: int = 900, dark: bool = False) -> None:
        """The size of the window, and whether its surroundings are dark."""
        self(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self("Emulation.setEmulatedMedia", features=[scheme])

    def open(self, page: Path) -> None:
        """Loads a file and waits for it; forgets complaints and requests of the one before."""
        self.complaints, self.requests, self._loaded = [], [], False
        url = page.as_uri()
        self("Page.navigate", url=url)
        while not self._loaded:
            self._next()
        self.requests = [request for request in self.requests if request != url]

    def evaluate(self, expression: str) -> Any:
        """The JSON value of a JavaScript expression in the page."""
        answer = self("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise BrowserError(str(answer["exceptionDetails"]))
        return answer["result"].get("value")

    def screenshot(self, file: Path) -> None:
        """Writes the whole page as a PNG."""
        answer = self("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        file.write_bytes(base64.b64decode(answer["data"]))
