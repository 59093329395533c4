"""How much memory this process has used at most."""

import sys
from pathlib import Path

import torch

PEAK = "memory/trainer_peak_gib"
"""Name of the logged number."""

_STATUS = Path("/proc/self/status")


def peak_bytes(device: torch.device) -> int:
    """Most bytes that this process has held at once since it began.

    Args:
        device: On CUDA, what PyTorch's allocator held there; otherwise the resident memory of the whole process.

    Returns:
        The bytes; 0 where the system does not tell.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if _STATUS.exists():
        # getrusage would also tell of the process that this one was forked from.
        lines = dict(line.split(":", 1) for line in _STATUS.read_text(encoding="utf-8").splitlines())
        if "VmHWM" in lines:
            return int(lines["VmHWM"].split()[0]) * 1024
    try:
        import resource
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
