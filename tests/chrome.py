"""A headless Chromium driven through its DevTools pipe: JSON messages that end in a zero byte. No package."""
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
PROGRAM = next((found for found in map(shutil.which, PROGRAMS) if found), None)
PATIENCE = 60                                               # seconds for an answer of the browser


class Page:
    """One tab of the browser."""

    def __init__(self, to_browser: int, from_browser: int):
        self.to_browser, self.from_browser = to_browser, from_browser
        self.buffer, self.number, self.session = b"", 0, {}
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self.session = dict(sessionId=attached["sessionId"])

    def call(self, method: str, **params) -> dict:
        """One DevTools command and its result; the events before it are dropped."""
        self.number += 1
        message = dict(id=self.number, method=method, params=params, **self.session)
        os.write(self.to_browser, json.dumps(message).encode() + b"\0")
        while True:
            answer = self.receive()
            if answer.get("id") == self.number:
                assert "error" not in answer, answer["error"]
                return answer["result"]

    def receive(self) -> dict:
        """The browser's next message."""
        while b"\0" not in self.buffer:
            assert select.select([self.from_browser], [], [], PATIENCE)[0], "the browser does not answer"
            more = os.read(self.from_browser, 1 << 20)
            assert more, "the browser has ended"
            self.buffer += more
        message, _, self.buffer = self.buffer.partition(b"\0")
        return json.loads(message)

    def run(self, script: str):
        """The value of a JavaScript expression; a promise is awaited."""
        result = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def wait(self, condition: str) -> None:
        """Until a JavaScript expression is true."""
        end = time.monotonic() + PATIENCE
        while not self.run(condition):
            assert time.monotonic() < end, f"never: {condition}"
            time.sleep(0.05)

    def open(self, address: str) -> None:
        """Shows a page as a phone of 390x844 pixels does."""
        phone = dict(width=390, height=844, deviceScaleFactor=2, mobile=True)
        self.call("Emulation.setDeviceMetricsOverride", **phone)
        self.call("Page.navigate", url=address)
        self.wait("location.href !== 'about:blank' && document.readyState === 'complete'")


@contextmanager
def browser(folder: Path) -> Iterator[Page]:
    """A browser with one tab whose profile lies in a folder."""
    read_there, write_here = os.pipe()
    read_here, write_there = os.pipe()

    def hand_over():                                        # it reads commands from 3, writes answers to 4
        there = [os.dup(read_there), os.dup(write_there)]
        os.dup2(there[0], 3)
        os.dup2(there[1], 4)

    command = [PROGRAM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
               "--mute-audio", "--autoplay-policy=no-user-gesture-required",
               "--remote-debugging-pipe", f"--user-data-dir={folder / 'profile'}"]
    process = subprocess.Popen(command, close_fds=False, preexec_fn=hand_over, stderr=subprocess.DEVNULL)
    os.close(read_there)
    os.close(write_there)
    try:
        yield Page(write_here, read_here)
    finally:
        process.terminate()
        process.wait(PATIENCE)
        os.close(write_here)
        os.close(read_here)
