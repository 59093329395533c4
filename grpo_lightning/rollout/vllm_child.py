"""What an engine process runs first, before it imports vLLM: its parent names this as its main module.

Standing in for the main module also keeps the process from importing the user's script, which without the
``if __name__ == "__main__"`` guard would start a second training.
"""

import ctypes
import os
import signal
import sys

LOG_ENV = "GRPO_LIGHTNING_ENGINE_LOG"
"""File that takes everything the engine's processes print."""

_PR_SET_PDEATHSIG = 1


def _write_to_log() -> None:
    # The descriptors, not sys.stdout: native code writes to them too, and so do the processes that this one starts.
    descriptor = os.open(os.environ[LOG_ENV], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)


def _die_with_parent() -> None:
    """Ask Linux to kill this process when its parent dies, so that no engine outlives its trainer."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


# The name that multiprocessing gives to the main module of a process that it spawned.
if __name__ == "__mp_main__":
    _die_with_parent()
    _write_to_log()
