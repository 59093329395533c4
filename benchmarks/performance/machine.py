"""The machine that numbers belong to, without its name."""

import os
import platform
import statistics
import time
from pathlib import Path
from typing import Any

from grpo_lightning.versions import package_versions

_SHAPES = ((1024, 576, 1536), (2048, 2048, 2048))
"""Rows, inner size and columns of the products that are timed: a projection of the demo's model, and a large one."""

_REPEATS = 15


def machine() -> dict[str, Any]:
    """Cores, memory, versions, and how fast it multiplies."""
    return {
        "cores": len(os.sched_getaffinity(0)),
        "processor": _field(Path("/proc/cpuinfo"), "model name") or platform.machine(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "python": platform.python_version(),
        "system": platform.system(),
        "versions": package_versions(),
        "matmul_tflops": matmul_rates(),
        "tmpfs": Path("/dev/shm").is_dir(),
    }


def matmul_rates(repeats: int = _REPEATS) -> dict[str, float]:
    """Median rate of matrix products, in 1e12 floating-point operations a second, with this process's threads.

    Args:
        repeats: Products of each shape and dtype.
    """
    import torch

    rates = {"threads": float(torch.get_num_threads())}
    for rows, inner, columns in _SHAPES:
        for dtype in (torch.bfloat16, torch.float32):
            a, b = torch.randn(rows, inner).to(dtype), torch.randn(inner, columns).to(dtype)
            seconds = []
            # The first ones choose a kernel and wake the threads.
            for number in range(-2, repeats):
                begin = time.perf_counter()
                a @ b
                if number >= 0:
                    seconds.append(time.perf_counter() - begin)
            name = f"{str(dtype).removeprefix('torch.')} [{rows},{inner}]x[{inner},{columns}]"
            rates[name] = round(2 * rows * inner * columns / statistics.median(seconds) / 1e12, 4)
    return rates


def _field(path: Path, name: str) -> str:
    """The first value of a name in a file of ``name : value`` lines."""
    if not path.is_file():
        return ""
    lines = path.read_text("utf-8").splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.split(":")[0].strip() == name), "")
