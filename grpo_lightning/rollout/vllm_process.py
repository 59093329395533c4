"""The processes of a vLLM engine: how they are started and ended, what they inherit, what they last said."""

import asyncio
import contextlib
import math
import multiprocessing
import multiprocessing.spawn
import os
import re
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from grpo_lightning.rollout import vllm_child
from grpo_lightning.rollout.vllm_plugin import ENABLE_ENV

_LAST_LINES = 20
_END_SECONDS = 2.0
"""How long to wait for a start-up to notice its end."""

_PREFIX = re.compile(r"^(\(\S+ pid=\d+\) )?([A-Z]+ \d\d-\d\d \d\d:\d\d:\d\d \[[^]]*\] ?)?")
"""What vLLM puts before each line of its log."""

_SAYS_NOTHING = re.compile(r"$|\s|Traceback|[IW]\d{4} ")
"""Empty lines, frames of a traceback, and torch's own information and warnings."""

_WRITTEN_BY_VLLM = (
    "LD_PRELOAD",
    "LOCAL_WORLD_SIZE",
    "NUMEXPR_MAX_THREADS",
    "OMP_NUM_THREADS",
    "TORCHINDUCTOR_COMPILE_THREADS",
    "TORCHINDUCTOR_CPP_DYNAMIC_THREADS",
)
"""Environment variables that vLLM sets while it starts, beside those that begin with ``VLLM_``."""

# The environment and the way to spawn belong to the whole process.
_one_start_at_a_time = threading.Lock()


class EngineProcesses:
    """The processes that one start of an engine makes, and the file that takes what they print."""

    def __init__(self) -> None:
        descriptor, name = tempfile.mkstemp(prefix="grpo-lightning-vllm-", suffix=".log")
        os.close(descriptor)
        self._log = Path(name)
        self._told = False
        self._ended = threading.Event()
        self._earlier = set(multiprocessing.active_children())
        self._names: set[str] = set()

    @contextlib.contextmanager
    def starting(self, environment: Callable[[], Mapping[str, str]]) -> Iterator[None]:
        """While vLLM starts: processes that this thread spawns get the environment and write to the log.

        Args:
            environment: Variables to set. It is called when no other start has the environment changed.
        """
        with _one_start_at_a_time, changed_environment({**environment(), vllm_child.LOG_ENV: str(self._log)}):
            original = multiprocessing.spawn.get_preparation_data
            this_thread = threading.get_ident()

            def get_preparation_data(name: str) -> dict[str, Any]:
                data: dict[str, Any] = original(name)
                if threading.get_ident() == this_thread:
                    if self._ended.is_set():
                        raise asyncio.CancelledError
                    self._names.add(name)
                    data.pop("init_main_from_path", None)
                    data["init_main_from_name"] = vllm_child.__name__
                return data

            multiprocessing.spawn.get_preparation_data = get_preparation_data
            try:
                yield
            finally:
                multiprocessing.spawn.get_preparation_data = original

    def end(self, start: Future[Any]) -> None:
        """End a start that is under way, without waiting for it to succeed.

        Args:
            start: The start. If it has no process yet it may go on for a while, but will get none.
        """
        self._ended.set()
        deadline = time.monotonic() + _END_SECONDS
        while not start.done() and time.monotonic() < deadline:
            for process in multiprocessing.active_children():
                if process.name in self._names and process not in self._earlier:
                    process.kill()
            with contextlib.suppress(Exception):
                start.result(timeout=0.1)

    def last_words(self) -> str:
        """The end of the log for an error message, which then names the log; it is kept."""
        lines = meaningful_lines(self._log.read_text(errors="replace"))
        if not lines:
            return "It logged nothing."
        self._told = True
        return "\n  ".join(["Its log ends with:", *lines]) + f"\nThe whole log: {self._log}"

    def discard_log(self) -> None:
        """Remove the log, unless an error message has named it."""
        if not self._told:
            self._log.unlink(missing_ok=True)


def meaningful_lines(log: str) -> list[str]:
    """The last lines of a log that say something, each once."""
    plain = (_PREFIX.sub("", line, count=1).rstrip() for line in log.splitlines())
    return list(dict.fromkeys(line for line in plain if not _SAYS_NOTHING.match(line)))[-_LAST_LINES:]


def engine_environment(
    on_gpu: bool, cpu_cache_gib: int | None, cpu_threads: int | None, timeout: float
) -> dict[str, str]:
    """What the engine's processes need in their environment.

    Args:
        on_gpu: Whether the engine runs on GPUs.
        cpu_cache_gib: As given to the engine; None leaves it to the user's environment, and else takes 2.
        cpu_threads: As given to the engine; None leaves it to the user's environment, and else takes all cores.
        timeout: Seconds that the engine may take to start.
    """
    defaults = {
        "VLLM_LOGGING_LEVEL": "ERROR",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
        # The tracker counts what a killed process left; it removes that too.
        "PYTHONWARNINGS": "ignore::FutureWarning,ignore:resource_tracker:UserWarning",
    }
    fixed = {
        ENABLE_ENV: str(os.getpid()),
        # A fork of the trainer, which has threads, could lock up.
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
        "VLLM_ENGINE_READY_TIMEOUT_S": str(math.ceil(timeout)),
    }
    if not on_gpu:
        # vLLM's CPU worker runs on one thread unless told otherwise.
        defaults |= {"OMP_NUM_THREADS": str(_cores()), "VLLM_CPU_KVCACHE_SPACE": "2"}
        given = {"OMP_NUM_THREADS": cpu_threads, "VLLM_CPU_KVCACHE_SPACE": cpu_cache_gib}
        fixed |= {name: str(value) for name, value in given.items() if value is not None}
        preload = [*filter(None, (_find_tcmalloc(), _find_iomp(), os.environ.get("LD_PRELOAD")))]
        fixed["LD_PRELOAD"] = ":".join(map(str, preload))
    return {**{name: os.environ.get(name, value) for name, value in defaults.items()}, **fixed}


@contextlib.contextmanager
def changed_environment(values: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables, and take back afterwards what this and vLLM changed.

    Variables are told apart by name: this may run beside other threads, whose own changes must stay.
    """

    def ours() -> dict[str, str]:
        return {
            name: value
            for name, value in os.environ.items()
            if name in values or name in _WRITTEN_BY_VLLM or name.startswith("VLLM_")
        }

    before = ours()
    os.environ.update(values)
    try:
        yield
    finally:
        for name in ours().keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)


def _cores() -> int:
    """Cores that this process may use; all of the machine's where the system knows no such restriction."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity is not None else os.cpu_count() or 1


def _find_iomp() -> Path | None:
    path = Path(sys.prefix) / "lib" / "libiomp5.so"
    return path if path.exists() else None


def _find_tcmalloc() -> Path | None:
    return next(iter(sorted(Path("/usr/lib").glob("*/libtcmalloc_minimal.so.4"))), None)
