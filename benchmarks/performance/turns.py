"""A process that works only when it is told to, seen from inside and from outside.

Between its turns it waits, so that two of them can be measured one after the other although both are running. It
needs nothing beyond the standard library, since it runs in TRL's environment too.
"""

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_PATIENCE = 3600.0
"""Seconds that a turn, or a start, may take."""

_LAST_LINES = 25


class Turns:
    """Inside: the gate that each turn begins at. From here on, what is printed goes to standard error."""

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8")
        self._in = os.fdopen(os.dup(0), encoding="utf-8")
        os.dup2(2, 1)
        with open(os.devnull) as nothing:
            os.dup2(nothing.fileno(), 0)
        self._begin: float | None = None
        self._notes: dict[str, Any] = {}

    def wait(self) -> None:
        """End the turn under way, and wait for the next; all between two calls belongs to the turn."""
        self.finish()
        self._say({"ready": True})
        if self._in.readline().strip() != "go":
            raise SystemExit("nobody asks for a further turn")
        self._begin = time.perf_counter()

    def note(self, values: Mapping[str, Any]) -> None:
        """Report these numbers with the turn under way."""
        self._notes |= values

    def finish(self) -> None:
        """End the turn under way, if there is one."""
        if self._begin is not None:
            self._say({"seconds": time.perf_counter() - self._begin, **self._notes})
        self._begin, self._notes = None, {}

    def _say(self, message: Mapping[str, Any]) -> None:
        self._out.write(json.dumps(message) + "\n")


class TimeIsUp(Exception):
    """A turn took longer than it may."""


class Side:
    """Outside: the process.

    Args:
        name: What it is called in messages, and its log's name.
        command: Its command line.
        log: File that takes what it prints.
        cwd: Its working folder.
        env: Its environment.
    """

    def __init__(self, name: str, command: Sequence[str], log: Path, cwd: Path, env: Mapping[str, str]) -> None:
        self.name = name
        self._log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w", encoding="utf-8") as stderr:
            self._process = subprocess.Popen(
                command, cwd=cwd, env=dict(env), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, text=True
            )
        self._messages: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._ready = False
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._messages.put(json.loads(line))
        self._messages.put(None)

    def _next(self, patience: float) -> dict[str, Any]:
        try:
            message = self._messages.get(timeout=patience)
        except queue.Empty:
            raise TimeIsUp(f"{self.name}: nothing within {patience:.0f} s") from None
        if message is None:
            said = "\n  ".join(self._log.read_text("utf-8", errors="replace").splitlines()[-_LAST_LINES:])
            raise RuntimeError(f"{self.name} ended with {self._process.wait()}; {self._log} ends with\n  {said}")
        return message

    def ready(self, patience: float = _PATIENCE) -> None:
        """Wait until it has started, or has come to its next turn.

        Args:
            patience: Seconds.
        """
        if not self._ready:
            message = self._next(patience)
            assert message.get("ready"), message
            self._ready = True

    def turn(self, patience: float = _PATIENCE) -> dict[str, Any]:
        """Have it take a turn.

        Args:
            patience: Seconds that the turn may take.

        Returns:
            ``seconds``, and what it noted.

        Raises:
            TimeIsUp: If it took longer.
            RuntimeError: If it ended instead.
        """
        self.ready()
        self._ready = False
        assert self._process.stdin is not None
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        return self._next(patience)

    def close(self, patience: float = 60.0) -> None:
        """End it.

        Args:
            patience: Seconds that it may take to end by itself.
        """
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(patience)
        except subprocess.TimeoutExpired:
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(10)
            self._process.kill()
            self._process.wait()

    def __enter__(self) -> "Side":
        return self

    def __exit__(self, *error: object) -> None:
        # One in the middle of a turn would not hear of the end.
        self.close(0.0 if isinstance(error[1], BaseException) else 60.0)


def environment(root: Path, **variables: str | None) -> dict[str, str]:
    """The environment of a process that is measured, without the threads that this one was given.

    Args:
        root: Folder of the project.
        **variables: Others to set; None removes one.
    """
    given: dict[str, str | None] = {**os.environ, "OMP_NUM_THREADS": None, "PYTHONPATH": str(root), **variables}
    return {name: value for name, value in given.items() if value is not None}


def spec() -> dict[str, Any]:
    """Inside: what the process was asked for, a JSON file that its command line names."""
    content: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text("utf-8"))
    return content
