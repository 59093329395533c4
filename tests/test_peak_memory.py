import subprocess
import sys

import torch

from grpo_lightning import peak_memory
from grpo_lightning.peak_memory import peak_bytes

CPU = torch.device("cpu")
GROWS = """
import torch
from grpo_lightning.peak_memory import peak_bytes

cpu = torch.device("cpu")
before = peak_bytes(cpu)
held = torch.ones(2**26, dtype=torch.uint8)
during = peak_bytes(cpu)
del held
print(before, during, peak_bytes(cpu))
"""


def test_the_peak_stays():
    ballast = torch.ones(2**29, dtype=torch.uint8)  # the parent's peak is none of the child's
    done = subprocess.run([sys.executable, "-c", GROWS], capture_output=True, text=True, check=True)
    before, during, after = map(int, done.stdout.split())
    # The kernel counts in portions.
    assert min(during, after) - before > 0.9 * 2**26
    assert before < peak_bytes(CPU) - len(ballast) // 2


def test_without_proc_it_is_about_the_same(monkeypatch, tmp_path):
    known = peak_bytes(CPU)
    monkeypatch.setattr(peak_memory, "_STATUS", tmp_path / "none")
    assert peak_bytes(CPU) >= 0.95 * known
    monkeypatch.setitem(sys.modules, "resource", None)
    assert peak_bytes(CPU) == 0


def test_on_cuda_it_is_the_allocators(monkeypatch):
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 7 if device.index == 1 else 0)
    assert peak_bytes(torch.device("cuda:1")) == 7
