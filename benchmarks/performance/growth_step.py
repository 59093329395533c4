"""One training step of the demo's model in a process of its own: seconds, and the memory that it takes on top.

Run: python -m benchmarks.performance.growth_step '{"prompts": 2, "samples": 4, ...}' REPEATS
"""

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.performance.batches import Shape, made_batch

ROOT = Path(__file__).parents[2]

WARM = Shape(1, 2, 16, 8)
"""Makes what is there once: the adapter's gradients, and the libraries' own caches."""


def step_point(shape: Shape, repeats: int) -> dict[str, float]:
    """Measure a step in a fresh process.

    Args:
        shape: The packed batch.
        repeats: Steps; the fastest counts.

    Returns:
        ``seconds``, ``bytes`` (see `measured`).
    """
    return run_module("benchmarks.performance.growth_step", json.dumps(asdict(shape)), str(repeats), own_pages=True)


def run_module(module: str, *arguments: str, own_pages: bool = False) -> dict[str, float]:
    """Run a module of the benchmark in a fresh process and return the JSON that it prints last.

    Args:
        module: Its name.
        *arguments: Its arguments.
        own_pages: Whether each large tensor gets its own pages and gives them back; glibc's default keeps and splinters
            them.

    Raises:
        RuntimeError: If the process failed, with what it said last.
    """
    environment = {**os.environ, **({"MALLOC_MMAP_THRESHOLD_": "262144"} if own_pages else {})}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), environment.get("PYTHONPATH")]))
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[1:])} failed:\n{done.stderr[-2000:]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def measured(shape: Shape, repeats: int) -> dict[str, float]:
    """Forward and backward pass of `GRPOModule.batch_loss` on one packed batch, in bfloat16.

    Args:
        shape: The batch.
        repeats: Steps.

    Returns:
        ``seconds`` of the fastest, wall clock. ``bytes``: the largest resident memory during the steps, above what was
        resident before the first: weights, gradients and libraries are there by then.
    """
    from grpo_lightning import GRPOModule
    from grpo_lightning.demo import prepare_model

    module: Any = GRPOModule(str(prepare_model()), dtype="bfloat16")
    module.configure_model()

    def step(batch: Any) -> float:
        begin = time.perf_counter()
        loss, _ = module.batch_loss(batch)
        loss.backward()
        seconds = time.perf_counter() - begin
        module.zero_grad(set_to_none=False)
        return seconds

    step(made_batch(WARM))
    batch = made_batch(shape)
    before = restarted_peak()
    seconds = min(step(batch) for _ in range(repeats))
    return {"seconds": seconds, "bytes": status("VmHWM") - before}


def restarted_peak() -> int:
    """Resident bytes; the kernel's record of the peak begins anew from here."""
    Path("/proc/self/clear_refs").write_text("5")
    return status("VmRSS")


def status(name: str) -> int:
    """Bytes of a line of this process's status, such as ``VmRSS``."""
    lines = Path("/proc/self/status").read_text("utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


if __name__ == "__main__":
    print(json.dumps(measured(Shape(**json.loads(sys.argv[1])), int(sys.argv[2]))))
