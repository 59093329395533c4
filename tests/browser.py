"""A headless Chromium, driven over its debugging pipe, for tests of pages."""

import fcntl
import json
import os
import shutil
import subprocess
import time
from pathlib import Path

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-extensions",
    "--force-device-scale-factor=1",
    "--remote-debugging-pipe",
)


class Browser:
    """One page in a headless Chromium.

    Args:
        profile: Folder for its profile.
    """

    def __init__(self, profile: Path) -> None:
        to_child, from_us = os.pipe()
        from_child, to_us = os.pipe()
        # The child's ends are moved out of the way of 3 and 4, where it expects them.
        child = [fcntl.fcntl(end, fcntl.F_DUPFD, 20) for end in (to_child, to_us)]
        self._process = subprocess.Popen(
            [CHROMIUM, *_FLAGS, f"--user-data-dir={profile}", "about:blank"],
            preexec_fn=lambda: [os.dup2(end, place) for end, place in zip(child, (3, 4), strict=True)],
            pass_fds=(3, 4),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for end in (to_child, to_us, *child):
            os.close(end)
        self._write = os.fdopen(from_us, "wb", buffering=0)
        self._read = os.fdopen(from_child, "rb")
        self._session = None
        self._number = 0
        self._unread = b""
        self.events: list[dict] = []
        target = next(t for t in self.send("Target.getTargets")["targetInfos"] if t["type"] == "page")["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(timeout=20)
        self._write.close()
        self._read.close()

    def send(self, method: str, **params):
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        self._write.write(json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer["error"]
                return answer["result"]
            self.events.append(answer)

    def _receive(self) -> dict:
        while b"\0" not in self._unread:
            read = self._read.read1(1 << 20)
            assert read, "Chromium has ended"
            self._unread += read
        message, _, self._unread = self._unread.partition(b"\0")
        return json.loads(message)

    def open(self, path: Path, fragment: str = "") -> None:
        """Load a page anew and wait until it has run."""
        self.send("Page.navigate", url="about:blank")
        self.events.clear()
        self.send("Page.navigate", url=path.as_uri() + fragment)
        # Asked in one go: between two questions the page may have changed.
        self.until(f"location.href.startsWith({json.dumps(path.as_uri())}) && document.readyState === 'complete'")

    def value(self, expression: str):
        """What an expression is worth in the page, as JSON."""
        answer = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def until(self, expression: str) -> None:
        """Wait until an expression is true in the page."""
        for _ in range(200):
            if self.value(expression):
                return
            time.sleep(0.05)
        raise AssertionError(f"not true in 10 s: {expression}")

    def text(self, selector: str) -> str:
        """What is read in the first element that a selector finds."""
        return self.value(f"document.querySelector({json.dumps(selector)}).innerText")

    def texts(self, selector: str) -> list[str]:
        return self.value(f"[...document.querySelectorAll({json.dumps(selector)})].map((e) => e.textContent)")

    def click(self, selector: str) -> None:
        self.value(f"document.querySelector({json.dumps(selector)}).click()")

    def press(self, *keys: str) -> None:
        """Press keys, as a keyboard does: characters are typed into what has the focus."""
        for key in keys:
            typed = {"text": key} if len(key) == 1 else {}
            self.send("Input.dispatchKeyEvent", type="keyDown", key=key, **typed)
            self.send("Input.dispatchKeyEvent", type="keyUp", key=key)

    def point_at(self, selector: str) -> None:
        """Move the mouse over the middle of an element."""
        x, y = self.value(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)});"
            " e.scrollIntoView({block: 'center'}); const r = e.getClientRects()[0];"
            " return [r.left + r.width / 2, r.top + r.height / 2]; })()"
        )
        self.send("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def choose(self, selector: str, value: str) -> None:
        """Choose an option of a select element, or fill in a field."""
        self.value(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)}); e.value = {json.dumps(value)};"
            " for (const name of ['input', 'change']) e.dispatchEvent(new Event(name, {bubbles: true})); })()"
        )

    def size(self, width: int, height: int) -> None:
        self.send(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )

    def prefer(self, scheme: str) -> None:
        self.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def complaints(self) -> list:
        """Errors and warnings of the page since it was opened."""
        self.value("0")
        bad = [e["params"] for e in self.events if e["method"] in ("Runtime.exceptionThrown", "Log.entryAdded")]
        calls = [e["params"] for e in self.events if e["method"] == "Runtime.consoleAPICalled"]
        return bad + [call for call in calls if call["type"] in ("error", "warning", "assert")]

    def requested(self) -> list[str]:
        """Addresses that the page has asked for since it was opened."""
        self.value("0")
        return [e["params"]["request"]["url"] for e in self.events if e["method"] == "Network.requestWillBeSent"]
