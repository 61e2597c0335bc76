"""A headless Chromium for tests, driven through chromedriver by the W3C WebDriver protocol over plain HTTP."""

import base64
import json
import shutil
import socket
import subprocess
import time
import urllib.request
from pathlib import Path
from typing import Any, Self

ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # the key that the protocol gives to element references


def available() -> bool:
    """Whether this machine has both programs."""
    return shutil.which("chromedriver") is not None and any(map(shutil.which, ("chromium", "google-chrome", "chrome")))


class Browser:
    """One window. Use with `with`."""

    def __init__(self, *, dark: bool = False, width: int = 1280, height: int = 1000) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        command = [shutil.which("chromedriver"), f"--port={self.port}", "--log-level=OFF"]
        self.driver = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        binary = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chrome"))))
        arguments = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--disable-dev-shm-usage"]
        arguments += [f"--window-size={width},{height}"] + (["--force-dark-mode"] if dark else [])
        options = {"binary": binary, "args": arguments}
        capabilities = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        self.session = ""
        self._wait()
        made = self._call("POST", "/session", {"capabilities": {"alwaysMatch": capabilities}})
        self.session = f"/session/{made['sessionId']}"
        if dark:
            features = [{"name": "prefers-color-scheme", "value": "dark"}]
            self._command("Emulation.setEmulatedMedia", {"features": features})

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        try:
            if self.session:
                self._call("DELETE", self.session)
        finally:
            self.driver.terminate()
            self.driver.wait(10)

    def _wait(self) -> None:
        for _ in range(100):
            try:
                self._call("GET", "/status")
                return
            except OSError:
                time.sleep(0.1)
        raise RuntimeError("chromedriver did not start")

    def _call(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}", data, {"Content-Type": "application/json"}, method=method
        )
        with urllib.request.urlopen(request, timeout=60) as response:
            return json.load(response)["value"]

    def _command(self, name: str, parameters: dict[str, Any]) -> Any:
        return self._call("POST", f"{self.session}/goog/cdp/execute", {"cmd": name, "params": parameters})

    def open(self, path: Path) -> None:
        """A file from disk."""
        self._call("POST", f"{self.session}/url", {"url": path.resolve().as_uri()})

    def resize(self, width: int, height: int = 1000) -> None:
        """Lay pages out for a screen of this size; a phone's is narrower than any window."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self._command("Emulation.setDeviceMetricsOverride", size)

    def script(self, code: str) -> Any:
        """What the body of a function returns."""
        return self._call("POST", f"{self.session}/execute/sync", {"script": code, "args": []})

    def click(self, selector: str) -> None:
        """As a mouse would: the first element of a CSS selector, scrolled into view."""
        found = self._call("POST", f"{self.session}/element", {"using": "css selector", "value": selector})
        self._call("POST", f"{self.session}/element/{found[ELEMENT]}/click", {})

    def press(self, key: str) -> None:
        """One key, to whatever has the focus. Arrow keys: see the protocol's table of code points."""
        actions = [{"type": "keyDown", "value": key}, {"type": "keyUp", "value": key}]
        body = {"actions": [{"type": "key", "id": "keys", "actions": actions}]}
        self._call("POST", f"{self.session}/actions", body)

    def log(self) -> list[str]:
        """Console messages since the last call."""
        return [entry["message"] for entry in self._call("POST", f"{self.session}/se/log", {"type": "browser"})]

    def screenshot(self, path: Path, *, whole: bool = False) -> None:
        """A PNG of the window, or of the whole page."""
        shot = self._command("Page.captureScreenshot", {"captureBeyondViewport": True, **self._clip()} if whole else {})
        path.write_bytes(base64.b64decode(shot["data"]))

    def _clip(self) -> dict[str, Any]:
        size = self._command("Page.getLayoutMetrics", {})["cssContentSize"]
        return {"clip": {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}}
