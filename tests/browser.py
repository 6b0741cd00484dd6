"""A real browser without a window: Debian's Chromium, spoken to in its own protocol through two pipes."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--remote-debugging-pipe",
]
# Of every element with text of its own: its contrast (WCAG 2) with what is behind it, of a value in a cell the cell.
CONTRASTS = """
(() => {
  const rgba = text => (text.match(/[\\d.]+/g) || []).map(Number).concat([1]).slice(0, 4);
  const over = (top, under) => [0, 1, 2].map(i => top[i] * top[3] + under[i] * (1 - top[3])).concat([1]);
  const light = c => { const [r, g, b] = c.slice(0, 3).map(v => v / 255).map(
    v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4); return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const behind = e => e ? over(rgba(getComputedStyle(e).backgroundColor), behind(e.parentElement)) : [255, 255, 255, 1];
  const texts = [...document.querySelectorAll("body *")].filter(
    e => e.tagName != "title" && [...e.childNodes].some(n => n.nodeType == 3 && n.textContent.trim()));
  return texts.map(e => {
    const style = getComputedStyle(e), cell = e.classList.contains("value") ? e.previousElementSibling : null;
    const tint = cell && getComputedStyle(cell);
    const back = tint ? over([...rgba(tint.fill).slice(0, 3), +tint.fillOpacity], behind(e)) : behind(e);
    const front = over(rgba(e.ownerSVGElement ? style.fill : style.color), back);
    const [a, b] = [light(front), light(back)].sort((x, y) => y - x);
    return [e.textContent.trim().slice(0, 40), (a + 0.05) / (b + 0.05)];
  });
})()
"""


class Browser:
    """One tab. `seen` are the protocol's events since the last page was opened."""

    def __init__(self, process: subprocess.Popen[bytes], to: int, back: int) -> None:
        self._process, self._to, self._back = process, to, back
        self._bytes, self._session, self._last = b"", "", 0
        self.seen: list[dict[str, Any]] = []
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.ask(f"{domain}.enable")

    def open(self, page: Path | str, width: int = 1280, dark: bool = False) -> None:
        """In a window so wide, as on a phone below 600 pixels; with the system's dark colours, or its light ones."""
        size = {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": width < 600}
        self.ask("Emulation.setDeviceMetricsOverride", **size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.ask("Emulation.setEmulatedMedia", features=[scheme])
        self.seen.clear()
        self.ask("Page.navigate", url=page if isinstance(page, str) else page.resolve().as_uri())
        while not any(event["method"] == "Page.loadEventFired" for event in self.seen):
            self._read()

    def value(self, script: str) -> Any:
        return self.ask("Runtime.evaluate", expression=script, returnByValue=True)["result"]["value"]

    def requests(self) -> list[str]:
        return [e["params"]["request"]["url"] for e in self.seen if e["method"] == "Network.requestWillBeSent"]

    def complaints(self) -> list[dict[str, Any]]:
        """Script errors, and what the page's own policy had to block."""
        return [e["params"] for e in self.seen if e["method"] in ("Runtime.exceptionThrown", "Log.entryAdded")]

    def screenshot(self, file: Path) -> None:
        """Of the whole page."""
        height = self.value("document.documentElement.scrollHeight")
        clip = {"x": 0, "y": 0, "width": self.value("innerWidth"), "height": height, "scale": 1}
        shot = self.ask("Page.captureScreenshot", captureBeyondViewport=True, clip=clip)
        file.write_bytes(base64.b64decode(shot["data"]))

    def ask(self, method: str, **params: Any) -> dict[str, Any]:
        self._last += 1
        message = {"id": self._last, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self._last:
                assert "error" not in answer, answer
                result: dict[str, Any] = answer["result"]
                return result

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._bytes:
            chunk = os.read(self._back, 2**16)
            assert chunk, f"chromium ended with {self._process.wait()}"
            self._bytes += chunk
        line, _, self._bytes = self._bytes.partition(b"\0")
        message: dict[str, Any] = json.loads(line)
        if "method" in message:
            self.seen.append(message)
        return message


@contextmanager
def chromium(profile: Path) -> Iterator[Browser]:
    """profile: a folder of its own. Fails the test where there is no Chromium."""
    program = shutil.which("chromium")
    if program is None:
        pytest.fail("no chromium: apt-get install -y chromium", pytrace=False)
    (its_in, to), (back, its_out) = os.pipe(), os.pipe()
    # It reads from file 3 and writes to file 4.
    script = f'exec "$@" 3<&{its_in} 4>&{its_out}'
    command = ["bash", "-c", script, "bash", program, *FLAGS, f"--user-data-dir={profile}", "about:blank"]
    process = subprocess.Popen(
        command, pass_fds=(its_in, its_out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    os.close(its_in)
    os.close(its_out)
    try:
        browser = Browser(process, to, back)
        yield browser
        browser.ask("Browser.close")  # else its helpers write on into the profile
        process.wait(timeout=30)
    finally:
        process.kill()
        process.wait()
        os.close(to)
        os.close(back)
