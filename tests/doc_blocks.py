"""The fenced blocks of a page: files to write, commands to run with what they print, and Python."""

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent.parent / "docs"

_FENCE = re.compile(r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```$', re.MULTILINE | re.DOTALL)
_NUMBER = re.compile(r"[-+]?\d+(?:[.,:]\d+)*(?:e[-+]?\d+)?")


@dataclass(frozen=True)
class Block:
    """One fenced block."""

    language: str
    title: str | None
    text: str


def blocks(page: str) -> list[Block]:
    """The blocks of a page in ``docs/``, in order."""
    found = _FENCE.findall((DOCS / page).read_text(encoding="utf-8"))
    return [Block(language, title or None, text) for language, title, text in found]


def run_page(page: str, folder: Path) -> None:
    """Do what a reader does: save the titled blocks, type the commands, run the rest of the Python, in order.

    Lines below a command are part of what it prints, whatever the numbers; ``...`` stands for any other lines.
    """
    names: dict[str, Any] = {"__name__": "page"}
    for block in blocks(page):
        if block.title:
            (folder / block.title).write_text(block.text, encoding="utf-8")
        elif block.language == "python":
            exec(compile(block.text, page, "exec"), names)
        elif block.language == "console":
            for command, shown in _commands(block.text):
                printed = _typed(command, folder)
                lines = {_shape(line) for line in printed.splitlines()}
                for line in shown:
                    assert _shape(line) in lines, f"{command} did not print {line!r}, but\n{printed}"


def _commands(text: str) -> list[tuple[str, list[str]]]:
    commands: list[tuple[str, list[str]]] = []
    for line in text.replace("\\\n", "").splitlines():
        if line.startswith("$ "):
            commands.append((line[2:], []))
        elif line.strip() != "...":
            commands[-1][1].append(line)
    return commands


def _typed(command: str, folder: Path) -> str:
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-c", command], cwd=folder, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    return done.stdout


def _shape(line: str) -> str:
    return " ".join(_NUMBER.sub("#", line).split())
