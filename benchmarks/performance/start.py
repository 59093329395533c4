"""Section ``start``: how long a user waits for the first sampled token, for ``--help``, for the import."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.performance.engines import engine_kind
from benchmarks.performance.paired import alternate, ratio, shown, spread
from benchmarks.performance.stored import ROOT
from benchmarks.performance.turns import environment
from grpo_lightning.rollout.vllm_plugin import ENABLE_ENV
from grpo_lightning.rollout.vllm_process import engine_environment

_PAIRS = 5
_QUICK = 7
_PATIENCE = 600.0
"""Seconds that a process may take to say what it should."""

QUICK = {
    "import": ["-c", "import grpo_lightning"],
    "help": ["-m", "grpo_lightning", "--help"],
    "python": ["-c", "pass"],
}
"""What a user waits for without a model; the interpreter alone is in all of them."""


def wait_for(command: Sequence[str], names: Sequence[str], folder: Path) -> dict[str, float]:
    """Start a process, and end it as soon as it has said when all of some things happened.

    Args:
        command: Its command line. It prints a JSON line ``{name: time.monotonic()}`` for each.
        names: What is waited for.
        folder: Its working folder; what it says otherwise goes to a file there.

    Returns:
        Seconds from the start of the process.

    Raises:
        RuntimeError: If it ends without a word, or takes too long.
    """
    log = folder / "stderr.log"
    begin = time.monotonic()
    with log.open("w", encoding="utf-8") as stderr:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=environment(ROOT),
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            start_new_session=True,
        )
    assert process.stdout is not None
    timer = threading.Timer(_PATIENCE, process.kill)
    timer.start()
    found: dict[str, float] = {}
    try:
        for line in process.stdout:
            with contextlib.suppress(ValueError):
                said = json.loads(line)
                if isinstance(said, dict):
                    found |= {name: moment - begin for name, moment in said.items() if name in names}
            if len(found) == len(names):
                return found
    finally:
        timer.cancel()
        _end(process)
    last = "\n  ".join(log.read_text("utf-8", errors="replace").splitlines()[-20:])
    raise RuntimeError(f"expected {', '.join(names)} of {' '.join(command)}, but got {found}; it said\n  {last}")


def _end(process: "subprocess.Popen[str]") -> None:
    """Interrupt it as ctrl-C would, so that it ends its engine and removes its files; then make sure."""
    for number, patience in ((signal.SIGINT, 60), (signal.SIGTERM, 20), (signal.SIGKILL, 20)):
        if process.poll() is not None:
            break
        with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
            process.send_signal(number)
            # It may have more to say than a pipe holds.
            process.communicate(timeout=patience)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def fit(model: str) -> dict[str, float]:
    """``grpo-lightning fit`` with the demo's configuration, up to the first token that answers a task.

    Args:
        model: Folder of the model.
    """
    engine = {"vllm": "FirstTokenVLLM", "transformers": "FirstTokenTransformers"}[engine_kind()]
    with tempfile.TemporaryDirectory() as folder:
        return wait_for(
            [
                *(sys.executable, "-m", "benchmarks.performance.first_token", "fit"),
                *("-c", str(ROOT / "configs" / "demo_cpu.yaml"), "--model.model", model),
                *("--data.engine", f"benchmarks.performance.first_token.{engine}"),
                "--data.engine.dtype=float32",
            ],
            ["any", "task"],
            Path(folder),
        )


def bare_engine(model: str) -> float:
    """Seconds until a fresh process has started the same engine; transformers' is its model.

    Args:
        model: Folder of the model.
    """
    if engine_kind() == "transformers":
        return bare_model(model)
    given = engine_environment(False, None, None, _PATIENCE)
    given.pop(ENABLE_ENV)
    return _ready(["-m", "benchmarks.performance.bare_engine", model, json.dumps(given)])


def bare_model(model: str) -> float:
    """Seconds until a fresh process has loaded the trainer's model.

    Args:
        model: Folder of the model.
    """
    return _ready(["-m", "benchmarks.performance.bare_model", model])


def _ready(command: Sequence[str]) -> float:
    with tempfile.TemporaryDirectory() as folder:
        return wait_for([sys.executable, *command], ["ready"], Path(folder))["ready"]


def quick(command: Sequence[str]) -> float:
    """Seconds of a Python process.

    Args:
        command: What Python is given.
    """
    begin = time.monotonic()
    subprocess.run([sys.executable, *command], cwd=ROOT, env=environment(ROOT), check=True, stdout=subprocess.DEVNULL)
    return time.monotonic() - begin


def measure(size: str) -> dict[str, Any]:
    """Quick commands, then starts in turns.

    Args:
        size: ``"full"`` or ``"smoke"``.
    """
    from grpo_lightning.demo import prepare_model

    model = str(prepare_model())
    pairs, repeats = (_PAIRS, _QUICK) if size == "full" else (1, 2)
    # The first of each writes and reads compiled files.
    commands = alternate({name: partial(quick, command) for name, command in QUICK.items()}, repeats, warmups=1)
    sides: dict[str, Callable[[], Any]] = {
        "fit": partial(fit, model),
        "bare engine": partial(bare_engine, model),
        "bare model": partial(bare_model, model),
    }
    starts: dict[str, list[Any]] = alternate(sides, pairs, warmups=1 if size == "full" else 0, tell=_tell)
    both = [engine + loaded for engine, loaded in zip(starts["bare engine"], starts["bare model"], strict=True)]
    seconds = {
        "fit to a task's first token": [one["task"] for one in starts["fit"]],
        "fit to any first token": [one["any"] for one in starts["fit"]],
        **{name: starts[name] for name in ("bare engine", "bare model")},
    }
    return {
        "engine": engine_kind(),
        "seconds": {name: [round(value, 2) for value in values] for name, values in seconds.items()},
        "ratio": ratio(seconds["fit to a task's first token"], both),
        "ratio_any": ratio(seconds["fit to any first token"], both),
        "commands": {name: [round(value, 3) for value in values] for name, values in commands.items()},
    }


def _tell(name: str, number: int, found: Any) -> None:
    print(f"{name} {number}: {found}", flush=True)


def headline(result: Mapping[str, Any]) -> dict[str, float]:
    """Ratios and seconds, medians."""
    return {
        "start_ratio": result["ratio"]["median"],
        "start_ratio_any": result["ratio_any"]["median"],
        "import_seconds": median(result["commands"]["import"]),
        "help_seconds": median(result["commands"]["help"]),
    }


def table(result: Mapping[str, Any]) -> str:
    """Markdown: starts, ratio, quick commands."""
    lines = ["| From the start of a fresh process | Seconds |", "|---|---|"]
    lines += [f"| {name} | {shown(spread(values), '.1f')} |" for name, values in result["seconds"].items()]
    lines += [f"| {name} | {shown(spread(values))} |" for name, values in _commands(result).items()]
    lines += [
        "",
        f"`fit` to the first token of a task's answer over bare engine and bare model one after the other: "
        f"{shown(result['ratio'])}; to the first token that the engine samples for anything, which is the doctor's: "
        f"{shown(result['ratio_any'])}. Medians, least and largest in brackets.",
    ]
    return "\n".join(lines)


def _commands(result: Mapping[str, Any]) -> dict[str, list[float]]:
    names = {
        "import": "`import grpo_lightning`",
        "help": "`python -m grpo_lightning --help`",
        "python": "Python alone",
    }
    return {label: result["commands"][name] for name, label in names.items()}
