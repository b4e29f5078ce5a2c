"""A real Chromium, driven through its own chromedriver with the standard library alone."""

from __future__ import annotations

import base64
import contextlib
import json
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

# the first is what Debian's packages install
CHROMIUM = ("chromium", "chromium-browser", "google-chrome")


class Browser:
    """One window of Chromium."""

    def __init__(self, address: str) -> None:
        self._address = address
        binary = next(filter(None, map(shutil.which, CHROMIUM)), None)
        options = {
            "args": [
                "--headless=new",
                "--no-sandbox",
                "--disable-dev-shm-usage",
                "--disable-gpu",
                "--host-resolver-rules=MAP elsewhere.test 127.0.0.1",
            ],
            **({"binary": binary} if binary else {}),
        }
        wanted = {
            "browserName": "chrome",
            "goog:chromeOptions": options,
            "goog:loggingPrefs": {"browser": "ALL"},
        }
        made = self._post("/session", {"capabilities": {"alwaysMatch": wanted}})
        self._address = f"{address}/session/{made['sessionId']}"

    def _post(self, path: str, content: Any) -> Any:
        request = urllib.request.Request(
            self._address + path,
            json.dumps(content).encode(),
            {"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as reply:
                return json.load(reply)["value"]
        except urllib.error.HTTPError as error:
            raise RuntimeError(error.read().decode()) from error

    def tool(self, command: str, **parameters: Any) -> Any:
        """Call a command of the DevTools protocol."""
        return self._post("/goog/cdp/execute", {"cmd": command, "params": parameters})

    def open(self, file: Path, fragment: str = "") -> None:
        """Open a file as a double click does."""
        self._post("/url", {"url": "about:blank"})
        self._post("/url", {"url": file.resolve().as_uri() + fragment})

    def go(self, address: str) -> None:
        """Open an address."""
        self._post("/url", {"url": address})

    def size(self, width: int, height: int = 900) -> None:
        """Set the size of the page's window in pixels."""
        self.tool(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )

    def scheme(self, name: str) -> None:
        """Prefer "light" or "dark"."""
        features = [{"name": "prefers-color-scheme", "value": name}]
        self.tool("Emulation.setEmulatedMedia", features=features)

    def run(self, script: str, *arguments: Any) -> Any:
        """Run the body of a function in the page."""
        return self._post("/execute/sync", {"script": script, "args": list(arguments)})

    def press(self, *keys: str) -> None:
        """Press keys, such as "Tab" or "ArrowRight"."""
        for key in keys:
            for kind in ("rawKeyDown", "keyUp"):
                codes = {"Tab": 9, "ArrowLeft": 37, "ArrowRight": 39, "End": 35, "Home": 36}
                self.tool(
                    "Input.dispatchKeyEvent", type=kind, key=key, windowsVirtualKeyCode=codes[key]
                )

    def messages(self) -> list[str]:
        """Take what the console has said since it was asked last."""
        return [entry["message"] for entry in self._post("/se/log", {"type": "browser"})]

    def picture(self, path: Path, *, whole: bool = False) -> None:
        """Take a picture of the window, or of the whole page."""
        shot = self.tool("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(shot["data"]))

    def close(self) -> None:
        """End the browser."""
        request = urllib.request.Request(self._address, method="DELETE")
        urllib.request.urlopen(request, timeout=60).close()


@contextlib.contextmanager
def browser(driver: Sequence[str] = ("chromedriver",)) -> Iterator[Browser]:
    """Start Chromium, and end it afterwards."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [*driver, f"--port={port}", "--log-level=OFF"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    address = f"http://127.0.0.1:{port}"
    try:
        until = time.monotonic() + 30
        while True:
            try:
                urllib.request.urlopen(f"{address}/status", timeout=5).close()
                break
            except urllib.error.URLError:
                if time.monotonic() > until:
                    raise
                time.sleep(0.05)
        window = Browser(address)
        try:
            yield window
        finally:
            window.close()
    finally:
        process.terminate()
        process.wait(timeout=30)
