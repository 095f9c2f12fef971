"""report.html in a real browser, at three widths, in light and dark: nothing is fetched or complains, all is drawn.

Needs Chromium on the path (Debian: chromium); driven by its DevTools protocol.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))

from test_reporting import evil_report, measured_report

from slimexport.reporting import html

BROWSER = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium here")


class Page:
    """One tab. `said` are the console's lines and errors, `asked` the addresses that were requested."""

    def __init__(self, socket: Any):
        self._socket, self._number = socket, 0
        self.said: list[str] = []
        self.asked: list[str] = []
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> Any:
        self._number += 1
        self._socket.send(json.dumps({"id": self._number, "method": method, "params": parameters}))
        while True:
            message = json.loads(self._socket.recv(timeout=60))
            self._note(message)
            if message.get("id") == self._number:
                assert "error" not in message, message
                return message["result"]

    def _note(self, message: dict[str, Any]) -> None:
        given = message.get("params", {})
        if message.get("method") in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown"):
            self.said.append(json.dumps(given))
        elif message.get("method") == "Log.entryAdded":
            self.said.append(given["entry"]["text"])
        elif message.get("method") == "Network.requestWillBeSent":
            self.asked.append(given["request"]["url"])

    def open(self, address: str) -> None:
        self.call("Page.navigate", url=address)
        while self.of("document.readyState") != "complete":
            time.sleep(0.02)

    def of(self, expression: str) -> Any:
        return self.call("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    client = pytest.importorskip("websockets.sync.client")
    profile = tmp_path_factory.mktemp("profile")
    command = [str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0",
               f"--user-data-dir={profile}", "about:blank"]  # fmt: skip
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            port_file, until = profile / "DevToolsActivePort", time.monotonic() + 60
            while not (port_file.is_file() and port_file.read_text().strip()):
                assert process.poll() is None, "the browser ended"
                assert time.monotonic() < until
                time.sleep(0.05)
            port = port_file.read_text().split()[0]
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/json/list") as answer:
                tabs = json.load(answer)
            address = next(tab["webSocketDebuggerUrl"] for tab in tabs if tab["type"] == "page")
            with client.connect(address, max_size=None) as socket:
                yield Page(socket)
        finally:
            process.terminate()


@pytest.mark.parametrize("width", [1280, 768, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("made", ["measured", "evil"])
def test_report(page: Page, tmp_path: Path, width: int, scheme: str, made: str) -> None:
    path = tmp_path / "report.html"
    path.write_text(html.render(measured_report() if made == "measured" else evil_report()), encoding="utf-8")
    page.said.clear()
    page.asked.clear()
    page.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 500)
    page.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    page.open(path.as_uri())
    assert page.asked == [path.as_uri()]
    assert page.said == []
    assert page.of("document.documentElement.scrollWidth") <= width, "no sideways scrolling"
    drawn = page.of("[...document.querySelectorAll('svg')].map(s => [s.getBoundingClientRect().width, "
                    "s.getBoundingClientRect().height, s.querySelectorAll('path, rect, use').length, "
                    "!!s.getAttribute('aria-label')])")  # fmt: skip
    assert len(drawn) >= (7 if made == "measured" else 3)
    assert all(wide > 200 and high > 50 and pieces > 3 and labelled for wide, high, pieces, labelled in drawn), drawn
    ink, ground = (page.of(f"getComputedStyle(document.body).{name}") for name in ("color", "backgroundColor"))
    assert abs(_light(ink) - _light(ground)) > 0.5, "readable"
    assert (_light(ground) < 0.3) == (scheme == "dark")
    text = page.of("[...document.querySelectorAll('figure svg text')].map(t => getComputedStyle(t).fill)")
    assert all(abs(_light(colour) - _light(ground)) > 0.2 for colour in text)
    # Every fold can be reached and opened by the keyboard alone.
    folds = page.of("document.querySelectorAll('summary').length")
    page.of("document.body.focus()")
    for _ in range(folds):
        page.call("Input.dispatchKeyEvent", type="keyDown", key="Tab", windowsVirtualKeyCode=9)
        page.call("Input.dispatchKeyEvent", type="keyUp", key="Tab", windowsVirtualKeyCode=9)
        page.call("Input.dispatchKeyEvent", type="keyDown", key="Enter", text="\r", windowsVirtualKeyCode=13)
        page.call("Input.dispatchKeyEvent", type="keyUp", key="Enter", windowsVirtualKeyCode=13)
    assert page.of("document.querySelectorAll('details[open]').length") == folds > 0
    assert page.of("document.documentElement.scrollWidth") <= width


def _light(colour: str) -> float:
    """Of `rgb(r, g, b)`, 0 to 1."""
    red, green, blue = (float(part) for part in colour[colour.index("(") + 1 : -1].split(",")[:3])
    return (0.2126 * red + 0.7152 * green + 0.0722 * blue) / 255
