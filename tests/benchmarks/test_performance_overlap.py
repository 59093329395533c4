"""The section's arithmetic; what it measures needs a quiet machine."""

import os
import subprocess
import sys
import time

import pytest

from benchmarks.performance import overlap


def epoch(seconds, rollout=10.0, train=6.0, rescore=2.0):
    phases = {"waited": 1.0, "sync": 0.1, "doctor": 0.2}
    return {"epoch": seconds, "rollout": rollout, "train": train, "rescore": rescore, **phases}


RESULT = {
    "shape": overlap.SIZES["full"],
    "pairs": [
        {"0": [epoch(18.0), epoch(20.0)], "1": [epoch(11.0), epoch(12.0)]},
        {"0": [epoch(18.0)], "1": [epoch(12.0, rollout=12.0, train=3.0)]},
        {"0": [epoch(22.0, train=9.0)], "1": [epoch(15.0, train=13.0)]},
    ],
}


def test_headline():
    assert overlap.headline(RESULT) == {
        "overlap_ratio": pytest.approx(1.0),
        # 11.5 / 10, 12 / 10, 15 / 11
        "overlap_ratio_alone": pytest.approx(1.2),
        # 19 / 10, 18 / 10, 22 / 11
        "overlap_ratio_without": pytest.approx(1.9),
        # 19 / 11.5, 18 / 12, 22 / 15
        "overlap_speedup": pytest.approx(1.5),
    }


def test_table():
    text = overlap.table(RESULT)
    assert "| 1 | 12.00 (11.00 to 15.00) | 10.00 (10.00 to 12.00) |" in text
    assert "| overlapped epoch / longer of its rollout and training | 1.00 (1.00 to 1.15) |" in text
    assert all(line.count("|") == text.splitlines()[0].count("|") for line in text.splitlines()[:4])


def test_descendants_and_their_cores():
    own = sorted(os.sched_getaffinity(0))
    code = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'input()'])"
    child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE)
    try:
        while not (found := overlap.descendants(child.pid)):
            time.sleep(0.05)
        # Other tests of this process may have left some of their own.
        assert {child.pid, *found} <= set(overlap.descendants(os.getpid()))
        found = [child.pid, *found]
        overlap.pin(found, own[-1])
        assert all(os.sched_getaffinity(pid) == {own[-1]} for pid in found)
        assert os.sched_getaffinity(0) == set(own)
    finally:
        child.stdin.close()
        child.wait()
